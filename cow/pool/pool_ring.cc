// Where the ring lies, and when it begins and ends.
#include <fmt/format.h>

#include <algorithm>

#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// Of the pool's capacity, the ring.
constexpr uint64_t kRingPart = 16;
/// Leases of an old pool, which may be in pieces.
constexpr unsigned kTriesMax = 256;

uint64_t BlocksOf(const std::vector<Extent>& extents) {
    uint64_t blocks = 0;
    for (const Extent& extent : extents) blocks += extent.count;
    return blocks;
}

uint64_t SegmentsIn(const std::vector<Extent>& extents, uint64_t segment_blocks) {
    uint64_t segments = 0;
    for (const Extent& extent : extents) segments += extent.count / segment_blocks;
    return segments;
}

/// Appends it, joined with the last one if it goes on there.
void AppendExtent(std::vector<Extent>& extents, const Extent& extent) {
    if (!extents.empty() && extents.back().place + extents.back().count == extent.place) {
        extents.back().count += extent.count;
    } else {
        extents.push_back(extent);
    }
}

}  // namespace

/// Cuts the ring into segments. kNoSpace if they are too few.
Status PoolImpl::UseSegments() {
    const uint64_t bytes = BlocksOf(ring_record_.extents) * kBlockBytes;
    const uint64_t least = Ring::SegmentBlocks(0, lanes_.size());
    uint64_t blocks = Ring::SegmentBlocks(bytes, lanes_.size());
    const uint64_t wanted = Ring::LeastBlocks(lanes_.size()) / least;
    while (blocks > least && SegmentsIn(ring_record_.extents, blocks) < wanted) blocks /= 2;
    ring_record_.segment_blocks = blocks;
    if (SegmentsIn(ring_record_.extents, blocks) >= wanted) return Status();
    return MakeError(
        ErrorKind::kNoSpace,
        fmt::format("the pool has no room for its journal, which takes {} KiB; enlarge "
                    "it, or delete snapshots with the varved that was used before",
                    wanted * least * kBlockBytes >> 10));
}

Task<Status> PoolImpl::FindRing() {
    const uint64_t least = Ring::LeastBlocks(lanes_.size());
    const uint64_t most =
        std::min(options_.ring_bytes, allocator_.Capacity() / kRingPart) / kBlockBytes;
    const uint64_t wanted = std::max(least, most);
    const uint64_t piece = Ring::SegmentBlocks(wanted * kBlockBytes, lanes_.size());
    uint64_t have = BlocksOf(ring_record_.extents);
    std::vector<Extent> small;  // of no use
    for (unsigned tries = 0; have < wanted && tries < kTriesMax; ++tries) {
        Result<std::vector<Extent>> lease = co_await leases_.Take(wanted - have);
        if (!lease.ok() && lease.error().kind == ErrorKind::kNoSpace) break;
        if (!lease.ok()) co_return lease.error();
        for (const Extent& extent : lease.value()) {
            if (extent.count < piece && extent.count < wanted - have) {
                small.push_back(extent);
                continue;
            }
            AppendExtent(ring_record_.extents, extent);
            ring_leased_.push_back(extent);
            have += extent.count;
        }
    }
    leases_.Release(small);
    co_return UseSegments();
}

/// Commits the record, and reserves those blocks of it that are not reserved yet.
Task<Status> PoolImpl::PutRing() {
    Change change = [this](CommitContext& context) {
        context.batch.Put(RingKey(), Encode(ring_record_));
        for (const Extent& extent : std::exchange(ring_leased_, {})) {
            context.allocator.ReserveLeased(extent);
        }
        return Status();
    };
    co_return co_await Commit(std::move(change));
}

Task<Status> PoolImpl::BeginRing() {
    do {
        ring_record_.tag = core_.environment.random();
    } while (ring_record_.tag == 0);
    const Status s = co_await PutRing();
    if (!s.ok()) co_return s;
    ring_ = std::make_unique<Ring>(ring_record_, lanes_.size());
    for (const auto& lane : lanes_) {
        LaneState* const state = lane.get();
        state->journal.Open(*ring_, [state] { Head::FoldLane(*state); });
    }
    co_return Status();
}

/// All is folded: the next start has nothing to read.
Task<Status> PoolImpl::EndRing() {
    ring_record_.tag = 0;
    const Status s = co_await PutRing();
    co_await committer_.Idle();
    co_return s;
}

}  // namespace varve::cow
