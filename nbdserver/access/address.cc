#include "nbdserver/access/address.h"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <netinet/in.h>

#include <algorithm>
#include <charconv>
#include <cstring>

namespace varve::nbdserver::access {
namespace {

constexpr std::array<uint8_t, 12> kMapped = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff};
constexpr unsigned kMappedBits = 96;

Address Mapped(const in_addr& v4) {
    Address address;
    std::copy(kMapped.begin(), kMapped.end(), address.bytes.begin());
    std::memcpy(address.bytes.data() + kMapped.size(), &v4, sizeof v4);
    return address;
}

Address Plain(const in6_addr& v6) {
    Address address;
    std::memcpy(address.bytes.data(), &v6, sizeof v6);
    return address;
}

/// With the bits behind the first `bits` cleared.
Address Masked(Address address, unsigned bits) {
    for (unsigned i = 0; i < address.bytes.size(); ++i) {
        const unsigned kept = std::clamp<unsigned>(bits, i * 8, i * 8 + 8) - i * 8;
        address.bytes[i] &= static_cast<uint8_t>(0xff00 >> kept);
    }
    return address;
}

/// A decimal number as it is written without need of thought: no sign, no zeros in front.
std::optional<unsigned> ParsePrefix(std::string_view text, unsigned most) {
    unsigned number = 0;
    const char* const last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, number);
    const bool plain = text.size() == 1 || !text.starts_with('0');
    if (error != std::errc() || end != last || !plain || number > most) return std::nullopt;
    return number;
}

Error NoRange(std::string message) {
    return MakeError(ErrorKind::kInvalid, std::move(message));
}

}  // namespace

bool Address::is_v4() const {
    return std::equal(kMapped.begin(), kMapped.end(), bytes.begin());
}

std::optional<Address> AddressOf(const sockaddr& address) {
    if (address.sa_family == AF_INET) {
        return Mapped(reinterpret_cast<const sockaddr_in&>(address).sin_addr);
    }
    if (address.sa_family == AF_INET6) {
        return Plain(reinterpret_cast<const sockaddr_in6&>(address).sin6_addr);
    }
    return std::nullopt;
}

std::optional<Address> ParseAddress(std::string_view text) {
    if (text.find('\0') != std::string_view::npos) return std::nullopt;
    const std::string terminated(text);
    in_addr v4{};
    if (::inet_pton(AF_INET, terminated.c_str(), &v4) == 1) return Mapped(v4);
    in6_addr v6{};
    if (::inet_pton(AF_INET6, terminated.c_str(), &v6) == 1) return Plain(v6);
    return std::nullopt;
}

std::string Format(const Address& address) {
    char text[INET6_ADDRSTRLEN] = "";
    if (address.is_v4()) {
        ::inet_ntop(AF_INET, address.bytes.data() + kMapped.size(), text, sizeof text);
    } else {
        ::inet_ntop(AF_INET6, address.bytes.data(), text, sizeof text);
    }
    return text;
}

bool AddressRange::Contains(const Address& address) const {
    if (first.is_v4() != address.is_v4()) return false;
    return Masked(address, bits) == first;
}

Result<AddressRange> ParseAddressRange(std::string_view text) {
    const size_t slash = text.find('/');
    const std::string_view written = text.substr(0, slash);
    const std::optional<Address> address = ParseAddress(written);
    if (!address) {
        return NoRange(fmt::format(
            "'{}' is not an address or a range; write 192.0.2.7, 10.0.0.0/8 or fd00::/8", text));
    }
    AddressRange range{*address, 128};
    if (slash == std::string_view::npos) return range;
    const bool dotted = written.find(':') == std::string_view::npos;
    const unsigned most = dotted ? 32 : 128;
    const std::optional<unsigned> prefix = ParsePrefix(text.substr(slash + 1), most);
    if (!prefix) return NoRange(fmt::format("'{}': a prefix is a number from 0 to {}", text, most));
    range.bits = dotted ? kMappedBits + *prefix : *prefix;
    range.first = Masked(*address, range.bits);
    if (range.first == *address) return range;
    // Of an IPv4-mapped address cut before its last 32 bits nothing useful is left to propose.
    const std::string_view slashed = text.substr(slash);
    const bool same_kind = range.first.is_v4() == address->is_v4();
    return NoRange(same_kind && (dotted || !address->is_v4())
                       ? fmt::format("'{}' has bits behind its prefix; write {}{}, or {} alone",
                                     text, Format(range.first), slashed, written)
                       : fmt::format("'{}' has bits behind its prefix; write {} alone, or a range "
                                     "that begins with its first address",
                                     text, written));
}

}  // namespace varve::nbdserver::access
