// Head: the writable end of a disk.
// Not the catalog's disk: it knows its branch and generation, no names, no snapshots.
//
// Belongs to its lane, but for the constructor.
//
// A write: the blocks it touches are locked (a bit each in their chunk); blocks born in the present
// generation are overwritten in place, all others get new blocks from the lease; when the data
// write has completed, the map is changed, in memory; then the write is answered. What becomes of
// it in a crash is decided by the next commit round.
//
// A commit round makes durable all that was answered before it began: it syncs the data file, and
// only then hands the map changes to the committer, as a journal row. Flushes that arrive during a
// round wait for the next one, together. Map rows are folded later, some chunks in each round: a
// pass takes all that have changed so far (docs/design/journal.md).
//
// A freeze (snapshot) ends the generation in one step without suspension: from then on writes
// belong to the next generation. Changes that are not folded yet, and writes of the old generation
// that are still under way, become the sealed state of their chunks; Seal() waits for those writes,
// syncs, and gives the last journal row of the old generation. No round runs between the freeze and
// the commit of the seal, so nothing of the new generation can be durable before the snapshot is:
// after a crash either the snapshot is there, or its generation goes on. The sealed generation is
// folded before the present one, and before the next freeze.
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
    std::string journal_key, journal;   // a new journal row; empty: none
    std::vector<std::string> obsolete;  // keys of journal rows that are folded with this
    std::vector<Extent> released;  // leased blocks that were given up before any row named them

    bool empty() const {
        return rows.empty() && released.empty() && journal.empty() && obsolete.empty();
    }
};

/// How much may wait to be folded on a lane. The journal's weight counts map changes, those that
/// no row holds yet among them; a row weighs kJournalRowWeight more, for its key.
struct HeadLimits {
    uint64_t unfolded_soft;  // changed chunks from which on a pass begins
    uint64_t unfolded_hard;  // from which on writers wait
    uint64_t journal_soft;   // the same of the journal's weight
    uint64_t journal_hard;
    uint64_t fold_together;  // chunks that a round folds at most

    /// Of a lane, beside what all lanes share. `cache_bytes`: of the maps of all; `owed`: bytes of
    /// metadata that it may owe.
    static HeadLimits Of(uint64_t cache_bytes, uint64_t owed);
};
inline constexpr uint64_t kJournalRowWeight = 8;

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
    /// After Freeze: the rest of the old generation's journal, synced. An error has failed the
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

    struct PendingJournal {  // of one generation; in no journal row yet
        std::vector<MapChange> changes;
        std::vector<Extent> released;  // blocks that are free once the changes are durable
        bool empty() const { return changes.empty() && released.empty(); }
    };
    struct JournalRow {
        Generation generation;
        uint64_t number;
        uint64_t weight;
    };

    // head.cc: requests
    Task<Errno> WriteSegment(uint64_t offset, std::span<const std::byte> buffer,
                             Requester* requester);
    Task<Errno> WriteMany(uint64_t offset, uint64_t length, const std::byte* data,
                          Requester* requester);
    Task<void> WriteCounted(uint64_t offset, std::span<const std::byte> buffer,
                            Requester* requester, Errno* error, Join* join);
    Task<Errno> WriteDetour(const Chunk& chunk, Generation generation, const Stretches& stretches,
                            uint64_t offset, std::span<const std::byte> buffer,
                            Requester* requester);
    Task<Errno> UnmapFrom(uint64_t from);
    Task<Errno> RoomToUnmap(bool whole, Requester* requester);
    Task<Errno> UnmapBlocks(uint64_t begin_block, uint64_t end_block, Requester* requester);
    Task<Errno> UnmapChunk(ChunkIndex index, uint32_t first, uint32_t end, Requester* requester,
                           uint64_t* cost);
    Task<Errno> ZeroPart(uint64_t offset, uint64_t length, Requester* requester);
    bool Laden() const;
    Task<void> Answerable(Requester* requester);
    bool ManyUnfolded() const;
    bool Overladen() const;
    void Relieve();
    void FoldLane();
    Task<Errno> Lock(ChunkIndex index, uint64_t mask, Requester* requester, Chunk** chunk);

    // head.cc: space
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
    void Journal(Generation generation, const MapChange& change);
    void MapStretches(Chunk& chunk, Generation generation, const Stretches& stretches);
    void GiveUp(const Stretches& stretches);
    void UnmapNow(Chunk& chunk, uint32_t first, uint32_t end);
    void Prepare(Chunk& chunk);
    Runs* PrepareSealed(Chunk& chunk, Generation generation);
    void ReleaseTentative(const Chunk& chunk, const Runs& removed);

    // head_rounds.cc: how they become durable
    void RequestRound();
    void RequestFold();
    bool RoundWanted() const;
    Task<void> Rounds();
    Task<void> Round();
    void BeginPass();
    static void SortForFold(std::vector<Chunk*>& chunks);
    void Encode(Chunk& chunk, HeadCommit& commit) const;
    bool NothingToFold() const { return dirty_.empty() && folding_.empty() && sealed_.empty(); }
    void CountJournaled(int64_t weight);
    uint64_t TakeJournal(uint64_t folded_below, HeadCommit& commit);
    void PutJournal(PendingJournal journal, Generation generation, HeadCommit& commit);
    Task<Errno> SyncData();
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

    PendingJournal journal_;         // of the present generation
    PendingJournal sealed_journal_;  // of the sealed one, between Freeze and Seal
    std::deque<JournalRow> rows_;    // that are stored
    uint64_t journaled_ = 0;         // the weight of all three, and of rows being deleted
    uint64_t next_row_ = 0;
    bool pass_ = false;  // under way; its rows are those before:
    uint64_t pass_rows_ = 0;
    bool pass_wanted_ = false;
    uint64_t passes_started_ = 0;
    uint64_t passes_done_ = 0;
    bool sealed_open_ = false;  // the sealed generation is not folded; its rows are before:
    uint64_t sealed_rows_ = 0;
    SnapshotId sealed_snapshot_;

    bool unsynced_ = false;  // data was written since the last sync began
    bool cut_ = false;       // between Freeze and FinishCut
    bool rounds_running_ = false;
    bool round_active_ = false;
    uint64_t rounds_wanted_ = 0;
    uint64_t rounds_started_ = 0;
    uint64_t rounds_done_ = 0;
    WaitList round_done_;
    const HeadLimits limits_;
};

}  // namespace varve::cow
