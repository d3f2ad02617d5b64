// Scheduler: runs the whole engine in one thread, in an order that a seed decides.
// Not a clock: there is no time, only order.
//
// Each executor keeps the order of what is posted to it, as a thread would; which executor goes
// next, and which transfer completes next, is drawn; now and then one rests for a while. In half
// of the seeds one may also rest in the middle of what it runs, between one post and the next; in
// half of them some rests, and in half of them some transfers, are long: bugs that need one of
// these seldom need another, and hide behind it. A slow executor takes a while over each thing it
// runs: what that posts to others arrives at some later step.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "base/executor.h"
#include "base/task.h"
#include "tests/simulation/dice.h"

namespace varve::simulation {

class Scheduler : public Dice {
  public:
    explicit Scheduler(uint64_t seed)
        : Dice(seed), interrupts_(Chance(0.5)), rests_long_(Chance(0.5)), some_slow_(Chance(0.5)) {}

    class Lane : public Executor {
      public:
        explicit Lane(Scheduler& scheduler, bool slow) : scheduler_(scheduler), slow_(slow) {}
        void Post(Runnable* runnable) override {
            if (scheduler_.running_ && scheduler_.running_->holds_) {
                scheduler_.running_->held_.emplace_back(this, runnable);
            } else {
                queue_.push_back(runnable);
            }
        }
        void ExpectPost() override { ++posts_expected_; }
        uint64_t posts_expected() const { return posts_expected_; }
        /// From now on nothing runs here, as on a thread that the device keeps; or again.
        void Stall(bool stalled) { stalled_ = stalled; }

      private:
        friend class Scheduler;
        Scheduler& scheduler_;
        uint64_t posts_expected_ = 0;
        const bool slow_;
        bool stalled_ = false;
        bool busy_ = false;
        bool holds_ = false;        // what it runs now takes a while
        uint64_t rests_until_ = 0;  // as a thread that others keep from running
        std::deque<Runnable*> queue_;
        std::deque<std::pair<Lane*, Runnable*>> held_;  // posted by what it runs
    };

    Lane& NewLane(bool slow = false) {
        return *lanes_.emplace_back(std::make_unique<Lane>(*this, slow));
    }

    /// Something that happens at some later step: a transfer's completion. Some take long.
    void Later(std::function<void()> event) {
        const uint64_t most = some_slow_ && Draw(4) == 0 ? kLongTransferMax : kTransferMax;
        In(Draw(8) == 0 ? Draw(most) : 0, std::move(event));
    }

    /// Something that happens after `steps` steps, or earlier if there is nothing else to do.
    void After(uint64_t steps, std::function<void()> event) {
        events_.push_back({std::move(event), steps_ + steps});
    }

    /// Nothing runs there for a long time.
    void Rest(Lane& lane) { lane.rests_until_ = steps_ + kLongRestMax; }

    uint64_t steps() const { return steps_; }

    /// One step. False if there is nothing to do.
    bool Step() {
        VARVE_CHECK(++steps_ < kStepsMax);  // else it runs in circles
        if (Draw(24) == 0) lanes_[Draw(lanes_.size())]->rests_until_ = steps_ + DrawRest();
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

    /// Something runs: what is called now is called by the engine, not by a test that looks at it.
    bool running() const { return running_ != nullptr; }

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
    static constexpr uint64_t kLongTransferMax = 3000;
    static constexpr uint64_t kRestMax = 80;
    static constexpr uint64_t kLongRestMax = 800;

    struct Event {
        std::function<void()> run;
        uint64_t due;
    };

    /// What may happen at step `now`.
    void Choose(uint64_t now) {
        ready_.clear();
        due_.clear();
        for (const auto& lane : lanes_) {
            const bool able = !lane->queue_.empty() && !lane->busy_ && !lane->stalled_ &&
                              lane->rests_until_ <= now;
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
        lane.holds_ = lane.slow_ || (interrupts_ && Draw(12) == 0);
        runnable->run(runnable);
        running_ = nullptr;
        if (!lane.holds_) return;
        lane.busy_ = true;
        LetGo(lane);
    }

    /// Of what it posted, a slow lane lets go of everything at its end; another was kept from
    /// running between one and the next.
    void LetGo(Lane& lane) {
        std::function<void()> event = [this, &lane] {
            do {
                if (lane.held_.empty()) break;
                lane.held_.front().first->queue_.push_back(lane.held_.front().second);
                lane.held_.pop_front();
            } while (lane.slow_);
            lane.busy_ = !lane.held_.empty();
            if (lane.busy_) LetGo(lane);
        };
        if (lane.slow_) return Later(std::move(event));
        In(DrawRest(), std::move(event));
    }

    void In(uint64_t steps, std::function<void()> event) {
        events_.push_back({std::move(event), steps_ + steps});
    }
    uint64_t DrawRest() { return Draw(rests_long_ && Draw(6) == 0 ? kLongRestMax : kRestMax); }

    const bool interrupts_, rests_long_, some_slow_;
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
