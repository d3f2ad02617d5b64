// Core: what the parts of an open pool share - its environment, its limits and its failure.
// Not the pool itself: no commands here.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "base/sync.h"
#include "cow/checksums.h"
#include "cow/chunk_cache.h"
#include "cow/pacer.h"
#include "cow/pool.h"

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
};

struct Core {
    explicit Core(Environment env) : environment(std::move(env)) {}

    Environment environment;
    std::vector<std::unique_ptr<LaneState>> lanes;

    Executor& home() { return *environment.home; }
    Executor& loader() { return *environment.loader; }
    Executor& auditor() { return *environment.auditor; }
    MetadataStore& metadata() { return *environment.metadata; }

    /// Set when data or metadata could not be made durable: from then on nobody knows what the
    /// disk holds of the latest writes, so writes and flushes are refused until a restart, and
    /// nothing is retried. Any thread.
    std::atomic<bool> failed = false;
    void Fail(const std::string& reason);
    std::string failure();

    /// Recovery is over. Before, whoever opens the pool tells the failure.
    bool opened = false;

    /// The pool is closing: long work ends early, to be taken up at the next start. Any thread.
    std::atomic<bool> closing = false;

    /// Of all background work. On home.
    Pacer pacer{environment.clock, *environment.home, closing};

    /// The frozen block at `place`, born in `birth`, does not hold what it held: logged once, with
    /// `what`, and counted. Any thread.
    void FoundDamage(uint64_t place, Generation birth, const std::string& what);
    /// Blocks found damaged since the start.
    uint64_t damaged_blocks();

  private:
    std::mutex failure_mutex_;
    std::string failure_;
    std::mutex damage_mutex_;
    std::set<std::pair<uint64_t, Generation>> damage_;  // at most kDamageMax of them
    uint64_t damaged_blocks_ = 0;
};

}  // namespace varve::cow
