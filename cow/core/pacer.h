// Pacer: how long background work rests between its steps, so that requests keep their rate.
// Not a scheduler: it starts nothing, and what rests may go on at any moment.
// docs/design/pacing.md has the reasons.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "base/clock.h"
#include "base/task.h"

namespace varve::cow {

/// Counts the requests of a lane. Its own lane writes, every thread may read.
class LoadMeter {
  public:
    /// A request is under way as long as this exists.
    class Request {
      public:
        explicit Request(LoadMeter& meter) : meter_(meter) { Increment(meter_.begun_); }
        Request(const Request&) = delete;
        ~Request() { Increment(meter_.ended_); }

      private:
        LoadMeter& meter_;
    };

    uint64_t begun() const { return begun_.load(std::memory_order_relaxed); }
    uint64_t ended() const { return ended_.load(std::memory_order_relaxed); }

  private:
    static void Increment(std::atomic<uint64_t>& count) {  // there is one writer
        count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }
    std::atomic<uint64_t> begun_ = 0, ended_ = 0;
};

/// Belongs to the home executor.
class Pacer {
  public:
    /// What somebody may wait for.
    enum class Work { kSpace, kChecksums };

    /// Without a clock nothing ever rests. `closing`: set when all shall end soon.
    Pacer(Clock* clock, Executor& home, const std::atomic<bool>& closing)
        : clock_(clock), home_(home), closing_(closing) {}

    /// Its requests count as load. Before any work.
    void Watch(const LoadMeter& meter) { meters_.push_back(&meter); }

    /// Somebody waits: this work does not rest as long as the object exists. On home.
    class Hurry {
      public:
        Hurry(Pacer& pacer, Work work) : count_(pacer.hurries_[Index(work)]) { ++count_; }
        Hurry(const Hurry&) = delete;
        ~Hurry() { --count_; }

      private:
        uint64_t& count_;
    };
    /// The same for the next `us` microseconds, without an object.
    void HurryFor(Work work, int64_t us);

    /// A step of work begins.
    struct Step {
        int64_t began_us = 0;
    };
    Step Begin();
    /// The step is over: returns when the next one may begin. At once if the lanes are idle, or
    /// somebody is in a hurry. On home.
    Task<void> Rest(Step step, Work work);

  private:
    static size_t Index(Work work) { return static_cast<size_t>(work); }
    bool Hurried(Work work) const;
    bool Idle(int64_t now_us);

    Clock* const clock_;
    Executor& home_;
    const std::atomic<bool>& closing_;
    std::vector<const LoadMeter*> meters_;
    uint64_t hurries_[2] = {0, 0};
    int64_t hurry_until_us_[2] = {0, 0};
    int64_t rest_until_us_ = 0;  // of all workers
    uint64_t served_ = 0;        // when it was last looked
    int64_t busy_us_ = 0;        // when requests were last seen
};

}  // namespace varve::cow
