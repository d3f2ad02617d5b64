#include "cow/volume/lane.h"

namespace varve::cow {

Lanes::Lanes(Core& core, uint64_t cache_bytes) {
    const uint64_t share = cache_bytes / core.environment.lanes.size();
    for (const Lane& lane : core.environment.lanes) {
        lanes_.push_back(std::make_unique<LaneState>(lane, share));
        core.pacer.Watch(lanes_.back()->load);
    }
}

}  // namespace varve::cow
