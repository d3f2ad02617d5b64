#include "cow/volume/chunk_cache.h"

#include "cow/volume/mapped_volume.h"

namespace varve::cow {
namespace {

/// What a chunk costs beside its runs: itself, its heap header, its slot in the volume's table.
constexpr uint32_t kChunkOverhead = sizeof(Chunk) + 16 + 40;

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

void ChunkCache::Shrink() {
    for (uint64_t steps = 2 * count_; used_ > limit_ && steps > 0; --steps) {
        Chunk& chunk = *hand_;
        hand_ = chunk.after;
        if (chunk.pins != 0) continue;
        if (chunk.referenced) {
            chunk.referenced = false;
            continue;
        }
        chunk.owner->Evict(chunk);
    }
}

}  // namespace varve::cow
