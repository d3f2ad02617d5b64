// Ticker: waiting that ends. Whoever waits in a WaitList for what may never come is woken now and
// then, to see whether it has waited long enough.
// Not exact: a deadline is met some hundredths of a second late.
#pragma once

#include <cstdint>
#include <functional>
#include <set>

#include "base/clock.h"
#include "base/sync.h"

namespace varve {

/// Belongs to one executor.
class Ticker {
  public:
    /// Without a clock waiting does not end by itself.
    Ticker(Clock* clock, Executor& executor) : clock_(clock), executor_(executor) {}
    /// REQUIRES: nobody waits, and Idle() has returned since.
    ~Ticker() { VARVE_CHECK(!running_); }
    Ticker(const Ticker&) = delete;

    int64_t NowUs() const { return clock_ ? clock_->NowUs() : 0; }

    /// Until `done` says yes, which is asked whenever `list` is woken; false if it has not after
    /// `us` microseconds, which `done` may put off: it adds to `*until_us`, a time of NowUs().
    Task<bool> Wait(WaitList& list, int64_t us, std::function<bool(int64_t* until_us)> done);
    /// Waits until the clock has nothing of this any more. REQUIRES: nobody waits.
    Task<void> Idle();

  private:
    Task<void> Run();

    Clock* const clock_;
    Executor& executor_;
    std::multiset<WaitList*> lists_;
    bool running_ = false;
};

}  // namespace varve
