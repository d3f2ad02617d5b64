// Ring: the segments of the data file that lanes write frames to, and which of them are free.
// Not what is in them: lane_journal.h writes it, ring_reader.h reads it.
#pragma once

#include <mutex>
#include <optional>
#include <vector>

#include "cow/format/ring_record.h"

namespace varve::cow {

class LaneJournal;

/// A block for each lane, of which a sector is used: so a power cut cannot tear it.
inline constexpr uint64_t kSlotBytes = kBlockBytes;

/// Any thread. Lanes come here once for each segment.
class Ring {
  public:
    Ring(const RingRecord& record, uint64_t lanes);

    /// Of `bytes` of ring and so many lanes: blocks of a segment, and blocks of ring at least.
    static uint64_t SegmentBlocks(uint64_t bytes, uint64_t lanes);
    static uint64_t LeastBlocks(uint64_t lanes);

    uint64_t tag() const { return tag_; }
    uint64_t segment_bytes() const { return segment_bytes_; }
    size_t segments() const { return offsets_.size(); }
    /// Bytes from the start of the data file.
    uint64_t offset(size_t segment) const { return offsets_[segment]; }
    /// The same of a lane's slot. They lie in front of the segments.
    uint64_t slot(uint32_t lane) const { return slots_ + lane * kSlotBytes; }

    /// It takes segments from now on, and hears when there is need.
    void Join(LaneJournal& lane);
    /// Takes a free one. If there is none, all lanes are asked to fold, and `lane` hears when one
    /// was given back.
    std::optional<uint32_t> Take(LaneJournal& lane);
    void Give(uint32_t segment);
    /// Less than half of it is free: lanes should fold.
    bool crowded() const;
    /// Somebody waits for a segment.
    bool hungry() const;

  private:
    const uint64_t tag_;
    const uint64_t segment_bytes_;
    uint64_t slots_ = 0;
    std::vector<uint64_t> offsets_;
    mutable std::mutex mutex_;
    std::vector<uint32_t> free_;
    std::vector<LaneJournal*> lanes_, hungry_;
};

}  // namespace varve::cow
