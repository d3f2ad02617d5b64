#include "cow/space/allocator.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "cow/mutants.h"

namespace varve::cow {
namespace {

constexpr char kFullRow = 'F';
constexpr char kBitmapRow = 'B';  // followed by the bitmap: block i is bit i % 8 of byte i / 8
constexpr uint64_t kRoomyBlocks = kRegionBlocks / 4;
/// Wholly free regions that stay provisioned: 256 MiB that need not be provisioned again soon.
constexpr size_t kEmptyKept = 16;

/// Checksums of what was there are of no use any more; see checksums.h.
constexpr uint64_t kSumsRowsOfRegion = kRegionBlocks / kSumsRowBlocks;

static_assert(sizeof(Allocator::Bits) == kRegionBlocks / 8, "a bitset is copied as bytes");

std::string EncodeBitmap(const Allocator::Bits& bits) {
    std::string row(1 + sizeof bits, kBitmapRow);
    std::memcpy(row.data() + 1, &bits, sizeof bits);
    return row;
}

/// The bitmap of a region's row, empty if the region is full; nothing if the row is damaged.
std::optional<std::string_view> BitmapOf(std::string_view row) {
    if (row.size() == 1 && row[0] == kFullRow) return std::string_view();
    if (row.size() == 1 + sizeof(Allocator::Bits) && row[0] == kBitmapRow) return row.substr(1);
    return std::nullopt;
}

Error DamagedRegion(uint64_t region) {
    return MakeError(ErrorKind::kDamaged, fmt::format("allocator region {} is damaged", region));
}

}  // namespace

Allocator::Allocator(MetadataStore& metadata, SpaceStore& space, PoolRecord& pool,
                     uint64_t capacity_max)
    : metadata_(metadata), space_(space), pool_(pool), capacity_max_(capacity_max) {
    regions_.resize(pool_.region_count);
}

std::optional<uint64_t> Allocator::UsedEnd(std::string_view row) {
    const std::optional<std::string_view> bitmap = BitmapOf(row);
    if (!bitmap) return std::nullopt;
    if (bitmap->empty()) return kRegionBlocks;
    const size_t last = bitmap->find_last_not_of('\0');
    if (last == std::string_view::npos) return 0;
    return last * 8 + std::bit_width(static_cast<uint8_t>((*bitmap)[last]));
}

Status Allocator::Know(uint64_t index) {
    if (index >= regions_.size()) return DamagedRegion(index);
    if (regions_[index].known) return Status();
    const Result<std::optional<std::string>> row = metadata_.View()->Get(RegionKey(index));
    if (!row.ok()) return row.error();
    return Learn(index, row.value());
}

Status Allocator::Learn(uint64_t index, const std::optional<std::string>& row) {
    Region& region = regions_[index];
    if (region.known) return Status();
    if (row) {
        const std::optional<std::string_view> bitmap = BitmapOf(*row);
        if (!bitmap) return DamagedRegion(index);
        region.full = bitmap->empty();
        if (!region.full) {
            region.maps = std::make_unique<Maps>();
            std::memcpy(static_cast<void*>(&region.maps->used), bitmap->data(), sizeof(Bits));
            region.maps->busy = region.maps->used;
        }
    }
    region.known = true;
    region.provisioned = row.has_value() || index == 0;
    if (index == 0) MapsOf(0).busy.set(0);  // the superblock: never wholly free, so never discarded
    Settle(index);
    while (known_below_ < regions_.size() && regions_[known_below_].known) ++known_below_;
    return Status();
}

std::vector<uint64_t> Allocator::Unknown(uint64_t most) const {
    std::vector<uint64_t> unknown;
    for (uint64_t i = known_below_; i < regions_.size() && unknown.size() < most; ++i) {
        if (!regions_[i].known) unknown.push_back(i);
    }
    return unknown;
}

Allocator::Maps& Allocator::MapsOf(uint64_t index) {
    Region& region = regions_[index];
    if (!region.maps) {
        region.maps = std::make_unique<Maps>();
        if (region.full) {
            region.maps->used.set();
            region.maps->busy.set();
        }
    }
    return *region.maps;
}

void Allocator::Settle(uint64_t index) {
    Region& region = regions_[index];
    uint64_t free = region.full ? 0 : kRegionBlocks;
    if (region.maps) {
        const Maps& maps = *region.maps;
        free = kRegionBlocks - maps.busy.count();
        if (maps.used == maps.busy && (free == 0 || free == kRegionBlocks)) {
            region.full = free == 0;
            region.maps.reset();
        }
    }
    for (auto* set : {&ready_, &bare_, &tight_, &empty_, &surplus_}) set->erase(index);
    if (region.discarding || free == 0) return;
    if (!region.provisioned) {
        bare_.insert(index);
    } else if (free < kRoomyBlocks) {
        tight_.insert(index);
    } else {
        ready_.insert(index);
        if (free == kRegionBlocks) empty_.insert(index);
    }
}

Result<uint64_t> Allocator::NextRegion() const {
    const uint64_t index = regions_.size();
    if (capacity_max_ != 0 && (index + 1) * kRegionBytes > capacity_max_) {
        return MakeError(ErrorKind::kNoSpace, "the pool has reached its configured capacity");
    }
    return index;
}

void Allocator::AddRegion() {
    const uint64_t index = regions_.size();
    regions_.emplace_back();
    regions_.back().known = true;
    regions_.back().provisioned = true;
    if (known_below_ == index) known_below_ = index + 1;
    pool_.region_count = regions_.size();
    if (index == 0) MapsOf(0).busy.set(0);
    Settle(index);
}

std::optional<uint64_t> Allocator::FindBare() const {
    if (bare_.empty()) return std::nullopt;
    return *bare_.begin();
}

void Allocator::Provisioned(uint64_t region) {
    regions_[region].provisioned = true;
    Settle(region);
}

std::optional<uint64_t> Allocator::TakeSurplus() {
    if (surplus_.empty()) return std::nullopt;
    const uint64_t region = *surplus_.rbegin();
    regions_[region].discarding = true;
    regions_[region].provisioned = false;
    Settle(region);
    return region;
}

void Allocator::Discarded(uint64_t region) {
    regions_[region].discarding = false;
    Settle(region);
}

std::vector<Extent> Allocator::TakeFrom(uint64_t index, uint64_t most) {
    Bits& busy = MapsOf(index).busy;
    std::vector<Extent> extents;
    const uint64_t base = index * kRegionBlocks;
    for (uint64_t i = 0; i < kRegionBlocks && most > 0; ++i) {
        if (busy[i]) continue;
        busy.set(i);
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

std::vector<Extent> Allocator::TakeReady(uint64_t most) {
    if (ready_.empty()) return {};
    return TakeFrom(*ready_.begin(), most);
}

std::vector<Extent> Allocator::TakeTight(uint64_t most) {
    if (tight_.empty()) return {};
    return TakeFrom(*tight_.begin(), most);
}

template <typename F>
Status Allocator::ForEachPart(Extent extent, F&& apply) {
    while (extent.count > 0) {
        const uint64_t index = extent.place / kRegionBlocks;
        const uint64_t first = extent.place % kRegionBlocks;
        const uint64_t count = std::min(extent.count, kRegionBlocks - first);
        if (Status s = Know(index); !s.ok()) return s;
        if (Status s = apply(index, first, first + count); !s.ok()) return s;
        extent = {extent.place + count, extent.count - count};
    }
    return Status();
}

Status Allocator::Claim(const Extent& extent) {
    return ForEachPart(extent, [this](uint64_t index, uint64_t first, uint64_t end) -> Status {
        Maps& maps = MapsOf(index);
        for (uint64_t bit = first; bit < end; ++bit) {
            if (maps.busy[bit]) return DamagedRegion(index);
            maps.busy.set(bit);
        }
        leased_blocks_ += end - first;
        regions_[index].provisioned = true;
        Settle(index);
        return Status();
    });
}

Status Allocator::MarkUsed(const Extent& extent) {
    pool_.used_blocks += extent.count;
    leased_blocks_ -= extent.count;
    return ForEachPart(extent, [this](uint64_t index, uint64_t first, uint64_t end) {
        Maps& maps = MapsOf(index);
        for (uint64_t bit = first; bit < end; ++bit) {
            VARVE_CHECK(maps.busy[bit] && !maps.used[bit]);
            maps.used.set(bit);
        }
        changed_.insert(index);
        return Status();
    });
}

Status Allocator::MarkFree(const Extent& extent) {
    Status s = ForEachPart(extent, [this](uint64_t index, uint64_t first, uint64_t end) -> Status {
        const Maps& maps = MapsOf(index);
        for (uint64_t bit = first; bit < end; ++bit) {
            if (!maps.used[bit]) return DamagedRegion(index);
        }
        return Status();
    });
    if (!s.ok()) return s;
    pool_.used_blocks -= extent.count;
    leased_blocks_ += extent.count;
    return ForEachPart(extent, [this](uint64_t index, uint64_t first, uint64_t end) {
        for (uint64_t bit = first; bit < end; ++bit) MapsOf(index).used.reset(bit);
        if (!Mutated(Mutant::kFreedBitNotStored)) changed_.insert(index);
        return Status();
    });
}

void Allocator::Release(const Extent& extent) {
    const Status s = ForEachPart(extent, [this](uint64_t index, uint64_t first, uint64_t end) {
        Maps& maps = MapsOf(index);
        for (uint64_t bit = first; bit < end; ++bit) {
            VARVE_CHECK(maps.busy[bit] && !maps.used[bit]);
            maps.busy.reset(bit);
        }
        Settle(index);
        if (empty_.size() - surplus_.size() > kEmptyKept && empty_.contains(index)) {
            surplus_.insert(index);
        }
        return Status();
    });
    leased_blocks_ -= extent.count;
    VARVE_CHECK(s.ok());  // the regions were known when the blocks were taken
}

void Allocator::Encode(Batch& batch) {
    for (const uint64_t index : changed_) {
        const Region& region = regions_[index];
        const bool none = region.maps ? region.maps->used.none() : !region.full;
        const bool all = region.maps ? region.maps->used.all() : region.full;
        if (none) {
            batch.Delete(RegionKey(index));
            for (uint64_t i = 0; i < kSumsRowsOfRegion; ++i) {
                batch.Delete(SumsKey(index * kSumsRowsOfRegion + i));
            }
        } else {
            batch.Put(RegionKey(index),
                      all ? std::string(1, kFullRow) : EncodeBitmap(region.maps->used));
        }
    }
    changed_.clear();
}

uint64_t Allocator::Capacity() const {
    uint64_t capacity = space_.Capacity(regions_.size() * kRegionBytes);
    if (capacity_max_ != 0) capacity = std::min(capacity, capacity_max_);
    return capacity / kRegionBytes * kRegionBytes;
}

}  // namespace varve::cow
