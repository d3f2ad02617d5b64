// Waiting between coroutines of one executor: WaitList, AsyncMutex, Gate, Join.
// Not for threads: each object belongs to one executor; others Hop there first.
#pragma once

#include <coroutine>
#include <cstdint>

#include "base/check.h"
#include "base/executor.h"
#include "base/task.h"

namespace varve {

/// Coroutines that wait until somebody wakes them. Woken ones are posted, never run inline.
class WaitList {
  public:
    explicit WaitList(Executor& executor) : executor_(executor) {}
    WaitList(const WaitList&) = delete;
    ~WaitList() { VARVE_CHECK(head_ == nullptr); }

    struct Waiter : Resumption {
        WaitList& list;
        explicit Waiter(WaitList& l) : list(l) {}
        bool await_ready() const noexcept { return false; }
        void await_suspend(std::coroutine_handle<> h) {
            handle = h;
            next = nullptr;
            *list.tail_ = this;
            list.tail_ = &next;
        }
        void await_resume() const noexcept {}
    };

    /// Suspends until woken. Check the condition again afterwards.
    Waiter Wait() { return Waiter(*this); }

    void WakeAll() {
        Runnable* waiter = head_;
        head_ = nullptr;
        tail_ = &head_;
        while (waiter) {
            Runnable* following = waiter->next;
            executor_.Post(waiter);
            waiter = following;
        }
    }

    bool WakeOne() {
        if (!head_) return false;
        Runnable* waiter = head_;
        head_ = waiter->next;
        if (!head_) tail_ = &head_;
        executor_.Post(waiter);
        return true;
    }

    bool empty() const { return head_ == nullptr; }

  private:
    Executor& executor_;
    Runnable* head_ = nullptr;
    Runnable** tail_ = &head_;
};

/// Mutual exclusion between coroutines of one executor, across their suspensions; first come,
/// first served.
class AsyncMutex {
  public:
    explicit AsyncMutex(Executor& executor) : waiters_(executor) {}

    Task<void> Lock() {
        if (!locked_) {
            locked_ = true;
            co_return;
        }
        co_await waiters_.Wait();  // Unlock() hands the lock over
    }
    void Unlock() {
        VARVE_CHECK(locked_);
        if (!waiters_.WakeOne()) locked_ = false;
    }
    bool locked() const { return locked_; }

  private:
    WaitList waiters_;
    bool locked_ = false;
};

/// Counts work under way; Drained() waits until none is left.
class Gate {
  public:
    explicit Gate(Executor& executor) : waiters_(executor) {}
    ~Gate() { VARVE_CHECK(count_ == 0); }

    void Enter() { ++count_; }
    void Leave() {
        VARVE_CHECK(count_ > 0);
        if (--count_ == 0) waiters_.WakeAll();
    }
    Task<void> Drained() {
        while (count_ != 0) co_await waiters_.Wait();
    }
    uint64_t count() const { return count_; }

  private:
    WaitList waiters_;
    uint64_t count_ = 0;
};

/// One coroutine waits for a known number of others; it is resumed inline by the last.
class Join {
  public:
    explicit Join(uint32_t pending) : pending_(pending) {}
    void Done() {
        VARVE_CHECK(pending_ > 0);
        if (--pending_ == 0 && waiter_) waiter_.resume();
    }
    bool await_ready() const noexcept { return pending_ == 0; }
    void await_suspend(std::coroutine_handle<> handle) noexcept { waiter_ = handle; }
    void await_resume() const noexcept {}

  private:
    uint32_t pending_;
    std::coroutine_handle<> waiter_;
};

}  // namespace varve
