// What `varve check` goes through, on one consistent view: inside of check.cc and
// check_families.cc only.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cow/history/catalog.h"
#include "cow/pool/pool.h"
#include "cow/store/stores.h"
#include "cow/volume/map_reader.h"

namespace varve::cow {

/// Blocks of the data file as a set. Its memory is that of the regions it has blocks of: 512 bytes
/// each, and 8 for each region there is.
class BlockSet {
  public:
    explicit BlockSet(uint64_t regions) : regions_(regions) {}
    /// False if it was there. REQUIRES: block < regions * kRegionBlocks.
    bool Insert(uint64_t block) {
        std::unique_ptr<Words>& words = regions_[block / kRegionBlocks];
        if (!words) words = std::make_unique<Words>();
        uint64_t& word = (*words)[block % kRegionBlocks / 64];
        const uint64_t bit = uint64_t{1} << block % 64;
        if (word & bit) return false;
        word |= bit;
        return true;
    }
    bool Contains(uint64_t block) const { return word(block / 64) >> block % 64 & 1; }
    /// Of the blocks from 64 * `index` on.
    uint64_t word(uint64_t index) const {
        const std::unique_ptr<Words>& words = regions_[index / kWords];
        return words ? (*words)[index % kWords] : 0;
    }

  private:
    static constexpr size_t kWords = kRegionBlocks / 64;
    using Words = std::array<uint64_t, kWords>;
    std::vector<std::unique_ptr<Words>> regions_;
};

/// A branch's rows of a chunk.
struct BranchRows {
    BranchId branch;
    std::vector<MapRow> versions;  // oldest first
    bool falls_through = false;    // some view reads the parent's state
    bool decided = false;          // falls_through was found out
};

/// All that a family, the branches of one root, has of a chunk.
struct FamilyChunk {
    uint64_t index = 0;
    std::vector<BranchRows> rows;  // by branch, ascending; those without any are left out
    std::vector<Runs> live, dead;  // rows that a view resolves to; others, and what notes name

    BranchRows* Find(BranchId id);
};

/// Which places the states of a chunk name, position by position. States that follow each other
/// mostly name the same, so the last ones are looked at first.
class PlacesSeen {
  public:
    void Clear() {
        for (std::vector<uint64_t>& places : places_) places.clear();
    }
    /// False if it was there. REQUIRES: position < kChunkBlocks.
    bool Insert(uint64_t position, uint64_t place) {
        std::vector<uint64_t>& places = places_[position];
        if (std::find(places.rbegin(), places.rend(), place) != places.rend()) return false;
        places.push_back(place);
        return true;
    }

  private:
    std::array<std::vector<uint64_t>, kChunkBlocks> places_;
};

struct Family {
    /// A branch, and the first chunk of which it may have rows or notes that were not read.
    struct Member {
        BranchId branch;
        uint64_t next_row = 0, next_note = 0;
    };
    std::vector<Member> members;  // ascending: parents before children
    std::vector<BranchId> whole;  // those of them that were flattened
};

class Checker {
  public:
    Checker(MetadataView& view, Catalog catalog)
        : view_(view),
          catalog_(std::move(catalog)),
          blocks_(catalog_.pool().region_count * kRegionBlocks),
          live_(catalog_.pool().region_count),
          dying_(catalog_.pool().region_count) {}

    Result<CheckReport> Verify();

  private:
    void Fault(std::string text);

    // ---- check_families.cc
    Status CheckFamilies();
    Status CheckFamily(Family& family);
    using Window = std::map<uint64_t, FamilyChunk>;
    struct Table {
        char letter;
        std::unique_ptr<Cursor> cursor;
        bool placed = false;  // in this pass over the members
    };
    template <typename F>
    Status ReadWindow(Table& table, BranchId id, uint64_t* next, uint64_t end, F&& take);
    Status ReadRows(Table& map, Family::Member& member, uint64_t end, Window& window);
    Status ReadNotes(Table& notes, Family::Member& member, uint64_t end, Window& window);
    bool FallsThrough(FamilyChunk& chunk, BranchId id) const;
    bool IsRead(FamilyChunk& chunk, BranchId id, Generation from, Generation to) const;
    void FindVisible(FamilyChunk& chunk);
    void CheckWhole(const Family& family, FamilyChunk& chunk);
    void CountMapped(FamilyChunk& chunk);
    uint64_t MappedAt(FamilyChunk& chunk, BranchId id, Generation at) const;
    void Own(uint64_t chunk, const std::vector<Runs>& states, PlacesSeen& seen, BlockSet& owner);
    void OwnBlock(uint64_t chunk, uint64_t block, BlockSet& owner);

    // ---- check.cc
    Status CheckJournal();
    void OwnJournaled(uint64_t chunk, const Runs& added, BlockSet& journaled);
    Status CheckTouched();
    void SumUp();
    void CheckCounts();
    int64_t CountAt(BranchId id, Generation at) const;
    Status CheckRegions();
    Status CheckSums();
    Status CheckRing();

    MetadataView& view_;
    const Catalog catalog_;
    const uint64_t blocks_;
    BlockSet live_, dying_;
    CheckReport report_;
    uint64_t faults_ = 0;
    uint64_t notes_ = 0;
    uint64_t dead_rows_ = 0;
    uint64_t row_hash_ = 0;
    std::vector<bool> in_use_;  // regions with used blocks
    /// By branch and generation: what each changed, in blocks; after SumUp(), how many there are.
    std::map<BranchId, std::map<Generation, int64_t>> mapped_;
};

/// Of a row's key; sums of it tell whether two sets of rows are the same.
uint64_t HashRow(uint64_t branch, uint64_t generation, uint64_t chunk);

}  // namespace varve::cow
