// The row about the ring: where it lies, and whose frames in it count. docs/format.md.
#pragma once

#include <string>
#include <string_view>

#include "cow/format/types.h"

namespace varve::cow {

/// Row `G`.
struct RingRecord {
    uint64_t tag = 0;             // of the frames that count; 0: none do
    uint64_t segment_blocks = 0;  // a segment lies side by side
    std::vector<Extent> extents;  // of the data file; what a segment does not fit in is not used
    friend bool operator==(const RingRecord&, const RingRecord&) = default;
};

std::string RingKey();
std::string Encode(const RingRecord& record);
/// False if `value` is not such a record.
bool Decode(std::string_view value, RingRecord* record);

}  // namespace varve::cow
