// Listening sockets: TCP, unix, and those that systemd passes.
// Not accepting: server.h does that.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "admin/unix_socket.h"
#include "base/result.h"
#include "nbdserver/access/address.h"
#include "nbdserver/negotiation/negotiation.h"

namespace varve::nbdserver {

/// What clients of a listener may do.
struct ListenPolicy {
    std::optional<TlsMode> tls;  // none: as fits the server's credentials and the socket
    bool read_only = false;      // every export
};

/// HOST:PORT, with an IPv6 address in brackets.
struct TcpAddress {
    std::string host;
    uint16_t port = 0;
    ListenPolicy policy;
};

struct UnixAddress {
    std::string path;
    ListenPolicy policy;
};

/// HOST:PORT[,tls=off|allow|require][,read-only]. kInvalid with a message that shows the form.
Result<TcpAddress> ParseTcpAddress(std::string_view text);
/// PATH, likewise. Anything else behind a comma belongs to the path.
Result<UnixAddress> ParseUnixAddress(std::string_view text);

struct Listener {
    TlsMode tls = TlsMode::kOff;
    bool read_only = false;
    admin::ListeningSocket socket;  // non-blocking, close-on-exec; with a path if it made the file
    std::string uri;  // "nbd://127.0.0.1:10809" with the actual port, "nbd+unix:///?socket=PATH"
};

/// One for each address of the host's, but for those that this machine does not have, if it has
/// another. `both`: [::] takes IPv4 as well. kBusy if the port is taken, else kInvalid or kIo.
Result<std::vector<Listener>> ListenTcp(const TcpAddress& address, bool both = true);
/// Mode 0660. Replaces a socket file that nobody listens on. kBusy, kExists, kInvalid or kIo.
Result<Listener> ListenNbdUnix(const std::string& path);
/// Those of LISTEN_FDS; none if the server was not started by a socket unit. Once per process.
Result<std::vector<Listener>> TakeSystemdSockets();

/// Fixes what `policy` leaves open: with credentials TLS is required over TCP, and allowed on a
/// unix socket, where the file's mode says who may connect. A URI says nbds:// where it is
/// required.
void ApplyPolicy(const ListenPolicy& policy, bool credentials, Listener& listener);

/// The other end of a connection, as the system knows it.
struct Peer {
    std::string name;  // "127.0.0.1:51234", "[::1]:51234", "unix:uid=0,pid=12"
    std::optional<access::Address> address;  // without port
    std::optional<uint32_t> uid;             // who has connected over a unix socket
};
Peer PeerOf(int fd);

/// Sets what NBD needs on a connected socket: no delay of small packets, and an end after
/// `peer_timeout_s` seconds (3 or more) without an answer of the peer's machine: to probes while
/// the connection is idle, to data otherwise; or without room there for data.
void PrepareConnection(int fd, uint64_t peer_timeout_s);

}  // namespace varve::nbdserver
