// Sweep: finds the map rows and blocks of one chunk that no view can see any more.
// Plans only: the caller commits a plan, or counts it. Blocking calls on a consistent view.
//
// Who may free a block? A head frees a block of its present generation when it drops it: nobody
// else has seen that generation. Everything else is decided here, so that nothing is freed twice:
//   - when a view is deleted, a job (J row) says where it stood;
//   - when a head drops an older block that no snapshot below it on its line holds, or supersedes
//     an older row that no such snapshot resolves to, its commit leaves a note (W row).
// A sweep looks at all rows and notes of one chunk in one region (history.h), keeps what the
// region's live views resolve to, and gives back the rest in one batch: rows, notes and blocks
// together. Rows and notes are the only places that name a block, so a block that a sweep frees
// is named nowhere afterwards, and no later sweep can meet it again.
#pragma once

#include <string>
#include <vector>

#include "cow/history/history.h"
#include "cow/store/stores.h"
#include "cow/volume/map_reader.h"

namespace varve::cow {

struct SweepPlan {
    std::vector<std::string> deletes;  // keys of rows, their touched marks, and notes
    std::vector<Extent> freed;
    uint64_t freed_blocks = 0;
};

/// Plans the sweeps of chunks of one region, on one view of the store.
class Sweeper {
  public:
    /// `region` and `view` must be taken at the same moment on the home executor.
    Sweeper(MetadataView& view, Region region);

    /// Adds what is dead of `chunk` to `plan`. kDamaged if a row cannot be read.
    Status Sweep(ChunkIndex chunk, SweepPlan& plan);

  private:
    Status CollectNotes(ChunkIndex chunk, SweepPlan& plan, std::vector<Runs>& dead);

    MetadataView& view_;
    const Region region_;
    std::unique_ptr<Cursor> map_;
    std::unique_ptr<Cursor> notes_;
};

/// The chunks that may have something dead after a view at one place was deleted: a dead row is
/// one that was touched below the view and again above it, so it is enough to walk whichever of
/// the two sides ends first. Both are walked in turns.
class CandidateScan {
  public:
    CandidateScan(Line below, Line above);

    /// Appends at most `most` candidates to `chunks`, with repetitions possible. Goes on where it
    /// stopped, on a newer view if need be. done() afterwards if that was all.
    Status Next(MetadataView& view, size_t most, std::vector<ChunkIndex>& chunks);
    bool done() const { return done_; }

  private:
    struct Side {
        Line stretches;
        size_t index = 0;
        std::string resume;  // key to go on from in stretches[index]; empty: its beginning
    };
    Status Step(MetadataView& view, Side& side, size_t most, std::vector<ChunkIndex>& chunks);

    Side below_, above_;
    bool done_ = false;
};

}  // namespace varve::cow
