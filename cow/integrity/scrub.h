// Scrubber: reads all frozen blocks and compares them with their checksums, on command.
// Not a repair: there is one copy of a block. Not `check`, which verifies the metadata.
//
// Belongs to the home executor; works in the steps of frozen_walk.h, as the checksummer does.
#pragma once

#include <map>
#include <set>

#include "cow/history/catalog.h"
#include "cow/integrity/frozen_walk.h"
#include "cow/integrity/scrub_report.h"

namespace varve::cow {

class Scrubber {
  public:
    /// `folded` waits until the newest snapshot of a disk is in map rows; on home.
    Scrubber(Core& core, const Lanes& lanes, Catalog& catalog,
             std::function<Task<void>(DiskId)> folded)
        : core_(core), lanes_(lanes), catalog_(catalog), folded_(std::move(folded)) {}

    /// Verifies `disk` with its snapshots, or all. kBusy if it runs already.
    Task<Result<ScrubReport>> Run(std::optional<DiskId> disk);

    bool running() const { return running_; }
    /// Of the run that is going on, or the last one.
    uint64_t verified_blocks() const { return verified_; }

  private:
    struct View {
        DiskId disk;          // of a fork: any of the family
        SnapshotId snapshot;  // 0: the head, or a fork
        Generation generation;
        BranchId fork;  // where others branched off at `generation`, and nobody stands; 0: none
    };
    struct Name {
        std::string disk, snapshot;
        Line line;
    };
    std::vector<View> PlanViews(std::optional<DiskId> disk) const;
    void PlanForks(std::vector<View>* views) const;
    bool Exists(const View& view) const;
    std::optional<Generation> CoveredBelow(BranchId branch, Generation from) const;
    BranchId BranchOf(const View& view) const;
    std::optional<FrozenWalk::View> WalkOf(const View& view) const;
    Task<Status> ScrubView(const View& view, ScrubReport* report);
    std::vector<Name> NamesBeside(const View& view) const;
    Task<Status> Tell(const View& view, std::vector<FrozenBlock> damaged, ScrubReport* report);

    Core& core_;
    const Lanes& lanes_;
    Catalog& catalog_;
    const std::function<Task<void>(DiskId)> folded_;
    bool running_ = false;
    std::atomic<uint64_t> verified_ = 0;
    // By branch: generations of which this run has been through all that is visible there.
    std::map<BranchId, std::set<Generation>> covered_;
    std::set<std::pair<uint64_t, Generation>> told_;
};

}  // namespace varve::cow
