// Sweep: finds the map rows and blocks of one chunk that no view can see any more.
// Plans only: the caller commits a plan, or counts it. Blocking calls on a consistent view.
//
// Who may free a block? A head frees a block of its present generation when it drops it: nobody
// else has seen that generation. Everything else is decided here, so that nothing is freed twice:
//   - when a view is deleted, a job (J row) says where it stood;
//   - when a head drops an older block that no snapshot below it on its line holds, or supersedes
//     an older row that no such snapshot resolves to, its commit leaves a note (W row).
// A sweep looks at one chunk in one region (history.h), from the places where something may have
// died down to the region's floor: no other row can have lost a reader. What is dead goes in one
// batch: rows, notes and blocks together. Rows and notes are the only places that name a block, so
// a block that a sweep frees must be named nowhere afterwards: whatever any other row or note of
// the region names is held, dead or not; its own sweep frees it then.
//
// A region may have thousands of branches (clones of a deleted snapshot). Whether one of them still
// reads a row, or names a block, is asked of one after the other until one says yes, beginning with
// the one that said yes last time. None says yes again once it has said no, so all the asking that
// is in vain costs a step for each branch and chunk, once.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cow/history/history.h"
#include "cow/reclaim/dead_blocks.h"
#include "cow/reclaim/row_filter.h"
#include "cow/store/stores.h"
#include "cow/volume/map_reader.h"

namespace varve::cow {

struct SweepPlan {
    std::vector<std::string> deletes;  // keys of rows, their touched marks, and notes
    std::vector<Runs> freed;           // by the row or note that named them
    uint64_t freed_blocks = 0;
};

/// Who said yes last time. Hints: any answer is only where the asking begins.
class SweepHints {
  public:
    /// The branch that was remembered, or 0.
    BranchId Find(BranchId below, ChunkIndex chunk) const;
    void Set(BranchId below, ChunkIndex chunk, BranchId witness);

  private:
    static constexpr size_t kMost = 1 << 16;  // some 3 MiB
    struct Hash {
        size_t operator()(const std::pair<BranchId, ChunkIndex>& key) const {
            return key.first.value * 0x9e3779b97f4a7c15 ^ key.second.value;
        }
    };
    std::unordered_map<std::pair<BranchId, ChunkIndex>, BranchId, Hash> hints_;
};

/// Plans the sweeps of chunks of one region, on one view of the store.
class Sweeper {
  public:
    /// `region` and `view` must be taken at the same moment on the home executor, and `filter`
    /// must have forgotten what changed before.
    Sweeper(MetadataView& view, std::shared_ptr<const Region> region, SweepHints& hints,
            RowFilter& filter)
        : view_(view), region_(std::move(region)), hints_(hints), filter_(filter) {}

    /// Adds what is dead of `chunk` to `plan`. `from`: the segments in which a view was deleted or
    /// a note was left. kDamaged if a row or a note cannot be read, for nobody knows what it names:
    /// then the plan is as it was.
    Status Sweep(ChunkIndex chunk, const std::vector<int>& from, SweepPlan& plan);

    const Region& region() const { return *region_; }

  private:
    /// What a segment has of the present chunk.
    struct Found {
        std::vector<MapRow> rows;        // newest first
        std::vector<Runs> notes;         // of heads that stood in it
        std::vector<std::string> marks;  // the notes' keys
    };
    /// The segments from which a sweep begins down to the floor. Nearly always those of the chunk
    /// before: a line of 100,000 views is not followed for each.
    struct Path {
        std::vector<int> from;
        std::vector<int> segments;  // highest first
        Line stretches;
        std::vector<int> forks;  // those of which something forks off that is not in `segments`

        bool Contains(int segment) const;
    };
    const Segment& At(int index) const { return region_->segments[static_cast<size_t>(index)]; }
    void Prepare();
    void FindPath(const std::vector<int>& from);
    Status ReadPath(ChunkIndex chunk);
    Result<Found*> Read(int segment, ChunkIndex chunk);
    template <typename F>
    Status ReadNotes(const Stretch& stretch, ChunkIndex chunk, F&& take);
    size_t FirstToAsk(int segment, ChunkIndex chunk) const;
    Result<bool> Needed(int segment, ChunkIndex chunk);
    Status KeepNamed(ChunkIndex chunk, const std::vector<Runs>& kept, DeadBlocks& dead);
    Status KeepNamedAbove(int segment, ChunkIndex chunk, DeadBlocks& dead);
    Status RemoveNamed(int segment, ChunkIndex chunk, DeadBlocks& dead);

    MetadataView& view_;
    const std::shared_ptr<const Region> region_;
    SweepHints& hints_;
    RowFilter& filter_;
    std::vector<std::vector<int>> children_;  // of each segment; empty: nothing was swept yet
    Path path_;
    // Of the present chunk:
    std::map<int, Found, std::greater<>> on_path_;  // of those that have something, highest first
    std::unordered_map<int, Found> beside_;         // of others that were read
};

/// The chunks that may have something dead after a view at one place was deleted: a dead row is
/// one that was touched below the view and again above it, so it is enough to walk whichever of
/// the two sides ends first. Both are walked in turns.
class CandidateScan {
  public:
    /// The marks from which a scan goes on, on either side; empty: from its beginning.
    struct Place {
        std::string below, above;
        bool gap_below = false, gap_above = false;
    };

    /// `place`: of an earlier scan from the same view, even if the tree has changed since.
    CandidateScan(Line below, Line above, const Place& place);
    CandidateScan(Line below, Line above) : CandidateScan(std::move(below), std::move(above), {}) {}

    /// Appends at most `most` candidates to `chunks`, with repetitions possible. Goes on where it
    /// stopped, on a newer view if need be. done() afterwards if that was all. `filter`, if there
    /// is one, tells which branches have no rows; it need not know what changed since the scan's
    /// view was deleted, for that is no candidate.
    Status Next(MetadataView& view, RowFilter* filter, size_t most,
                std::vector<ChunkIndex>& chunks);
    bool done() const { return done_; }
    /// When done: one of the sides was walked whole, so there are no other candidates.
    bool complete() const { return complete_; }
    /// After an error: goes on with the next stretch of that side.
    void Skip();
    /// REQUIRES: not done.
    Place place() const { return {PlaceOf(below_), PlaceOf(above_), below_.gap, above_.gap}; }

  private:
    struct Side {
        Line stretches;
        size_t index = 0;
        std::string resume;  // key to go on from in stretches[index]; empty: its beginning
        bool gap = false;    // something was skipped
        bool ended() const { return index == stretches.size(); }
    };
    static Side SideAt(Line line, const std::string& place, bool gap);
    void LookForEnd();
    static std::string PlaceOf(const Side& side);
    Status Step(MetadataView& view, RowFilter* filter, Side& side, size_t most,
                std::vector<ChunkIndex>& chunks);

    Side below_, above_;
    bool in_above_ = false;  // was the last to be walked
    bool done_ = false;
    bool complete_ = false;
};

}  // namespace varve::cow
