#include "cow/space/allocator.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/sort_unique.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

constexpr char kFullRow = 'F';
constexpr char kBitmapRow = 'B';  // followed by the bitmap: block i is bit i % 8 of byte i / 8
// The same of a region that was renewed: some of what is used there may be named nowhere.
constexpr char kRenewedFullRow = 'f';
constexpr char kRenewedBitmapRow = 'b';
constexpr uint64_t kRoomyBlocks = kRegionBlocks / 4;
/// Wholly free regions that stay provisioned: 256 MiB that need not be provisioned again soon.
constexpr size_t kEmptyKept = 16;

/// Checksums of what was there are of no use any more; see checksums.h.
constexpr uint64_t kSumsRowsOfRegion = kRegionBlocks / kSumsRowBlocks;

static_assert(sizeof(Allocator::Bits) == kRegionBlocks / 8, "a bitset is copied as bytes");

std::string EncodeRow(const Allocator::Bits& bits, bool renewed) {
    if (bits.all()) return std::string(1, renewed ? kRenewedFullRow : kFullRow);
    std::string row(1 + sizeof bits, renewed ? kRenewedBitmapRow : kBitmapRow);
    std::memcpy(row.data() + 1, &bits, sizeof bits);
    return row;
}

/// The bitmap of a region's row, empty if the region is full; nothing if the row is damaged.
std::optional<std::string_view> BitmapOf(std::string_view row) {
    if (row.empty()) return std::nullopt;
    const bool full = row[0] == kFullRow || row[0] == kRenewedFullRow;
    const bool bitmap = row[0] == kBitmapRow || row[0] == kRenewedBitmapRow;
    if (full && row.size() == 1) return std::string_view();
    if (bitmap && row.size() == 1 + sizeof(Allocator::Bits)) return row.substr(1);
    return std::nullopt;
}

bool IsRenewed(std::string_view row) {
    return row[0] == kRenewedFullRow || row[0] == kRenewedBitmapRow;
}

Error DamagedRegion(uint64_t region) {
    return MakeError(ErrorKind::kDamaged, fmt::format("allocator region {} is damaged", region));
}

}  // namespace

std::vector<uint64_t> RegionsOf(const std::vector<Extent>& extents) {
    std::vector<uint64_t> regions;
    for (const Extent& extent : extents) {
        regions.push_back(extent.place / kRegionBlocks);
        regions.push_back((extent.place + extent.count - 1) / kRegionBlocks);
    }
    SortUnique(regions);
    return regions;
}

Allocator::Allocator(MetadataStore& metadata, SpaceStore& space, PoolRecord& pool,
                     uint64_t capacity_max, uint64_t open_max)
    : metadata_(metadata),
      space_(space),
      pool_(pool),
      capacity_max_(capacity_max),
      open_max_(open_max),
      unknown_to_((pool.region_count + RegionStates::kPageRegions - 1) /
                  RegionStates::kPageRegions),
      first_count_(pool.region_count) {}

std::optional<Allocator::Bits> Allocator::UsedOf(std::string_view row) {
    const std::optional<std::string_view> bitmap = BitmapOf(row);
    if (!bitmap) return std::nullopt;
    Bits used;
    if (bitmap->empty()) {
        used.set();
    } else {
        std::memcpy(static_cast<void*>(&used), bitmap->data(), sizeof used);
    }
    return used;
}

std::optional<uint64_t> Allocator::UsedEnd(std::string_view row) {
    const std::optional<std::string_view> bitmap = BitmapOf(row);
    if (!bitmap) return std::nullopt;
    if (bitmap->empty()) return kRegionBlocks;
    const size_t last = bitmap->find_last_not_of('\0');
    if (last == std::string_view::npos) return 0;
    return last * 8 + std::bit_width(static_cast<uint8_t>((*bitmap)[last]));
}

RegionState Allocator::StateOf(const std::optional<std::string_view>& row) {
    if (!row) return RegionState::kBare;
    const std::optional<Bits> used = UsedOf(*row);
    if (!used) return RegionState::kUnknown;
    const uint64_t free = kRegionBlocks - used->count();
    if (free == 0) return RegionState::kFull;
    if (free == kRegionBlocks) return RegionState::kBare;
    return free < kRoomyBlocks ? RegionState::kTight : RegionState::kRoomy;
}

// ---- rows

std::optional<uint64_t> Allocator::UnknownPage() const {
    if (unknown_from_ >= unknown_to_) return std::nullopt;
    // What was filled in order has its room at the back.
    const uint64_t last = unknown_to_ - 1;
    const uint64_t pages =
        (first_count_ + RegionStates::kPageRegions - 1) / RegionStates::kPageRegions;
    const bool back = unknown_from_ > pages - unknown_to_;
    return back ? last : unknown_from_;
}

uint64_t Allocator::RegionsIn(uint64_t page) const {
    return std::min(RegionStates::kPageRegions, first_count_ - page * RegionStates::kPageRegions);
}

void Allocator::LearnPage(uint64_t page, const std::vector<std::optional<RegionState>>& states) {
    const uint64_t base = page * RegionStates::kPageRegions;
    for (uint64_t i = 0; i < states.size() && base + i < first_count_; ++i) {
        if (!states[i] || states_.Get(base + i) != RegionState::kUnknown) continue;
        RegionState state = *states[i];
        if (state == RegionState::kUnknown) {
            SetAside(base + i, DamagedRegion(base + i));
            continue;
        }
        // It has the superblock, or some of the ring, so it is never wholly free.
        const bool held = base + i == 0 || reserved_.contains(base + i);
        if (held && state == RegionState::kBare) state = RegionState::kRoomy;
        states_.Set(base + i, state);
    }
    if (page == unknown_from_) {
        ++unknown_from_;
    } else if (page + 1 == unknown_to_) {
        --unknown_to_;
    }
}

bool Allocator::NeedsRow(uint64_t region) const {
    if (region >= pool_.region_count || open_.contains(region)) return false;
    switch (states_.Get(region)) {
        case RegionState::kBare:
        case RegionState::kEmpty:
        case RegionState::kSurplus:
        case RegionState::kDiscarding:
            return false;  // there is none
        default:
            return true;
    }
}

Status Allocator::Learn(uint64_t index, const std::optional<std::string>& row) {
    if (index >= pool_.region_count) return DamagedRegion(index);
    if (open_.contains(index)) return Status();
    const std::optional<Bits> used = row ? UsedOf(*row) : Bits();
    if (!used) return DamagedRegion(index);
    aside_.erase(index);
    Bitmaps& open = open_[index];
    open.renewed = row && IsRenewed(*row);
    open.used = *used;
    SetBusy(index, open);
    if (states_.Get(index) == RegionState::kUnknown) states_.Set(index, RegionState::kBare);
    Settle(index);
    return Status();
}

Status Allocator::Know(uint64_t index) {
    if (index >= pool_.region_count) return DamagedRegion(index);
    if (open_.contains(index)) return Status();
    if (!NeedsRow(index)) return Learn(index, std::nullopt);
    const auto aside = aside_.find(index);
    if (aside != aside_.end()) return aside->second;
    ++home_reads_;
    const Result<std::optional<std::string>> row = metadata_.View()->Get(RegionKey(index));
    if (!row.ok()) return row.error();
    return Learn(index, row.value());
}

void Allocator::Hold(const std::vector<uint64_t>& regions) {
    for (const uint64_t region : regions) {
        ++held_[region];
        const auto open = open_.find(region);
        if (open != open_.end()) KeepOpen(open->second);
    }
}

void Allocator::Unhold(const std::vector<uint64_t>& regions) {
    for (const uint64_t region : regions) {
        const auto held = held_.find(region);
        if (--held->second > 0) continue;
        held_.erase(held);
        if (open_.contains(region)) Settle(region);
    }
}

void Allocator::SetAside(uint64_t region, Error why) {
    if (open_.contains(region)) return;
    states_.Set(region, RegionState::kFull);
    aside_.try_emplace(region, std::move(why));
}

Status Allocator::Open(const Extent& extent) {
    const uint64_t last = (extent.place + extent.count - 1) / kRegionBlocks;
    for (uint64_t region = extent.place / kRegionBlocks; region <= last; ++region) {
        if (region >= pool_.region_count) break;  // a contradiction, which marking finds
        Status s = Know(region);
        if (s.ok()) continue;
        SetAside(region, s.error());
        return s;
    }
    return Status();
}

// ---- open regions

/// REQUIRES: it is open, or has no row.
Allocator::Bitmaps& Allocator::Opened(uint64_t index) {
    const auto found = open_.find(index);
    if (found != open_.end()) return found->second;
    Bitmaps& open = open_[index];
    SetBusy(index, open);
    return open;
}

/// Of what is not leased or resting.
void Allocator::SetBusy(uint64_t index, Bitmaps& open) const {
    open.busy = open.used;
    if (index == 0) open.busy.set(0);  // the superblock
    const auto reserved = reserved_.find(index);
    if (reserved != reserved_.end()) open.busy |= reserved->second;
    open.free = kRegionBlocks - open.busy.count();
}

/// After its bitmaps changed, or what they are needed for.
void Allocator::Settle(uint64_t index) {
    Bitmaps& open = open_.at(index);
    const RegionState before = states_.Get(index);
    RegionState state = before;
    if (open.free == 0) {
        state = RegionState::kFull;
    } else if (open.free < kRoomyBlocks) {
        state = RegionState::kTight;
    } else if (open.free < kRegionBlocks) {
        state = RegionState::kRoomy;
    } else if (before == RegionState::kRoomy || before == RegionState::kTight ||
               before == RegionState::kFull) {
        state = RegionState::kEmpty;
    }
    states_.Set(index, state);
    KeepOpen(open);
    if (open.pending > 0 || open.changed || held_.contains(index)) return;
    if (open.free == 0 || open.free == kRegionBlocks) return Close(index);
    open.place = idle_.insert(idle_.end(), index);
    open.idle = true;
    while (open_.size() > open_max_ && idle_.size() > 1) Close(idle_.front());
}

void Allocator::KeepOpen(Bitmaps& open) {
    if (open.idle) idle_.erase(open.place);
    open.idle = false;
}

void Allocator::Close(uint64_t index) {
    const auto found = open_.find(index);
    KeepOpen(found->second);
    open_.erase(found);
}

// ---- leases

std::optional<uint64_t> Allocator::FindReady() const {
    std::optional<uint64_t> first;
    for (const RegionState state :
         {RegionState::kRoomy, RegionState::kEmpty, RegionState::kSurplus}) {
        const std::optional<uint64_t> region = states_.First(state);
        if (region && (!first || *region < *first)) first = region;
    }
    return first;
}

uint64_t Allocator::ready() const {
    return states_.count(RegionState::kRoomy) + states_.count(RegionState::kEmpty) +
           states_.count(RegionState::kSurplus);
}

std::vector<Extent> Allocator::Take(uint64_t index, uint64_t most) {
    VARVE_CHECK(!NeedsRow(index));
    std::vector<Extent> extents;
    const RegionState state = states_.Get(index);
    if (state == RegionState::kBare || state == RegionState::kDiscarding) return extents;
    Bitmaps& open = Opened(index);
    const uint64_t base = index * kRegionBlocks;
    most = std::min(most, open.free);
    for (uint64_t i = 0; i < kRegionBlocks && most > 0; ++i) {
        if (open.busy[i]) continue;
        open.busy.set(i);
        --open.free;
        ++open.pending;
        ++leased_blocks_;
        --most;
        if (!extents.empty() && extents.back().place + extents.back().count == base + i) {
            ++extents.back().count;
        } else {
            extents.push_back({base + i, 1});
        }
    }
    Settle(index);
    return extents;
}

void Allocator::Provisioned(uint64_t region) {
    if (states_.Get(region) == RegionState::kBare) states_.Set(region, RegionState::kEmpty);
}

Result<uint64_t> Allocator::NextRegion() const {
    const uint64_t index = pool_.region_count;
    if (capacity_max_ != 0 && (index + 1) * kRegionBytes > capacity_max_) {
        return MakeError(ErrorKind::kNoSpace, "the pool has reached its configured capacity");
    }
    return index;
}

void Allocator::AddRegion() {
    const uint64_t index = pool_.region_count++;
    states_.Set(index, index == 0 ? RegionState::kRoomy : RegionState::kEmpty);
    if (index != 0) return;
    Opened(0);  // with the superblock
    Settle(0);
}

std::optional<uint64_t> Allocator::TakeSurplus() {
    const std::optional<uint64_t> region = states_.Last(RegionState::kSurplus);
    if (region) states_.Set(*region, RegionState::kDiscarding);
    return region;
}

void Allocator::Discarded(uint64_t region) {
    states_.Set(region, RegionState::kBare);
}

// ---- changes

template <typename F>
Status Allocator::ForEachPart(Extent extent, F&& apply) {
    while (extent.count > 0) {
        const uint64_t index = extent.place / kRegionBlocks;
        const uint64_t first = extent.place % kRegionBlocks;
        const uint64_t count = std::min(extent.count, kRegionBlocks - first);
        std::vector<uint64_t> held;
        if (!open_.contains(index)) held.push_back(index);
        Hold(held);  // one that is full or empty would be closed at once
        Status s = Know(index);
        if (s.ok()) s = apply(index, open_.at(index), first, first + count);
        Unhold(held);
        if (!s.ok()) return s;
        extent = {extent.place + count, extent.count - count};
    }
    return Status();
}

void Allocator::AddReserved(Extent extent) {
    for (; extent.count > 0; ++extent.place, --extent.count) {
        reserved_[extent.place / kRegionBlocks].set(extent.place % kRegionBlocks);
    }
}

void Allocator::Reserve(const Extent& extent) {
    VARVE_CHECK(open_.empty());
    AddReserved(extent);
}

void Allocator::ReserveLeased(const Extent& extent) {
    AddReserved(extent);
    const Status s =
        ForEachPart(extent, [this](uint64_t index, Bitmaps& open, uint64_t first, uint64_t end) {
            open.pending -= end - first;
            leased_blocks_ -= end - first;
            Settle(index);
            return Status();
        });
    VARVE_CHECK(s.ok());  // they are open, as long as blocks of theirs are leased
}

void Allocator::Cover(uint64_t block) {
    while (pool_.region_count * kRegionBlocks <= block) AddRegion();
}

Status Allocator::Claim(const Extent& extent) {
    for (const uint64_t region : RegionsOf({extent})) {
        if (region >= pool_.region_count) break;  // a contradiction, which claiming finds
        const Status s = Know(region);
        if (!s.ok() && s.error().kind != ErrorKind::kDamaged) return s;
        if (!s.ok()) Renew(region);
    }
    return ForEachPart(
        extent, [this](uint64_t index, Bitmaps& open, uint64_t first, uint64_t end) -> Status {
            for (uint64_t bit = first; bit < end; ++bit) {
                if (!open.busy[bit]) {
                    open.busy.set(bit);
                    --open.free;
                } else if (open.renewed && open.used[bit] && index + bit > 0) {  // the superblock
                    open.used.reset(bit);
                    --pool_.used_blocks;
                } else {
                    return DamagedRegion(index);
                }
                ++open.pending;
                ++leased_blocks_;
            }
            Settle(index);
            return Status();
        });
}

/// Gives a region whose row cannot be read a new one: all of it is used. The row says so, since
/// recovery may have more to claim there after another crash.
void Allocator::Renew(uint64_t index) {
    renewed_.push_back(index);
    const uint64_t counted = TakeUnread();
    aside_.erase(index);
    Bitmaps& open = open_[index];
    open.renewed = true;
    open.used.set();
    open.busy.set();
    if (index == 0) open.used.reset(0);  // the superblock
    const auto reserved = reserved_.find(index);
    if (reserved != reserved_.end()) open.used &= ~reserved->second;
    pool_.used_blocks += open.used.count() - counted;
    open.changed = true;
    changed_.insert(index);
    states_.Set(index, RegionState::kFull);
}

/// Reads all rows. If some cannot even be seen, there may be any number of them.
Allocator::Unread Allocator::CountUnread() const {
    Unread unread;
    uint64_t read = 0;
    for (const auto& [index, open] : open_) read += open.used.count();
    const std::unique_ptr<MetadataView> view = metadata_.View();
    const auto cursor = view->Range("R", PrefixEnd("R"));
    for (cursor->Seek("R"); cursor->valid(); cursor->Next()) {
        const uint64_t region = KeyNumber(cursor->key(), 0);
        if (region >= pool_.region_count || open_.contains(region)) continue;
        const std::optional<Bits> used = UsedOf(cursor->value());
        used ? read += used->count() : ++unread.regions;
    }
    if (!cursor->status().ok()) unread.regions = pool_.region_count;
    unread.blocks = pool_.used_blocks - std::min(read, pool_.used_blocks);
    return unread;
}

/// The fewest blocks that the pool's record can count in the region that is renewed now: `used` may
/// be too high as long as others cannot be read, but never too low.
uint64_t Allocator::TakeUnread() {
    if (!unread_) unread_ = CountUnread();
    unread_->regions -= std::min<uint64_t>(unread_->regions, 1);
    const uint64_t others = unread_->regions * kRegionBlocks;
    const uint64_t least = unread_->blocks - std::min(unread_->blocks, others);
    unread_->blocks -= least;
    return least;
}

Status Allocator::MarkUsed(const Extent& extent) {
    pool_.used_blocks += extent.count;
    return ForEachPart(extent, [this](uint64_t index, Bitmaps& open, uint64_t first, uint64_t end) {
        for (uint64_t bit = first; bit < end; ++bit) {
            VARVE_CHECK(open.busy[bit] && !open.used[bit]);
            open.used.set(bit);
        }
        open.pending -= end - first;
        leased_blocks_ -= end - first;
        open.changed = true;
        KeepOpen(open);
        changed_.insert(index);
        return Status();
    });
}

Status Allocator::MarkFree(const Extent& extent) {
    Status s = ForEachPart(
        extent, [](uint64_t index, const Bitmaps& open, uint64_t first, uint64_t end) -> Status {
            for (uint64_t bit = first; bit < end; ++bit) {
                if (!open.used[bit]) return DamagedRegion(index);
            }
            return Status();
        });
    if (!s.ok()) return s;
    pool_.used_blocks -= extent.count;
    return ForEachPart(extent, [this](uint64_t index, Bitmaps& open, uint64_t first, uint64_t end) {
        for (uint64_t bit = first; bit < end; ++bit) open.used.reset(bit);
        open.pending += end - first;
        leased_blocks_ += end - first;
        KeepOpen(open);
        if (!Mutated(Mutant::kFreedBitNotStored)) {
            open.changed = true;
            changed_.insert(index);
        }
        return Status();
    });
}

void Allocator::Release(const Extent& extent) {
    const Status s =
        ForEachPart(extent, [this](uint64_t index, Bitmaps& open, uint64_t first, uint64_t end) {
            for (uint64_t bit = first; bit < end; ++bit) {
                VARVE_CHECK(open.busy[bit] && !open.used[bit]);
                open.busy.reset(bit);
            }
            open.free += end - first;
            open.pending -= end - first;
            leased_blocks_ -= end - first;
            Settle(index);
            if (states_.Get(index) == RegionState::kEmpty &&
                states_.count(RegionState::kEmpty) > kEmptyKept) {
                states_.Set(index, RegionState::kSurplus);
            }
            return Status();
        });
    VARVE_CHECK(s.ok());  // they are open, as long as blocks of theirs are leased or resting
}

void Allocator::Encode(Batch& batch) {
    Stored();
    for (const uint64_t index : changed_) {
        Bitmaps& open = open_.at(index);
        if (open.used.none()) {
            open.renewed = false;  // nothing is left of what nobody names
            batch.Delete(RegionKey(index));
            for (uint64_t i = 0; i < kSumsRowsOfRegion; ++i) {
                batch.Delete(SumsKey(index * kSumsRowsOfRegion + i));
            }
        } else {
            batch.Put(RegionKey(index), EncodeRow(open.used, open.renewed));
        }
    }
    storing_.swap(changed_);
}

void Allocator::Stored() {
    for (const uint64_t index : storing_) {
        if (changed_.contains(index)) continue;
        open_.at(index).changed = false;
        Settle(index);
    }
    storing_.clear();
}

uint64_t Allocator::Capacity() const {
    uint64_t capacity = space_.Capacity(pool_.region_count * kRegionBytes);
    if (capacity_max_ != 0) capacity = std::min(capacity, capacity_max_);
    return capacity / kRegionBytes * kRegionBytes;
}

}  // namespace varve::cow
