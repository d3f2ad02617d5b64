#include "cow/pacer.h"

#include <algorithm>
#include <utility>

namespace varve::cow {
namespace {

/// Rest for each microsecond of work.
constexpr int64_t kRestPerWork = 9;
/// Rest for one step at most: with this the work goes on, however slow the machine.
constexpr int64_t kRestUsMax = 500'000;
/// How often a rest looks whether it is still needed.
constexpr int64_t kLookUs = 2000;

}  // namespace

void Pacer::HurryFor(Work work, int64_t us) {
    if (clock_) hurry_until_us_[Index(work)] = clock_->NowUs() + us;
}

bool Pacer::Hurried(Work work) const {
    return closing_ || hurries_[Index(work)] > 0 || clock_->NowUs() < hurry_until_us_[Index(work)];
}

uint64_t Pacer::Served() const {
    uint64_t served = 0;
    for (const LoadMeter* meter : meters_) served += meter->ended();
    return served;
}

bool Pacer::Busy(uint64_t served_before, uint64_t served_now) const {
    return served_now != served_before ||
           std::any_of(meters_.begin(), meters_.end(),
                       [](const LoadMeter* meter) { return meter->begun() != meter->ended(); });
}

Pacer::Step Pacer::Begin() const {
    if (!clock_) return Step();
    return {clock_->NowUs(), Served()};
}

Task<void> Pacer::Rest(Step step, Work work) {
    if (!clock_ || Hurried(work)) co_return;
    int64_t now = clock_->NowUs();
    uint64_t served = Served();
    if (!Busy(step.served, served)) co_return;
    const int64_t rest = std::min(kRestPerWork * (now - step.began_us), kRestUsMax);
    rest_until_us_ = std::max(rest_until_us_, now) + rest;
    while (now < rest_until_us_ && !Hurried(work)) {
        co_await Sleep(*clock_, std::min(rest_until_us_ - now, kLookUs), home_);
        now = clock_->NowUs();
        const uint64_t before = std::exchange(served, Served());
        if (!Busy(before, served)) rest_until_us_ = now;  // for the other workers as well
    }
}

}  // namespace varve::cow
