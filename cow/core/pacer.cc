#include "cow/core/pacer.h"

#include <algorithm>

namespace varve::cow {
namespace {

/// Rest for each microsecond of work. In its steps a sweep leaves a load some quarter of its rate,
/// on two processors, so of 1/20 of the time it costs a twenty-fifth.
constexpr int64_t kRestPerWork = 19;
/// Rest for one step at most: with this the work goes on, however slow the machine.
constexpr int64_t kRestUsMax = 500'000;
/// Lanes without requests for so long are idle. A busy client on a busy machine may be kept from
/// running for some milliseconds.
constexpr int64_t kIdleUs = 10'000;
/// How often a rest looks whether it is still needed. Each look wakes two threads.
constexpr int64_t kLookUs = 5000;

}  // namespace

void Pacer::HurryFor(Work work, int64_t us) {
    if (clock_) hurry_until_us_[Index(work)] = clock_->NowUs() + us;
}

bool Pacer::Hurried(Work work) const {
    return closing_ || hurries_[Index(work)] > 0 || clock_->NowUs() < hurry_until_us_[Index(work)];
}

/// Looks at the lanes, and says whether no request has been seen for a while.
bool Pacer::Idle(int64_t now_us) {
    uint64_t served = 0;
    bool under_way = false;
    for (const LoadMeter* meter : meters_) {
        const uint64_t ended = meter->ended();
        served += ended;
        under_way |= meter->begun() != ended;
    }
    if (under_way || served != served_) busy_us_ = now_us;
    served_ = served;
    return now_us - busy_us_ >= kIdleUs;
}

Pacer::Step Pacer::Begin() {
    if (!clock_) return Step();
    const int64_t now = clock_->NowUs();
    Idle(now);
    return {now};
}

Task<void> Pacer::Rest(Step step, Work work) {
    if (!clock_ || Hurried(work)) co_return;
    int64_t now = clock_->NowUs();
    if (Idle(now)) co_return;
    const int64_t rest = std::min(kRestPerWork * (now - step.began_us), kRestUsMax);
    rest_until_us_ = std::max(rest_until_us_, now) + rest;
    while (now < rest_until_us_ && !Hurried(work)) {
        co_await Sleep(*clock_, std::min(rest_until_us_ - now, kLookUs), home_);
        now = clock_->NowUs();
        if (Idle(now)) rest_until_us_ = now;  // for the other workers as well
    }
}

}  // namespace varve::cow
