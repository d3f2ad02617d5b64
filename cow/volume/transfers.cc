#include "cow/volume/transfers.h"

#include <cstdlib>

#include "base/check.h"
#include "base/sync.h"
#include "cow/format/types.h"

namespace varve::cow {
namespace {

/// Transfers started together; bounds the memory of one large scattered request.
constexpr size_t kTogether = 256;

struct CountedIo : BlockIo {
    Join* join = nullptr;
};

void Describe(BlockIo& io, BlockIo::Kind kind, const IoPiece& piece) {
    io.kind = kind;
    io.offset = piece.offset;
    io.vectors = &piece.memory;
    io.vector_count = 1;
}

/// How many of the first pieces the store could do at once. `error`: the first of theirs.
size_t DoNow(BlockStore& store, BlockIo::Kind kind, const IoPieces& pieces, Errno& error) {
    BlockIo io;
    for (size_t i = 0; i < pieces.size(); ++i) {
        Describe(io, kind, pieces[i]);
        if (!store.DoNow(io)) return i;
        if (error == 0) error = io.error;
    }
    return pieces.size();
}

}  // namespace

void AppendPiece(IoPieces& pieces, uint64_t offset, std::byte* memory, size_t length) {
    if (!pieces.empty()) {
        IoPiece& last = pieces.back();
        const bool goes_on =
            last.offset + last.memory.iov_len == offset &&
            static_cast<std::byte*>(last.memory.iov_base) + last.memory.iov_len == memory;
        if (goes_on) {
            last.memory.iov_len += length;
            return;
        }
    }
    pieces.push_back({offset, {memory, length}});
}

Task<Errno> TransferAll(BlockStore& store, BlockIo::Kind kind, const IoPieces& pieces) {
    if (pieces.empty()) co_return 0;
    if (pieces.size() == 1) {
        co_return co_await Transfer(store, kind, pieces[0].offset, &pieces[0].memory, 1);
    }
    Errno first_error = 0;
    const size_t done = DoNow(store, kind, pieces, first_error);
    for (size_t begin = done; begin < pieces.size(); begin += kTogether) {
        const size_t count = std::min(kTogether, pieces.size() - begin);
        Join join(static_cast<uint32_t>(count));
        std::vector<CountedIo> ios(count);
        for (size_t i = 0; i < count; ++i) {
            Describe(ios[i], kind, pieces[begin + i]);
            ios[i].join = &join;
            ios[i].done = [](BlockIo* io) { static_cast<CountedIo*>(io)->join->Done(); };
            store.Submit(ios[i]);
        }
        co_await join;
        for (const CountedIo& io : ios) {
            if (io.error != 0 && first_error == 0) first_error = io.error;
        }
    }
    co_return first_error;
}

void FreeAligned::operator()(std::byte* memory) const {
    std::free(memory);
}

AlignedBuffer AllocateAligned(size_t bytes) {
    const size_t rounded = (bytes + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(kBlockBytes, rounded));
    VARVE_CHECK(memory != nullptr);
    return AlignedBuffer(memory);
}

}  // namespace varve::cow
