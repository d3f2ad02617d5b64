// RunOn: a thread that is no executor's waits for a task that runs on one.
// Not for use on that executor itself: it would wait for itself.
#pragma once

#include <future>
#include <memory>
#include <utility>

#include "base/executor.h"
#include "base/task.h"

namespace varve {
namespace internal {

/// The waiter may be gone before set_value() returns: so the promise is shared.
template <typename T>
Task<void> RunInto(Executor& executor, Task<T> task, std::shared_ptr<std::promise<T>> result) {
    co_await Hop(executor);
    T value = co_await task;
    result->set_value(std::move(value));
}

}  // namespace internal

/// Runs `task` on `executor` and gives its result, on a thread that is not the executor's.
template <typename T>
T RunOn(Executor& executor, Task<T> task) {
    auto result = std::make_shared<std::promise<T>>();
    std::future<T> future = result->get_future();
    Spawn(internal::RunInto(executor, std::move(task), std::move(result)));
    return future.get();
}

}  // namespace varve
