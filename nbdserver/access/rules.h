// Rules: who may open which exports, and whether to write; read from a file.
// Not who somebody is (tls/handshake.h, sockets), and not what becomes of clients when rules change
// (daemon/clients.h).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "nbdserver/access/address.h"
#include "nbdserver/tls/handshake.h"

namespace varve::nbdserver::access {

inline constexpr size_t kFileBytesMax = 1 << 20;
inline constexpr size_t kPatternsMax = 10'000;  // in all rules together

/// In their order: each holds what the one before it does.
enum class Right { kNone, kRead, kWrite };

/// What is known of a client.
struct Subject {
    std::optional<Address> address;  // of the network
    std::optional<uint32_t> uid;     // of a unix socket
    tls::Identity identity;
};

/// All that are given must hold; none: everybody.
struct Who {
    std::optional<AddressRange> range;
    std::optional<uint32_t> uid;
    std::optional<std::string> certificate;  // one of its names; "*": any
    std::optional<std::string> psk;          // a user; "*": any

    bool Is(const Subject& subject) const;
};

struct Rule {
    Who who;
    std::vector<std::string> exports;  // names, or patterns as of Matches()
    Right right = Right::kNone;
};

/// Whether `pattern` stands for the name: `*` for any characters, `?` for one, neither for the @
/// between a disk and its snapshot.
bool Matches(std::string_view pattern, std::string_view name);

class Grants;

/// Fixed once made; any thread.
class Rules {
  public:
    /// The text of a file. kInvalid, with the number of the line.
    static Result<std::shared_ptr<const Rules>> Parse(std::string_view text);
    /// Reads a file; blocks. kInvalid, in one line that names the file.
    static Result<std::shared_ptr<const Rules>> Load(const std::string& path);

    const std::vector<Rule>& rules() const { return rules_; }

  private:
    std::vector<Rule> rules_;
};

/// What somebody may: what the rules give together that are for him.
class Grants {
  public:
    /// Everything: when there are no rules.
    Grants() = default;
    /// `rules` may be null.
    Grants(std::shared_ptr<const Rules> rules, const Subject& subject);

    /// Of an export by its own name: "disk0", "disk0@monday", or the diff "disk0@tuesday~monday",
    /// which shows something of both snapshots: of that the right to read, for who may open both.
    Right Of(std::string_view name) const;
    /// What Of() costs: comparisons, at most.
    size_t patterns() const { return patterns_; }
    /// Whether both give the same, because they come from the same rules.
    bool operator==(const Grants&) const = default;

  private:
    Right OfOne(std::string_view name) const;

    std::shared_ptr<const Rules> rules_;
    std::vector<uint32_t> fitting_;  // of them
    size_t patterns_ = 0;
};

}  // namespace varve::nbdserver::access
