// Control: the thread of the control plane. An executor on an Asio io_context, with signals and
// timers.
// Not for data: requests of attached clients never pass here.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "base/executor.h"
#include "base/task.h"

namespace boost::asio {
class io_context;
}

namespace varve::nbdserver {

class Control : public Executor {
  public:
    Control();
    ~Control() override;

    void Post(Runnable* runnable) override;
    boost::asio::io_context& io();

    /// Runs on the calling thread until Stop().
    void Run();
    /// Any thread. What is posted later is not run.
    void Stop();

    /// Calls `handle` once, on this thread, at the first SIGTERM or SIGINT. Later ones are ignored.
    void OnTermination(std::function<void(int)> handle);
    /// Calls `handle` on this thread at each SIGHUP, or once for several.
    void OnReload(std::function<void()> handle);

  private:
    void WaitForReload();

    struct State;
    std::unique_ptr<State> state_;
};

/// A timer that coroutines of `control` wait for.
class Timer {
  public:
    explicit Timer(Control& control);
    /// REQUIRES: nobody waits.
    ~Timer();

    /// True after `milliseconds`; false, soon, once Cancel() was called, before or meanwhile. One
    /// at a time.
    Task<bool> Wait(uint64_t milliseconds);
    /// For good. On the control thread.
    void Cancel();
    bool cancelled() const { return cancelled_; }

  private:
    struct State;
    std::unique_ptr<State> state_;
    bool cancelled_ = false;
};

}  // namespace varve::nbdserver
