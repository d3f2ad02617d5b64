// Reading frozen blocks and comparing them with their checksums, where those are known.
// Not for blocks of the generation that is being written: they have none.
#pragma once

#include "cow/volume/lane.h"
#include "cow/volume/transfers.h"

namespace varve::cow {

/// Neighbours that are to be read, whole, to `memory`.
struct FrozenBlocks {
    uint64_t place = 0;
    uint64_t count = 0;
    Generation birth;
    const std::byte* memory = nullptr;
};
using FrozenList = boost::container::small_vector<FrozenBlocks, 4>;

/// Reads all of `pieces`, among which are `frozen`. EIO if one of those is damaged. On the lane.
/// Both lists must outlive it. REQUIRES: the frozen blocks are not used again meanwhile, because of
/// a guard of the lane's epochs, or because a head that maps them has locked them.
Task<Errno> ReadVerified(Core& core, LaneState& lane, const IoPieces& pieces,
                         const FrozenList& frozen);

}  // namespace varve::cow
