// RingReader: what the frames of a ring say after a crash.
// Not recovery: whether what an entry maps is really there is for its user to find out.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/result.h"
#include "cow/format/frame.h"

namespace varve::cow {

class RingReader {
  public:
    explicit RingReader(uint64_t tag) : tag_(tag) {}

    /// The bytes of a segment, and of a lane's slot; in any order.
    void AddSegment(std::string segment);
    void AddSlot(std::string_view slot);

    /// Calls `each` for entries that count, those of a lane in the order in which they happened.
    /// `durable`: the blocks are known to hold what was written to them; else it must be verified.
    /// kDamaged if frames are missing that were durable, or one breaks a rule of the format.
    using Each = std::function<void(const FrameEntry& entry, bool durable)>;
    Status ForEach(const Each& each);

  private:
    struct Frame {
        FrameHeader header;
        size_t segment;  // in segments_
        size_t offset;
    };
    using Frames = std::vector<Frame>;

    Status ForEachOfLane(Frames::const_iterator begin, Frames::const_iterator end,
                         const Each& each) const;

    const uint64_t tag_;
    std::vector<std::string> segments_;
    Frames frames_;
};

}  // namespace varve::cow
