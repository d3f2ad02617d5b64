// Big-endian loads and stores at any alignment, for keys and for the wire.
// Not a serialiser: the formats live with their owners.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>

namespace varve {

static_assert(std::endian::native == std::endian::little, "byte swaps below assume it");

constexpr uint16_t Swap(uint16_t v) {
    return __builtin_bswap16(v);
}
constexpr uint32_t Swap(uint32_t v) {
    return __builtin_bswap32(v);
}
constexpr uint64_t Swap(uint64_t v) {
    return __builtin_bswap64(v);
}

/// Reads a big-endian T at `from`; any alignment.
template <typename T>
T LoadBig(const void* from) {
    T v;
    std::memcpy(&v, from, sizeof v);
    return Swap(v);
}

/// Writes `v` big-endian at `to`; any alignment.
template <typename T>
void StoreBig(void* to, T v) {
    v = Swap(v);
    std::memcpy(to, &v, sizeof v);
}

/// Appends `v` big-endian to `out`.
template <typename T>
void AppendBig(std::string& out, T v) {
    v = Swap(v);
    out.append(reinterpret_cast<const char*>(&v), sizeof v);
}

}  // namespace varve
