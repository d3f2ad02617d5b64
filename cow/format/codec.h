// Bytes in and out of stored values: varints, strings, and a decoder that survives any input.
// Not the layout of any record: that is format.h and runs.h.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace varve::cow {

inline constexpr size_t kVarintBytesMax = 10;

/// Writes `v` in groups of seven bits, low group first, high bit set on all but the last. Returns
/// the end. REQUIRES: room for kVarintBytesMax.
inline char* PutVarint(char* out, uint64_t v) {
    for (; v >= 0x80; v >>= 7) *out++ = static_cast<char>(v | 0x80);
    *out++ = static_cast<char>(v);
    return out;
}

inline void AppendVarint(std::string& out, uint64_t v) {
    char bytes[kVarintBytesMax];
    out.append(bytes, PutVarint(bytes, v));
}

inline void AppendString(std::string& out, std::string_view text) {
    AppendVarint(out, text.size());
    out.append(text);
}

/// Reads what the functions above wrote. After any error all reads give zero and ok() is false.
class Decoder {
  public:
    explicit Decoder(std::string_view in) : in_(in) {}

    uint8_t Byte() {
        if (in_.empty()) return Fail();
        const uint8_t byte = static_cast<uint8_t>(in_.front());
        in_.remove_prefix(1);
        return byte;
    }

    uint64_t Varint() {
        uint64_t value = 0;
        for (unsigned shift = 0; shift < 64; shift += 7) {
            const uint8_t byte = Byte();
            if (shift == 63 && byte > 1) return Fail();
            value |= static_cast<uint64_t>(byte & 0x7f) << shift;
            if (!(byte & 0x80)) return value;
        }
        return Fail();
    }

    /// The next `size` bytes; they are the input's.
    std::string_view Take(uint64_t size) {
        if (size > in_.size()) {
            Fail();
            return {};
        }
        const std::string_view bytes = in_.substr(0, size);
        in_.remove_prefix(size);
        return bytes;
    }

    std::string String() { return std::string(Take(Varint())); }

    std::string_view rest() const { return in_; }
    bool ok() const { return ok_; }
    /// Everything was read, without error.
    bool Finished() const { return ok_ && in_.empty(); }

  private:
    uint8_t Fail() {
        ok_ = false;
        in_ = {};
        return 0;
    }

    std::string_view in_;
    bool ok_ = true;
};

}  // namespace varve::cow
