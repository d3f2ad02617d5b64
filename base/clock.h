// Clock: time that passes, and waking up after some of it. A test's scheduler provides another one.
// Not the date, and not for the data path: waking up costs two switches of threads.
#pragma once

#include <cstdint>
#include <memory>

#include "base/executor.h"

namespace varve {

class Clock {
  public:
    virtual ~Clock() = default;
    /// Microseconds since some moment; never less than before. Any thread.
    virtual int64_t NowUs() = 0;
    /// Posts `runnable` to `executor` after `us` microseconds, or somewhat later. Any thread. It
    /// cannot be cancelled: who may be in a hurry sleeps in short pieces.
    virtual void PostAfter(int64_t us, Executor& executor, Runnable* runnable) = 0;
};

/// Over once `us` have passed; never without a clock.
class Deadline {
  public:
    Deadline(Clock* clock, int64_t us)
        : clock_(clock), until_us_(clock ? clock->NowUs() + us : 0) {}
    bool over() const { return clock_ && clock_->NowUs() >= until_us_; }

  private:
    Clock* const clock_;
    const int64_t until_us_;
};

/// The system's monotonic clock, with a thread of its own for waking up.
class SystemClock : public Clock {
  public:
    SystemClock();
    /// REQUIRES: nothing waits to be posted, and every PostAfter() has returned.
    ~SystemClock() override;

    int64_t NowUs() override;
    void PostAfter(int64_t us, Executor& executor, Runnable* runnable) override;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

/// `co_await Sleep(clock, us, executor)`: what follows runs on `executor` when time has passed.
class [[nodiscard]] Sleep {
  public:
    Sleep(Clock& clock, int64_t us, Executor& executor)
        : clock_(clock), us_(us), executor_(executor) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> handle) {
        resumption_.handle = handle;
        clock_.PostAfter(us_, executor_, &resumption_);
    }
    void await_resume() const noexcept {}

  private:
    Clock& clock_;
    const int64_t us_;
    Executor& executor_;
    Resumption resumption_;
};

}  // namespace varve
