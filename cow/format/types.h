// The engine's vocabulary: units and constants that every part of cow/ shares.
// Not the on-disk encoding: that is format.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/ids.h"
#include "base/result.h"

namespace varve::cow {

/// The unit of the map: what is copied, shared, owned and freed. Bytes.
inline constexpr uint64_t kBlockBytes = 4096;
/// Blocks in a chunk: the unit of a map row. 64, so that a chunk's blocks fit a 64-bit mask.
inline constexpr uint64_t kChunkBlocks = 64;
inline constexpr uint64_t kChunkBytes = kChunkBlocks * kBlockBytes;
/// Blocks in an allocator region: 16 MiB, a bitmap of 512 bytes.
inline constexpr uint64_t kRegionBlocks = 4096;
inline constexpr uint64_t kRegionBytes = kRegionBlocks * kBlockBytes;
/// Blocks of the data file whose checksums share a row.
inline constexpr uint64_t kSumsRowBlocks = 64;
/// The largest disk: the data file's block numbers have 48 bits in a run; half of that in bytes
/// is kept as the bound so that offset + length never overflows anything. 256 PiB.
inline constexpr uint64_t kDiskBytesMax = uint64_t{1} << 58;

/// `count` consecutive blocks of a chunk, from its block `first` on, that lie side by side in the
/// data file from `place` on and were all written first in generation `birth`.
struct Run {
    uint64_t place : 48;
    uint64_t first : 8;
    uint64_t count : 8;
    Generation birth;

    uint64_t end() const { return first + count; }
    friend bool operator==(const Run&, const Run&) = default;
};
static_assert(sizeof(Run) == 16);

/// Whether `count` places from `place` on can be a run's: all fit its bits, none is block 0, which
/// is the superblock. `count` is a chunk's at most.
inline bool ArePlaces(uint64_t place, uint64_t count) {
    constexpr uint64_t kPlaces = uint64_t{1} << 48;
    return place > 0 && place < kPlaces && count <= kPlaces - place;
}

/// The whole state of a chunk: runs in the order of `first`, not overlapping. No run: zeros.
using Runs = std::vector<Run>;

/// `count` blocks of the data file from `place` on.
struct Extent {
    uint64_t place = 0;
    uint64_t count = 0;
    friend bool operator==(const Extent&, const Extent&) = default;
};

/// A stretch of a disk as BLOCK_STATUS and sparse reads report it.
struct Allocation {
    uint64_t length = 0;   // bytes
    bool hole = false;     // not mapped, reads as zeros
    uint16_t changed = 0;  // for who compares it with bases, a bit for each
    uint32_t depth = 0;    // if asked for, and not a hole: see Layers
};

/// A stretch of a disk beside another state of it.
struct Delta {
    uint64_t length = 0;   // bytes
    bool changed = false;  // may differ
    bool zero = false;     // if changed: not mapped, reads as zeros now
    friend bool operator==(const Delta&, const Delta&) = default;
};

}  // namespace varve::cow
