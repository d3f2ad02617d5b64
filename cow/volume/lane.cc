#include "cow/volume/lane.h"

#include <algorithm>
#include <utility>

namespace varve::cow {

Lanes::Lanes(Core& core, uint64_t cache_bytes)
    : core_(core), memory_(cache_bytes, core.environment.lanes.size()) {
    for (const Lane& lane : core.environment.lanes) {
        const auto index = static_cast<uint32_t>(lanes_.size());
        lanes_.push_back(std::make_unique<LaneState>(core, lane, index, memory_));
        core.pacer.Watch(lanes_.back()->load);
    }
    disks_.resize(lanes_.size());
    begun_.resize(lanes_.size());
}

LaneState& Lanes::Add(DiskId disk) {
    const auto fewest = std::min_element(disks_.begin(), disks_.end());
    const auto index = static_cast<size_t>(fewest - disks_.begin());
    VARVE_CHECK(places_.emplace(disk, index).second);
    ++*fewest;
    return *lanes_[index];
}

void Lanes::Remove(DiskId disk) {
    const auto place = places_.find(disk);
    VARVE_CHECK(place != places_.end());
    --disks_[place->second];
    places_.erase(place);
}

/// What each lane may keep.
std::vector<uint64_t> Lanes::Targets(ShareOf share, const std::vector<bool>& active) {
    CacheBudget& budget = share(*lanes_.front()).budget();
    const auto working = std::max<int64_t>(1, std::count(active.begin(), active.end(), true));
    const uint64_t equal = budget.total() / static_cast<uint64_t>(working);
    bool lacking = false, poor = false;  // some lane does; though it has less than an equal share
    std::vector<uint64_t> targets;
    for (const auto& lane : lanes_) {
        const bool hungry = share(*lane).TakeHungry();
        lacking |= hungry;
        poor |= hungry && share(*lane).limit() < equal;
        targets.push_back(share(*lane).limit());
    }
    budget.SetCap(poor ? equal : budget.total());
    if (!lacking) return targets;
    for (size_t i = 0; i < targets.size(); ++i) {
        const uint64_t limit = targets[i];
        uint64_t target = std::min(limit, share(*lanes_[i]).used() + budget.slab());
        if (!active[i]) target = std::min(target, limit - limit / 4);
        if (poor && limit > equal) target = std::min(target, limit - (limit - equal + 3) / 4);
        targets[i] = std::min(limit, std::max(target, budget.kept()));
    }
    return targets;
}

Task<void> Lanes::Balance() {
    std::vector<bool> active;
    for (size_t i = 0; i < lanes_.size(); ++i) {
        const uint64_t begun = lanes_[i]->load.begun();
        active.push_back(begun != std::exchange(begun_[i], begun));
    }
    const ShareOf chunks_of = [](LaneState& lane) -> CacheShare& { return lane.cache.share(); };
    const ShareOf sums_of = [](LaneState& lane) -> CacheShare& { return lane.sums.share(); };
    const std::vector<uint64_t> chunks = Targets(chunks_of, active);
    const std::vector<uint64_t> sums = Targets(sums_of, active);
    for (size_t i = 0; i < lanes_.size(); ++i) {
        LaneState& lane = *lanes_[i];
        const bool less = chunks[i] < chunks_of(lane).limit() || sums[i] < sums_of(lane).limit();
        if (!less) continue;
        co_await Hop(lane.executor);
        lane.cache.GiveBack(chunks[i]);
        lane.sums.GiveBack(sums[i]);
        co_await Hop(core_.home());
    }
}

}  // namespace varve::cow
