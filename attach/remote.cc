#include "attach/remote.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <libnbd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <utility>

namespace varve::attach {
namespace {

// proto.md, "Transmission flags"; those that <linux/nbd.h> knows too.
constexpr uint16_t kHasFlags = 1 << 0;
constexpr uint16_t kReadOnly = 1 << 1;
constexpr uint16_t kSendFlush = 1 << 2;
constexpr uint16_t kSendFua = 1 << 3;
constexpr uint16_t kRotational = 1 << 4;
constexpr uint16_t kSendTrim = 1 << 5;
constexpr uint16_t kSendWriteZeroes = 1 << 6;
constexpr uint16_t kCanMultiConn = 1 << 8;

struct CloseHandle {
    void operator()(nbd_handle* handle) const { nbd_close(handle); }
};
using Handle = std::unique_ptr<nbd_handle, CloseHandle>;

Error LastError(const std::string& uri) {
    const int code = nbd_get_errno();
    const char* text = nbd_get_error();
    const std::string message = fmt::format("{}: {}", uri, text ? text : "no connection");
    const bool refused = code == ENOENT || code == EPERM || code == EBUSY || code == EINVAL;
    return MakeError(refused ? ErrorKind::kNotFound : ErrorKind::kFailed, message);
}

/// Until `handle` has `reached` what it is on the way to.
template <typename F>
Status Await(nbd_handle* handle, const std::string& uri, F&& reached) {
    using Clock = std::chrono::steady_clock;
    const auto end = Clock::now() + std::chrono::milliseconds(kNegotiationMs);
    while (!reached()) {
        const auto left =
            std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
        if (left <= 0) {
            return MakeError(ErrorKind::kFailed,
                             fmt::format("{}: the server did not answer within {} s", uri,
                                         kNegotiationMs / 1000));
        }
        if (nbd_poll(handle, static_cast<int>(left)) < 0) return LastError(uri);
    }
    return Status();
}

Result<Handle> Make(const std::string& uri) {
    if (uri.starts_with("nbds")) {
        return MakeError(ErrorKind::kInvalid,
                         uri +
                             ": the kernel's driver needs a socket whose TLS is done by the "
                             "kernel, which this build cannot hand over; use a tunnel (stunnel, "
                             "WireGuard) or 'nbd-client -tls'");
    }
    Handle handle(nbd_create());
    if (!handle) return MakeError(ErrorKind::kFailed, "libnbd: out of memory");
    // The driver knows simple replies only.
    nbd_set_request_structured_replies(handle.get(), false);
    return handle;
}

uint16_t FlagsOf(nbd_handle* handle) {
    const auto flag = [](int answer, uint16_t bit) { return answer > 0 ? bit : uint16_t{0}; };
    return static_cast<uint16_t>(
        kHasFlags | flag(nbd_is_read_only(handle), kReadOnly) |
        flag(nbd_can_flush(handle), kSendFlush) | flag(nbd_can_fua(handle), kSendFua) |
        flag(nbd_is_rotational(handle), kRotational) | flag(nbd_can_trim(handle), kSendTrim) |
        flag(nbd_can_zero(handle), kSendWriteZeroes) |
        flag(nbd_can_multi_conn(handle), kCanMultiConn));
}

/// So that a peer whose machine is gone is noticed while nothing is under way, and while something
/// is. On a unix socket these options do not exist, and are not needed.
void WatchPeer(int fd) {
    const int on = 1;
    const int idle_s = kPeerSilenceMs / 2000;
    const int interval_s = 5;
    const unsigned silence_ms = kPeerSilenceMs;
    (void)setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof interval_s);
    (void)setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &silence_ms, sizeof silence_ms);
}

}  // namespace

Socket& Socket::operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
}

Socket::~Socket() {
    if (fd_ >= 0) ::close(fd_);
}

bool Remote::read_only() const {
    return (flags & kReadOnly) != 0;
}

bool Remote::multi_conn() const {
    return (flags & kCanMultiConn) != 0;
}

Result<Remote> Negotiate(const std::string& uri) {
    Result<Handle> made = Make(uri);
    if (!made.ok()) return made.error();
    nbd_handle* handle = made.value().get();
    if (nbd_aio_connect_uri(handle, uri.c_str()) < 0) return LastError(uri);
    const Status s = Await(handle, uri, [handle] { return nbd_aio_is_ready(handle) > 0; });
    if (!s.ok()) return s.error();
    const int64_t size = nbd_get_size(handle);
    if (size < 0) return LastError(uri);
    Remote remote;
    remote.size = static_cast<uint64_t>(size);
    remote.flags = FlagsOf(handle);
    // The handle closes its own descriptor and says nothing to the server: this one lives on.
    remote.socket = Socket(::fcntl(nbd_aio_get_fd(handle), F_DUPFD_CLOEXEC, 3));
    if (remote.socket.fd() < 0) return SystemError(errno, "cannot keep the connection");
    const int flags = ::fcntl(remote.socket.fd(), F_GETFL);
    (void)::fcntl(remote.socket.fd(), F_SETFL, flags & ~O_NONBLOCK);
    WatchPeer(remote.socket.fd());
    return remote;
}

Result<uint64_t> AskSize(const std::string& uri) {
    Result<Handle> made = Make(uri);
    if (!made.ok()) return made.error();
    nbd_handle* handle = made.value().get();
    nbd_set_opt_mode(handle, true);
    if (nbd_aio_connect_uri(handle, uri.c_str()) < 0) return LastError(uri);
    Status s = Await(handle, uri, [handle] { return nbd_aio_is_negotiating(handle) > 0; });
    if (!s.ok()) return s.error();
    int answer = 0;
    bool answered = false;
    struct State {
        int* answer;
        bool* answered;
    } state{&answer, &answered};
    nbd_completion_callback done = {};
    done.user_data = &state;
    done.callback = [](void* user, int* error) {
        auto* told = static_cast<State*>(user);
        *told->answer = *error;
        *told->answered = true;
        return 1;
    };
    if (nbd_aio_opt_info(handle, done) < 0) return LastError(uri);
    s = Await(handle, uri, [&answered] { return answered; });
    if (!s.ok()) return s.error();
    const int64_t size = answer == 0 ? nbd_get_size(handle) : -1;
    if (size < 0) {
        return MakeError(ErrorKind::kNotFound, uri + ": the server does not have this export");
    }
    (void)nbd_aio_opt_abort(handle);
    return static_cast<uint64_t>(size);
}

}  // namespace varve::attach
