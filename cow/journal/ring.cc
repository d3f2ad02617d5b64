#include "cow/journal/ring.h"

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "cow/journal/lane_journal.h"

namespace varve::cow {
namespace {

/// Each lane keeps the one it writes to, and may need another before it can fold.
constexpr uint64_t kSegmentsOfLane = 4;
constexpr uint64_t kSegmentBlocksMost = 64;
/// What one request reserves at most fits.
constexpr uint64_t kSegmentBlocksLeast = 4;
constexpr uint64_t kSegmentsWanted = 64;

/// Blocks: slots must fit, and some entries.
uint64_t LeastOfSegment(uint64_t lanes) {
    return std::bit_ceil(std::max(kSegmentBlocksLeast, lanes * kSlotBytes / kBlockBytes));
}

}  // namespace

uint64_t Ring::SegmentBlocks(uint64_t bytes, uint64_t lanes) {
    const uint64_t segments = std::max(kSegmentsWanted, kSegmentsOfLane * lanes);
    const uint64_t least = LeastOfSegment(lanes);
    uint64_t blocks = std::max(kSegmentBlocksMost, least);
    while (blocks > least && blocks * segments * kBlockBytes > bytes) blocks /= 2;
    return blocks;
}

/// The first segment is for slots.
uint64_t Ring::LeastBlocks(uint64_t lanes) {
    return (1 + kSegmentsOfLane * lanes) * LeastOfSegment(lanes);
}

Ring::Ring(const RingRecord& record, uint64_t lanes)
    : tag_(record.tag), segment_bytes_(record.segment_blocks * kBlockBytes) {
    for (const Extent& extent : record.extents) {
        for (uint64_t at = 0; at + record.segment_blocks <= extent.count;
             at += record.segment_blocks) {
            offsets_.push_back((extent.place + at) * kBlockBytes);
        }
    }
    VARVE_CHECK(offsets_.size() > 1 && lanes * kSlotBytes <= segment_bytes_);
    slots_ = offsets_.front();
    offsets_.erase(offsets_.begin());
    // Those at the front are taken first.
    for (size_t i = offsets_.size(); i-- > 0;) free_.push_back(static_cast<uint32_t>(i));
}

void Ring::Join(LaneJournal& lane) {
    const std::lock_guard lock(mutex_);
    lanes_.push_back(&lane);
}

std::optional<uint32_t> Ring::Take(LaneJournal& lane) {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
        if (std::find(hungry_.begin(), hungry_.end(), &lane) == hungry_.end()) {
            hungry_.push_back(&lane);
        }
        for (LaneJournal* other : lanes_) other->AskToFold();
        return std::nullopt;
    }
    const uint32_t segment = free_.back();
    free_.pop_back();
    return segment;
}

void Ring::Give(uint32_t segment) {
    const std::lock_guard lock(mutex_);
    // The one that was given back last is taken last.
    free_.insert(free_.begin(), segment);
    for (LaneJournal* lane : hungry_) lane->TellOfRoom();
    hungry_.clear();
}

bool Ring::hungry() const {
    const std::lock_guard lock(mutex_);
    return !hungry_.empty();
}

bool Ring::crowded() const {
    const std::lock_guard lock(mutex_);
    return 2 * free_.size() < offsets_.size();
}

}  // namespace varve::cow
