// MappedVolume: what changed since another state of the disk.
#include <algorithm>

#include "base/log.h"
#include "cow/volume/mapped_volume.h"

namespace varve::cow {
namespace {

/// Chunks in memory that one step looks through.
constexpr uint64_t kLiveLook = 4 << 10;
/// Runs of them that it takes with it: 256 KiB.
constexpr uint64_t kLiveRuns = 16 << 10;
/// Trips to the loader for one request: beyond it the answer is shorter than the question.
constexpr unsigned kTripsMost = 64;

/// Appends to a list of at most `most` changes.
class ChangeList {
  public:
    ChangeList(std::vector<Delta>& list, uint32_t most) : list_(list), most_(most) {}

    /// False: it is full, and what it has ends before this.
    bool Add(uint64_t length, bool changed, bool zero) {
        const Delta next{length, changed, changed && zero};
        const bool joins =
            !list_.empty() && list_.back().changed == changed && list_.back().zero == next.zero;
        if (joins) {
            list_.back().length += length;
            return true;
        }
        if (list_.size() >= most_) return false;
        list_.push_back(next);
        return true;
    }

  private:
    std::vector<Delta>& list_;
    const uint32_t most_;
};

/// What a range of a disk is beside a base, stretch by stretch.
class ChangeWriter {
  public:
    /// `size`: of the disk now. Where the base is smaller, its last block counts as changed: there
    /// is more of it now.
    ChangeWriter(ChangeList& list, const Base& base, uint64_t size, uint64_t offset, uint64_t end)
        : list_(list), unknown_(base.kind == Base::Kind::kUnknown), offset_(offset), end_(end) {
        if (base.size >= size) return;
        beyond_ = base.size / kBlockBytes * kBlockBytes;
        unmapped_ = (base.size + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    }

    uint64_t offset() const { return offset_; }

    /// Up to `to`: chunks that nothing was found of.
    bool Skip(uint64_t to) {
        to = std::min(to, end_);
        if (unknown_) return Add(to, true, true);
        return Add(std::min(to, beyond_), false, false) &&
               Add(std::min(to, unmapped_), true, false) && Add(to, true, true);
    }

    /// One chunk; gives how many stretches it took, 0 if there was no room.
    uint64_t Add(const ChangedChunk& chunk) {
        const uint64_t base = chunk.chunk.value * kChunkBytes;
        if (!Skip(base)) return 0;
        uint64_t units = 1;
        while (offset_ < std::min(end_, base + kChunkBytes)) {
            const uint64_t block = (offset_ - base) / kBlockBytes;
            const auto look = [&](uint64_t at) {
                const bool past = base + at * kBlockBytes >= beyond_;
                const bool changed = past || (chunk.changed >> at & 1) != 0;
                return std::pair(changed, changed && (chunk.mapped >> at & 1) == 0);
            };
            const auto [changed, zero] = look(block);
            uint64_t last = block + 1;
            while (last < kChunkBlocks && look(last) == std::pair(changed, zero)) ++last;
            const uint64_t to = std::min(end_, base + last * kBlockBytes);
            if (!Add(to, changed, zero)) return 0;
            ++units;
        }
        return units;
    }

  private:
    bool Add(uint64_t to, bool changed, bool zero) {
        if (to <= offset_) return true;
        if (!list_.Add(to - offset_, changed, zero)) return false;
        offset_ = to;
        return true;
    }

    ChangeList& list_;
    const bool unknown_;
    uint64_t beyond_ = ~uint64_t{0};    // from here on all is changed
    uint64_t unmapped_ = ~uint64_t{0};  // and from here on the base has no blocks
    uint64_t offset_;
    const uint64_t end_;
};

}  // namespace

/// What the store may lack: chunks that are pinned. Brings `*end` nearer if there are too many.
std::vector<LiveChunk> MappedVolume::TakeLive(const Base& base, ChunkIndex first,
                                              ChunkIndex* end) const {
    std::vector<const Chunk*> pinned;
    if (chunks_.size() <= kLiveLook) {
        for (const auto& [index, chunk] : chunks_) {
            const bool inside = index >= first.value && index < end->value;
            if (inside && chunk->pins > 0) pinned.push_back(chunk);
        }
        std::sort(pinned.begin(), pinned.end(),
                  [](const Chunk* a, const Chunk* b) { return a->index < b->index; });
    } else {
        *end = ChunkIndex{std::min(end->value, first.value + kLiveLook)};
        for (ChunkIndex index = first; index < *end; ++index.value) {
            const auto found = chunks_.find(index.value);
            if (found != chunks_.end() && found->second->pins > 0) pinned.push_back(found->second);
        }
    }
    std::vector<LiveChunk> live;
    uint64_t runs = 0;
    for (const Chunk* chunk : pinned) {
        runs += chunk->runs.size();
        if (runs > kLiveRuns && !live.empty()) {
            *end = chunk->index;
            break;
        }
        const bool touched = chunk->pending || (chunk->row && LiesIn(base.apart, *chunk->row));
        live.push_back({chunk->index, chunk->runs, touched});
    }
    return live;
}

Task<Errno> MappedVolume::Changes(const Base* base, uint64_t offset, uint64_t length, uint32_t most,
                                  std::vector<Delta>* changes, Requester* requester) {
    if (!InRange(offset, length)) co_return EINVAL;
    const uint64_t end = offset + length;
    ChangeList list(*changes, most);
    ChangeWriter writer(list, *base, size(), offset, end);
    for (unsigned step = 0; step < kTripsMost && writer.offset() < end; ++step) {
        if (Gone(requester)) co_return ECANCELED;
        const ChunkIndex first{writer.offset() / kChunkBytes};
        ChunkIndex stop{(end + kChunkBytes - 1) / kChunkBytes};
        const std::vector<LiveChunk> live = TakeLive(*base, first, &stop);
        const Line line = line_;
        co_await Hop(core_.loader());
        Result<FoundChanges> found = [&] {
            const std::unique_ptr<MetadataView> view = core_.metadata().View();
            return FindChanges(*view, line, *base, first, stop, most, live);
        }();
        co_await Hop(lane_.executor);
        if (!found.ok()) {
            Log(LogLevel::kError, found.error().message);
            co_return EIO;
        }
        for (const ChangedChunk& chunk : found.value().chunks) {
            const uint64_t units = writer.Add(chunk);
            if (units == 0) co_return 0;
            if (lane_.turns.Spend(units)) co_await Turns::Next(lane_.turns);
        }
        if (!writer.Skip(found.value().next.value * kChunkBytes)) co_return 0;
    }
    co_return 0;
}

}  // namespace varve::cow
