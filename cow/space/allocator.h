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
// Belongs to the home executor. A region's row is read when the region is met first, so opening a
// pool costs the same at any size. Which regions get space from the data file, and when, is decided
// by leases.h; this only keeps the book.
#pragma once

#include <bitset>
#include <memory>
#include <optional>
#include <set>
#include <string_view>
#include <vector>

#include "cow/format/format.h"
#include "cow/store/stores.h"

namespace varve::cow {

class Allocator {
  public:
    using Bits = std::bitset<kRegionBlocks>;

    /// `pool` is the catalog's record: counts are kept there. `capacity_max`: bytes, 0 for none.
    Allocator(MetadataStore& metadata, SpaceStore& space, PoolRecord& pool, uint64_t capacity_max);

    /// The end, in blocks of its region, of what a region's row says is used; nothing if the row is
    /// damaged. Any thread.
    static std::optional<uint64_t> UsedEnd(std::string_view row);

    // ---- leases. Extents are the first `most` free blocks of one region, or what it has, in
    // order; empty if there is no such region.
    /// Of a region that is provisioned and at least a quarter free.
    std::vector<Extent> TakeReady(uint64_t most);
    /// How many such regions there are.
    size_t ready() const { return ready_.size(); }
    /// Of a region that has less.
    std::vector<Extent> TakeTight(uint64_t most);
    /// A wholly free region that has to be provisioned before it is ready.
    std::optional<uint64_t> FindBare() const;
    void Provisioned(uint64_t region);
    /// The region that comes next if the data file grows. kNoSpace over `capacity_max`.
    Result<uint64_t> NextRegion() const;
    /// It was provisioned.
    void AddRegion();

    // ---- rows
    bool all_known() const { return known_below_ == regions_.size(); }
    /// At most `most` regions whose rows have not been read.
    std::vector<uint64_t> Unknown(uint64_t most) const;
    /// Takes in a region's row, as the store has it; nothing if it is known by now. kDamaged.
    Status Learn(uint64_t region, const std::optional<std::string>& row);

    // ---- wholly free regions beyond some that are kept for soon
    bool any_surplus() const { return !surplus_.empty(); }
    /// Takes one out of use, to be discarded.
    std::optional<uint64_t> TakeSurplus();
    void Discarded(uint64_t region);

    /// free -> leased, for blocks that were written before a crash. kDamaged if one is not free.
    Status Claim(const Extent& extent);
    /// REQUIRES: leased. Goes into the next Encode.
    Status MarkUsed(const Extent& extent);
    /// kDamaged if a block is not used: then nothing was changed and nothing may be freed.
    Status MarkFree(const Extent& extent);
    /// Blocks that nobody can reach any more may be leased again.
    void Release(const Extent& extent);

    /// How many regions changed since the last Encode.
    size_t changed() const { return changed_.size(); }
    /// Puts the rows of all regions that changed since the last call.
    void Encode(Batch& batch);

    /// That are leased or resting: not free, although nothing names them.
    uint64_t leased_blocks() const { return leased_blocks_; }

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
        bool discarding = false;     // between TakeSurplus and Discarded
        bool full = false;           // without maps: whether all blocks are used, or none
        std::unique_ptr<Maps> maps;  // null if busy = used = all or none
    };

    Status Know(uint64_t index);
    Maps& MapsOf(uint64_t index);
    void Settle(uint64_t index);
    std::vector<Extent> TakeFrom(uint64_t index, uint64_t most);
    /// Calls apply(region, first bit, end bit) for the part of `extent` in each region.
    template <typename F>
    Status ForEachPart(Extent extent, F&& apply);

    MetadataStore& metadata_;
    SpaceStore& space_;
    PoolRecord& pool_;
    const uint64_t capacity_max_;
    std::vector<Region> regions_;
    uint64_t leased_blocks_ = 0;
    uint64_t known_below_ = 0;  // all regions below this one have been read
    // Known regions, none of them discarding:
    std::set<uint64_t> ready_;    // provisioned, at least a quarter free
    std::set<uint64_t> bare_;     // not provisioned; wholly free
    std::set<uint64_t> tight_;    // less than a quarter free, but some
    std::set<uint64_t> empty_;    // those of ready_ that are wholly free
    std::set<uint64_t> surplus_;  // those of empty_ that shall be discarded
    std::set<uint64_t> changed_;  // since the last Encode
};

}  // namespace varve::cow
