// Committer: every change of the metadata goes through here, in groups.
//
// The rule of the pool: data, then metadata, then the answer. A head hands in its map changes only
// after the data they name has been synced; this makes one batch of all that has been handed in,
// commits it durably, and only then lets the waiting coroutines go on. What is handed in while a
// commit runs shares the next one. After a failed commit nothing is committed any more.
//
// Two executors work here (docs/design/committing.md). Home builds changes, into the catalog, the
// allocator and a batch, when no batch it built is under way: so the catalog is ahead of the store
// by one batch at most, and never built upon if that fails. The environment's committer stores
// batches, and blocks meanwhile; it takes rows that need no building straight from the lanes, and
// answers lanes itself. Whatever follows from such an answer comes to home behind the news that
// the commit is done.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "cow/history/catalog.h"
#include "cow/space/leases.h"
#include "cow/volume/lane.h"

namespace varve::cow {

/// A note that a head of `branch` left in `generation`.
struct NotePlace {
    BranchId branch;
    Generation generation;
    ChunkIndex chunk;
};

/// What a change sees while it is built into the next batch.
struct CommitContext {
    Batch& batch;
    Catalog& catalog;
    Allocator& allocator;
    std::vector<Extent>& freed;  // may be used again once the commit is durable and reads are done
    bool noted = false;          // there is work for the reclaimer, these notes for instance:
    std::vector<NotePlace> notes;
};

/// Builds a change: into the catalog, the allocator and the batch, without suspension. An error
/// means that it added nothing. What it checks there holds: no other change comes between.
using Change = std::function<Status(CommitContext&)>;

/// Rows that neither the catalog nor the allocator knows of.
struct PlainRows {
    Batch batch;
    std::vector<Extent> freed;  // leased blocks that nobody needs once this is durable
};

class Committer {
  public:
    /// `wake_reclaimer` is called on home after commits that left work for it, with their notes.
    using WakeReclaimer = std::function<void(const std::vector<NotePlace>&)>;
    /// From here on a batch takes no more changes, and the same for rows from lanes; the others
    /// wait for the next one. One change may bring more by itself: 128 chunks of a round or a
    /// sweep, a few MiB at most, or the rows of a disk with all its snapshots.
    static constexpr uint64_t kGroupBytes = 1 << 20;

    Committer(Core& core, const Lanes& lanes, Catalog& catalog, Allocator& allocator,
              Leases& leases, WakeReclaimer wake_reclaimer);
    /// REQUIRES: Idle() has returned, and nothing came since.
    ~Committer();

    /// Runs on home; resumes on `resume_on` when `change` is durable, or with why it is not.
    Task<Status> Commit(Change change, Executor& resume_on);
    /// The same for a change that frees or claims blocks of `regions` (RegionsOf). Their rows are
    /// read before, on the loader; those of others would be read on home.
    Task<Status> CommitIn(std::vector<uint64_t> regions, Change change, Executor& resume_on);

    /// The same for rows that need no building. Runs on `lane`, and does not pass home.
    Task<Status> CommitPlain(PlainRows rows, Executor& lane);

    /// Calls `look` on home at a moment when map rows and notes in the store are those that the
    /// catalog and the history in memory speak of. On home.
    Task<void> Look(std::function<void()> look);

    /// The branches of which rows or notes were committed or deleted since the last call, up to
    /// the moment of a Look. On home, in a Look. At most all there are.
    std::unordered_set<BranchId> TakeChanged();

    /// Waits until what was handed in before is committed and the blocks it freed are free.
    Task<void> Settled();

    /// Waits until no commit runs and all freed blocks are free.
    Task<void> Idle();

    uint64_t commits() const { return commits_.load(std::memory_order_relaxed); }
    uint64_t released_blocks() const { return released_blocks_; }
    /// Freed blocks are waiting for reads to finish.
    bool resting() const { return resting_.count() > 0; }

  private:
    struct Request;
    struct Plain;
    struct Built;
    struct Looker;
    /// What the store has to do next.
    struct Inbox {
        Built* built = nullptr;
        std::deque<Plain*> plain;  // at most one of each disk
        bool empty() const { return !built && plain.empty(); }
    };

    void Wake();
    Task<void> Run();
    void Build(Built& built);
    void NoteChanged(const Batch& batch);
    void HandOver(Built* built, Plain* plain);
    Task<void> Store();
    Inbox TakeInbox();
    void StoreInbox(Inbox inbox);
    Status Write(const Batch& batch);
    Task<void> RestLater(std::vector<Extent> freed);
    Task<void> Rest(std::vector<Extent> freed);

    Core& core_;
    const Lanes& lanes_;
    Catalog& catalog_;
    Allocator& allocator_;
    Leases& leases_;
    const WakeReclaimer wake_reclaimer_;

    // Of home.
    std::unordered_set<BranchId> changed_;
    std::deque<Request*> queue_;  // a few of each disk, and of commands
    std::vector<Looker*> lookers_;
    bool running_ = false;
    Gate resting_;
    WaitList idle_;
    uint64_t released_blocks_ = 0;

    // Of everybody.
    std::mutex mutex_;
    Inbox inbox_;
    bool storing_ = false;
    std::atomic<uint64_t> commits_ = 0;
};

}  // namespace varve::cow
