#include "nbdserver/daemon/listeners.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>

#include <algorithm>
#include <charconv>
#include <memory>
#include <optional>
#include <set>

namespace varve::nbdserver {
namespace {

constexpr unsigned kUnixMode = 0660;

union SocketAddress {
    sockaddr any;
    sockaddr_in v4;
    sockaddr_in6 v6;
    sockaddr_un local;
    sockaddr_storage storage;
};

/// "127.0.0.1:10809" or "[::1]:10809"; empty for other families.
std::string FormatAddress(const SocketAddress& address) {
    char text[INET6_ADDRSTRLEN] = "";
    if (address.any.sa_family == AF_INET) {
        ::inet_ntop(AF_INET, &address.v4.sin_addr, text, sizeof text);
        return fmt::format("{}:{}", text, ntohs(address.v4.sin_port));
    }
    if (address.any.sa_family == AF_INET6) {
        ::inet_ntop(AF_INET6, &address.v6.sin6_addr, text, sizeof text);
        return fmt::format("[{}]:{}", text, ntohs(address.v6.sin6_port));
    }
    return "";
}

/// Where `fd` listens.
std::string ListeningUri(int fd) {
    SocketAddress address{};
    socklen_t length = sizeof address;
    if (::getsockname(fd, &address.any, &length) != 0) return "nbd://?";
    if (address.any.sa_family == AF_UNIX) {
        return fmt::format("nbd+unix:///?socket={}", address.local.sun_path);
    }
    return "nbd://" + FormatAddress(address);
}

/// Whether nobody can listen there because this machine, or its kernel, lacks the address.
bool IsAbsent(Errno error) {
    return error == EADDRNOTAVAIL || error == EAFNOSUPPORT || error == EPROTONOSUPPORT;
}

bool IsWildcard6(const addrinfo& info) {
    return info.ai_family == AF_INET6 &&
           IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<const sockaddr_in6*>(info.ai_addr)->sin6_addr);
}

/// `*absent`: the error is that there is no such address here.
Result<Listener> ListenOn(const addrinfo& info, const TcpAddress& address, bool both,
                          bool* absent) {
    const auto failed = [&](const char* what) {
        const Errno error = errno;
        *absent = IsAbsent(error);
        const std::string text = fmt::format("cannot {} {}:{}", what, address.host, address.port);
        if (error != EADDRINUSE) return SystemError(error, text);
        return MakeError(ErrorKind::kBusy,
                         text + ": another program listens there; stop it or choose another port");
    };
    Listener listener;
    listener.socket.fd = admin::OwnedFd(
        ::socket(info.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, info.ai_protocol));
    const int fd = listener.socket.fd.get();
    if (fd < 0) return failed("make a socket for");
    const int on = 1;
    // A restarted server need not wait for connections of the last one to be forgotten.
    ::setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    const int only6 = !(both && IsWildcard6(info));
    if (info.ai_family == AF_INET6) {
        ::setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only6, sizeof only6);
    }
    if (::bind(fd, info.ai_addr, info.ai_addrlen) != 0) return failed("bind to");
    if (::listen(fd, SOMAXCONN) != 0) return failed("listen on");
    listener.uri = ListeningUri(fd);
    return listener;
}

/// Takes ",tls=MODE" and ",read-only" from the end of `text`.
Result<ListenPolicy> TakePolicy(std::string_view& text) {
    ListenPolicy policy;
    for (;;) {
        const size_t comma = text.rfind(',');
        if (comma == std::string_view::npos) return policy;
        const std::string_view word = text.substr(comma + 1);
        if (word == "read-only") {
            policy.read_only = true;
        } else if (word == "tls=off") {
            policy.tls = TlsMode::kOff;
        } else if (word == "tls=allow") {
            policy.tls = TlsMode::kAllow;
        } else if (word == "tls=require") {
            policy.tls = TlsMode::kRequire;
        } else if (word.starts_with("tls=")) {
            return MakeError(ErrorKind::kInvalid,
                             fmt::format("'{}' is not tls=off, tls=allow or tls=require", word));
        } else {
            return policy;
        }
        text = text.substr(0, comma);
    }
}

bool IsUnix(int fd) {
    return ::sd_is_socket(fd, AF_UNIX, SOCK_STREAM, -1) > 0;
}

}  // namespace

Result<TcpAddress> ParseTcpAddress(std::string_view text) {
    const Error wrong = MakeError(
        ErrorKind::kInvalid,
        fmt::format("'{}' is not an address; write HOST:PORT, as in 127.0.0.1:10809 or [::1]:10809",
                    text));
    const Result<ListenPolicy> policy = TakePolicy(text);
    if (!policy.ok()) return policy.error();
    const size_t colon = text.rfind(':');
    if (colon == std::string_view::npos || colon == 0) return wrong;
    std::string_view host = text.substr(0, colon);
    const std::string_view port = text.substr(colon + 1);
    const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
    if (bracketed) host = host.substr(1, host.size() - 2);
    if (!bracketed && host.find_first_of(":[]") != std::string_view::npos) return wrong;
    TcpAddress address;
    address.host = host;
    address.policy = policy.value();
    const auto [end, error] = std::from_chars(port.data(), port.data() + port.size(), address.port);
    if (error != std::errc() || end != port.data() + port.size()) return wrong;
    return address;
}

Result<UnixAddress> ParseUnixAddress(std::string_view text) {
    const Result<ListenPolicy> policy = TakePolicy(text);
    if (!policy.ok()) return policy.error();
    if (text.empty()) return MakeError(ErrorKind::kInvalid, "the path is empty");
    return UnixAddress{std::string(text), policy.value()};
}

void ApplyPolicy(const ListenPolicy& policy, bool credentials, Listener& listener) {
    const bool local = IsUnix(listener.socket.fd.get());
    const TlsMode usual = local ? TlsMode::kAllow : TlsMode::kRequire;
    listener.tls = policy.tls.value_or(credentials ? usual : TlsMode::kOff);
    listener.read_only = policy.read_only;
    if (listener.tls == TlsMode::kRequire) listener.uri.insert(3, "s");  // behind "nbd"
}

Result<std::vector<Listener>> ListenTcp(const TcpAddress& address, bool both) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
    addrinfo* found = nullptr;
    const int result =
        ::getaddrinfo(address.host.c_str(), std::to_string(address.port).c_str(), &hints, &found);
    if (result != 0) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("cannot listen on {}:{}: {}", address.host, address.port,
                                     ::gai_strerror(result)));
    }
    const std::unique_ptr<addrinfo, void (*)(addrinfo*)> release(found, ::freeaddrinfo);
    std::vector<Listener> listeners;
    std::set<std::string> taken;  // a name may have the same address twice
    std::optional<Error> missing;
    for (const addrinfo* info = found; info; info = info->ai_next) {
        if (!taken.emplace(reinterpret_cast<const char*>(info->ai_addr), info->ai_addrlen).second) {
            continue;
        }
        bool absent = false;
        Result<Listener> listener = ListenOn(*info, address, both, &absent);
        if (listener.ok()) {
            listeners.push_back(std::move(listener.value()));
        } else if (absent) {
            missing = listener.error();
        } else {
            return listener.error();
        }
    }
    if (listeners.empty()) return *missing;
    return listeners;
}

Result<Listener> ListenNbdUnix(const std::string& path) {
    Result<admin::ListeningSocket> socket = admin::ListenUnix(path, kUnixMode);
    if (!socket.ok()) return socket.error();
    Listener listener;
    listener.socket = std::move(socket.value());
    listener.uri = fmt::format("nbd+unix:///?socket={}", path);
    return listener;
}

Result<std::vector<Listener>> TakeSystemdSockets() {
    std::vector<Listener> listeners;
    const int count = ::sd_listen_fds(/*unset_environment=*/1);
    for (int fd = SD_LISTEN_FDS_START; fd < SD_LISTEN_FDS_START + count; ++fd) {
        Listener listener;
        listener.socket.fd = admin::OwnedFd(fd);
        if (::sd_is_socket(fd, AF_UNSPEC, SOCK_STREAM, 1) <= 0) {
            return MakeError(ErrorKind::kInvalid,
                             fmt::format("systemd passed descriptor {}, which is no listening "
                                         "stream socket; use ListenStream= in the socket unit",
                                         fd));
        }
        ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
        listener.uri = ListeningUri(fd);
        listeners.push_back(std::move(listener));
    }
    return listeners;
}

Peer PeerOf(int fd) {
    SocketAddress address{};
    socklen_t length = sizeof address;
    if (::getpeername(fd, &address.any, &length) != 0) return {"?", {}, {}};
    if (address.any.sa_family != AF_UNIX) {
        return {FormatAddress(address), access::AddressOf(address.any), {}};
    }
    ucred peer{};
    length = sizeof peer;
    if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) return {"unix", {}, {}};
    return {fmt::format("unix:uid={},pid={}", peer.uid, peer.pid), {}, peer.uid};
}

void PrepareConnection(int fd, uint64_t peer_timeout_s) {
    const auto set = [fd](int level, int name, int value) {
        ::setsockopt(fd, level, name, &value, sizeof value);  // fails on unix sockets: no matter
    };
    const int seconds = static_cast<int>(peer_timeout_s);
    set(IPPROTO_TCP, TCP_NODELAY, 1);
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
    // Three probes in the second half of the time.
    set(IPPROTO_TCP, TCP_KEEPIDLE, seconds / 2);
    set(IPPROTO_TCP, TCP_KEEPINTVL, std::max(1, seconds / 6));
    set(IPPROTO_TCP, TCP_KEEPCNT, 3);
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, seconds * 1000);
}

}  // namespace varve::nbdserver
