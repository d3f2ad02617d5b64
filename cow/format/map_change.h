// A change of a disk's map, as the journal keeps it, and whose it is.
#pragma once

#include "cow/format/types.h"

namespace varve::cow {

/// `count` blocks of a chunk, from `first` on, lie side by side from `place` on now, born in the
/// generation that the change is of. Place 0: they are not mapped any more.
struct MapChange {
    ChunkIndex chunk;
    uint64_t place : 48;
    uint64_t first : 8;
    uint64_t count : 8;
    friend bool operator==(const MapChange&, const MapChange&) = default;
};
static_assert(sizeof(MapChange) == 16);

inline MapChange MapChangeOf(ChunkIndex chunk, uint64_t first, uint64_t count, uint64_t place) {
    MapChange change{.chunk = chunk};
    change.first = first;
    change.count = count;
    change.place = place;
    return change;
}

/// The largest index a chunk may have, and one more.
inline constexpr uint64_t kChunksMax = kDiskBytesMax / kChunkBytes;

inline bool IsSound(const MapChange& change) {
    return change.count > 0 && change.first + change.count <= kChunkBlocks &&
           change.chunk.value < kChunksMax &&
           (change.place == 0 || ArePlaces(change.place, change.count));
}

/// Whose map changed.
struct MapOwner {
    DiskId disk;
    BranchId branch;
    Generation generation;
    friend bool operator==(const MapOwner&, const MapOwner&) = default;
};

}  // namespace varve::cow
