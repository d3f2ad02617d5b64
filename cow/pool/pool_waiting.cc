// Which command may work on which disk, and waiting that ends: for disks, for clients that are cut
// off, for figures.
//
// No lock is held across a wait for another. A command says which disks it is about, and gets all
// of them in one step, once none of them has a command at work; until then it holds nothing. So
// commands cannot wait for each other in a circle, and one that is stuck keeps away those that need
// its disk, for a bounded time, and nobody else. Names and limits need no lock: they are checked by
// the change itself, which is built in one step.
#include <fmt/format.h>

#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// For another command on the same disk: longer than that waits for its clients.
constexpr int64_t kCommandWaitUs = 20'000'000;
/// For all that was answered to be in map rows, before figures are told from memory. Commits take
/// some milliseconds, also under load.
constexpr int64_t kFreshUs = 1'000'000;
/// For the next chunk to be counted.
constexpr int64_t kCountUs = 2'000'000;
/// Entries of a list that are made without letting others run: less than 1 ms.
constexpr size_t kEntriesTogether = 1000;

}  // namespace

PoolImpl::Hold::Hold(PoolImpl& pool, std::vector<DiskId> disks, const char* command)
    : pool_(&pool), disks_(std::move(disks)) {
    pool.commands_.Enter();
    for (const DiskId id : disks_) {
        Disk& disk = pool.disks_.at(id);
        disk.command = command;
        disk.command_since_us = pool.ticker_.NowUs();
    }
}

PoolImpl::Hold::~Hold() {
    if (!pool_) return;
    for (const DiskId id : disks_) {
        const auto disk = pool_->disks_.find(id);
        if (disk != pool_->disks_.end()) disk->second.command = nullptr;
    }
    pool_->command_ended_.WakeAll();
    pool_->commands_.Leave();
}

Error PoolImpl::Stopping() {
    return MakeError(ErrorKind::kBusy, "the server is stopping; send it again to the next one");
}

Task<Result<PoolImpl::Hold>> PoolImpl::Reserve(const char* command, FindDisks find, About about) {
    Result<std::vector<DiskId>> found = std::vector<DiskId>();
    DiskId blocked;
    std::function<bool(int64_t*)> free = [&](int64_t*) {
        found = find();
        if (core_.closing) found = Stopping();
        if (!found.ok()) return true;
        for (const DiskId id : found.value()) {
            blocked = id;
            const bool trimming = about != About::kSnapshots && disks_.at(id).trimming;
            if (disks_.at(id).command || trimming) return false;
        }
        return true;
    };
    const bool ended = co_await ticker_.Wait(command_ended_, kCommandWaitUs, std::move(free));
    if (!ended) {
        const Disk& disk = disks_.at(blocked);
        if (!disk.command) co_return Idle(blocked).error();
        co_return MakeError(
            ErrorKind::kBusy,
            fmt::format("disk '{}' is busy: {} has been at work on it for {} s; try again",
                        catalog_.disk(blocked).record.name, disk.command,
                        (ticker_.NowUs() - disk.command_since_us) / 1'000'000));
    }
    if (!found.ok()) co_return found.error();
    for (const DiskId id : about == About::kDisk ? found.value() : std::vector<DiskId>()) {
        const Status idle = Idle(id);
        if (!idle.ok()) co_return idle.error();
    }
    Hold hold(*this, std::move(found.value()), command);
    co_return std::move(hold);
}

PoolImpl::FindDisks PoolImpl::DiskNamed(const std::string& name) const {
    return [this, &name]() -> Result<std::vector<DiskId>> {
        const Result<DiskId> id = catalog_.FindDisk(name);
        if (!id.ok()) return id.error();
        return std::vector<DiskId>{id.value()};
    };
}

PoolImpl::FindDisks PoolImpl::DiskOf(const std::string& snapshot) const {
    return [this, &snapshot]() -> Result<std::vector<DiskId>> {
        const Result<SnapshotId> id = catalog_.FindSnapshot(snapshot);
        if (!id.ok()) return id.error();
        return std::vector<DiskId>{catalog_.snapshot(id.value()).disk};
    };
}

/// Of a snapshot or a bookmark.
PoolImpl::FindDisks PoolImpl::DiskOfBase(const std::string& name) const {
    return [this, &name]() -> Result<std::vector<DiskId>> {
        const Result<Catalog::Base> base = FindBaseNamed(name);
        if (!base.ok()) return base.error();
        return std::vector<DiskId>{catalog_.RecordOf(base.value()).disk};
    };
}

// ---- what may hang, watched

/// Waits until the disk's newest snapshot is in map rows; one at a time for each disk.
Task<void> PoolImpl::WatchSealed(DiskId id) {
    background_.Enter();
    disks_.at(id).watched = true;
    co_await FoldSealed(id);
    const auto disk = disks_.find(id);
    if (disk != disks_.end()) {
        disk->second.watched = false;
        ++disk->second.seen_sealed;
    }
    sealed_seen_.WakeAll();
    background_.Leave();
}

/// Whether the snapshot is in map rows. A newer one of its disk may not be.
Task<bool> PoolImpl::IsFolded(SnapshotId id) {
    const DiskId disk = catalog_.snapshot(id).disk;
    const Generation generation = catalog_.snapshot(id).generation;
    Head& head = *disks_.at(disk).head;
    ++disks_.at(disk).visitors;
    co_await Hop(head.executor());
    const bool folded = head.IsFolded(generation);
    co_await Hop(core_.home());
    EndVisit(disk);
    co_return folded;
}

/// Until the snapshot is in map rows, or gone; false if that takes too long, or `*given_up`.
Task<bool> PoolImpl::FoldedWithin(SnapshotId snapshot, int64_t us, const bool* given_up) {
    const DiskId id = catalog_.snapshot(snapshot).disk;
    const bool folded = co_await IsFolded(snapshot);
    const auto disk = disks_.find(id);
    if (folded || disk == disks_.end()) co_return true;
    const uint64_t seen = disk->second.seen_sealed;
    if (!disk->second.watched) Spawn(WatchSealed(id));
    std::function<bool(int64_t*)> done = [this, id, seen, given_up](int64_t* until_us) {
        if (core_.closing || (given_up && *given_up)) *until_us = 0;
        const auto now = disks_.find(id);
        return now == disks_.end() || now->second.seen_sealed != seen;
    };
    co_return co_await ticker_.Wait(sealed_seen_, us, std::move(done));
}

Task<void> PoolImpl::Refreshes() {
    background_.Enter();
    while (refreshes_started_ < refreshes_wanted_) {
        const uint64_t mine = ++refreshes_started_;
        co_await FoldAll();
        uint64_t used = 0;
        for (const auto& lane : lanes_) {
            co_await Hop(lane->executor);
            used += lane->cache.used() + lane->sums.used();
        }
        co_await Hop(core_.home());
        map_cache_used_ = used;
        refreshes_done_ = mine;
        refreshed_.WakeAll();
    }
    refreshing_ = false;
    background_.Leave();
}

/// Brings into map rows what was answered before. False if that takes too long: figures are those
/// of memory then. However many ask, one refresh is under way, and one to come.
Task<bool> PoolImpl::Refreshed() {
    const uint64_t mine = refreshes_started_ + 1;  // one that runs already may have missed some
    refreshes_wanted_ = std::max(refreshes_wanted_, mine);
    if (!refreshing_) {
        refreshing_ = true;
        Spawn(Refreshes());
    }
    std::function<bool(int64_t*)> done = [this, mine](int64_t* until_us) {
        if (core_.closing) *until_us = 0;
        return refreshes_done_ >= mine;
    };
    co_return co_await ticker_.Wait(refreshed_, kFreshUs, std::move(done));
}

Task<void> PoolImpl::Count(CountingFor whom, DoomedViews views,
                           std::shared_ptr<Counting> counting) {
    background_.Enter();
    Task<Result<uint64_t>> counts = BytesFreedWithout(std::move(views), *counting);
    const Result<uint64_t> bytes = co_await counts;
    const SnapshotId snapshot = whom.second;
    if (bytes.ok() && catalog_.snapshots().contains(snapshot)) unique_[snapshot] = bytes.value();
    counting->bytes = bytes;
    counting_.erase(whom);
    counted_.WakeAll();
    background_.Leave();
}

/// What deleting `views` would free; nothing if that takes too long without going on: the auditor
/// has other work, or hangs. What was begun ends then, but not before the auditor gets to it, so
/// one at a time is for each of `whom`.
Task<Result<std::optional<uint64_t>>> PoolImpl::BytesFreedSoon(CountingFor whom,
                                                               DoomedViews views) {
    uint64_t steps = 0;
    const auto look = [&](const Counting& counting, int64_t* until_us) {
        const uint64_t now = counting.steps;
        if (now != std::exchange(steps, now)) *until_us = ticker_.NowUs() + kCountUs;
        if (core_.closing) *until_us = 0;
    };
    std::function<bool(int64_t*)> free = [&](int64_t* until_us) {
        const auto other = counting_.find(whom);  // it may have begun before something was deleted
        if (other == counting_.end()) return true;
        look(*other->second, until_us);
        return false;
    };
    const std::optional<uint64_t> unknown;
    const bool mine = co_await ticker_.Wait(counted_, kCountUs, std::move(free));
    if (!mine) co_return unknown;
    auto counting = std::make_shared<Counting>();
    counting_[whom] = counting;
    std::shared_ptr<Counting> shared = counting;
    Spawn(Count(whom, std::move(views), std::move(shared)));
    steps = 0;
    std::function<bool(int64_t*)> done = [&](int64_t* until_us) {
        look(*counting, until_us);
        return counting->bytes.has_value();
    };
    const bool counted = co_await ticker_.Wait(counted_, kCountUs, std::move(done));
    counting->given_up = !counted;
    if (!counted) co_return unknown;
    if (!counting->bytes->ok()) co_return counting->bytes->error();
    const std::optional<uint64_t> bytes = counting->bytes->value();
    co_return bytes;
}

/// Puts `unique` into unique_. False if that takes too long.
Task<Result<bool>> PoolImpl::Counted(SnapshotId id) {
    DoomedViews views;
    views.snapshots.push_back(id);
    const CountingFor whom(DiskId{}, id);
    Task<Result<std::optional<uint64_t>>> counting = BytesFreedSoon(whom, std::move(views));
    const Result<std::optional<uint64_t>> bytes = co_await counting;
    if (!bytes.ok()) co_return bytes.error();
    co_return bytes.value().has_value();
}

// ---- the list of exports

/// In pieces, since there may be many. Made once for each state of the catalog.
Task<void> PoolImpl::MakeExports() {
    background_.Enter();
    const uint64_t version = catalog_.names_version();
    auto entries = std::make_shared<std::vector<ExportEntry>>();
    for (const auto& [id, disk] : catalog_.disks()) {
        entries->push_back({disk.record.name, disk.record.size, false});
    }
    for (SnapshotId last;;) {
        auto at = catalog_.snapshots().upper_bound(last);
        for (size_t i = 0; at != catalog_.snapshots().end() && i < kEntriesTogether; ++i, ++at) {
            last = at->first;
            const std::string& disk = catalog_.disk(at->second.disk).record.name;
            entries->push_back({disk + "@" + at->second.name, at->second.size, true});
        }
        if (at == catalog_.snapshots().end()) break;
        co_await Hop(core_.home());
    }
    exports_list_ = std::move(entries);
    exports_version_ = version;  // if names changed meanwhile, it is made again next time
    making_exports_ = false;
    exports_made_.WakeAll();
    background_.Leave();
}

Task<std::shared_ptr<const std::vector<ExportEntry>>> PoolImpl::ListExports() {
    // One that is being made may lack what came since it began.
    const uint64_t version = catalog_.names_version();
    while (!exports_list_ || exports_version_ < version) {
        if (!std::exchange(making_exports_, true)) Spawn(MakeExports());
        while (making_exports_) co_await exports_made_.Wait();
    }
    co_return exports_list_;
}

}  // namespace varve::cow
