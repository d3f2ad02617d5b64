// Strong integer types: a block, a chunk and a generation cannot be mixed up.
// Not arithmetic types: unwrap with .value, wrap with braces, both on purpose.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace varve {

template <typename Tag>
struct Id {
    uint64_t value = 0;
    friend constexpr auto operator<=>(Id, Id) = default;
};

using BlockIndex = Id<struct BlockTag>;       // a 4 KiB block of the pool's data file
using ChunkIndex = Id<struct ChunkTag>;       // 64 consecutive blocks of a disk
using Generation = Id<struct GenerationTag>;  // pool-wide, only grows; 0 is "before all"
using BranchId = Id<struct BranchTag>;        // one line of history
using DiskId = Id<struct DiskTag>;            // survives renames and restores
using SnapshotId = Id<struct SnapshotTag>;    // survives renames

}  // namespace varve

template <typename Tag>
struct std::hash<varve::Id<Tag>> {
    size_t operator()(varve::Id<Tag> id) const noexcept { return std::hash<uint64_t>()(id.value); }
};
