// Scheduler: runs the whole engine in one thread, in an order that a seed decides.
// Not a clock: there is no time, only order.
//
// Each executor keeps the order of what is posted to it, as a thread would; which executor goes
// next, and which transfer completes next, is drawn; now and then one rests for a while. A slow
// executor takes a while over each thing it runs: what that posts to others arrives at some later
// step.
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
        explicit Lane(Scheduler& scheduler, bool slow) : scheduler_(scheduler), slow_(slow) {}
        void Post(Runnable* runnable) override {
            const bool held = scheduler_.running_ && scheduler_.running_->slow_;
            if (held) {
                scheduler_.running_->held_.emplace_back(this, runnable);
            } else {
                queue_.push_back(runnable);
            }
        }

      private:
        friend class Scheduler;
        Scheduler& scheduler_;
        const bool slow_;
        bool busy_ = false;
        uint64_t rests_until_ = 0;  // as a thread that others keep from running
        std::deque<Runnable*> queue_;
        std::vector<std::pair<Lane*, Runnable*>> held_;  // posted by what it runs
    };

    Random& random() { return random_; }
    uint64_t Draw(uint64_t below) { return random_() % below; }
    bool Chance(double probability) {
        return std::uniform_real_distribution<double>(0, 1)(random_) < probability;
    }

    Lane& NewLane(bool slow = false) {
        return *lanes_.emplace_back(std::make_unique<Lane>(*this, slow));
    }

    /// Something that happens at some later step: a transfer's completion. Some take long.
    void Later(std::function<void()> event) {
        const uint64_t delay = Draw(8) == 0 ? Draw(kTransferMax) : 0;
        events_.push_back({std::move(event), steps_ + delay});
    }

    /// Something that happens after `steps` steps, or earlier if there is nothing else to do.
    void After(uint64_t steps, std::function<void()> event) {
        events_.push_back({std::move(event), steps_ + steps});
    }

    uint64_t steps() const { return steps_; }

    /// One step. False if there is nothing to do.
    bool Step() {
        VARVE_CHECK(++steps_ < kStepsMax);  // else it runs in circles
        if (Draw(24) == 0) lanes_[Draw(lanes_.size())]->rests_until_ = steps_ + Draw(kRestMax);
        Choose(steps_);
        if (ready_.empty() && due_.empty()) Choose(~uint64_t{0});  // nobody else: no need to wait
        const size_t choices = ready_.size() + due_.size();
        if (choices == 0) return false;
        const size_t choice = Draw(choices);
        if (choice < ready_.size()) {
            Run(*ready_[choice]);
        } else {
            std::swap(events_[due_[choice - ready_.size()]], events_.back());
            const std::function<void()> event = std::move(events_.back().run);
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
    static constexpr uint64_t kStepsMax = 20'000'000;
    // In steps:
    static constexpr uint64_t kTransferMax = 400;
    static constexpr uint64_t kRestMax = 80;

    struct Event {
        std::function<void()> run;
        uint64_t due;
    };

    /// What may happen at step `now`.
    void Choose(uint64_t now) {
        ready_.clear();
        due_.clear();
        for (const auto& lane : lanes_) {
            const bool able = !lane->queue_.empty() && !lane->busy_ && lane->rests_until_ <= now;
            if (able) ready_.push_back(lane.get());
        }
        for (size_t i = 0; i < events_.size(); ++i) {
            if (events_[i].due <= now) due_.push_back(i);
        }
    }

    void Run(Lane& lane) {
        Runnable* runnable = lane.queue_.front();
        lane.queue_.pop_front();
        running_ = &lane;
        runnable->run(runnable);
        running_ = nullptr;
        if (!lane.slow_) return;
        lane.busy_ = true;
        Later([&lane] {
            for (const auto& [to, posted] : lane.held_) to->queue_.push_back(posted);
            lane.held_.clear();
            lane.busy_ = false;
        });
    }

    Random random_;
    uint64_t steps_ = 0;
    Lane* running_ = nullptr;
    std::vector<std::unique_ptr<Lane>> lanes_;
    std::vector<Event> events_;
    std::vector<Lane*> ready_;  // of the present step
    std::vector<size_t> due_;
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
