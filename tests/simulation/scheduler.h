// Scheduler: runs the whole engine in one thread, in an order that a seed decides.
// Not a clock: there is no time, only order.
//
// Each executor keeps the order of what is posted to it, as a thread would; which executor goes
// next, and which transfer completes next, is drawn.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "base/executor.h"
#include "base/task.h"

namespace varve::simulation {

using Random = std::mt19937_64;

class Scheduler {
  public:
    explicit Scheduler(uint64_t seed) : random_(seed) {}

    class Lane : public Executor {
      public:
        void Post(Runnable* runnable) override { queue_.push_back(runnable); }

      private:
        friend class Scheduler;
        std::deque<Runnable*> queue_;
    };

    Random& random() { return random_; }
    uint64_t Draw(uint64_t below) { return random_() % below; }
    bool Chance(double probability) {
        return std::uniform_real_distribution<double>(0, 1)(random_) < probability;
    }

    Lane& NewLane() { return *lanes_.emplace_back(std::make_unique<Lane>()); }

    /// Something that happens at some later step: a transfer's completion.
    void Later(std::function<void()> event) { events_.push_back(std::move(event)); }

    /// One step. False if there is nothing to do.
    bool Step() {
        std::vector<Lane*> ready;
        for (const auto& lane : lanes_) {
            if (!lane->queue_.empty()) ready.push_back(lane.get());
        }
        const size_t choices = ready.size() + events_.size();
        if (choices == 0) return false;
        const size_t choice = Draw(choices);
        if (choice < ready.size()) {
            Runnable* runnable = ready[choice]->queue_.front();
            ready[choice]->queue_.pop_front();
            runnable->run(runnable);
        } else {
            const size_t index = choice - ready.size();
            std::swap(events_[index], events_.back());
            const std::function<void()> event = std::move(events_.back());
            events_.pop_back();
            event();
        }
        return true;
    }

    void RunAll() {
        while (Step()) {
        }
    }

    /// Runs until `done`; false if nothing is left to do before that.
    bool RunUntil(const std::function<bool()>& done) {
        while (!done()) {
            if (!Step()) return done();
        }
        return true;
    }

  private:
    Random random_;
    std::vector<std::unique_ptr<Lane>> lanes_;
    std::vector<std::function<void()>> events_;
};

/// Runs a task on `executor` to its end and gives its result.
template <typename T>
Task<void> Collect(Executor* executor, Task<T> task, std::optional<T>* result) {
    co_await Hop(*executor);
    *result = co_await task;
}

template <typename T>
T Await(Scheduler& scheduler, Executor& executor, Task<T> task) {
    std::optional<T> result;
    Spawn(Collect<T>(&executor, std::move(task), &result));
    VARVE_CHECK(scheduler.RunUntil([&] { return result.has_value(); }));
    return std::move(*result);
}

}  // namespace varve::simulation
