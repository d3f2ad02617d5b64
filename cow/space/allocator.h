// Allocator: which blocks of the data file are in use.
// Not the owner of blocks: it never knows who holds one. docs/format.md describes its rows.
//
// A block is in one of these states:
//   free     may be leased
//   leased   handed to a disk, which writes into it before it maps it; known in memory only
//   used     a committed map row or note names it; a bit in its region's row, in the same commit
//   reserved the ring's (docs/design/ring.md); in no region's row
//   resting  forgotten by a commit, but a read may still be under way; known in memory only
// MarkUsed: leased -> used. MarkFree: used -> resting. Release: leased or resting -> free.
// After a crash there are only free and used.
//
// Belongs to the home executor, and reads no rows there: leases.h does that elsewhere, before they
// are needed. A region's bitmaps are in memory, it is *open*, while some of its blocks are leased
// or resting, or its row is being changed, or somebody holds it; of the others some that were used
// lately stay open. docs/design/allocator.md has the bounds. Which regions get space from the data
// file, and when, is decided by leases.h as well; this only keeps the book.
#pragma once

#include <bitset>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "cow/format/format.h"
#include "cow/space/region_states.h"
#include "cow/store/stores.h"

namespace varve::cow {

/// The regions that `extents` lie in, in order, each once.
std::vector<uint64_t> RegionsOf(const std::vector<Extent>& extents);

class Allocator {
  public:
    using Bits = std::bitset<kRegionBlocks>;

    /// Open regions that stay so without need: 16 MiB.
    static constexpr uint64_t kOpenMax = 14'000;

    /// `pool` is the catalog's record: counts are kept there. `capacity_max`: bytes, 0 for none.
    /// `open_max`: regions that may be open without need.
    Allocator(MetadataStore& metadata, SpaceStore& space, PoolRecord& pool, uint64_t capacity_max,
              uint64_t open_max = kOpenMax);

    /// What a region's row says is used; nothing if the row is damaged. Any thread.
    static std::optional<Bits> UsedOf(std::string_view row);
    /// The end, in blocks of its region, of what a region's row says is used; nothing if the row is
    /// damaged. Any thread.
    static std::optional<uint64_t> UsedEnd(std::string_view row);
    /// What a region's row says of it; kUnknown if it is damaged. Any thread.
    static RegionState StateOf(const std::optional<std::string_view>& row);

    // ---- rows
    /// A page of regions whose rows LearnPage() has not been told of, next to those it has; nothing
    /// if all have. Pages are taken from the front and from the back of the file in turns.
    std::optional<uint64_t> UnknownPage() const;
    bool all_known() const { return !UnknownPage().has_value(); }
    /// How many of them a page has.
    uint64_t RegionsIn(uint64_t page) const;
    /// Takes in what the rows of that page say; nothing of a region: its row was not tried, and
    /// stays unknown. What is damaged counts as full. May be called again for the same page.
    void LearnPage(uint64_t page, const std::vector<std::optional<RegionState>>& states);
    /// Whether the region's row has to be read before anything is done with it.
    bool NeedsRow(uint64_t region) const;
    /// Takes in a region's row, as the store has it; nothing if it is open by now. kDamaged.
    Status Learn(uint64_t region, const std::optional<std::string>& row);
    /// While a region is held, it stays open: nobody can miss a change of its row.
    void Hold(const std::vector<uint64_t>& regions);
    void Unhold(const std::vector<uint64_t>& regions);
    /// Its row cannot be read: nothing is leased from it, and nothing freed in it, until Learn()
    /// has taken it in after all.
    void SetAside(uint64_t region, Error why);
    /// Regions whose rows could not be read.
    uint64_t set_aside() const { return aside_.size(); }
    /// Sees to it that blocks may be marked; reads nothing if their regions are held. kDamaged or
    /// the store's error if the row of one cannot be read: then it is set aside.
    Status Open(const Extent& extent);

    // ---- leases
    /// A region that is provisioned and at least a quarter free; one that has less.
    std::optional<uint64_t> FindReady() const;
    std::optional<uint64_t> FindTight() const { return states_.First(RegionState::kTight); }
    /// How many there are that are ready.
    uint64_t ready() const;
    /// Its first `most` free blocks, or what it has, in order. REQUIRES: not NeedsRow.
    std::vector<Extent> Take(uint64_t region, uint64_t most);
    /// A wholly free region that has to be provisioned before it is ready.
    std::optional<uint64_t> FindBare() const { return states_.First(RegionState::kBare); }
    void Provisioned(uint64_t region);
    /// The region that comes next if the data file grows. kNoSpace over `capacity_max`.
    Result<uint64_t> NextRegion() const;
    /// It was provisioned.
    void AddRegion();

    // ---- wholly free regions beyond some that are kept for soon
    bool any_surplus() const { return states_.count(RegionState::kSurplus) > 0; }
    /// Takes one out of use, to be discarded.
    std::optional<uint64_t> TakeSurplus();
    void Discarded(uint64_t region);

    // ---- the ring's blocks: never free, and no row's
    /// Those that it has had before. Before anything else is done with their regions.
    void Reserve(const Extent& extent);
    /// leased -> reserved.
    void ReserveLeased(const Extent& extent);
    /// The data file holds this block, though the store may not know its region yet.
    void Cover(uint64_t block);

    /// free -> leased, for blocks that were written before a crash. kDamaged if one is not free. A
    /// region whose row is damaged gets a new one, which says that all else in it is used: whoever
    /// reads a row of it later must not take these blocks for free.
    Status Claim(const Extent& extent);
    /// The regions that have got a new row so.
    const std::vector<uint64_t>& renewed() const { return renewed_; }
    /// REQUIRES: leased. Goes into the next Encode.
    Status MarkUsed(const Extent& extent);
    /// kDamaged if a block is not used: then nothing was changed and nothing may be freed.
    Status MarkFree(const Extent& extent);
    /// Blocks that nobody can reach any more may be leased again.
    void Release(const Extent& extent);

    /// How many regions changed since the last Encode.
    size_t changed() const { return changed_.size(); }
    /// Puts the rows of all regions that changed since the last call. The batch of that call has
    /// been stored by now.
    void Encode(Batch& batch);
    /// The last batch has been stored.
    void Stored();

    /// That are leased or resting: not free, although nothing names them.
    uint64_t leased_blocks() const { return leased_blocks_; }

    /// Bytes the pool could hold in all, now.
    uint64_t Capacity() const;

    // ---- what it costs
    uint64_t open_regions() const { return open_.size(); }
    uint64_t known_pages() const { return states_.pages(); }
    /// Rows that had to be read on home, because nobody had asked for them before.
    uint64_t home_reads() const { return home_reads_; }

  private:
    struct Bitmaps {
        Bits used;
        Bits busy;             // used, leased or resting
        uint64_t free = 0;     // blocks that are not busy
        uint64_t pending = 0;  // leased or resting
        bool changed = false;  // since the last Encode, or the batch of that is not stored yet
        bool renewed = false;  // by Claim: some of what is used may be named nowhere
        bool idle = false;     // in idle_
        std::list<uint64_t>::iterator place;
    };

    Status Know(uint64_t index);
    Bitmaps& Opened(uint64_t index);
    void Settle(uint64_t index);
    void SetBusy(uint64_t index, Bitmaps& open) const;
    void AddReserved(Extent extent);
    void KeepOpen(Bitmaps& open);
    void Close(uint64_t index);
    /// Calls apply(region, its bitmaps, first bit, end bit) for the part of `extent` in each.
    template <typename F>
    Status ForEachPart(Extent extent, F&& apply);
    void Renew(uint64_t region);
    /// What the pool's record counts in regions whose rows cannot be read, all together.
    struct Unread {
        uint64_t regions = 0;
        uint64_t blocks = 0;
    };
    Unread CountUnread() const;
    uint64_t TakeUnread();

    MetadataStore& metadata_;
    SpaceStore& space_;
    PoolRecord& pool_;
    const uint64_t capacity_max_;
    const uint64_t open_max_;
    RegionStates states_;
    std::unordered_map<uint64_t, Bitmaps> open_;
    std::list<uint64_t> idle_;  // open without need; used last: last
    std::unordered_map<uint64_t, uint64_t> held_;
    std::map<uint64_t, Error> aside_;  // regions whose rows cannot be read, and why
    std::unordered_map<uint64_t, Bits> reserved_;
    std::vector<uint64_t> renewed_;           // by Claim
    std::optional<Unread> unread_;            // once one was renewed
    uint64_t unknown_from_ = 0, unknown_to_;  // pages
    const uint64_t first_count_;              // regions when the pool was opened
    std::set<uint64_t> changed_;              // since the last Encode
    std::set<uint64_t> storing_;              // put by it
    uint64_t leased_blocks_ = 0;
    uint64_t home_reads_ = 0;
};

}  // namespace varve::cow
