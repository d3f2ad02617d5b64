// Several transfers awaited as one, and aligned memory for those that need a detour.
// Not a queue: everything given is started at once.
#pragma once

#include <boost/container/small_vector.hpp>
#include <cstddef>
#include <memory>

#include "base/task.h"
#include "cow/store/stores.h"

namespace varve::cow {

/// `length` bytes between memory and the data file from `offset` on.
struct IoPiece {
    uint64_t offset = 0;
    iovec memory{};
};
using IoPieces = boost::container::small_vector<IoPiece, 4>;

/// Appends a piece, or lengthens the last one if it goes on there both in file and memory.
void AppendPiece(IoPieces& pieces, uint64_t offset, std::byte* memory, size_t length);

/// Moves all pieces; the first error, if any, once all have ended. `pieces` must outlive it.
Task<Errno> TransferAll(BlockStore& store, BlockIo::Kind kind, const IoPieces& pieces);

struct FreeAligned {
    void operator()(std::byte* memory) const;
};
using AlignedBuffer = std::unique_ptr<std::byte[], FreeAligned>;

/// `bytes` of memory aligned to 4096; not zeroed.
AlignedBuffer AllocateAligned(size_t bytes);

}  // namespace varve::cow
