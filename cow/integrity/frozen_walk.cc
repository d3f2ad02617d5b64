#include "cow/integrity/frozen_walk.h"

#include <algorithm>

#include "base/sort_unique.h"
#include "cow/format/format.h"
#include "cow/mutants.h"
#include "cow/volume/block_sum.h"
#include "cow/volume/transfers.h"

namespace varve::cow {
namespace {

/// Chunks of one step: at most 4 MiB are read while the blocks that are freed meanwhile rest.
constexpr size_t kStepChunks = 16;
/// Blocks of one transfer: 128 KiB.
constexpr size_t kReadTogether = 32;

}  // namespace

Status FrozenWalk::AddChunks(MetadataView& view, ChunkIndex first, ChunkIndex end,
                             std::vector<FrozenBlock>& blocks) {
    const Result<MapRows> rows = ReadMap(view, view_.line, first, end);
    if (!rows.ok()) return rows.error();
    const Status all = rows.value().AllReadable();
    if (!all.ok() && !view_.fork) return all;
    left_out_ = left_out_ || !all.ok();
    for (const MapRow& row : rows.value().rows) {
        for (const Run& run : row.runs) {
            if (run.birth <= floor_ || run.birth == view_.present) continue;
            for (uint32_t i = 0; i < run.count; ++i) {
                FrozenBlock& block = blocks.emplace_back();
                block.place = run.place + i;
                block.birth = run.birth;
                block.chunk = row.chunk;
                block.block = static_cast<uint32_t>(run.first) + i;
            }
        }
    }
    return Status();
}

Status FrozenWalk::Next(MetadataView& view, std::vector<FrozenBlock>& blocks) {
    std::vector<ChunkIndex> chunks;
    if (Status s = chunks_.Next(view, nullptr, 2 * kStepChunks, chunks); !s.ok()) return s;
    SortUnique(chunks);
    for (size_t i = 0; i < chunks.size();) {
        size_t next = i + 1;  // neighbours share a scan
        while (next < chunks.size() && chunks[next].value == chunks[next - 1].value + 1) ++next;
        const ChunkIndex end{chunks[next - 1].value + 1};
        if (Status s = AddChunks(view, chunks[i], end, blocks); !s.ok()) return s;
        i = next;
    }
    std::sort(blocks.begin(), blocks.end(),
              [](const FrozenBlock& a, const FrozenBlock& b) { return a.place < b.place; });
    return FindSums(view, blocks);
}

Status FindSums(MetadataView& view, std::vector<FrozenBlock>& blocks) {
    SumsRow row;
    uint64_t known = ~uint64_t{0};
    for (FrozenBlock& block : blocks) {
        const uint64_t index = block.place / kSumsRowBlocks;
        if (index != known) {
            const Result<std::optional<std::string>> value = view.Get(SumsKey(index));
            if (!value.ok()) return value.error();
            std::optional<SumsRow> decoded;
            if (value.value()) decoded = SumsRow::Decode(*value.value());
            row = decoded ? std::move(*decoded) : SumsRow();
            known = index;
        }
        block.sum = row.Find(block.place, block.birth);
    }
    return Status();
}

namespace {

/// Reads `wanted` to `memory`, and hands them over on the loader. From the lane and back: the
/// loader has several threads, and an awaited task must end on the one on which it began.
Task<void> ReadSome(Core& core, LaneState& lane, std::span<FrozenBlock*> wanted, std::byte* memory,
                    const FrozenVisitor& visitor) {
    IoPieces pieces;
    for (size_t i = 0; i < wanted.size(); ++i) {
        AppendPiece(pieces, wanted[i]->place * kBlockBytes, memory + i * kBlockBytes, kBlockBytes);
    }
    const Errno error = co_await TransferAll(lane.blocks, BlockIo::Kind::kRead, pieces);
    if (error != 0 && wanted.size() > 1) {  // which of them?
        for (size_t i = 0; i < wanted.size(); ++i) {
            co_await ReadSome(core, lane, wanted.subspan(i, 1), memory, visitor);
        }
        co_return;
    }
    co_await Hop(core.loader());
    for (size_t i = 0; i < wanted.size(); ++i) {
        wanted[i]->error = error;
        visitor.read(*wanted[i], error == 0 ? BlockSum(memory + i * kBlockBytes) : 0);
    }
    co_await Hop(lane.executor);
}

}  // namespace

Task<Status> StepFrozen(Core& core, LaneState& lane, FrozenWalk& walk,
                        const FrozenVisitor& visitor) {
    std::vector<FrozenBlock> blocks;
    Status result;
    co_await Hop(lane.executor);
    {
        // Taken before the view: what a commit frees after it rests until this is over.
        const ReadEpochs::Guard guard(lane.epochs);
        co_await Hop(core.loader());
        result = walk.Next(*core.metadata().View(), blocks);
        std::vector<FrozenBlock*> wanted;
        for (FrozenBlock& block : blocks) {
            if (result.ok() && visitor.wants(block)) wanted.push_back(&block);
        }
        co_await Hop(lane.executor);
        const AlignedBuffer memory = AllocateAligned(kReadTogether * kBlockBytes);
        for (size_t i = 0; i < wanted.size() && result.ok(); i += kReadTogether) {
            if (core.closing) result = MakeError(ErrorKind::kFailed, "the server is stopping");
            if (core.closing) break;
            const size_t count = std::min(kReadTogether, wanted.size() - i);
            co_await ReadSome(core, lane, std::span(wanted).subspan(i, count), memory.get(),
                              visitor);
        }
    }
    co_await Hop(core.home());
    co_return result;
}

}  // namespace varve::cow
