// LaneState: a data-plane thread with what the engine keeps on it.
// Not the thread: that is the environment's.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "base/sync.h"
#include "cow/core/core.h"
#include "cow/volume/checksums.h"
#include "cow/volume/chunk_cache.h"

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

/// A lane with the engine's state on it. Belongs to the lane's executor.
struct LaneState {
    LaneState(const Lane& lane, uint64_t cache_bytes)
        : executor(*lane.executor),
          blocks(*lane.blocks),
          epochs(executor),
          cache(cache_bytes - cache_bytes / 4),
          sums(cache_bytes / 4) {}

    Executor& executor;
    BlockStore& blocks;
    ReadEpochs epochs;
    ChunkCache cache;
    SumsCache sums;
    LoadMeter load;
    /// Changed chunks whose rows are not written yet, and the heads that have any, in the order in
    /// which they came to have some.
    uint64_t unfolded = 0;
    std::vector<Head*> unfolded_heads;
    /// The weight of its heads' journals (head.h).
    uint64_t journaled = 0;
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
    auto begin() const { return lanes_.begin(); }
    auto end() const { return lanes_.end(); }

  private:
    std::vector<std::unique_ptr<LaneState>> lanes_;
    std::vector<uint64_t> disks_;      // how many each lane has
    std::map<DiskId, size_t> places_;  // indices of lanes
};

}  // namespace varve::cow
