#include "cow/volume/lane.h"

#include <algorithm>

namespace varve::cow {

Lanes::Lanes(Core& core, uint64_t cache_bytes) {
    const uint64_t share = cache_bytes / core.environment.lanes.size();
    for (const Lane& lane : core.environment.lanes) {
        lanes_.push_back(std::make_unique<LaneState>(lane, share));
        core.pacer.Watch(lanes_.back()->load);
    }
    disks_.resize(lanes_.size());
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

}  // namespace varve::cow
