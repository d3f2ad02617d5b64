#include "nbdserver/tls/psk_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

namespace varve::nbdserver::tls {
namespace {

constexpr size_t kUserBytesMax = 128;
constexpr size_t kKeyBytesMin = 16, kKeyBytesMax = 64;

std::optional<Secret> ParseKey(std::string_view hex) {
    if (hex.size() < 2 * kKeyBytesMin || hex.size() > 2 * kKeyBytesMax) return std::nullopt;
    return FromHex(hex);
}

Error Wrong(unsigned line, std::string_view what) {
    return MakeError(ErrorKind::kInvalid, fmt::format("line {}: {}", line, what));
}

}  // namespace

Result<PskTable> ParsePskFile(std::string_view text) {
    PskTable table;
    for (unsigned number = 1; !text.empty(); ++number) {
        std::string_view line = text.substr(0, text.find('\n'));
        text.remove_prefix(std::min(text.size(), line.size() + 1));
        if (line.ends_with('\r')) line.remove_suffix(1);
        if (line.empty() || line.front() == '#') continue;
        const size_t colon = line.rfind(':');
        const std::string_view user = line.substr(0, std::min(colon, line.size()));
        if (colon == std::string_view::npos || user.empty() || user.size() > kUserBytesMax ||
            user.find('\0') != std::string_view::npos) {
            return Wrong(number, "this is not of the form USER:HEXKEY");
        }
        std::optional<Secret> key = ParseKey(line.substr(colon + 1));
        if (!key) return Wrong(number, "a key has 32 to 128 hexadecimal digits");
        if (!table.emplace(user, std::move(*key)).second) {
            return Wrong(number, "this user has a key already");
        }
    }
    if (table.empty()) return Wrong(1, "there is no user in it; psktool -u USER -p FILE adds one");
    return table;
}

}  // namespace varve::nbdserver::tls
