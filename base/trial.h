// Trial: finds out which of two ways is the faster one, while the work goes on, again and again.
// For choices that depend on the machine and on who is at the other end. Not a benchmark: it is
// right more often than not, and a wrong choice lasts for one cycle. One thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace varve {

class Trial {
  public:
    static constexpr uint64_t kWindow = 1024;  // events, at least, for which a way is kept
    static constexpr unsigned kCycle = 16;     // windows: one of each way, the rest of the faster

    /// Whether to go the first way, or the second.
    bool first() const { return window_ == 0 || (window_ > 1 && first_is_faster_); }

    /// Counts events. `now` is asked for the time, in nanoseconds of any clock, at the end of a
    /// window.
    template <typename Now>
    void Count(uint64_t events, Now now) {
        events_ += events;
        if (events_ >= kWindow) EndWindow(now());
    }

  private:
    void EndWindow(int64_t now) {
        if (window_ < each_.size()) {
            each_[window_] = static_cast<double>(now - since_) / static_cast<double>(events_);
        }
        if (window_ == 1) first_is_faster_ = each_[0] <= each_[1];
        window_ = (window_ + 1) % kCycle;
        events_ = 0;
        since_ = now;
    }

    uint64_t events_ = 0;  // in this window
    int64_t since_ = 0;
    unsigned window_ = kCycle - 1;  // the first one, whose beginning nobody knows, is not tried
    std::array<double, 2> each_{};  // nanoseconds for an event, first and second way
    bool first_is_faster_ = true;   // until it has been tried
};

}  // namespace varve
