// How the pool is, and what to do about it; whether its metadata may grow.
// docs/design/metadata_space.md has the reasons.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/log.h"
#include "base/units.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// Of a capacity, free: with less, there is a warning.
constexpr uint64_t kLowPart = 16;
constexpr uint64_t kLowDataMax = 1 << 30;

/// Metadata: with less free, there is a warning. What is free goes up and down by some memtables,
/// as these are flushed and tables compacted, so a warning comes no later than as much as is owed
/// (four of them; of a small one, a quarter), and goes when there is half as much again.
bool IsLow(const MetadataSpace& space, bool was) {
    const uint64_t least =
        std::max(space.capacity / kLowPart, std::min(space.capacity / 4, space.owed));
    return space.free < (was ? least + least / 2 : least);
}

/// Bytes of data that a byte of metadata has room for, at least: single blocks, each a run in a row
/// and a slot of a row of checksums, in one generation.
constexpr uint64_t kDataForByte = 128;
/// A full store is compacted again after so many commits, or what was swept.
constexpr uint64_t kCommitsToCompact = 64;
/// Or, while there is more to sweep, after so many chunks of it: some 60 MiB of rows.
constexpr uint64_t kSweptToCompact = 1 << 18;

void Worsen(PoolStatus& status, Health health, std::string warning) {
    status.health = std::max(status.health, health);
    status.warnings.push_back(std::move(warning));
}

}  // namespace

/// Of a command that adds rows.
Status PoolImpl::Growable() const {
    MetadataStore& metadata = *core_.environment.metadata;
    // Measured once more: somebody may have made room a moment ago.
    if (!metadata.full() || metadata.Space().free > 0) return Status();
    return MakeError(ErrorKind::kNoSpace,
                     "the pool's metadata is full; delete snapshots or disks, or make room on its "
                     "file system");
}

/// Fills in what is free, and how the pool is, from the other figures.
void PoolImpl::Judge(PoolStatus& status) const {
    const MetadataSpace space = core_.environment.metadata->Space();
    status.metadata_capacity = space.capacity;
    status.metadata_free = space.free;
    status.metadata_used = space.capacity - space.free;
    const uint64_t data = status.capacity - status.used;
    const bool bounds = space.free < data / kDataForByte;
    status.free = bounds ? space.free * kDataForByte : data;
    if (core_.failed) {
        Worsen(status, Health::kFailed,
               fmt::format("writes are refused: {}; mend the device and restart the server",
                           status.failure));
    }
    if (space.free == 0) {
        Worsen(
            status, Health::kFull,
            "the metadata is full: new blocks, snapshots and disks are refused; delete snapshots "
            "or disks, or make room on its file system");
    } else if (IsLow(space, metadata_low_)) {
        Worsen(status, Health::kWarning,
               fmt::format("the metadata has {} left; delete snapshots or disks, or make room on "
                           "its file system",
                           FormatSize(space.free)));
    }
    if (data == 0 || (full_ && full_at_release_ == committer_.released_blocks())) {
        Worsen(status, Health::kFull,
               "the data is full: writes that need new blocks are refused; delete snapshots or "
               "disks, or enlarge it");
    } else if (data < std::min(status.capacity / kLowPart, kLowDataMax)) {
        Worsen(status, Health::kWarning,
               fmt::format("the data has {} left; delete snapshots or disks, or enlarge it",
                           FormatSize(data)));
    }
    if (status.damaged_bytes > 0) {
        Worsen(status, Health::kWarning,
               fmt::format("{} of frozen data are damaged; run: varve scrub",
                           FormatSize(status.damaged_bytes)));
    }
    if (allocator_.set_aside() > 0) {
        Worsen(status, Health::kWarning,
               fmt::format("{} of the data file cannot be used, as the allocator's rows of it "
                           "cannot be read; run: varve check",
                           FormatSize(allocator_.set_aside() * kRegionBytes)));
    }
    if (leases_.untried() > 0) {
        Worsen(status, Health::kWarning,
               fmt::format("up to {} of the data file wait to be used, as reading the metadata "
                           "takes long and fails; run: varve check",
                           FormatSize(leases_.untried() * kRegionBytes)));
    }
    if (status.reclaim_set_aside > 0) {
        Worsen(status, Health::kWarning,
               fmt::format("{} chunks or deletions cannot be read, so their space is not given "
                           "back; run: varve check",
                           status.reclaim_set_aside));
    }
    if (!core_.failed && !status.failure.empty()) {
        Worsen(status, Health::kWarning,
               fmt::format("space cannot be given back: {}", status.failure));
    }
}

Task<void> PoolImpl::CompactMetadata() {
    compacting_ = true;
    compacted_chunks_ = reclaimer_.swept_chunks();
    compacted_commits_ = committer_.commits();
    background_.Enter();
    co_await Hop(core_.auditor());
    core_.metadata().Compact(core_.closing);
    co_await Hop(core_.home());
    background_.Leave();
    compacting_ = false;
}

Task<bool> PoolImpl::FreeMetadata(Executor& lane) {
    MetadataStore& metadata = core_.metadata();
    co_await Hop(core_.home());
    background_.Enter();
    metadata.Space();
    bool more = false;
    if (metadata.full() && !core_.closing) {
        const Pacer::Hurry hurry(core_.pacer, Pacer::Work::kSpace);
        more = co_await reclaimer_.WaitStep();
        metadata.Space();
    }
    background_.Leave();
    co_await Hop(lane);
    co_return more && !core_.closing;
}

/// Once in a while: measures, and logs what has become worse.
void PoolImpl::WatchHealth() {
    PoolStatus status;
    status.used = catalog_.pool().used_blocks * kBlockBytes;
    status.capacity = std::max(allocator_.Capacity(), status.used);
    metadata_low_ = IsLow(core_.environment.metadata->Space(), metadata_low_);
    Judge(status);
    const bool full = status.metadata_free == 0;
    if (!full) checksummer_.Wake();
    if (std::exchange(metadata_full_, full) && !full) reclaimer_.Wake({});  // it may flatten again
    if (status.metadata_free > 0 && !catalog_.flattening().empty()) reclaimer_.Wake({});
    // What was deleted takes room until it is compacted, which a store that has little to write
    // does not do by itself.
    const uint64_t swept = reclaimer_.swept_chunks() - compacted_chunks_;
    const bool due = swept > 0 || committer_.commits() >= compacted_commits_ + kCommitsToCompact;
    const bool compact = full && ((reclaimer_.idle() && due) || swept >= kSweptToCompact);
    if (compact && !compacting_) Spawn(CompactMetadata());
    // By kind, not by figure: a line that counts down would fill the log.
    const std::string now = fmt::format("{} {}", NameOf(status.health), status.warnings.size());
    if (now == health_logged_) return;
    const bool first = health_logged_.empty();
    health_logged_ = now;
    for (const std::string& warning : status.warnings) Log(LogLevel::kWarning, warning);
    if (status.warnings.empty() && !first) Log(LogLevel::kInfo, "there is room again");
}

}  // namespace varve::cow
