// Allocator: which blocks of the data file are in use.
// Not the owner of blocks: it never knows who holds one. docs/format.md describes its rows.
//
// A block is in one of these states:
//   free     may be leased
//   leased   handed to a disk, which writes into it before it maps it; known in memory only
//   used     a committed map row or note names it; a bit in its region's row, in the same commit
//   resting  forgotten by a commit, but a read may still be under way; known in memory only
// MarkUsed: leased -> used. MarkFree: used -> resting. Release: leased or resting -> free.
// After a crash there are only free and used.
//
// Belongs to the home executor; reads region rows when it meets them first, so opening a pool
// costs the same at any size.
#pragma once

#include <bitset>
#include <memory>
#include <set>
#include <vector>

#include "cow/format.h"
#include "cow/stores.h"

namespace varve::cow {

class Allocator {
  public:
    using Bits = std::bitset<kRegionBlocks>;

    /// `pool` is the catalog's record: counts are kept there. `capacity_max`: bytes, 0 for none.
    Allocator(MetadataStore& metadata, SpaceStore& space, PoolRecord& pool, uint64_t capacity_max);

    /// Hands out the free blocks of one region, in order. Provisions the region if it is new.
    /// kNoSpace if there is none anywhere.
    Result<std::vector<Extent>> Lease();

    /// REQUIRES: leased (or, after a crash left them marked, used). Goes into the next Encode.
    Status MarkUsed(const Extent& extent);
    /// kDamaged if a block is not used: then nothing was changed and nothing may be freed.
    Status MarkFree(const Extent& extent);
    /// Blocks that nobody can reach any more may be leased again.
    void Release(const Extent& extent);

    /// Puts the rows of all regions that changed since the last call.
    void Encode(Batch& batch);

    /// Bytes the pool could hold in all, now.
    uint64_t Capacity() const;

  private:
    struct Maps {
        Bits used;
        Bits busy;  // used, leased or resting
    };
    struct Region {
        bool known = false;          // its row has been read
        bool provisioned = false;    // surely: it was this run, or has used blocks
        bool full = false;           // without maps: whether all blocks are used, or none
        std::unique_ptr<Maps> maps;  // null if busy = used = all or none
    };

    Status Know(uint64_t index);
    Status KnowMore(uint64_t most);
    Maps& MapsOf(uint64_t index);
    void Settle(uint64_t index);
    std::vector<Extent> TakeAll(uint64_t index);
    Result<uint64_t> Grow();
    /// Calls apply(region, first bit, end bit) for the part of `extent` in each region.
    template <typename F>
    Status ForEachPart(Extent extent, F&& apply);

    MetadataStore& metadata_;
    SpaceStore& space_;
    PoolRecord& pool_;
    const uint64_t capacity_max_;
    std::vector<Region> regions_;
    uint64_t known_below_ = 0;    // all regions below this one have been read
    std::set<uint64_t> roomy_;    // known regions with at least a quarter free
    std::set<uint64_t> tight_;    // known regions with less, but some
    std::set<uint64_t> empty_;    // known regions of which every block is free
    std::set<uint64_t> changed_;  // since the last Encode
};

}  // namespace varve::cow
