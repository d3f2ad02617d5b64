// FreedCount: how many blocks would be free without some views of one region of the tree.
// Counts only, in pieces that are bounded by what they ask of the store, not by chunks: a chunk may
// cost two looks, or thousands where there are as many clones. Blocking calls.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cow/format/format.h"
#include "cow/history/losses.h"
#include "cow/reclaim/sweep.h"
#include "cow/store/stores.h"

namespace varve::cow {

/// What has died already and waits for the reclaimer.
struct Pending {
    bool any = false;  // notes, too
    std::vector<JobRecord> jobs;
};

/// Counts what is asked of a view: places sought, and rows passed.
class CountedView : public MetadataView {
  public:
    explicit CountedView(MetadataView& view) : view_(view) {}
    Result<std::optional<std::string>> Get(std::string_view key) override;
    std::unique_ptr<Cursor> Range(std::string_view lower, std::string_view upper,
                                  uint64_t deleted_most) override;
    uint64_t moves() const { return moves_; }

  private:
    MetadataView& view_;
    uint64_t moves_ = 0;
};

/// Counts what would be dead without the views of a loss, less what is dead already.
///
/// To a sweep, what waits elsewhere in the region holds what it names. Here it is dead: so both
/// sweeps, with the views and without them, also begin where deletions that are under way did, and
/// in each chunk where notes on it were left. What is dead and below neither does not exist.
class FreedCount {
  public:
    /// All of one moment on the home executor.
    FreedCount(MetadataView& view, Loss loss, const Pending& pending);

    /// Does a piece: some milliseconds, but at least a chunk.
    Status Step();
    bool done() const { return scan_.done() && notes_found_ && next_ == chunks_.size(); }
    uint64_t blocks() const { return blocks_; }

  private:
    /// The region, with the views or without them.
    struct Side {
        Side(MetadataView& view, Region whole, std::vector<int> begin, SweepHints& hints,
             RowFilter& filter)
            : region(std::make_shared<const Region>(std::move(whole))),
              from(std::move(begin)),
              sweeper(view, region, hints, filter) {}
        void AddJobs(const std::vector<JobRecord>& jobs);
        void AddNote(BranchId branch, ChunkIndex chunk, Generation generation);
        Status Sweep(ChunkIndex chunk, SweepPlan& plan);

        const std::shared_ptr<const Region> region;
        std::vector<int> from;                          // segments to sweep from
        std::vector<std::pair<ChunkIndex, int>> notes;  // further ones; by chunk, once all are in
        Sweeper sweeper;
    };
    Status Collect();
    Status FindNotes();
    Status SweepChunk();

    CountedView view_;
    SweepHints hints_;
    RowFilter filter_{16, 1 << 20};  // of the one view; there may be a count for each client
    Side with_, without_;
    CandidateScan scan_;
    std::vector<ChunkIndex> chunks_;
    size_t sorted_ = 0;  // of them
    size_t next_ = 0;    // of them
    bool notes_found_;
    std::string notes_from_ = "W";
    uint64_t blocks_ = 0;
};

}  // namespace varve::cow
