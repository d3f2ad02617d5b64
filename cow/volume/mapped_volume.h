// MappedVolume: reading through the block map - the part that heads and snapshots share.
// Not writable: head.h adds that.
//
// Belongs to its lane. Chunks are loaded in groups of neighbours, because a miss costs a trip to
// the loader and a seek, and the next row is cheap.
#pragma once

#include <boost/unordered/unordered_flat_map.hpp>

#include "cow/mutants.h"
#include "cow/volume/changes.h"
#include "cow/volume/lane.h"
#include "cow/volume/verified_read.h"
#include "cow/volume/volume.h"

namespace varve::cow {

class MappedVolume : public Volume {
  public:
    /// Made on any thread; used on `lane` only.
    MappedVolume(Core& core, LaneState& lane, Line line, uint64_t size);
    /// On the lane. REQUIRES: nothing under way.
    ~MappedVolume() override;

    Executor& executor() override { return lane_.executor; }
    uint64_t size() const override { return size_.load(std::memory_order_relaxed); }
    bool read_only() const override { return true; }

    Task<Errno> Read(uint64_t offset, std::span<std::byte> buffer, std::vector<Allocation>* map,
                     Requester* requester) override;
    Task<Errno> Write(uint64_t, std::span<const std::byte>, Requester*) override {
        co_return EPERM;
    }
    Task<Errno> Trim(uint64_t, uint64_t, Requester*) override { co_return EPERM; }
    Task<Errno> WriteZeroes(uint64_t, uint64_t, bool, Requester*) override { co_return EPERM; }
    Task<Errno> Flush() override { co_return 0; }
    Task<Errno> Status(uint64_t offset, uint64_t length, uint32_t most, const Layers* layers,
                       std::vector<Allocation>* map, Requester* requester) override;
    Task<Errno> Changes(const Base* base, uint64_t offset, uint64_t length, uint32_t most,
                        std::vector<Delta>* changes, Requester* requester) override;

    /// Another line that leads to the same rows. On the lane.
    void SetLine(Line line) { line_ = std::move(line); }

    /// Forgets the chunks, some in each turn: to be done before the destructor, for which many are
    /// too much at once. REQUIRES: nothing under way.
    Task<void> Empty();

    /// Forgets a clean chunk. For the cache.
    void Evict(Chunk& chunk);

  protected:
    struct Loaded {
        Errno error = 0;
        ChunkIndex next;       // from the group's end up to here nothing was stored
        uint64_t settled = 0;  // settled_ at that time
    };

    bool InRange(uint64_t offset, uint64_t length) const {
        return offset <= size() && length <= size() - offset;
    }
    /// Nothing may begin any more for its sake.
    static bool Gone(const Requester* requester) {
        return requester && requester->gone() && !Mutated(Mutant::kGoneWorkGoesOn);
    }
    /// The chunk if it is in memory.
    Chunk* Find(ChunkIndex index);
    /// Where a walk goes on behind `index` that knows that nothing is stored up to `to`: at the
    /// next chunk that may be in memory, or at `to`. Adds what it cost, in units of Turns.
    ChunkIndex NextHeld(ChunkIndex index, ChunkIndex to, uint64_t* cost) const;
    /// Brings the chunk's group into memory. It may be gone again when a later load made room.
    Task<Loaded> Load(ChunkIndex index);
    /// The first chunk after the group that Load() brings in with `index`.
    static ChunkIndex GroupEnd(ChunkIndex index);
    /// Forgets all chunks and reads from `line` from now on. REQUIRES: nothing under way.
    void Reset(Line line, uint64_t size);

    Core& core_;
    LaneState& lane_;
    std::atomic<uint64_t> size_;  // bytes
    /// The one that is being written; blocks of all others are frozen. A snapshot has none.
    Generation generation_ = kHead;
    /// Grows whenever changed chunks may leave memory because they were committed. What a load says
    /// of chunks that are not stored is true as long as this is as it was: until then, whatever is
    /// not stored and not in memory is zeros.
    uint64_t settled_ = 0;

  private:
    /// Appends what [offset, end) maps to, all in one chunk: pieces to read, zeros filled in. Gives
    /// what it cost, in units of Turns.
    uint64_t Gather(const Chunk& chunk, uint64_t offset, std::span<std::byte> buffer,
                    IoPieces& pieces, FrozenList& frozen, std::vector<Allocation>* map) const;
    Task<Errno> ReadEdges(uint64_t offset, std::span<std::byte> buffer,
                          std::vector<Allocation>* map, Requester* requester);
    Task<Errno> ReadDetour(uint64_t offset, std::span<std::byte> buffer,
                           std::vector<Allocation>* map, Requester* requester);
    /// REQUIRES: whole blocks, and memory aligned for the store.
    Task<Errno> ReadBlocks(uint64_t offset, std::span<std::byte> buffer,
                           std::vector<Allocation>* map, Requester* requester);
    /// The same for at most kReadTogether.
    Task<Errno> ReadSome(uint64_t offset, std::span<std::byte> buffer, std::vector<Allocation>* map,
                         Requester* requester);

    std::vector<LiveChunk> TakeLive(const Base& base, ChunkIndex first, ChunkIndex* end) const;

    Line line_;
    boost::unordered_flat_map<uint64_t, Chunk*> chunks_;
    boost::unordered_flat_map<uint64_t, WaitList*> loading_;  // groups, with who waits for them
};

/// Adds a stretch to a map, joined with the last if that is of the same kind.
void AppendAllocation(std::vector<Allocation>& map, uint64_t length, bool hole, uint32_t depth = 0);

}  // namespace varve::cow
