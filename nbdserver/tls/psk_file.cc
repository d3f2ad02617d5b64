#include "nbdserver/tls/psk_file.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

namespace varve::nbdserver::tls {
namespace {

constexpr size_t kUserBytesMax = 128;
constexpr size_t kKeyBytesMin = 16, kKeyBytesMax = 64;

int Nibble(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

std::optional<Secret> ParseKey(std::string_view hex) {
    if (hex.size() % 2 != 0 || hex.size() < 2 * kKeyBytesMin || hex.size() > 2 * kKeyBytesMax) {
        return std::nullopt;
    }
    std::string key;
    for (size_t i = 0; i < hex.size(); i += 2) {
        const int high = Nibble(hex[i]), low = Nibble(hex[i + 1]);
        if (high < 0 || low < 0) return std::nullopt;
        key += static_cast<char>(high << 4 | low);
    }
    return Secret(std::move(key));
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
