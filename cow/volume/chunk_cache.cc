#include "cow/volume/chunk_cache.h"

#include <algorithm>

#include "cow/volume/mapped_volume.h"

namespace varve::cow {
namespace {

/// What a chunk costs beside its runs: itself, its heap header, its slot in the volume's table.
constexpr uint32_t kChunkOverhead = sizeof(Chunk) + 16 + 40;

/// Chunks that are looked at without letting others run: about 0.5 ms.
constexpr uint64_t kStepsTogether = 4096;
/// The same each time when there is one chunk more: about 15 us.
constexpr uint64_t kShrinkSteps = 128;
/// Part of the bound by which it may be passed before referenced chunks go as well.
constexpr uint64_t kSlackPart = 64;

uint32_t BytesOf(const Chunk& chunk) {
    return kChunkOverhead + static_cast<uint32_t>(chunk.runs.capacity() * sizeof(Run));
}

}  // namespace

void ChunkCache::Add(Chunk& chunk) {
    if (hand_) {
        chunk.after = hand_;
        chunk.before = hand_->before;
        chunk.before->after = &chunk;
        hand_->before = &chunk;
    } else {
        hand_ = chunk.before = chunk.after = &chunk;
    }
    ++count_;
    chunk.bytes = BytesOf(chunk);
    used_ += chunk.bytes;
}

void ChunkCache::Remove(Chunk& chunk) {
    if (hand_ == &chunk) hand_ = chunk.after == &chunk ? nullptr : chunk.after;
    chunk.before->after = chunk.after;
    chunk.after->before = chunk.before;
    used_ -= chunk.bytes;
    --count_;
}

void ChunkCache::Recharge(Chunk& chunk) {
    const uint32_t bytes = BytesOf(chunk);
    used_ += bytes;
    used_ -= chunk.bytes;
    chunk.bytes = bytes;
}

/// The hand moves on, over one chunk. `second_chance`: one that was referenced stays.
void ChunkCache::Step(bool second_chance) {
    Chunk& chunk = *hand_;
    hand_ = chunk.after;
    if (chunk.pins != 0) return;
    if (chunk.referenced && second_chance) {
        chunk.referenced = false;
        return;
    }
    chunk.owner->Evict(chunk);
}

uint64_t ChunkCache::Shrink() {
    uint64_t steps = 0;
    // All may have been referenced since the hand came by: then it is not waited for until it has
    // been around. Most calls come after one chunk more, so the bound is met again soon.
    for (; !share_.Fits(used_) && steps < std::min(2 * count_, kShrinkSteps); ++steps) Step(true);
    const uint64_t most = share_.limit() + share_.limit() / kSlackPart;
    const uint64_t end = steps + std::min(count_, kShrinkSteps);
    for (; used_ > most && steps < end; ++steps) Step(false);
    return steps;
}

void ChunkCache::GiveBack(uint64_t limit) {
    for (uint64_t steps = std::min(2 * count_, kStepsTogether); used_ > limit && steps > 0; --steps)
        Step(true);
    share_.Lower(limit, used_);
}

}  // namespace varve::cow
