// Executor: a place where coroutines run, one at a time. A reactor is one, a worker thread is
// one, a test's seeded scheduler is one.
// Not a thread pool: whatever lives on an executor needs no lock.
#pragma once

#include <coroutine>

namespace varve {

/// Something an executor runs once. It lives in its owner's memory (mostly a coroutine frame) and
/// must stay alive until it has run. Immutable while posted.
struct Runnable {
    void (*run)(Runnable*) = nullptr;
    Runnable* next = nullptr;  // owned by the executor while posted
};

class Executor {
  public:
    virtual ~Executor() = default;

    /// Runs `runnable` later on this executor, in the order of posting (a test's scheduler may
    /// choose another). Callable from every thread. Never runs it inline, never fails.
    virtual void Post(Runnable* runnable) = 0;

    /// Says that another thread is about to post something that somebody waits for. A thread with
    /// nothing else to do may look for a post for a while before it falls asleep. From this
    /// executor.
    virtual void ExpectPost() {}
};

/// A coroutine waiting to be resumed on an executor.
struct Resumption : Runnable {
    std::coroutine_handle<> handle;
    Resumption() {
        run = [](Runnable* self) { static_cast<Resumption*>(self)->handle.resume(); };
    }
};

/// `co_await Hop(executor)`: what follows runs on `executor`. Always suspends.
class [[nodiscard]] Hop {
  public:
    explicit Hop(Executor& executor) : executor_(executor) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> handle) {
        resumption_.handle = handle;
        executor_.Post(&resumption_);
    }
    void await_resume() const noexcept {}

  private:
    Executor& executor_;
    Resumption resumption_;
};

}  // namespace varve
