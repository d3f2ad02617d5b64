#include "nbdserver/daemon/control.h"

#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/signal_set.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <csignal>
#include <utility>

namespace varve::nbdserver {

namespace asio = boost::asio;
using ErrorCode = boost::system::error_code;

struct Control::State {
    asio::io_context io{1};
    asio::executor_work_guard<asio::io_context::executor_type> work = asio::make_work_guard(io);
    asio::signal_set signals{io};
    asio::signal_set hangups{io};
    std::function<void()> reload;
};

Control::Control() : state_(std::make_unique<State>()) {}
Control::~Control() = default;

void Control::Post(Runnable* runnable) {
    asio::post(state_->io, [runnable] { runnable->run(runnable); });
}

asio::io_context& Control::io() {
    return state_->io;
}

void Control::Run() {
    state_->io.run();
}

void Control::Stop() {
    state_->io.stop();
}

void Control::OnTermination(std::function<void(int)> handle) {
    state_->signals.add(SIGTERM);
    state_->signals.add(SIGINT);
    state_->signals.async_wait([handle = std::move(handle)](const ErrorCode& error, int signal) {
        if (!error) handle(signal);
    });
}

void Control::OnReload(std::function<void()> handle) {
    state_->reload = std::move(handle);
    state_->hangups.add(SIGHUP);
    WaitForReload();
}

void Control::WaitForReload() {
    state_->hangups.async_wait([this](const ErrorCode& error, int) {
        if (error) return;
        state_->reload();
        WaitForReload();
    });
}

struct Timer::State {
    explicit State(asio::io_context& io) : timer(io) {}
    asio::steady_timer timer;
    bool waiting = false;
};

namespace {

struct Expiry {
    asio::steady_timer& timer;
    bool expired = false;

    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter) {
        timer.async_wait([this, waiter](const ErrorCode& error) {
            expired = !error;
            waiter.resume();
        });
    }
    bool await_resume() const noexcept { return expired; }
};

}  // namespace

Timer::Timer(Control& control) : state_(std::make_unique<State>(control.io())) {}

Timer::~Timer() {
    VARVE_CHECK(!state_->waiting);
}

Task<bool> Timer::Wait(uint64_t milliseconds) {
    if (cancelled_) co_return false;
    state_->waiting = true;
    state_->timer.expires_after(std::chrono::milliseconds(milliseconds));
    Expiry expiry{state_->timer};
    const bool expired = co_await expiry;
    state_->waiting = false;
    co_return expired && !cancelled_;
}

void Timer::Cancel() {
    cancelled_ = true;
    state_->timer.cancel();
}

}  // namespace varve::nbdserver
