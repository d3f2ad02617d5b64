#include "cow/volume/mapped_volume.h"

#include <algorithm>
#include <cstring>

#include "base/log.h"
#include "cow/format/runs.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Chunks loaded together: 4 MiB of a disk. One seek costs about as much as decoding 16 rows.
constexpr uint64_t kGroupChunks = 16;
/// Bytes of one request that are read together; bounds the memory of a large scattered one.
constexpr uint64_t kReadTogether = 4 << 20;
/// What one Status() may cost, in units of Turns: 1 GiB of a disk whose blocks alternate with
/// holes, 16 GiB without anything. Beyond it the answer is shorter than the question.
constexpr uint64_t kStatusMost = 32 * Turns::kShare;
/// What a transfer costs beside its transfer, in units of Turns.
constexpr uint64_t kTransferCost = 12;
/// What it costs to forget a chunk, and how many are looked for together: the table is walked from
/// its beginning each time.
constexpr uint64_t kEvictCost = 4;
constexpr size_t kEmptyTogether = 512;
/// Chunks in memory among which the next one is looked for, and how many for a unit of Turns.
constexpr size_t kHeldLook = 1024;
constexpr size_t kHeldPerUnit = 8;
/// Bytes zeroed for a unit of Turns.
constexpr uint64_t kZeroedPerUnit = 256;

}  // namespace

ChunkIndex MappedVolume::GroupEnd(ChunkIndex index) {
    return ChunkIndex{(index.value / kGroupChunks + 1) * kGroupChunks};
}

void AppendAllocation(std::vector<Allocation>& map, uint64_t length, bool hole, uint32_t depth) {
    if (!map.empty() && map.back().hole == hole && map.back().depth == depth) {
        map.back().length += length;
    } else {
        map.push_back({.length = length, .hole = hole, .depth = depth});
    }
}

MappedVolume::MappedVolume(Core& core, LaneState& lane, Line line, uint64_t size)
    : core_(core), lane_(lane), size_(size), line_(std::move(line)) {}

MappedVolume::~MappedVolume() {
    Reset({}, 0);
}

void MappedVolume::Reset(Line line, uint64_t size) {
    VARVE_CHECK(loading_.empty());
    for (const auto& [index, chunk] : chunks_) {
        VARVE_CHECK(chunk->pins == 0);
        lane_.cache.Remove(*chunk);
        delete chunk;
    }
    chunks_.clear();
    line_ = std::move(line);
    size_ = size;
}

void MappedVolume::Evict(Chunk& chunk) {
    chunks_.erase(chunk.index.value);
    lane_.cache.Remove(chunk);
    delete &chunk;
}

Task<void> MappedVolume::Empty() {
    std::vector<Chunk*> some;
    do {
        some.clear();
        for (auto it = chunks_.begin(); it != chunks_.end() && some.size() < kEmptyTogether; ++it) {
            if (it->second->pins == 0) some.push_back(it->second);
        }
        for (Chunk* chunk : some) Evict(*chunk);
        if (lane_.turns.Spend(some.size() * kEvictCost)) co_await Turns::Next(lane_.turns);
    } while (!some.empty());
}

Chunk* MappedVolume::Find(ChunkIndex index) {
    const auto found = chunks_.find(index.value);
    if (found == chunks_.end()) return nullptr;
    found->second->referenced = true;
    return found->second;
}

ChunkIndex MappedVolume::NextHeld(ChunkIndex index, ChunkIndex to, uint64_t* cost) const {
    if (read_only()) return to;  // nothing that is not stored
    if (chunks_.size() > kHeldLook) return std::min(to, ChunkIndex{index.value + 1});
    *cost += chunks_.size() / kHeldPerUnit;
    for (const auto& [held, chunk] : chunks_) {
        if (held > index.value) to = std::min(to, ChunkIndex{held});
    }
    return to;
}

Task<MappedVolume::Loaded> MappedVolume::Load(ChunkIndex index) {
    const uint64_t group = index.value / kGroupChunks;
    Loaded result;
    if (const auto other = loading_.find(group); other != loading_.end()) {
        co_await other->second->Wait();
        co_return result;  // the caller looks again
    }
    WaitList loaded(lane_.executor);
    loading_[group] = &loaded;
    // A chunk that is in memory now may be changed, committed and dropped before the rows arrive:
    // only those that are absent now are taken from them.
    const ChunkIndex first{group * kGroupChunks};
    uint64_t absent = 0;
    for (uint64_t i = 0; i < kGroupChunks; ++i) {
        if (!chunks_.contains(first.value + i)) absent |= uint64_t{1} << i;
    }
    const Line line = line_;
    result.settled = settled_;
    co_await Hop(core_.loader());
    const std::unique_ptr<MetadataView> view = core_.metadata().View();
    Result<MapRows> rows = ReadMap(*view, line, first, ChunkIndex{first.value + kGroupChunks});
    co_await Hop(lane_.executor);
    loading_.erase(group);
    loaded.WakeAll();
    if (!rows.ok()) {
        Log(LogLevel::kError, rows.error().message);
        result.error = EIO;
        co_return result;
    }
    lane_.cache.Shrink();
    uint64_t damaged = 0;
    for (const DamagedRow& lost : rows.value().damaged) {
        damaged |= uint64_t{1} << (lost.chunk.value - first.value);
        if (lost.chunk != index) continue;
        Log(LogLevel::kError, lost.what);
        result.error = EIO;
    }
    auto row = rows.value().rows.begin();
    for (uint64_t i = 0; i < kGroupChunks; ++i) {
        const ChunkIndex here{first.value + i};
        const bool stored = row != rows.value().rows.end() && row->chunk == here;
        const bool stale = Mutated(Mutant::kStaleRowsLoaded) && !chunks_.contains(here.value);
        if ((absent & ~damaged) >> i & 1 || stale) {
            auto* chunk = new Chunk{.owner = this, .index = here};
            if (stored) {
                chunk->runs = std::move(row->runs);
                chunk->row = row->at;
            }
            chunks_[here.value] = chunk;
            lane_.cache.Add(*chunk);
        }
        if (stored) ++row;
    }
    result.next = rows.value().next;
    co_return result;
}

uint64_t MappedVolume::Gather(const Chunk& chunk, uint64_t offset, std::span<std::byte> buffer,
                              IoPieces& pieces, FrozenList& frozen,
                              std::vector<Allocation>* map) const {
    const uint64_t base = chunk.index.value * kChunkBytes;
    uint64_t cost = 1;
    for (uint64_t done = 0; done < buffer.size();) {
        const uint64_t at = offset + done - base;  // in the chunk
        const uint64_t stop = offset + buffer.size() - base;
        const auto first = static_cast<uint32_t>(at / kBlockBytes);
        const auto end = static_cast<uint32_t>((stop + kBlockBytes - 1) / kBlockBytes);
        const Piece piece = PieceAt(chunk.runs, first, end);
        const uint64_t piece_end = std::min(stop, (first + piece.count) * kBlockBytes);
        const uint64_t length = piece_end - at;
        cost += piece.mapped ? kTransferCost : length / kZeroedPerUnit;
        if (piece.mapped) {
            AppendPiece(pieces, piece.place * kBlockBytes + at % kBlockBytes, &buffer[done],
                        length);
            if (piece.birth != generation_) {
                frozen.push_back({piece.place, length / kBlockBytes, piece.birth, &buffer[done]});
            }
        } else {
            std::memset(&buffer[done], 0, length);
        }
        if (map) AppendAllocation(*map, length, !piece.mapped);
        done += length;
    }
    return cost;
}

Task<Errno> MappedVolume::ReadBlocks(uint64_t offset, std::span<std::byte> buffer,
                                     std::vector<Allocation>* map, Requester* requester) {
    Errno error = 0;
    for (size_t done = 0; done < buffer.size() && error == 0; done += kReadTogether) {
        const size_t length = std::min(buffer.size() - done, kReadTogether);
        error = co_await ReadSome(offset + done, buffer.subspan(done, length), map, requester);
    }
    co_return error;
}

Task<Errno> MappedVolume::ReadSome(uint64_t offset, std::span<std::byte> buffer,
                                   std::vector<Allocation>* map, Requester* requester) {
    const ReadEpochs::Guard guard(lane_.epochs);
    IoPieces pieces;
    FrozenList frozen;
    for (uint64_t done = 0; done < buffer.size();) {
        if (Gone(requester)) co_return ECANCELED;
        const uint64_t at = offset + done;
        const ChunkIndex index{at / kChunkBytes};
        Chunk* chunk = Find(index);
        if (!chunk) {
            const Loaded loaded = co_await Load(index);
            if (loaded.error != 0) co_return loaded.error;
            continue;
        }
        const uint64_t length =
            std::min<uint64_t>(buffer.size() - done, kChunkBytes - at % kChunkBytes);
        const uint64_t cost = Gather(*chunk, at, buffer.subspan(done, length), pieces, frozen, map);
        done += length;
        const bool more = done < buffer.size();
        if (more && lane_.turns.Spend(cost)) co_await Turns::Next(lane_.turns);
    }
    if (Gone(requester)) co_return ECANCELED;
    const bool skip = Mutated(Mutant::kHeadReadsUnverified) && !read_only();
    if (!frozen.empty() && !skip) co_return co_await ReadVerified(core_, lane_, pieces, frozen);
    co_return co_await TransferAll(lane_.blocks, BlockIo::Kind::kRead, pieces);
}

Task<Errno> MappedVolume::Read(uint64_t offset, std::span<std::byte> buffer,
                               std::vector<Allocation>* map, Requester* requester) {
    if (!InRange(offset, buffer.size())) co_return EINVAL;
    const LoadMeter::Request counted(lane_.load);
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    const bool aligned = (address & (lane_.blocks.alignment() - 1)) == 0;
    if (((offset | buffer.size()) & (kBlockBytes - 1)) != 0) {
        co_return co_await ReadEdges(offset, buffer, map, requester);
    }
    if (aligned) co_return co_await ReadBlocks(offset, buffer, map, requester);
    co_return co_await ReadDetour(offset, buffer, map, requester);
}

/// Blocks are verified as a whole: those at the edges take a detour, what lies between does not.
Task<Errno> MappedVolume::ReadEdges(uint64_t offset, std::span<std::byte> buffer,
                                    std::vector<Allocation>* map, Requester* requester) {
    const uint64_t end = offset + buffer.size();
    const uint64_t first_whole = (offset + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    const uint64_t last_whole = end / kBlockBytes * kBlockBytes;
    if (first_whole >= last_whole) co_return co_await ReadDetour(offset, buffer, map, requester);
    Errno error = 0;
    for (uint64_t at = offset; at < end && error == 0;) {
        const uint64_t stop = at < first_whole ? first_whole : at < last_whole ? last_whole : end;
        const std::span<std::byte> part = buffer.subspan(at - offset, stop - at);
        const auto address = reinterpret_cast<uintptr_t>(part.data());
        const bool direct =
            at >= first_whole && at < last_whole && (address & (lane_.blocks.alignment() - 1)) == 0;
        if (direct) {
            error = co_await ReadBlocks(at, part, map, requester);
        } else {
            error = co_await ReadDetour(at, part, map, requester);
        }
        at = stop;
    }
    co_return error;
}

Task<Errno> MappedVolume::ReadDetour(uint64_t offset, std::span<std::byte> buffer,
                                     std::vector<Allocation>* map, Requester* requester) {
    const uint64_t first = offset / kBlockBytes * kBlockBytes;
    const uint64_t end = (offset + buffer.size() + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    const Buffer detour = lane_.detours.Take(end - first);
    if (!detour) co_return ENOMEM;
    const std::span<std::byte> whole = detour.span();
    std::vector<Allocation> whole_map;
    const Errno error = co_await ReadBlocks(first, whole, map ? &whole_map : nullptr, requester);
    if (error != 0) co_return error;
    std::memcpy(buffer.data(), whole.data() + (offset - first), buffer.size());
    uint64_t skip = offset - first, left = buffer.size();
    for (const Allocation& part : whole_map) {
        const uint64_t skipped = std::min(skip, part.length);
        skip -= skipped;
        const uint64_t length = std::min(left, part.length - skipped);
        if (length > 0) AppendAllocation(*map, length, part.hole);
        left -= length;
    }
    co_return 0;
}

Task<Errno> MappedVolume::Status(uint64_t offset, uint64_t length, uint32_t most,
                                 const Layers* layers, std::vector<Allocation>* map,
                                 Requester* requester) {
    if (!InRange(offset, length)) co_return EINVAL;
    ChunkIndex nothing_from, nothing_to;  // nothing is stored in between
    uint64_t settled = 0;
    uint64_t cost = 0;
    const uint64_t end = offset + length;
    while (offset < end) {
        if (Gone(requester)) co_return ECANCELED;
        const ChunkIndex index{offset / kChunkBytes};
        uint64_t stop = std::min(end, (index.value + 1) * kChunkBytes);
        uint64_t units = 1;
        Chunk* chunk = Find(index);
        const bool absent = index >= nothing_from && index < nothing_to && settled == settled_;
        if (!chunk && absent) {
            const ChunkIndex last{end / kChunkBytes + 1};
            const ChunkIndex next = NextHeld(index, std::min(nothing_to, last), &units);
            stop = std::min(end, next.value * kChunkBytes);
            AppendAllocation(*map, stop - offset, true);
            offset = stop;
        } else if (!chunk) {
            const Loaded loaded = co_await Load(index);
            if (loaded.error != 0) co_return loaded.error;
            nothing_from = GroupEnd(index);
            nothing_to = loaded.next;
            settled = loaded.settled;
            chunk = Find(index);
            if (!chunk) continue;
        }
        while (offset < stop) {
            const uint64_t base = index.value * kChunkBytes;
            const auto first = static_cast<uint32_t>((offset - base) / kBlockBytes);
            const auto last = static_cast<uint32_t>((stop - base + kBlockBytes - 1) / kBlockBytes);
            const Piece piece = PieceAt(chunk->runs, first, last);
            const uint64_t piece_end = std::min(stop, base + (first + piece.count) * kBlockBytes);
            const uint32_t depth = layers && piece.mapped ? layers->DepthOf(piece.birth) : 0;
            AppendAllocation(*map, piece_end - offset, !piece.mapped, depth);
            offset = piece_end;
            ++units;
            if (map->size() > most) break;
        }
        if (map->size() > most) {  // the one too many ends what is known of the last
            map->pop_back();
            co_return 0;
        }
        cost += units;
        if (cost >= kStatusMost) co_return 0;
        if (offset < end && lane_.turns.Spend(units)) co_await Turns::Next(lane_.turns);
    }
    co_return 0;
}

}  // namespace varve::cow
