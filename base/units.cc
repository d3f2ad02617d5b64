#include "base/units.h"

#include <fmt/format.h>

#include <charconv>
#include <limits>

namespace varve {

Result<uint64_t> ParseSize(std::string_view text) {
    const Error wrong = MakeError(
        ErrorKind::kInvalid,
        fmt::format("'{}' is not a size; write bytes or a binary unit, as in 4096, 512M, 10G, 2T",
                    text));
    uint64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end == text.data()) return wrong;
    const std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
    if (unit.empty()) return number;
    static constexpr std::string_view kUnits = "KMGTP";
    const size_t power = kUnits.find(static_cast<char>(unit[0] & ~0x20));
    if (unit.size() != 1 || power == std::string_view::npos) return wrong;
    const unsigned shift = 10 * (static_cast<unsigned>(power) + 1);
    if (number > (static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) >> shift)) {
        return wrong;
    }
    return number << shift;
}

std::string FormatSize(uint64_t bytes) {
    static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double amount = static_cast<double>(bytes);
    size_t unit = 0;
    while (amount >= 1024 && unit < 6) amount /= 1024, ++unit;
    return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", amount, kUnits[unit]);
}

std::string FormatCount(uint64_t count, std::string_view thing) {
    return fmt::format("{} {}{}", count, thing, count == 1 ? "" : "s");
}

}  // namespace varve
