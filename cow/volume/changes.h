// What changed between two states of a disk, from map rows alone: docs/design/changes.md.
// Blocking calls on a consistent view, made on the loader; what a head has in memory is given.
#pragma once

#include <vector>

#include "cow/history/history.h"
#include "cow/volume/map_reader.h"

namespace varve::cow {

/// Bases of one export, at most.
inline constexpr size_t kBasesMax = 8;

/// What a view is compared with. Made on home for one view; fixed once made; any thread.
struct Base {
    enum class Kind {
        kSnapshot,  // its rows are there
        kBelow,     // a bookmark that the view comes from
        kUnknown,   // any other bookmark: everything differs
    };
    Kind kind = Kind::kUnknown;
    Generation generation;  // its own
    uint64_t size = 0;      // bytes
    Line line;              // of a snapshot's rows
    Line apart;             // where one of the two may have rows that the other does not see
};

/// Which snapshots a view comes from, for qemu:allocation-depth.
struct Layers {
    uint64_t version = 0;           // of the history that they were taken from
    Generation newest;              // the view's own generation
    std::vector<Generation> below;  // of live snapshots, ascending

    /// 1: born in the newest generation; else as many live snapshots have the block, and 1; 2 at
    /// least.
    uint32_t DepthOf(Generation birth) const;
};

/// A chunk as a head has it in memory.
struct LiveChunk {
    ChunkIndex chunk;
    Runs runs;
    bool touched = false;  // it has changes, or its row is newer than what both come from
};

/// Blocks of a chunk, a bit each.
struct ChangedChunk {
    ChunkIndex chunk;
    uint64_t changed = 0;  // may differ from the base
    uint64_t mapped = 0;   // now
};

/// What a step found. Chunks from the first asked for up to `next` that are not in `chunks` did not
/// change; compared with an unknown base, they are not mapped.
struct FoundChanges {
    std::vector<ChangedChunk> chunks;  // ascending
    ChunkIndex next;
};

/// Compares chunks [first, end) of the view with `line`, or some of them, at least one; whoever
/// needs few stretches says so by `most`, about as many changed chunks. `live`: those of them that
/// the view has in memory, ascending. kDamaged names a row that cannot be read;
/// other errors are the store's. Costs some milliseconds at most.
Result<FoundChanges> FindChanges(MetadataView& view, const Line& line, const Base& base,
                                 ChunkIndex first, ChunkIndex end, uint64_t most,
                                 const std::vector<LiveChunk>& live);

/// Whether the row lies in one of the stretches.
bool LiesIn(const Line& stretches, const RowAt& row);

}  // namespace varve::cow
