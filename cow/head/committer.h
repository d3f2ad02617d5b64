// Committer: every change of the metadata goes through here, in groups.
//
// The rule of the pool: data, then metadata, then the answer. A head hands in its map changes only
// after the data they name has been synced; this makes one batch of all that has been handed in,
// commits it durably, and only then lets the waiting coroutines go on. What is handed in while a
// commit runs shares the next one. After a failed commit nothing is committed any more.
//
// Belongs to the home executor, which it blocks while the store commits.
#pragma once

#include <functional>
#include <vector>

#include "cow/history/catalog.h"
#include "cow/space/leases.h"
#include "cow/volume/lane.h"

namespace varve::cow {

/// What a change sees while it is built into the next batch.
struct CommitContext {
    Batch& batch;
    Catalog& catalog;
    Allocator& allocator;
    std::vector<Extent>& freed;  // may be used again once the commit is durable and reads are done
    bool noted = false;          // there is work for the reclaimer
};

/// Builds a change: into the catalog, the allocator and the batch, without suspension. An error
/// means that it added nothing.
using Change = std::function<Status(CommitContext&)>;

class Committer {
  public:
    /// `wake_reclaimer` is called on home after commits that left work for it.
    Committer(Core& core, const Lanes& lanes, Catalog& catalog, Allocator& allocator,
              Leases& leases, std::function<void()> wake_reclaimer);

    /// Runs on home; resumes on `resume_on` when `change` is durable, or with why it is not.
    Task<Status> Commit(Change change, Executor& resume_on);

    /// Waits until what was handed in before is committed and the blocks it freed are free.
    Task<void> Settled();

    /// Waits until no commit runs and all freed blocks are free.
    Task<void> Idle();

    uint64_t commits() const { return commits_; }
    uint64_t released_blocks() const { return released_blocks_; }
    /// Freed blocks are waiting for reads to finish.
    bool resting() const { return resting_.count() > 0; }

  private:
    struct Request;
    Task<void> Run();
    Task<void> Rest(std::vector<Extent> freed);

    Core& core_;
    const Lanes& lanes_;
    Catalog& catalog_;
    Allocator& allocator_;
    Leases& leases_;
    const std::function<void()> wake_reclaimer_;
    std::vector<Request*> queue_;
    bool running_ = false;
    Gate resting_;
    WaitList idle_;
    uint64_t commits_ = 0;
    uint64_t released_blocks_ = 0;
};

}  // namespace varve::cow
