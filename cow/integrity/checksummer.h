// Checksummer: makes the checksums of snapshots, in the background and in small steps.
// Not what verifies them: that is verified_read.h for reads, scrub.h for all of them.
// docs/design/checksums.md has the reasons.
//
// Belongs to the home executor; rows are read and sums computed on the loader, data is read on
// the disk's lane. Gives way to requests (pacer.h). Nothing waits for it. What is missing follows
// from the store: a snapshot without a mark (K row) is looked at again after a crash, and what has
// a checksum keeps it.
#pragma once

#include <functional>
#include <map>

#include "cow/head/committer.h"
#include "cow/integrity/frozen_walk.h"

namespace varve::cow {

class Checksummer {
  public:
    /// `folded` waits until the newest snapshot of a disk is in map rows; on home.
    Checksummer(Core& core, const Lanes& lanes, Catalog& catalog, Committer& committer,
                std::function<Task<void>(DiskId)> folded);

    /// Starts the background work with all snapshots that have no mark.
    void Start();
    /// Ends it after the transfer under way. REQUIRES: Core::closing is set.
    Task<void> Stop();
    /// A snapshot was taken.
    void Add(SnapshotId snapshot);
    /// Metadata has room again: what waited for it goes on.
    void Wake();
    /// Waits until all that can be done is done.
    Task<void> WaitIdle();

    /// Snapshots whose blocks may lack checksums.
    uint64_t pending() const;
    uint64_t summed_blocks() const { return summed_blocks_; }

  private:
    struct Sum {
        uint64_t place;
        Generation birth;
        uint32_t sum;
    };
    struct Work;
    Task<void> Run();
    Task<Status> ReadMarks();
    Task<Status> SumSnapshot(SnapshotId id);
    Task<Status> Store(SnapshotId id, std::vector<Sum> sums, bool mark);
    FrozenWalk::View ViewOf(const SnapshotRecord& record) const;

    Core& core_;
    const Lanes& lanes_;
    Catalog& catalog_;
    Committer& committer_;
    const std::function<Task<void>(DiskId)> folded_;
    std::map<Generation, SnapshotId> pending_;
    std::map<Generation, SnapshotId> given_up_;  // something of it cannot be read; until a restart
    bool running_ = false;
    bool stopping_ = false;
    bool idle_ = true;
    WaitList wake_;
    WaitList changed_;
    uint64_t summed_blocks_ = 0;
};

}  // namespace varve::cow
