// Remote: an NBD export as the kernel's driver needs it - a socket after negotiation, and what was
// agreed on. By libnbd, which knows the URIs.
// Not the driver (netlink.h).
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"

namespace varve::attach {

/// A descriptor that is closed with its owner.
class Socket {
  public:
    explicit Socket(int fd = -1) : fd_(fd) {}
    Socket(Socket&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
    Socket& operator=(Socket&& other) noexcept;
    ~Socket();
    int fd() const { return fd_; }

  private:
    int fd_;
};

struct Remote {
    Socket socket;       // blocking, in transmission with simple replies; its peer's death is seen
    uint64_t size = 0;   // bytes
    uint16_t flags = 0;  // the protocol's transmission flags that the driver knows
    bool read_only() const;
    bool multi_conn() const;  // several connections see each other's flushes
};

/// How long a connection may take until it is negotiated, and without an answer of the peer's
/// machine before it counts as dead. Milliseconds.
inline constexpr int kNegotiationMs = 10'000;
inline constexpr unsigned kPeerSilenceMs = 20'000;

/// Connects and negotiates: `nbd://`, `nbd+unix://`. kNotFound if the server does not have the
/// export or will not give it, kInvalid for a URI that cannot be attached, kFailed if the server
/// cannot be reached. Gives up after kNegotiationMs.
Result<Remote> Negotiate(const std::string& uri);

/// The export's size, in bytes, without attaching to it. Errors as above.
Result<uint64_t> AskSize(const std::string& uri);

}  // namespace varve::attach
