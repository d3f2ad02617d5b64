// RunOn: a test's thread does something on an executor and waits for it.
// Not for use on that executor itself: it would wait for itself.
#pragma once

#include <future>
#include <utility>

#include "base/executor.h"

namespace varve {

template <typename F>
auto RunOn(Executor& executor, F function) {
    using Value = decltype(function());
    struct Call : Runnable {
        std::packaged_task<Value()> task;
    } call;
    call.task = std::packaged_task<Value()>(std::move(function));
    std::future<Value> result = call.task.get_future();
    call.run = [](Runnable* self) {
        // The waiter may destroy the call as soon as the result is there.
        std::packaged_task<Value()> task = std::move(static_cast<Call*>(self)->task);
        task();
    };
    executor.Post(&call);
    return result.get();
}

}  // namespace varve
