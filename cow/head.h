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
// A commit round makes durable all that was answered before it began: it encodes the changed
// chunks, syncs the data file, and only then hands the rows to the committer. Flushes that arrive
// during a round wait for the next one, together.
//
// A freeze (snapshot) ends the generation in one step without suspension: from then on writes
// belong to the next generation. Changes that are not committed yet, and writes of the old
// generation that are still under way, become the sealed state of their chunks; Seal() waits for
// those writes, syncs, and gives the last rows of the old generation. No round runs between the
// freeze and the commit of the seal, so no row of the new generation can be durable before the
// snapshot is: after a crash either the snapshot is there, or its generation goes on.
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

#include "cow/mapped_volume.h"

namespace varve::cow {

/// The map changes of one round, ready to be committed. Extents as they were, not as they are.
struct HeadCommit {
    struct Row {
        ChunkIndex chunk;
        std::string value;
        std::optional<RowAt> previous;  // the row that held the state before
        Runs added;                     // mapped by this row and not by the previous state
        Runs dropped;                   // the other way round
    };
    BranchId branch;
    Generation generation;
    std::vector<Row> rows;
    std::vector<Extent> released;  // leased blocks that were given up before any row named them
    std::vector<Chunk*> chunks;    // pinned until the commit is done

    bool empty() const { return rows.empty() && released.empty(); }
};

/// What a head asks of the pool. Tasks are started on the head's lane and finish there.
class HeadHost {
  public:
    virtual ~HeadHost() = default;
    /// Free blocks; kNoSpace if there are none, after all that could give some has been tried.
    /// Not `urgent`: only those that are at hand.
    virtual Task<Result<std::vector<Extent>>> LeaseBlocks(DiskId disk, Executor& lane,
                                                          bool urgent) = 0;
    /// Commits the rows; their data has been synced.
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
    Task<Errno> Write(uint64_t offset, std::span<const std::byte> buffer) override;
    Task<Errno> Trim(uint64_t offset, uint64_t length) override;
    Task<Errno> WriteZeroes(uint64_t offset, uint64_t length, bool allocate) override;
    Task<Errno> Flush() override;

    // ---- for the pool; on the lane
    /// Ends the generation. With `hold`, no write is answered until Unhold(): for a cut across
    /// several disks. REQUIRES: no other cut is under way.
    void Freeze(Generation next, bool hold);
    void Unhold();
    /// After Freeze: the rest of the old generation, synced. An error has failed the pool.
    Task<Errno> Seal(HeadCommit* commit);
    /// After the seal was committed, or not.
    void FinishCut(HeadCommit& commit);

    /// Waits for what the head does by itself: rounds and lease refills.
    Task<void> Quiesce();
    /// Whether a round would have something to commit. Any thread; a hint.
    bool changed() const { return changed_.load(std::memory_order_relaxed); }
    bool dirty() const { return !dirty_.empty() || !released_.empty() || unsynced_; }

    /// Starts over at another place in history. REQUIRES: nothing under way, nothing changed.
    void Rebase(Place place);
    void SetSize(uint64_t size) { size_ = size; }
    /// Unmaps all blocks from `from` (a multiple of 4096) on, whatever the disk's size is.
    /// REQUIRES: nothing under way, everything committed.
    Task<Errno> TrimFrom(uint64_t from);
    /// Takes back the free blocks it was handed.
    std::vector<Extent> TakeLease();

    uint64_t leased_blocks() const { return lease_blocks_; }

  private:
    struct Stretch {  // of a segment's blocks: where they will be written
        uint32_t first = 0, count = 0;
        uint64_t place = 0;
        bool fresh = false;  // newly allocated, else in place
    };
    using Stretches = boost::container::small_vector<Stretch, 4>;

    // head.cc: requests
    Task<Errno> WriteSegment(uint64_t offset, std::span<const std::byte> buffer);
    Task<Errno> WriteMany(uint64_t offset, uint64_t length, const std::byte* data);
    Task<void> WriteCounted(uint64_t offset, std::span<const std::byte> buffer, Errno* error,
                            Join* join);
    Task<Errno> WriteDetour(const Chunk& chunk, const Stretches& stretches, uint64_t offset,
                            std::span<const std::byte> buffer);
    Task<Errno> UnmapBlocks(uint64_t begin_block, uint64_t end_block);
    Task<Errno> ZeroPart(uint64_t offset, uint64_t length);
    Task<void> Answerable();
    Chunk* TryLock(ChunkIndex index, uint64_t mask);
    Task<Errno> Lock(ChunkIndex index, uint64_t mask, Chunk** chunk);
    void Unlock(Chunk& chunk, uint64_t mask);

    // head.cc: space
    uint64_t FreshNeeded(const Chunk& chunk, uint32_t first, uint32_t end) const;
    Task<Errno> EnsureLease(const Chunk& chunk, uint32_t first, uint32_t end);
    Task<Errno> Refill(bool urgent);
    Task<void> RefillAhead();
    Extent Allocate(uint64_t most);
    void Plan(const Chunk& chunk, uint32_t first, uint32_t end, Stretches& stretches);

    // head_commit.cc: changes and rounds
    void Pin(std::vector<Chunk*>& list, Chunk& chunk);
    void MapStretches(Chunk& chunk, Generation generation, const Stretches& stretches);
    void GiveUp(const Stretches& stretches);
    void UnmapNow(Chunk& chunk, uint32_t first, uint32_t end);
    void Prepare(Chunk& chunk);
    Runs* PrepareSealed(Chunk& chunk, Generation generation);
    void ReleaseTentative(const Chunk& chunk, const Runs& removed);
    void Encode(Chunk& chunk, HeadCommit& commit) const;
    Task<void> EncodeAll(HeadCommit& commit);
    Task<void> Rounds();
    Task<void> Round();
    Task<Errno> SyncData();
    void Unpin(HeadCommit& commit);
    void RequestRound();
    std::vector<Chunk*> TakeDirty();

    HeadHost& host_;
    const DiskId disk_;
    BranchId branch_;
    Generation generation_;
    Generation sealed_generation_;  // between Freeze and FinishCut

    // Requests under way that may change data, by the parity of the cuts before them.
    uint64_t writers_[2] = {0, 0};
    unsigned era_ = 0;
    WaitList writers_gone_;
    WaitList unlocked_;
    bool hold_ = false;
    WaitList unheld_;

    std::deque<Extent> lease_;
    uint64_t lease_blocks_ = 0;
    bool refilling_ = false;
    bool refill_ahead_ = true;  // no use once the pool was full
    Errno refill_error_ = 0;
    WaitList refilled_;

    std::vector<Chunk*> dirty_;     // changed in the present generation, not encoded
    std::vector<Chunk*> sealed_;    // changed in the sealed generation, not encoded
    std::vector<Chunk*> stranded_;  // their commit failed; stay in memory until the end
    std::vector<Extent> released_;
    std::atomic<bool> changed_ = false;
    bool unsynced_ = false;  // data was written since the last sync began
    bool cut_ = false;       // between Freeze and FinishCut
    bool rounds_running_ = false;
    bool round_active_ = false;
    uint64_t rounds_wanted_ = 0;
    uint64_t rounds_started_ = 0;
    uint64_t rounds_done_ = 0;
    uint64_t flushes_ = 0;  // the last round that a flush waits for
    WaitList round_done_;
    const uint64_t dirty_soft_, dirty_hard_;  // chunks: start a round, make writers wait
};

}  // namespace varve::cow
