// What a scrub found. Not how it looks: that is scrub.h.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace varve::cow {

/// A frozen block that does not hold what it held, as one of the views that see it.
struct ScrubDamage {
    std::string disk;
    std::string snapshot;  // empty: the disk itself
    uint64_t offset = 0;   // bytes, in the disk
    uint64_t place = 0;    // in the data file, blocks
    bool unreadable = false;
};

struct ScrubReport {
    std::vector<ScrubDamage> damage;  // at most 1000
    uint64_t verified_blocks = 0;     // compared; a block may be met more than once
    uint64_t unverified_blocks = 0;   // frozen, but without a checksum yet
    uint64_t damaged_blocks = 0;      // each once
    bool ok() const { return damaged_blocks == 0; }
};

}  // namespace varve::cow
