// What deleting views would free: one by one for lists, several together for a dry run.
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "base/units.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

constexpr size_t kCandidatesTogether = 4096;

/// A part of the tree that views would be gone from.
struct Part {
    Region with;
    std::vector<int> from;             // segments to sweep from
    std::vector<CandidateScan> scans;  // of each of them

    /// The chunks that may have something dead then. A chunk comes up once for each generation
    /// that touched it: memory is for chunks only.
    Result<std::vector<ChunkIndex>> Candidates(MetadataView& view, std::atomic<uint64_t>& steps) {
        std::vector<ChunkIndex> chunks;
        size_t sorted = 0;
        const auto sort = [&] {
            std::sort(chunks.begin(), chunks.end());
            chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
            sorted = chunks.size();
        };
        for (CandidateScan& scan : scans) {
            while (!scan.done()) {
                if (Status s = scan.Next(view, kCandidatesTogether, chunks); !s.ok()) {
                    return s.error();
                }
                ++steps;
                if (chunks.size() >= 2 * sorted + kCandidatesTogether) sort();
            }
        }
        sort();
        return chunks;
    }

    /// What would be dead without the views, less what is dead already and only waits for the
    /// reclaimer.
    Result<uint64_t> CountFreed(MetadataView& view, std::atomic<uint64_t>& steps) {
        const Result<std::vector<ChunkIndex>> chunks = Candidates(view, steps);
        if (!chunks.ok()) return chunks.error();
        Region without = with;
        for (const int segment : with.gone) {
            without.segments[static_cast<size_t>(segment)].view = false;
        }
        SweepHints hints;
        Sweeper sweep_with(view, with, hints), sweep_without(view, std::move(without), hints);
        uint64_t blocks = 0;
        for (const ChunkIndex chunk : chunks.value()) {
            SweepPlan now, then;
            ++steps;
            if (Status s = sweep_with.Sweep(chunk, from, now); !s.ok()) return s.error();
            if (Status s = sweep_without.Sweep(chunk, from, then); !s.ok()) return s.error();
            blocks += then.freed_blocks - now.freed_blocks;
        }
        return blocks;
    }
};

}  // namespace

/// Rows and history of one moment, to count by.
struct PoolImpl::FreedScan {
    std::unique_ptr<MetadataView> view;  // null: a view is gone already
    std::map<std::pair<BranchId, Generation>, Part> parts;
};

void PoolImpl::LookAtFreed(const DoomedViews& doomed, FreedScan* at) {
    const History& history = catalog_.history();
    std::vector<std::pair<BranchId, Generation>> places;
    Views gone;
    for (const SnapshotId id : doomed.snapshots) {
        if (!catalog_.snapshots().contains(id)) return;
        const SnapshotRecord& record = catalog_.snapshot(id);
        gone.snapshots.insert(record.generation);
        places.emplace_back(record.branch, record.generation);
    }
    for (const DiskId id : doomed.disks) {
        if (!catalog_.disks().contains(id)) return;
        const BranchId branch = catalog_.disk(id).record.branch;
        gone.heads.insert(branch);
        places.emplace_back(branch, kHead);
    }
    at->view = core_.metadata().View();
    for (const auto& [branch, generation] : places) {
        Part& part = at->parts[history.RegionKeyOf(branch, generation, gone)];
        if (part.scans.empty()) {
            part.with = history.RegionWithout(branch, generation, gone);
            part.from = part.with.gone;
            // To a sweep, what waits elsewhere in the region holds what it names. Here it is dead.
            for (size_t i = 0; i < part.with.segments.size() && !reclaimer_.idle(); ++i) {
                part.from.push_back(static_cast<int>(i));
            }
        }
        part.scans.emplace_back(history.StretchesBelow(branch, generation, gone),
                                history.StretchesAbove(branch, generation, gone));
    }
}

/// Counts on in `steps`, if there is somebody who looks whether it goes on.
Task<Result<uint64_t>> PoolImpl::BytesFreedWithout(DoomedViews views,
                                                   std::atomic<uint64_t>* steps) {
    std::atomic<uint64_t> unseen = 0;
    FreedScan at;
    std::function<void()> look = [&] { LookAtFreed(views, &at); };
    co_await committer_.Look(std::move(look));
    if (!at.view) co_return MakeError(ErrorKind::kNotFound, "it was deleted meanwhile");
    co_await Hop(core_.auditor());
    uint64_t blocks = 0;
    Status s;
    for (auto& [key, part] : at.parts) {
        const Result<uint64_t> freed = part.CountFreed(*at.view, steps ? *steps : unseen);
        if (!freed.ok()) s = freed.error();
        if (!freed.ok()) break;
        blocks += freed.value();
    }
    co_await Hop(core_.home());
    if (!s.ok()) co_return s.error();
    const uint64_t bytes = blocks * kBlockBytes;
    co_return bytes;
}

Task<Result<uint64_t>> PoolImpl::EstimateDelete(std::vector<std::string> names, bool snapshots) {
    const bool fresh = co_await Refreshed();
    if (!fresh) {
        co_return MakeError(ErrorKind::kBusy,
                            "what was written last cannot be counted: the device is slow; see "
                            "'varve status', and try again");
    }
    std::set<SnapshotId> doomed;
    std::set<DiskId> disks;
    for (const std::string& name : names) {
        if (name.find('@') != std::string::npos) {
            const Result<SnapshotId> id = catalog_.FindSnapshot(name);
            if (!id.ok()) co_return id.error();
            doomed.insert(id.value());
            continue;
        }
        const Result<DiskId> id = catalog_.FindDisk(name);
        if (!id.ok()) co_return id.error();
        disks.insert(id.value());
    }
    for (const DiskId id : disks) {
        const Catalog::Disk& disk = catalog_.disk(id);
        uint64_t others = 0;
        for (const auto& [name, snapshot] : disk.snapshots) {
            if (snapshots) doomed.insert(snapshot);
            others += doomed.contains(snapshot) ? 0 : 1;
        }
        if (others > 0) {
            co_return MakeError(ErrorKind::kBusy,
                                fmt::format("disk '{}' has {} more; say --snapshots to delete "
                                            "them with it",
                                            disk.record.name, FormatCount(others, "snapshot")));
        }
    }
    DoomedViews views;
    views.snapshots.assign(doomed.begin(), doomed.end());
    views.disks.assign(disks.begin(), disks.end());
    const CountingFor estimate;
    Task<Result<std::optional<uint64_t>>> counting = BytesFreedSoon(estimate, std::move(views));
    const Result<std::optional<uint64_t>> bytes = co_await counting;
    if (!bytes.ok()) co_return bytes.error();
    if (!bytes.value()) {
        co_return MakeError(ErrorKind::kBusy,
                            "it cannot be counted now: a check or other figures come first, or the "
                            "device is slow; see 'varve status', and try again");
    }
    co_return *bytes.value();
}

}  // namespace varve::cow
