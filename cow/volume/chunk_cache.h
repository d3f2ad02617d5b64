// ChunkCache: the decoded chunks of one lane's volumes, within its share of a bound of bytes.
// Not a map: volumes index their own chunks; this decides which of them go.
//
// Belongs to its lane. A chunk that is pinned (locked, changed and not committed, or waited for)
// stays whatever the bound says; the volumes bound how many of those there are.
#pragma once

#include <memory>
#include <optional>

#include "cow/format/types.h"
#include "cow/volume/cache_budget.h"
#include "cow/volume/map_reader.h"

namespace varve::cow {

class LockWait;
class MappedVolume;

struct Chunk {
    /// Exists while the chunk differs from what the last encoded row says.
    struct Pending {
        Runs base;                   // the state of the last encoded row (Chunk::row)
        std::optional<Runs> sealed;  // the state at the end of the sealed generation, if
                                     // generation is newer and that state is not encoded yet
        Generation generation;       // of the newest change
    };

    MappedVolume* owner = nullptr;
    ChunkIndex index;
    Runs runs;                 // the state now
    std::optional<RowAt> row;  // where the last encoded state is stored; none: no row, zeros
    std::unique_ptr<Pending> pending;
    uint64_t young = 0;        // blocks, a bit each, that may not be overwritten in place yet: see
    uint64_t young_until = 0;  // LaneJournal::settled(), which must get there
    uint64_t locked = 0;       // blocks that a request is changing, a bit each
    LockWait* line = nullptr;  // the first that waits for some of them
    uint32_t pins = 0;
    bool referenced = true;   // since the clock's hand passed
    uint32_t bytes = 0;       // as charged
    Chunk* before = nullptr;  // in the clock
    Chunk* after = nullptr;
};

/// A clock: new chunks come in behind the hand, the hand gives referenced ones a second chance.
class ChunkCache {
  public:
    explicit ChunkCache(CacheBudget& budget) : share_(budget) {}
    ~ChunkCache() { VARVE_CHECK(hand_ == nullptr); }

    void Add(Chunk& chunk);
    void Remove(Chunk& chunk);
    /// After the chunk's runs changed in number.
    void Recharge(Chunk& chunk);
    /// Drops unpinned chunks until the bound is kept, or some of them: it may be passed by a 64th
    /// for a while. Returns how many were looked at, a few hundred at most, however many there are.
    /// REQUIRES: the caller holds no pointer to an unpinned chunk.
    uint64_t Shrink();
    /// The same with another bound, or some steps towards it; what is free then goes back to the
    /// budget.
    void GiveBack(uint64_t limit);

    uint64_t used() const { return used_; }
    CacheShare& share() { return share_; }

  private:
    void Step(bool second_chance);

    CacheShare share_;
    uint64_t used_ = 0;
    uint64_t count_ = 0;
    Chunk* hand_ = nullptr;
};

}  // namespace varve::cow
