// Turns: long work on a lane goes on a piece at a time, so that short requests come between.
// Not a scheduler: it knows no requests and no priorities, only who came first.
//
// Whoever loops over chunks says what it did. Once all of them together have done a turn's share,
// each waits for a turn to come; a turn lets as many go on, in the order in which they asked, as
// its share lasts for. So a turn is as long with a thousand of them as with one.
#pragma once

#include <coroutine>
#include <cstdint>

#include "base/check.h"
#include "base/executor.h"

namespace varve::cow {

/// Belongs to its executor.
class Turns : private Runnable {
  public:
    /// A unit is some 25 ns: a run of blocks or a hole looked at, a chunk looked for, 256 bytes
    /// zeroed. The share of a turn is some 50 us; a reactor may take 16 turns before it looks at
    /// its ring.
    static constexpr uint64_t kShare = 2048;

    explicit Turns(Executor& executor) : executor_(executor) {
        run = [](Runnable* self) { static_cast<Turns*>(self)->Take(); };
    }
    Turns(const Turns&) = delete;
    ~Turns() { VARVE_CHECK(first_ == nullptr); }

    /// Some work was done. If true, wait for Next() before more of it.
    [[nodiscard]] bool Spend(uint64_t units) {
        spent_ += units;
        return spent_ >= kShare;
    }

    /// `co_await turns.Next()`: what follows runs in a turn that has something left.
    class Next {
      public:
        explicit Next(Turns& turns) : turns_(turns) {}
        bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<> handle) {
            handle_ = handle;
            const bool alone = turns_.first_ == nullptr;
            *turns_.end_ = this;
            turns_.end_ = &after_;
            if (alone && !turns_.taking_) turns_.executor_.Post(&turns_);
        }
        void await_resume() const noexcept {}

      private:
        friend class Turns;
        Turns& turns_;
        std::coroutine_handle<> handle_;
        Next* after_ = nullptr;
    };

  private:
    void Take() {
        spent_ = 0;
        taking_ = true;
        while (first_ && spent_ < kShare) {
            Next* const waiter = first_;
            first_ = waiter->after_;
            if (!first_) end_ = &first_;
            waiter->handle_.resume();
        }
        taking_ = false;
        if (first_) executor_.Post(this);
    }

    Executor& executor_;
    uint64_t spent_ = 0;  // since the last turn
    bool taking_ = false;
    Next* first_ = nullptr;
    Next** end_ = &first_;
};

}  // namespace varve::cow
