#include "nbdserver/daemon/control_socket.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/asio/io_context.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <utility>

namespace varve::nbdserver {

namespace asio = boost::asio;
using Descriptor = asio::posix::stream_descriptor;
using ErrorCode = boost::system::error_code;

struct ControlSocket::State {
    explicit State(asio::io_context& io) : descriptor(io) {}
    Descriptor descriptor;
    bool waiting = false;
};

namespace {

struct Readiness {
    Descriptor& descriptor;
    Descriptor::wait_type direction;
    bool ready = false;

    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter) {
        descriptor.async_wait(direction, [this, waiter](const ErrorCode& error) {
            ready = !error;
            waiter.resume();
        });
    }
    bool await_resume() const noexcept { return ready; }
};

bool WouldBlock(ssize_t result) {
    return result < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR);
}

void SetBlocking(int fd, bool blocking) {
    const int flags = ::fcntl(fd, F_GETFL);
    ::fcntl(fd, F_SETFL, blocking ? flags & ~O_NONBLOCK : flags | O_NONBLOCK);
}

}  // namespace

ControlSocket::ControlSocket(Control& control, int fd)
    : state_(std::make_unique<State>(control.io())) {
    SetBlocking(fd, false);
    ErrorCode error;
    state_->descriptor.assign(fd, error);
    if (!error) return;
    ::close(fd);
    cancelled_ = true;
}

ControlSocket::~ControlSocket() {
    VARVE_CHECK(!state_->waiting);
}

Task<bool> ControlSocket::Wait(Direction direction) {
    if (cancelled_) co_return false;
    state_->waiting = true;
    const auto type =
        direction == Direction::kRead ? Descriptor::wait_read : Descriptor::wait_write;
    Readiness readiness{state_->descriptor, type};
    const bool ready = co_await readiness;
    state_->waiting = false;
    co_return ready && !cancelled_;
}

Task<bool> ControlSocket::WaitReadable() {
    return Wait(Direction::kRead);
}

Task<size_t> ControlSocket::Read(std::span<char> into) {
    for (;;) {
        Task<bool> wait = Wait(Direction::kRead);
        const bool ready = co_await wait;
        if (!ready) co_return 0;
        const ssize_t n = ::recv(fd(), into.data(), into.size(), 0);
        if (!WouldBlock(n)) co_return n > 0 ? static_cast<size_t>(n) : 0;
    }
}

Task<bool> ControlSocket::WriteAll(std::string_view bytes) {
    while (!bytes.empty()) {
        if (cancelled_) co_return false;
        const ssize_t n = ::send(fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
        if (n >= 0) {
            bytes.remove_prefix(static_cast<size_t>(n));
            continue;
        }
        if (!WouldBlock(n)) co_return false;
        Task<bool> wait = Wait(Direction::kWrite);
        const bool ready = co_await wait;
        if (!ready) co_return false;
    }
    co_return true;
}

bool ControlSocket::WriteNow(std::string_view bytes) {
    const ssize_t n = ::send(fd(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    return n == static_cast<ssize_t>(bytes.size());
}

void ControlSocket::Cancel() {
    cancelled_ = true;
    ErrorCode ignored;
    state_->descriptor.cancel(ignored);
}

int ControlSocket::fd() const {
    return state_->descriptor.native_handle();
}

int ControlSocket::Release() {
    const int fd = state_->descriptor.release();
    SetBlocking(fd, true);  // the ring reports "try again" for a non-blocking socket
    return fd;
}

}  // namespace varve::nbdserver
