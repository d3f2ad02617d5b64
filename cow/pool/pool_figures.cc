// What deleting views would free: one by one for lists, several together for a dry run.
#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "base/units.h"
#include "cow/history/losses.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// Marks, and chunks, that are looked at before others get the auditor.
constexpr size_t kCandidatesTogether = 4096;
constexpr size_t kChunksTogether = 256;
/// With more views the tree is not looked at on home.
constexpr size_t kViewsOnHome = 256;

template <typename T>
void Unique(std::vector<T>& ids) {
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
}

/// Counts what would be dead without some views of a region, less what is dead already and only
/// waits for the reclaimer. `busy`: something may wait.
class FreedCount {
  public:
    FreedCount(MetadataView& view, Loss loss, bool busy)
        : view_(view),
          with_(std::make_shared<const Region>(std::move(loss.with))),
          without_(std::make_shared<const Region>(std::move(loss.without))),
          from_with_(with_->gone),
          from_without_(std::move(loss.from)),
          scan_(std::move(loss.below), std::move(loss.above)),
          sweep_with_(view, with_, hints_),
          sweep_without_(view, without_, hints_) {
        // To a sweep, what waits elsewhere in the region holds what it names. Here it is dead.
        if (!busy) return;
        from_with_ = All(*with_);
        from_without_ = All(*without_);
    }

    /// Does a piece.
    Status Step() {
        if (!scan_.done()) return Collect();
        const size_t end = std::min(chunks_.size(), next_ + kChunksTogether);
        for (; next_ < end; ++next_) {
            SweepPlan now, then;
            if (Status s = sweep_with_.Sweep(chunks_[next_], from_with_, now); !s.ok()) return s;
            if (Status s = sweep_without_.Sweep(chunks_[next_], from_without_, then); !s.ok()) {
                return s;
            }
            blocks_ += then.freed_blocks - now.freed_blocks;
        }
        return Status();
    }
    bool done() const { return scan_.done() && next_ == chunks_.size(); }
    uint64_t blocks() const { return blocks_; }

  private:
    static std::vector<int> All(const Region& region) {
        std::vector<int> all(region.segments.size());
        std::iota(all.begin(), all.end(), 0);
        return all;
    }

    /// More of the chunks that may have something dead. A chunk comes up once for each generation
    /// that touched it: memory is for chunks only.
    Status Collect() {
        if (Status s = scan_.Next(view_, kCandidatesTogether, chunks_); !s.ok()) return s;
        if (chunks_.size() < 2 * sorted_ + kCandidatesTogether && !scan_.done()) return Status();
        std::sort(chunks_.begin(), chunks_.end());
        chunks_.erase(std::unique(chunks_.begin(), chunks_.end()), chunks_.end());
        sorted_ = chunks_.size();
        return Status();
    }

    MetadataView& view_;
    const std::shared_ptr<const Region> with_, without_;
    std::vector<int> from_with_, from_without_;  // segments to sweep from
    CandidateScan scan_;
    SweepHints hints_;
    Sweeper sweep_with_, sweep_without_;
    std::vector<ChunkIndex> chunks_;
    size_t sorted_ = 0;  // of them
    size_t next_ = 0;    // of them
    uint64_t blocks_ = 0;
};

}  // namespace

/// Rows and history of one moment, to count by.
struct PoolImpl::FreedScan {
    std::unique_ptr<MetadataView> view;  // null: a view is gone already
    std::vector<ViewAt> views;
    std::vector<Loss> losses;
    std::optional<History> history;  // if `losses` are still to be found, with it
    bool busy = false;
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
    at->busy = !reclaimer_.idle();
    if (at->views.size() <= kViewsOnHome) {
        at->losses = FindLosses(catalog_.history(), at->views);
    } else {
        at->history = catalog_.history();
    }
}

/// Counts on in `steps`, if there is somebody who looks whether it goes on. Takes turns with others
/// on the auditor, and ends early when the pool closes.
Task<Result<uint64_t>> PoolImpl::BytesFreedWithout(DoomedViews views,
                                                   std::atomic<uint64_t>* steps) {
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
        FreedCount count(*at.view, std::move(loss), at.busy);
        while (s.ok() && !count.done()) {
            s = core_.closing ? Stopping() : count.Step();
            if (steps) ++*steps;
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
    Unique(doomed);
    Unique(disks);
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
    Unique(doomed);
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
