// Operations on the runs of one chunk: look up, replace, compare, encode.
// Pure functions on values; not the map, which is made of many chunks.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cow/format/types.h"

namespace varve::cow {

/// A piece of a chunk as a lookup sees it: `count` blocks from `first` on, mapped or not.
struct Piece {
    uint32_t first = 0;
    uint32_t count = 0;
    bool mapped = false;
    uint64_t place = 0;  // of the first block, if mapped
    Generation birth;    // if mapped
};

/// Blocks [first, end) of a chunk, a bit each. REQUIRES: first < 64, end <= 64.
inline uint64_t MaskOf(uint64_t first, uint64_t end) {
    const uint64_t below_end = end == kChunkBlocks ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
    return below_end & ~((uint64_t{1} << first) - 1);
}

/// The piece that begins at block `first` of the chunk: as long as possible, but not beyond `end`.
/// REQUIRES: first < end <= 64.
Piece PieceAt(const Runs& runs, uint32_t first, uint32_t end);

/// Takes blocks [first, end) out of `runs`; what was mapped there is appended to `removed`.
void Unmap(Runs& runs, uint32_t first, uint32_t end, Runs* removed);

/// Maps `run`, replacing what was there (appended to `removed`). Joins with a neighbour that
/// continues it.
void Map(Runs& runs, Run run, Runs* removed);

/// How many blocks are mapped.
uint64_t MappedBlocks(const Runs& runs);

/// The parts of `runs` that `other` does not map to the same place, position by position.
Runs Subtract(const Runs& runs, const Runs& other);

/// A map row's value. `generation` is the row's own.
std::string EncodeRuns(const Runs& runs, Generation generation);
/// The inverse; nothing if `value` breaks a rule of the format (docs/format.md).
std::optional<Runs> DecodeRuns(std::string_view value, Generation generation);

}  // namespace varve::cow
