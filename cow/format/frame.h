// Frames: what a lane appends to the ring. docs/format.md has the bytes, docs/design/ring.md the
// reasons. Not where a frame lies: that is cow/journal.
//
// A lane's slot in the ring holds a frame without entries, which is overwritten.
//
// A lane numbers its entries from 0 on, whenever the pool is opened. Every frame tells which it
// holds, and what was known of earlier ones when it was written.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "cow/format/map_change.h"

namespace varve::cow {

inline constexpr size_t kFrameHeaderBytes = 48;
/// What an entry takes at most: one that names an owner; one that maps blocks, but for their
/// checksums, of 4 bytes each; and any, with its owner's.
inline constexpr size_t kOwnerBytesMax = 31;
inline constexpr size_t kMapBytesMax = 23;
inline constexpr size_t kEntryBytesMax = kOwnerBytesMax + kMapBytesMax + 4 * kChunkBlocks;
/// A frame with one entry fits.
inline constexpr size_t kFrameUnitLeast = 512;
static_assert(kFrameHeaderBytes + kEntryBytesMax <= kFrameUnitLeast);

struct FrameHeader {
    uint32_t bytes = 0;    // of the whole frame
    uint32_t count = 0;    // entries in it
    uint64_t tag = 0;      // of this opening of the pool
    uint32_t lane = 0;     // who wrote it
    uint64_t first = 0;    // number of the first entry, or of the next one if there is none
    uint64_t durable = 0;  // entries below are known to be durable, with the data they speak of
    uint64_t oldest = 0;   // entries below are in map rows
};

/// A map change, with the checksum of each block that it maps. Or that earlier ones have come to
/// nothing, as their data could not be written.
struct FrameEntry {
    MapOwner owner;
    uint64_t number = 0;
    MapChange change;
    std::string_view sums;    // 4 bytes for each block, big-endian; empty if it unmaps
    uint64_t void_first = 0;  // entries of this lane that have not happened
    uint64_t void_count = 0;  // so many; then there is no change

    uint32_t sum(uint64_t block) const;
};

/// A frame in the making. One thread.
class FrameWriter {
  public:
    bool empty() const { return count_ == 0; }
    size_t bytes() const { return bytes_.size(); }
    /// REQUIRES: IsSound(change); `sums` has one for each block, or none if it unmaps.
    void Add(const MapOwner& owner, const MapChange& change, std::span<const uint32_t> sums);
    /// Entries from `first` on, so many, have not happened.
    void AddVoid(const MapOwner& owner, uint64_t first, uint64_t count);
    /// The frame, until the next call of anything: a multiple of `unit` bytes. `header`: `bytes`
    /// and `count` are filled in.
    std::string_view Finish(FrameHeader header, size_t unit = 1);
    /// Begins another.
    void Clear();

  private:
    char* Begin(const MapOwner& owner);
    void End(const char* out);

    std::string bytes_ = std::string(kFrameHeaderBytes, '\0');
    uint32_t count_ = 0;
    MapOwner owner_;  // of the last entry
};

/// The header of the frame that `bytes` begin with; nothing if that is not whole: it was never
/// written to its end, has changed since, or is of another opening.
std::optional<FrameHeader> ReadFrame(std::string_view bytes, uint64_t tag);

/// Calls `each` for the entries of a frame. False if one breaks a rule of the format.
/// REQUIRES: ReadFrame(bytes) gave a header.
bool ForEachEntry(std::string_view bytes, const std::function<void(const FrameEntry&)>& each);

}  // namespace varve::cow
