// What deleting views would free: one by one for lists, several together for a dry run.
#include <fmt/format.h>

#include <algorithm>

#include "base/sort_unique.h"
#include "base/units.h"
#include "cow/history/losses.h"
#include "cow/pool/freed_count.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// With more views the tree is not looked at on home.
constexpr size_t kViewsOnHome = 256;

}  // namespace

/// Rows and history of one moment, to count by.
struct PoolImpl::FreedScan {
    std::unique_ptr<MetadataView> view;  // null: a view is gone already
    std::vector<ViewAt> views;
    std::vector<Loss> losses;
    std::optional<History> history;  // if `losses` are still to be found, with it
    Pending pending;
};

void PoolImpl::LookAtFreed(const DoomedViews& doomed, FreedScan* at) {
    for (const SnapshotId id : doomed.snapshots) {
        const auto snapshot = catalog_.snapshots().find(id);
        if (snapshot == catalog_.snapshots().end()) return;
        at->views.push_back({snapshot->second.branch, snapshot->second.generation});
    }
    for (const DiskId id : doomed.disks) {
        if (!catalog_.disks().contains(id)) return;
        at->views.push_back({catalog_.disk(id).record.branch, kHead});
    }
    at->view = core_.metadata().View();
    at->pending.any = !reclaimer_.idle();
    for (const auto& [number, job] : catalog_.jobs()) {
        if (at->pending.any) at->pending.jobs.push_back(job);
    }
    if (at->views.size() <= kViewsOnHome) {
        at->losses = FindLosses(catalog_.history(), at->views);
    } else {
        at->history = catalog_.history();
    }
}

/// Takes turns with others on the auditor, and ends early when the pool closes, or when nobody
/// waits for it any more.
Task<Result<uint64_t>> PoolImpl::BytesFreedWithout(DoomedViews views, Counting& counting) {
    FreedScan at;
    std::function<void()> look = [&] { LookAtFreed(views, &at); };
    co_await committer_.Look(std::move(look));
    if (!at.view) co_return MakeError(ErrorKind::kNotFound, "it was deleted meanwhile");
    co_await Hop(core_.auditor());
    if (at.history) at.losses = FindLosses(*at.history, at.views);
    at.history.reset();
    uint64_t blocks = 0;
    Status s;
    for (Loss& loss : at.losses) {
        FreedCount count(*at.view, std::move(loss), at.pending);
        while (s.ok() && !count.done()) {
            const bool vain = core_.closing || counting.given_up;
            s = vain ? Stopping() : count.Step();
            ++counting.steps;
            co_await Hop(core_.auditor());
        }
        blocks += count.blocks();
    }
    at = FreedScan();
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
    DoomedViews views;
    std::vector<SnapshotId>& doomed = views.snapshots;
    std::vector<DiskId>& disks = views.disks;
    for (const std::string& name : names) {
        if (name.find('@') != std::string::npos) {
            const Result<SnapshotId> id = catalog_.FindSnapshot(name);
            if (!id.ok()) co_return id.error();
            doomed.push_back(id.value());
            continue;
        }
        const Result<DiskId> id = catalog_.FindDisk(name);
        if (!id.ok()) co_return id.error();
        disks.push_back(id.value());
    }
    SortUnique(doomed);
    SortUnique(disks);
    std::vector<SnapshotId> all;  // of the disks
    for (const DiskId id : disks) {
        const Catalog::Disk& disk = catalog_.disk(id);
        uint64_t others = 0;
        for (const auto& [name, snapshot] : disk.snapshots) {
            if (snapshots) all.push_back(snapshot);
            if (!snapshots && !std::binary_search(doomed.begin(), doomed.end(), snapshot)) ++others;
        }
        if (others > 0) {
            co_return MakeError(ErrorKind::kBusy,
                                fmt::format("disk '{}' has {} more; say --snapshots to delete "
                                            "them with it",
                                            disk.record.name, FormatCount(others, "snapshot")));
        }
    }
    doomed.insert(doomed.end(), all.begin(), all.end());
    SortUnique(doomed);
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
