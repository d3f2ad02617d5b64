// Task<T>: a lazy coroutine that is awaited exactly once; Spawn() starts one that nobody awaits.
// Not a scheduler: a task runs on whatever executor its awaits leave it on.
//
// A task finishes on the executor on which it was started: whoever hops away hops back, or is sure
// that the awaiter has suspended. So that needs no lock to learn that it finished, if the executor
// has one thread: on one that has several, tasks may go on but not be awaited. (A spawned task has
// no awaiter and may end anywhere.)
//
// A child is resumed inline by its awaiter, which suspends only if the child did not finish:
// symmetric transfer would grow the stack without optimisation and under sanitizers.
// g++ 12 destroys some temporaries twice inside co_await expressions: name every owning argument
// before the co_await, and put no braces, ternaries or owning lambdas into one.
#pragma once

#include <coroutine>
#include <cstddef>
#include <exception>
#include <optional>
#include <utility>

#include "base/check.h"

namespace varve {

/// Memory for coroutine frames: a free list for each thread and size class, so that the data
/// path does not allocate. Any thread may free what another allocated.
void* AllocateFrame(size_t bytes);
void FreeFrame(void* frame, size_t bytes);

namespace internal {

/// Differs from thread to thread. Clang 16 keeps the address of a thread's variable in a coroutine
/// that goes on elsewhere, so it has to ask a function that it does not see.
#ifdef __clang__
const char* ThreadMark();
#else
inline thread_local char thread_mark;
inline const char* ThreadMark() {
    return &thread_mark;
}
#endif

struct FinalAwaiter {
    bool await_ready() const noexcept { return false; }
    template <typename Promise>
    void await_suspend(std::coroutine_handle<Promise> self) noexcept {
        if (self.promise().detached) {
            self.destroy();
        } else if (auto parent = self.promise().parent) {
            parent.resume();
        } else {
            // Else the awaiter may be about to suspend, and nobody would ever resume it.
            VARVE_CHECK(self.promise().awaited_on == ThreadMark());
        }
    }
    void await_resume() const noexcept {}
};

struct PromiseBase {
    std::coroutine_handle<> parent;    // set only once the awaiter has really suspended
    const char* awaited_on = nullptr;  // the awaiter's thread
    bool detached = false;             // nobody awaits it: it frees itself

    static void* operator new(size_t bytes) { return AllocateFrame(bytes); }
    static void operator delete(void* frame, size_t bytes) { FreeFrame(frame, bytes); }

    std::suspend_always initial_suspend() const noexcept { return {}; }
    FinalAwaiter final_suspend() const noexcept { return {}; }
    void unhandled_exception() { std::terminate(); }
};

template <typename T>
struct Promise : PromiseBase {
    std::optional<T> value;
    auto get_return_object() { return std::coroutine_handle<Promise>::from_promise(*this); }
    template <typename U>
    void return_value(U&& v) {
        value.emplace(std::forward<U>(v));
    }
    T Take() { return std::move(*value); }
};

template <>
struct Promise<void> : PromiseBase {
    auto get_return_object() { return std::coroutine_handle<Promise>::from_promise(*this); }
    void return_void() {}
    void Take() {}
};

}  // namespace internal

template <typename T = void>
class Task;
void Spawn(Task<void> task);

template <typename T>
class [[nodiscard]] Task {
  public:
    using promise_type = internal::Promise<T>;
    using Handle = std::coroutine_handle<promise_type>;

    Task(Handle handle) : handle_(handle) {}  // NOLINT: made by the promise
    Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Task& operator=(Task&&) = delete;
    ~Task() {
        if (handle_) handle_.destroy();
    }

    bool await_ready() const noexcept { return false; }
    bool await_suspend(std::coroutine_handle<> parent) {
        handle_.promise().awaited_on = internal::ThreadMark();
        handle_.resume();
        if (handle_.done()) return false;
        handle_.promise().parent = parent;
        return true;
    }
    T await_resume() { return handle_.promise().Take(); }

  private:
    friend void Spawn(Task<void> task);
    Handle handle_;
};

/// Runs `task` up to its first suspension, at once; the rest runs by itself, on whatever thread,
/// and its frame frees itself. Whoever spawns must know another way when it ended (a Gate, a
/// counter).
inline void Spawn(Task<void> task) {
    // Told before it runs: once it has hopped away it may end at any moment on another thread.
    const Task<void>::Handle handle = std::exchange(task.handle_, nullptr);
    handle.promise().detached = true;
    handle.resume();
}

}  // namespace varve
