// Addresses of IP and ranges of them, by arithmetic on 128 bits.
// Not names of hosts, and not ports.
#pragma once

#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"

namespace varve::nbdserver::access {

/// IPv6, or IPv4 in its IPv4-mapped form (::ffff:a.b.c.d): there is one form of each address.
struct Address {
    std::array<uint8_t, 16> bytes{};

    bool is_v4() const;
    bool operator==(const Address&) const = default;
};

/// Of a socket's end; none for other families. An IPv6 zone does not count.
std::optional<Address> AddressOf(const sockaddr& address);
/// Without brackets, zone, port or blanks. None if it is no address.
std::optional<Address> ParseAddress(std::string_view text);
/// "10.0.0.1", "::1".
std::string Format(const Address& address);

/// The addresses that have the first `bits` bits in common.
struct AddressRange {
    Address first;
    unsigned bits = 128;  // of IPv4: 96 and more

    /// A range of IPv6 holds no address of IPv4.
    bool Contains(const Address& address) const;
};

/// ADDRESS or ADDRESS/PREFIX. kInvalid, with what would be right if bits behind the prefix are set.
Result<AddressRange> ParseAddressRange(std::string_view text);

}  // namespace varve::nbdserver::access
