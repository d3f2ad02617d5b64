// LaneState: a data-plane thread with what the engine keeps on it.
// Not the thread: that is the environment's.
#pragma once

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <vector>

#include "base/buffers.h"
#include "base/sync.h"
#include "cow/core/core.h"
#include "cow/journal/lane_journal.h"
#include "cow/volume/checksums.h"
#include "cow/volume/chunk_cache.h"
#include "cow/volume/turns.h"

namespace varve::cow {

/// Counts the reads under way on one lane, so that blocks are reused only after every read that
/// might still be aimed at them has finished. Belongs to its lane.
class ReadEpochs {
  public:
    explicit ReadEpochs(Executor& executor) : turn_(executor), drained_(executor) {}

    /// Held while block numbers taken from a map are in use.
    class Guard {
      public:
        explicit Guard(ReadEpochs& epochs) : epochs_(epochs), epoch_(epochs.epoch_) {
            ++epochs_.readers_[epoch_];
        }
        Guard(const Guard&) = delete;
        ~Guard() {
            if (--epochs_.readers_[epoch_] == 0) epochs_.drained_.WakeAll();
        }

      private:
        ReadEpochs& epochs_;
        const unsigned epoch_;
    };

    /// Returns when all guards that exist now are gone.
    Task<void> Barrier() {
        co_await turn_.Lock();
        const unsigned old = epoch_;
        epoch_ ^= 1;
        while (readers_[old] != 0) co_await drained_.Wait();
        turn_.Unlock();
    }

  private:
    unsigned epoch_ = 0;
    uint64_t readers_[2] = {0, 0};
    AsyncMutex turn_;
    WaitList drained_;
};

class Head;

/// What the lanes of a pool share. Any thread.
struct SharedMemory {
    SharedMemory(uint64_t cache_bytes, uint64_t lane_count)
        : lanes(lane_count),
          chunks(cache_bytes - cache_bytes / 4, lanes),
          sums(cache_bytes / 4, lanes),
          unfolded_soft(std::max<uint64_t>(2, chunks.total() / (16 << 10))) {}

    const uint64_t lanes;
    CacheBudget chunks, sums;
    /// Changed chunks whose rows are not written yet. Some take 4 KiB, which is pinned: so from a
    /// quarter of the cache on they are folded, and at half of it writers wait.
    std::atomic<uint64_t> unfolded = 0;
    const uint64_t unfolded_soft;
};

/// A lane with the engine's state on it. Belongs to the lane's executor.
struct LaneState {
    LaneState(Core& core, const Lane& lane, uint32_t index, SharedMemory& memory)
        : executor(*lane.executor),
          blocks(*lane.blocks),
          epochs(executor),
          turns(executor),
          cache(memory.chunks),
          sums(memory.sums),
          journal(core, lane, index),
          shared(memory) {}

    Executor& executor;
    BlockStore& blocks;
    ReadEpochs epochs;
    Turns turns;
    ChunkCache cache;
    SumsCache sums;
    LoadMeter load;
    LaneJournal journal;
    /// The heads that have entries in it which are not folded.
    std::vector<Head*> journaled_heads;
    SharedMemory& shared;
    /// For what is not aligned; who asks for a transfer is charged for its detour.
    BufferPool detours{1 << 20};

    /// Changed chunks whose rows are not written yet, and the heads that have any, in the order in
    /// which they came to have some.
    uint64_t unfolded = 0;
    std::vector<Head*> unfolded_heads;
    void AddUnfolded(uint64_t count) {
        unfolded += count;
        shared.unfolded.fetch_add(count, std::memory_order_relaxed);
    }
    void RemoveUnfolded(uint64_t count) {
        unfolded -= count;
        shared.unfolded.fetch_sub(count, std::memory_order_relaxed);
    }
    /// Whether all lanes together have more than `most`, and this one more than an equal share of
    /// that: what a lane waits for is always its own work. So there are never twice as many.
    bool crowded(uint64_t most) const {
        return unfolded > most / shared.lanes &&
               shared.unfolded.load(std::memory_order_relaxed) > most;
    }
};

/// The lanes of a pool: they stay while it is open. Where disks live belongs to home.
class Lanes {
  public:
    /// One for each of the environment's; `core`'s pacer watches them. They share `cache_bytes`.
    Lanes(Core& core, uint64_t cache_bytes);

    /// Finds a lane for the disk and its snapshots, one that has the fewest disks; it keeps it
    /// until Remove(). REQUIRES: it has none.
    LaneState& Add(DiskId disk);
    void Remove(DiskId disk);
    /// Where the disk and its snapshots live. REQUIRES: it has a lane.
    LaneState& Of(DiskId disk) const { return *lanes_[places_.at(disk)]; }
    size_t size() const { return lanes_.size(); }
    auto begin() const { return lanes_.begin(); }
    auto end() const { return lanes_.end(); }

    /// Moves cache memory to the lanes that lack some: from those that had no request since the
    /// last call, or hold what they do not use, or more than an equal share of those that work. A
    /// quarter at a time. One at a time; the server calls it every second.
    Task<void> Balance();
    /// So many changed chunks wait to be folded that lanes which work may lack room for theirs.
    bool crowded() const { return memory_.unfolded > memory_.unfolded_soft; }

  private:
    using ShareOf = CacheShare& (*)(LaneState&);
    std::vector<uint64_t> Targets(ShareOf share, const std::vector<bool>& active);

    Core& core_;
    SharedMemory memory_;
    std::vector<std::unique_ptr<LaneState>> lanes_;
    std::vector<uint64_t> disks_;      // how many each lane has
    std::map<DiskId, size_t> places_;  // indices of lanes
    std::vector<uint64_t> begun_;      // requests of each lane, when Balance last looked
};

}  // namespace varve::cow
