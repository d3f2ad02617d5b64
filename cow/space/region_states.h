// RegionStates: what is known of each region without its bitmap, in a byte, and which regions are
// in some state. Not the bitmaps: those are allocator.h.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>

namespace varve::cow {

enum class RegionState : uint8_t {
    kUnknown,     // its row has not been read
    kBare,        // wholly free, and to be provisioned before it is used
    kEmpty,       // wholly free
    kSurplus,     // the same, and to be discarded
    kDiscarding,  // being discarded: not to be used
    kRoomy,       // at least a quarter is free
    kTight,       // less is free, but some
    kFull,
};

/// By pages, so that what is not known takes no memory: 1.1 KiB for 16 GiB of the data file.
class RegionStates {
  public:
    static constexpr uint64_t kPageRegions = 1024;

    RegionState Get(uint64_t region) const;
    void Set(uint64_t region, RegionState state);

    /// Regions in a state that is not kUnknown.
    uint64_t count(RegionState state) const { return counts_[Index(state)]; }
    std::optional<uint64_t> First(RegionState state) const;
    std::optional<uint64_t> Last(RegionState state) const;

    uint64_t pages() const { return pages_.size(); }

  private:
    static constexpr size_t kStates = 8;
    static size_t Index(RegionState state) { return static_cast<size_t>(state); }
    struct Page {
        std::array<RegionState, kPageRegions> states{};
        std::array<uint16_t, kStates> counts{};
    };

    std::map<uint64_t, std::unique_ptr<Page>> pages_;
    std::array<std::set<uint64_t>, kStates> with_;  // pages that have regions in a state
    std::array<uint64_t, kStates> counts_{};
};

}  // namespace varve::cow
