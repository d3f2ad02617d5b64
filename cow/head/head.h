// Head: the writable end of a disk.
// Not the catalog's disk: it knows its branch and generation, no names, no snapshots.
//
// Belongs to its lane, but for the constructor.
//
// A write: the blocks it touches are locked (a bit each in their chunk); blocks born in the present
// generation are overwritten in place, all others get new blocks from the lease, and the change of
// the map is announced in the lane's journal (journal/lane_journal.h), which leaves beside the
// data; when the data write has completed, the map is changed, in memory; when the journal is
// written, too, the write is answered. A block is overwritten in place only when its map change is
// settled; until then it goes to another place each time, so that what the journal says a place
// holds is what it holds.
//
// A flush syncs the data file, with the journal in it. Map rows are folded later, by rounds: each
// syncs, and then commits the rows of some chunks. A pass takes all that have changed so far
// (docs/design/ring.md).
//
// A freeze (snapshot) ends the generation in one step without suspension: from then on writes
// belong to the next generation. Changes that are not folded yet, and writes of the old generation
// that are still under way, become the sealed state of their chunks; Seal() waits for those writes,
// and syncs. No round runs between the freeze and the commit of the snapshot, so no row is of the
// new generation before the snapshot is there; what the journal has of it belongs to the old one if
// the snapshot was lost in a crash. The sealed generation is folded before the present one, and
// before the next freeze.
//
// Generations of a chunk's state (chunk_cache.h):
//   pending   sealed   means
//   none      none     the stored row (Chunk::row) is the state
//   g         none     `runs` differs from the row; generation g, present or sealed
//   g+1       none     `base` is the end of generation g, encoded; `runs` is newer
//   g+1       set      `sealed` is the end of generation g, not encoded; `runs` is newer
#pragma once

#include <deque>
#include <functional>

#include "cow/format/runs.h"
#include "cow/head/chunk_lock.h"
#include "cow/head/journal.h"
#include "cow/volume/mapped_volume.h"

namespace varve::cow {

/// What one round commits. Extents and rows as they were, not as they are.
struct HeadCommit {
    struct Row {
        ChunkIndex chunk;
        std::string value;
        std::optional<RowAt> previous;  // the row that held the state before
        Runs added;                     // mapped by this row and not by the previous state
        Runs dropped;                   // the other way round
    };
    BranchId branch;
    Generation generation;  // of the rows
    SnapshotId snapshot;    // the one that this generation ended with, if it did
    std::vector<Row> rows;
    std::vector<Extent> released;  // leased blocks that were given up before any row named them

    bool empty() const { return rows.empty() && released.empty(); }
};

/// How much may wait to be folded on a lane.
struct HeadLimits {
    uint64_t unfolded_soft;  // changed chunks from which on a pass begins
    uint64_t unfolded_hard;  // from which on writers wait
    uint64_t fold_together;  // chunks that a round folds at most

    /// Of a lane, beside what all lanes share. `cache_bytes`: of the maps of all; `owed`: bytes of
    /// metadata that it may owe.
    static HeadLimits Of(uint64_t cache_bytes, uint64_t owed);
};

/// A request waits so long for deletions to give back space, of data or of metadata: less than the
/// patience of the kernel's client (30 seconds by default).
inline constexpr int64_t kSpacePatienceUs = 10'000'000;

/// What a head asks of the pool. Tasks are started on the head's lane and finish there.
class HeadHost {
  public:
    virtual ~HeadHost() = default;
    /// Free blocks, at most `most`; kNoSpace if there are none, after all that could give some has
    /// been tried. Not `urgent`: only those that are at hand.
    virtual Task<Result<std::vector<Extent>>> LeaseBlocks(DiskId disk, Executor& lane,
                                                          uint64_t most, bool urgent) = 0;
    /// The metadata store is full: waits for a step of the deletions under way, and measures again.
    /// Whether there may be more such steps.
    virtual Task<bool> FreeMetadata(Executor& lane) = 0;
    /// Commits what a round gives; its data has been synced.
    virtual Task<Status> CommitHead(DiskId disk, HeadCommit& commit, Executor& lane) = 0;
};

class Head : public MappedVolume {
  public:
    struct Place {
        Line line;  // the first stretch is the head's branch
        Generation generation;
        uint64_t size = 0;
    };
    Head(Core& core, LaneState& lane, HeadHost& host, DiskId disk, Place place);
    ~Head() override;

    bool read_only() const override { return false; }
    Task<Errno> Write(uint64_t offset, std::span<const std::byte> buffer,
                      Requester* requester) override;
    Task<Errno> Trim(uint64_t offset, uint64_t length, Requester* requester) override;
    Task<Errno> WriteZeroes(uint64_t offset, uint64_t length, bool allocate,
                            Requester* requester) override;
    Task<Errno> Flush() override;

    // ---- for the pool; on the lane
    /// Ends the generation. With `hold`, no write is answered until Unhold(): for a cut across
    /// several disks. REQUIRES: no other cut is under way.
    void Freeze(Generation next, bool hold);
    void Unhold();
    /// After Freeze: all of the old generation is written, and synced. An error has failed the
    /// pool.
    Task<Errno> Seal(HeadCommit* commit);
    /// After the seal was committed, with the snapshot; or not.
    void FinishCut(SnapshotId snapshot);
    /// Whether all of a snapshot's generation is in map rows: of all but the one sealed last it is.
    bool IsFolded(Generation generation) const;
    /// Waits until all of the generation that was sealed last is in map rows, or the pool failed.
    Task<void> SealedFolded();
    /// Makes durable, in map rows, all that was answered before. Errors as of Flush().
    Task<Errno> Fold();
    /// Does what is due: syncs what was answered, gives back blocks. Errors as of Flush().
    Task<Errno> Commit();
    /// Waits until what was answered before is settled. Errors as of Flush().
    Task<Errno> Settle();
    /// Folds all that the journal of a lane holds. For LaneJournal::Open.
    static void FoldLane(LaneState& lane);

    /// Waits for what the head does by itself: rounds and lease refills.
    Task<void> Quiesce();
    /// Whether there is something that is not durable or not folded. Any thread; a hint.
    bool changed() const { return changed_.load(std::memory_order_relaxed); }

    /// Starts over at another place in history. REQUIRES: nothing under way, nothing changed.
    void Rebase(Place place);
    void SetSize(uint64_t size) { size_ = size; }
    /// Zeros, durable, from the disk's end to that of its last block: what a shrink or a snapshot
    /// of a larger disk has left there must not show when the disk grows. Requests may be under
    /// way.
    Task<Errno> ClearTail();
    /// Unmaps all whole blocks from `from` on, whatever the disk's size is.
    /// REQUIRES: nothing under way, everything folded.
    Task<Errno> TrimFrom(uint64_t from);
    /// Takes back the free blocks it was handed.
    std::vector<Extent> TakeLease();
    /// Whether it holds free blocks, and how often it took some for a write. Any thread; hints.
    bool has_lease() const { return has_lease_.load(std::memory_order_relaxed); }
    uint64_t allocations() const { return allocations_.load(std::memory_order_relaxed); }

  private:
    struct Stretch {  // of a segment's blocks: where they will be written
        uint32_t first = 0, count = 0;
        uint64_t place = 0;
        bool fresh = false;  // newly allocated, else in place
    };
    using Stretches = boost::container::small_vector<Stretch, 4>;

    /// Checksums of the blocks of fresh stretches, in order.
    using Sums = boost::container::small_vector<uint32_t, 16>;

    /// What a write says in the journal before its data is written.
    struct Announcement {
        LaneJournal::Announced entries;
        uint64_t end = 0;  // the number after the last one; 0: there are none
    };

    struct Released {  // a block is free once the journal is synced up to there
        uint64_t number;
        Extent extent;
    };
    static constexpr uint64_t kNoEntry = ~uint64_t{0};

    // head.cc: requests
    Task<Errno> WriteSegment(uint64_t offset, std::span<const std::byte> buffer,
                             Requester* requester, uint64_t* last);
    Task<Errno> WriteMany(uint64_t offset, uint64_t length, const std::byte* data,
                          Requester* requester, uint64_t* last);
    Task<void> WriteCounted(uint64_t offset, std::span<const std::byte> buffer,
                            Requester* requester, uint64_t* last, Errno* error, Join* join);
    Task<Errno> Prepared(Chunk& chunk, uint32_t first, uint32_t end, Requester* requester,
                         uint64_t* reserved);
    Task<Errno> ReserveJournal(uint64_t units, Requester* requester);
    Task<Errno> WriteDetour(const Chunk& chunk, Generation generation, const Stretches& stretches,
                            uint64_t offset, std::span<const std::byte> buffer,
                            Requester* requester, Announcement* announcement);
    Task<Errno> UnmapFrom(uint64_t from);
    Task<Errno> RoomToUnmap(bool whole, Requester* requester);
    Task<Errno> UnmapBlocks(uint64_t begin_block, uint64_t end_block, Requester* requester);
    Task<Errno> UnmapChunk(ChunkIndex index, uint32_t first, uint32_t end, Requester* requester,
                           uint64_t* cost);
    Task<Errno> ZeroPart(uint64_t offset, uint64_t length, Requester* requester);
    bool RoundDue() const;
    bool Laden() const;
    Task<Errno> Answerable(Errno error, Requester* requester, uint64_t last);
    Task<void> Relieved(Requester* requester);
    bool ManyUnfolded() const;
    bool Overladen() const;
    Task<Errno> Lock(ChunkIndex index, uint64_t mask, Requester* requester, Chunk** chunk);

    // head.cc: space
    Piece OursAt(const Chunk& chunk, uint32_t first, uint32_t end, bool* ours) const;
    uint64_t FreshNeeded(const Chunk& chunk, uint32_t first, uint32_t end) const;
    Task<Errno> Growable(Requester* requester);
    Task<void> SeekRoom();
    Task<Errno> EnsureLease(const Chunk& chunk, uint32_t first, uint32_t end, Requester* requester);
    Task<Errno> Refilled(uint64_t needed, Requester* requester);
    Task<void> Refill(uint64_t needed, bool urgent);
    Extent Allocate(uint64_t most);
    void Plan(const Chunk& chunk, uint32_t first, uint32_t end, Stretches& stretches);

    // head_changes.cc: changes of the map, and cuts
    void Pin(std::vector<Chunk*>& list, Chunk& chunk);
    void CountEntry(uint64_t end);
    void Announce(ChunkIndex chunk, Generation generation, const Stretches& stretches,
                  const Sums& sums, Announcement* announcement);
    Task<void> Recall(Generation generation, Announcement* announcement);
    void MapStretches(Chunk& chunk, Generation generation, const Stretches& stretches,
                      uint64_t entries_end);
    void MapStretch(Chunk& chunk, Generation generation, const Stretch& stretch, Runs* sealed);
    void MakeYoung(Chunk& chunk, uint32_t first, uint32_t count, uint64_t entries_end);
    void Age();
    void GiveUp(const Stretches& stretches);
    void UnmapNow(Chunk& chunk, uint32_t first, uint32_t end);
    void Prepare(Chunk& chunk);
    Runs* PrepareSealed(Chunk& chunk, Generation generation);
    void ReleaseTentative(const Runs& removed, const Runs& kept);
    void Release(Extent extent);
    static const Runs& StateBefore(const Chunk& chunk);

    // head_rounds.cc: how they become durable
    void RequestRound();
    void RequestFold();
    bool RoundWanted() const;
    Task<void> Rounds();
    Task<void> Round();
    uint64_t FoldableEnd() const;
    void BeginPass();
    static void SortForFold(std::vector<Chunk*>& chunks);
    void Encode(Chunk& chunk, HeadCommit& commit) const;
    bool NothingToFold() const { return dirty_.empty() && folding_.empty() && sealed_.empty(); }
    void FoldedBelow(uint64_t number);
    void TakeReleased(HeadCommit& commit);
    bool SyncsUnderWay(uint64_t begun) const;
    Task<void> SyncsEnd();
    bool Synced() const;
    Task<Errno> SyncData();
    Task<void> SyncAlone();
    void Unpin(std::vector<Chunk*>& chunks);

    HeadHost& host_;
    const DiskId disk_;
    BranchId branch_;
    Generation sealed_generation_;  // from Freeze until it is folded

    // Requests under way that may change data, by the parity of the cuts before them.
    uint64_t writers_[2] = {0, 0};
    unsigned era_ = 0;
    WaitList writers_gone_;
    bool shrinking_ = false;
    bool hold_ = false;
    WaitList unheld_;

    std::deque<Extent> lease_;
    uint64_t lease_blocks_ = 0;
    uint64_t lease_size_ = 0;  // asked for last; more each time
    std::atomic<bool> has_lease_ = false;
    std::atomic<uint64_t> allocations_ = 0;
    bool refilling_ = false;
    bool refill_ahead_ = true;  // no use once the pool was full
    Errno refill_error_ = 0;
    uint64_t refills_ = 0;  // done
    WaitList refilled_;

    bool seeking_room_ = false;   // of metadata
    uint64_t room_seekers_ = 0;   // requests that wait for it
    uint64_t room_searches_ = 0;  // done
    WaitList room_sought_;

    // Changed chunks, by what they wait for:
    std::vector<Chunk*> dirty_;     // the next pass
    std::vector<Chunk*> folding_;   // the present pass
    std::vector<Chunk*> sealed_;    // the fold of the sealed generation
    std::vector<Chunk*> stranded_;  // nothing: their commit failed, they stay until the end
    uint64_t unfolded_ = 0;         // in all of them, and in the round
    std::atomic<bool> changed_ = false;

    LaneJournal::DiskAnnounced announced_;
    uint64_t first_entry_ = kNoEntry;  // in the journal, that is not folded
    uint64_t last_entry_ = 0;          // the number after the last one
    uint64_t entries_ = 0;             // in the journal, since the last round began
    std::deque<Released> released_;
    uint64_t released_blocks_ = 0;
    std::deque<Chunk*> aging_;  // have young blocks
    bool pass_ = false;         // under way; its entries are those below:
    uint64_t pass_end_ = 0;
    bool pass_wanted_ = false;
    uint64_t passes_started_ = 0;
    uint64_t passes_done_ = 0;
    bool sealed_open_ = false;  // the sealed generation is not folded; below are entries of its:
    uint64_t sealed_end_ = 0;
    SnapshotId sealed_snapshot_;

    bool unsynced_ = false;  // data or entries were written since the last sync began
    uint64_t covered_ = 0;   // entries below are, by the last sync that began
    uint64_t syncs_begun_ = 0;
    std::vector<uint64_t> syncs_;  // under way
    WaitList synced_;
    bool cut_ = false;  // between Freeze and FinishCut
    bool rounds_running_ = false;
    bool round_active_ = false;
    uint64_t rounds_wanted_ = 0;
    uint64_t rounds_started_ = 0;
    uint64_t rounds_done_ = 0;
    WaitList round_done_;
    const HeadLimits limits_;
};

}  // namespace varve::cow
