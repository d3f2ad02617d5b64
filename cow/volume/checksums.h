// Checksums of frozen blocks: their rows, and the cache of them that each lane has.
// Not how they are made (checksummer.h), nor how reads use them (verified_read.h).
// docs/design/checksums.md says why they can give no false alarm.
//
// A checksum is stored by the block's place in the data file, together with the block's birth. It
// counts for a block of that place and that birth only, so one that outlived its block is harmless.
#pragma once

#include <array>
#include <boost/unordered/unordered_flat_map.hpp>
#include <list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cow/format/types.h"
#include "cow/volume/cache_budget.h"

namespace varve::cow {

/// The checksums of kSumsRowBlocks places, from a multiple of that on.
class SumsRow {
  public:
    struct Slot {
        Generation birth;  // 0: there is none
        uint32_t sum = 0;
        friend bool operator==(const Slot&, const Slot&) = default;
    };
    using Slots = std::array<Slot, kSumsRowBlocks>;

    SumsRow() = default;
    explicit SumsRow(const Slots& slots);
    Slots Unpack() const;

    /// Of the block at `place` if it was born in `birth`; nothing if that is not known.
    std::optional<uint32_t> Find(uint64_t place, Generation birth) const;

    std::string Encode() const;
    /// Nothing if `value` breaks a rule of the format (docs/format.md).
    static std::optional<SumsRow> Decode(std::string_view value);

    /// Bytes of memory beside the object itself.
    size_t heap_bytes() const {
        return groups_.capacity() * sizeof(Group) + sums_.capacity() * sizeof(uint32_t);
    }

  private:
    /// Neighbours of one birth.
    struct Group {
        uint8_t first = 0, count = 0;
        Generation birth;
    };
    std::vector<Group> groups_;   // in order, not overlapping
    std::vector<uint32_t> sums_;  // of all groups, one after the other
};

/// Rows that were read lately, within a share of a bound of bytes; the one that was not used for
/// longest goes first. An absent row is kept as an empty one. Belongs to its lane.
class SumsCache {
  public:
    explicit SumsCache(CacheBudget& budget) : share_(budget) {}

    /// Null if it is not known. Valid until the next Put or Forget.
    const SumsRow* Find(uint64_t row);
    /// Not if a Forget came since `version` was current: then the row may be an old one.
    void Put(uint64_t row, SumsRow sums, uint64_t version);
    /// New checksums were stored in these rows.
    void Forget(const std::vector<uint64_t>& rows);

    uint64_t version() const { return version_; }
    /// Drops rows until `limit` is kept, or some; what is free then goes back to the budget.
    void GiveBack(uint64_t limit);

    uint64_t used() const { return used_; }
    CacheShare& share() { return share_; }

  private:
    struct Entry {
        uint64_t row;
        SumsRow sums;
        uint64_t bytes;
    };
    void Drop(std::list<Entry>::iterator entry);

    CacheShare share_;
    uint64_t used_ = 0;
    uint64_t version_ = 0;
    std::list<Entry> entries_;  // used last: first
    boost::unordered_flat_map<uint64_t, std::list<Entry>::iterator> index_;
};

}  // namespace varve::cow
