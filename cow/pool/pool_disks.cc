// Commands on disks.
#include <fmt/format.h>

#include <set>

#include "base/log.h"
#include "base/units.h"
#include "cow/mutants.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {

Head::Place PoolImpl::PlaceOf(DiskId id) const {
    const DiskRecord& record = catalog_.disk(id).record;
    return {catalog_.history().LineOf(record.branch, kHead), record.generation, record.size};
}

/// Branches that a lookup of the disk may have to visit.
size_t PoolImpl::DepthOf(DiskId id) const {
    return catalog_.history().LineOf(catalog_.disk(id).record.branch, kHead).size();
}

Head& PoolImpl::AddHead(DiskId id) {
    Disk& disk = disks_[id];
    disk.depth = DepthOf(id);
    disk.head = std::make_unique<Head>(core_, lanes_.Add(id), *this, id, PlaceOf(id));
    return *disk.head;
}

Status PoolImpl::CheckNewName(std::string_view name) const {
    if (!IsValidName(name)) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("'{}' cannot be a name; use letters, digits and . _ : + -, at "
                                     "most 128, a letter or digit first",
                                     name.substr(0, 300)));
    }
    if (catalog_.FindDisk(name).ok()) {
        return MakeError(ErrorKind::kExists, fmt::format("there is a disk '{}' already", name));
    }
    return Status();
}

namespace {

Status CheckSize(uint64_t size, const PoolOptions& options) {
    if (size == 0 || size % kSizeUnitBytes != 0) {
        return MakeError(
            ErrorKind::kInvalid,
            fmt::format("a disk's size is a multiple of 512 bytes and not 0, not {}", size));
    }
    const uint64_t most = std::min(options.disk_bytes_max, kDiskBytesMax);
    if (size > most) {
        return MakeError(ErrorKind::kLimit, fmt::format("a disk may have at most {} here, not {}",
                                                        FormatSize(most), FormatSize(size)));
    }
    return Status();
}

Error TooManyDisks(uint64_t most) {
    return MakeError(ErrorKind::kLimit,
                     fmt::format("there are {} disks already, which is the limit; delete some or "
                                 "raise it in the server's settings",
                                 most));
}

}  // namespace

Status PoolImpl::CheckNewDisk(std::string_view name) const {
    Status s = CheckNewName(name);
    if (s.ok() && catalog_.disks().size() >= options_.disks_max) {
        s = TooManyDisks(options_.disks_max);
    }
    return s;
}

Status PoolImpl::Idle(DiskId id) const {
    const Disk& disk = disks_.at(id);
    if (!disk.busy) return Status();
    const std::string& name = catalog_.disk(id).record.name;
    if (disk.trimming) {
        return MakeError(
            ErrorKind::kBusy,
            fmt::format("disk '{}' is being resized; try again when that is done", name));
    }
    return MakeError(ErrorKind::kBusy,
                     fmt::format("disk '{}' was made smaller, but what lay beyond its end could "
                                 "not be freed (see the server's log); shrink it to the same size "
                                 "again, or delete it",
                                 name));
}

Task<Status> PoolImpl::CreateDisk(std::string name, uint64_t size) {
    Task<Result<Hold>> reserving = Reserve("a creation", [] { return std::vector<DiskId>(); });
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    Status s = CheckSize(size, options_);
    if (s.ok()) s = Growable();
    if (!s.ok()) co_return s;
    DiskId created;
    Change change = [&](CommitContext& context) {
        if (Status fits = CheckNewDisk(name); !fits.ok()) return fits;
        DiskRecord record;
        record.name = name;
        record.size = size;
        record.branch = context.catalog.AddBranch(BranchId{0}, Generation{0}, context.batch);
        record.generation = Generation{context.catalog.NextId()};
        record.created_ms = core_.environment.now_ms();
        created = context.catalog.AddDisk(std::move(record), context.batch);
        AddHead(created);
        return Status();
    };
    s = co_await Commit(std::move(change));
    if (s.ok()) Stored(created);
    co_return s;
}

/// Its creation is durable.
void PoolImpl::Stored(DiskId id) {
    const auto disk = disks_.find(id);
    if (disk != disks_.end()) disk->second.stored = true;
}

/// `fresh`: all that was answered is in map rows.
DiskInfo PoolImpl::InfoOf(DiskId id, bool fresh) const {
    const Catalog::Disk& disk = catalog_.disk(id);
    DiskInfo info;
    info.name = disk.record.name;
    info.size = disk.record.size;
    info.used = disk.record.mapped_blocks * kBlockBytes;
    info.snapshots = disk.snapshots.size();
    info.clients = disks_.at(id).clients;
    info.created_ms = disk.record.created_ms;
    info.generation = disk.record.generation.value;
    info.depth = DepthOf(id);
    info.offline = disk.record.offline;
    info.approximate = !fresh && disks_.at(id).head->changed();
    return info;
}

Task<Result<std::vector<DiskInfo>>> PoolImpl::ListDisks() {
    const bool fresh = co_await Refreshed();
    std::vector<DiskInfo> infos;
    for (const auto& [id, disk] : catalog_.disks()) infos.push_back(InfoOf(id, fresh));
    std::sort(infos.begin(), infos.end(),
              [](const DiskInfo& a, const DiskInfo& b) { return a.name < b.name; });
    co_return infos;
}

Task<Result<DiskInfo>> PoolImpl::ShowDisk(std::string name) {
    const bool fresh = co_await Refreshed();
    const Result<DiskId> id = catalog_.FindDisk(name);
    if (!id.ok()) co_return id.error();
    DiskInfo info = InfoOf(id.value(), fresh);
    if (!fresh) co_return info;
    const BranchId branch = catalog_.disk(id.value()).record.branch;
    if (catalog_.history().StandsAlone(branch)) {  // nothing needs to be counted
        info.unique = info.used;
        co_return info;
    }
    DoomedViews views;
    views.disks.push_back(id.value());
    const CountingFor whom(id.value(), SnapshotId{});
    Task<Result<std::optional<uint64_t>>> counting = BytesFreedSoon(whom, std::move(views));
    const Result<std::optional<uint64_t>> unique = co_await counting;
    if (!unique.ok()) co_return unique.error();
    info.unique = unique.value();
    info.approximate = !info.unique.has_value();
    co_return info;
}

Task<Status> PoolImpl::RenameDisk(std::string name, std::string to) {
    Task<Result<Hold>> reserving = Reserve("a renaming", DiskNamed(name));
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<DiskId> id = catalog_.FindDisk(name);
    if (!id.ok()) co_return id.error();
    Change change = [&](CommitContext& context) {
        if (Status fits = CheckNewName(to); !fits.ok()) return fits;
        DiskRecord record = context.catalog.disk(id.value()).record;
        record.name = to;
        context.catalog.UpdateDisk(id.value(), std::move(record), context.batch);
        return Status();
    };
    co_return co_await Commit(std::move(change));
}

Task<Status> PoolImpl::CloneSnapshot(std::string snapshot, std::string name) {
    Task<Result<Hold>> reserving = Reserve("a cloning", DiskOf(snapshot), About::kSnapshots);
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<SnapshotId> id = catalog_.FindSnapshot(snapshot);
    if (!id.ok()) co_return id.error();
    Status s = CheckNewDisk(name);
    if (s.ok()) s = CheckDepth(id.value());
    if (s.ok()) s = Growable();
    if (!s.ok()) co_return s;
    co_await FoldSealed(catalog_.snapshot(id.value()).disk);
    DiskId created;
    Change change = [&](CommitContext& context) {
        if (Status fits = CheckNewDisk(name); !fits.ok()) return fits;
        const SnapshotRecord& source = context.catalog.snapshot(id.value());
        DiskRecord record;
        record.name = name;
        record.size = source.size;
        record.mapped_blocks = source.mapped_blocks;
        record.branch = context.catalog.AddBranch(source.branch, source.generation, context.batch);
        record.generation = Generation{context.catalog.NextId()};
        if (Mutated(Mutant::kCloneKeepsGeneration)) record.generation = source.generation;
        record.created_ms = core_.environment.now_ms();
        created = context.catalog.AddDisk(std::move(record), context.batch);
        AddHead(created);
        FlattenIfDeep(source, context);
        return Status();
    };
    s = co_await Commit(std::move(change));
    if (s.ok()) Stored(created);
    co_return s;
}

// ---- depth

/// Before its line gets long: the branch of the view that somebody starts from, so that all who do
/// profit. Once at a time on a line.
void PoolImpl::FlattenIfDeep(const SnapshotRecord& source, CommitContext& context) {
    const Line line = context.catalog.history().LineOf(source.branch, source.generation);
    if (line.size() <= options_.flatten_depth) return;
    if (line.size() > 2 * options_.flatten_depth) HurryReclaim();  // it grows faster
    for (const Stretch& stretch : line) {
        if (context.catalog.flattening().contains(stretch.branch)) return;
    }
    context.catalog.SetFlattening(source.branch, Flattening::kUnderWay, context.batch);
    context.noted = true;
}

/// Gives the branch that is being flattened now; 0 if there is no need.
Task<Result<BranchId>> PoolImpl::BeginFlatten(std::string name) {
    Task<Result<Hold>> reserving = Reserve("a flattening", DiskNamed(name));
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<DiskId> id = catalog_.FindDisk(name);
    if (!id.ok()) co_return id.error();
    if (Status s = Growable(); !s.ok()) co_return s.error();
    BranchId branch;
    Change change = [&](CommitContext& context) {
        if (!context.catalog.disks().contains(id.value())) return Status();
        if (DepthOf(id.value()) == 1) return Status();
        branch = context.catalog.disk(id.value()).record.branch;
        context.catalog.SetFlattening(branch, Flattening::kUnderWay, context.batch);
        context.noted = true;
        return Status();
    };
    const Status s = co_await Commit(std::move(change));
    if (!s.ok()) co_return s.error();
    co_return branch;
}

Task<Status> PoolImpl::FlattenDisk(std::string name) {
    const Result<BranchId> begun = co_await BeginFlatten(name);
    if (!begun.ok()) co_return begun.error();
    const BranchId branch = begun.value();
    if (branch.value == 0) co_return Status();
    background_.Enter();
    {
        const Pacer::Hurry hurry(core_.pacer, Pacer::Work::kSpace);
        while (catalog_.flattening().contains(branch) && co_await reclaimer_.WaitStep()) continue;
    }
    background_.Leave();
    const auto& branches = catalog_.history().branches();
    const auto found = branches.find(branch);
    if (found != branches.end() && found->second.whole) co_return Status();
    if (core_.failed)
        co_return MakeError(ErrorKind::kIo, "the pool has failed: " + core_.failure());
    if (catalog_.flattening().contains(branch)) {
        if (Status s = Growable(); !s.ok()) co_return s;
        co_return MakeError(ErrorKind::kFailed,
                            fmt::format("the server is stopping; flattening '{}' goes on when it "
                                        "runs again",
                                        name));
    }
    if (found == branches.end() || !found->second.head) {
        co_return MakeError(ErrorKind::kNotFound,
                            fmt::format("disk '{}' was restored or deleted meanwhile", name));
    }
    co_return MakeError(ErrorKind::kDamaged,
                        fmt::format("disk '{}' cannot be flattened: its map is damaged; see the "
                                    "server's log and 'varve check'",
                                    name));
}

/// Tells the heads whose lines are shorter now. What they had still leads to the same rows.
void PoolImpl::RefreshLines() {
    for (auto& [id, disk] : disks_) {
        const bool there = disk.head && catalog_.disks().contains(id);
        if (there && DepthOf(id) < disk.depth) Spawn(RefreshLine(id));
    }
}

Task<void> PoolImpl::RefreshLine(DiskId id) {
    Disk& disk = disks_.at(id);
    Head& head = *disk.head;
    ++disk.visitors;
    Line line = PlaceOf(id).line;
    disk.depth = line.size();
    co_await Hop(head.executor());
    head.SetLine(std::move(line));
    co_await Hop(core_.home());
    EndVisit(id);
}

/// Folds all that the head has answered, and waits for what it does by itself.
Task<Status> PoolImpl::Settle(Head& head) {
    co_await Hop(head.executor());
    Errno error = co_await head.Fold();
    if (error == 0) error = co_await head.Settle();
    co_await head.Quiesce();
    co_await Hop(core_.home());
    if (error == 0) co_return Status();
    co_return MakeError(ErrorKind::kIo, "the pool has failed: " + core_.failure());
}

Task<Status> PoolImpl::ResizeDisk(std::string name, uint64_t size, bool shrink, bool disconnect) {
    std::optional<DiskId> shrunk;
    Status s = co_await ResizeLocked(std::move(name), size, shrink, disconnect, &shrunk);
    if (!s.ok() || !shrunk) co_return s;
    // The disk is fenced and busy; other commands may run meanwhile.
    background_.Enter();
    s = co_await FinishShrink(*shrunk);
    background_.Leave();
    co_return s;
}

Task<Status> PoolImpl::ResizeLocked(std::string name, uint64_t size, bool shrink, bool disconnect,
                                    std::optional<DiskId>* shrunk) {
    Task<Result<Hold>> reserving = Reserve("a resizing", DiskNamed(name), About::kShrunkDisk);
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<DiskId> id = catalog_.FindDisk(name);
    if (!id.ok()) co_return id.error();
    Status s = CheckSize(size, options_);
    if (!s.ok()) co_return s;
    const uint64_t old_size = catalog_.disk(id.value()).record.size;
    if (size < old_size && !shrink) {
        co_return MakeError(ErrorKind::kInvalid,
                            fmt::format("disk '{}' has {}; making it smaller loses what is beyond "
                                        "the new end: say --shrink if that is meant",
                                        name, FormatSize(old_size)));
    }
    const bool again = shrink && size == old_size && disks_.at(id.value()).busy;
    if (size < old_size || again) {
        s = co_await ShrinkDisk(id.value(), size, disconnect);
        if (s.ok()) *shrunk = id.value();
        co_return s;
    }
    if (s = Idle(id.value()); !s.ok()) co_return s;
    Head& head = *disks_.at(id.value()).head;
    if (old_size % kBlockBytes != 0) {
        co_await Hop(head.executor());
        const Errno error = co_await head.ClearTail();
        co_await Hop(core_.home());
        if (error != 0) co_return SystemError(error, fmt::format("cannot enlarge disk '{}'", name));
    }
    Change change = [&](CommitContext& context) {
        DiskRecord record = context.catalog.disk(id.value()).record;
        record.size = size;
        context.catalog.UpdateDisk(id.value(), std::move(record), context.batch);
        head.SetSize(size);
        return Status();
    };
    co_return co_await Commit(std::move(change));
}

/// Done is done with this commit; what FinishShrink does then unmaps what nobody can reach any
/// more, and is taken up again at the next start if it was interrupted.
Task<Status> PoolImpl::ShrinkDisk(DiskId id, uint64_t size, bool disconnect) {
    bool cut_off = false;
    Status s = co_await FenceDisk(id, disconnect, &cut_off);
    if (!s.ok()) co_return s;
    Disk& disk = disks_.at(id);
    s = co_await Settle(*disk.head);
    if (s.ok()) {
        Change change = [&](CommitContext& context) {
            DiskRecord record = context.catalog.disk(id).record;
            record.size = size;
            record.trimming = !Mutated(Mutant::kShrinkNotResumed);
            context.catalog.UpdateDisk(id, std::move(record), context.batch);
            return Status();
        };
        s = co_await Commit(std::move(change));
    }
    if (!s.ok()) {
        disk.fenced = disk.busy;
        co_return s;
    }
    disk.busy = disk.trimming = true;
    co_return s;
}

Task<Status> PoolImpl::FinishShrink(DiskId id) {
    const Status s = co_await TrimShrunk(id);
    disks_.at(id).trimming = false;
    if (!s.ok() && !core_.closing) {
        Log(LogLevel::kError, fmt::format("disk {} is smaller now, but what lay beyond its end is "
                                          "not freed: {}",
                                          catalog_.disk(id).record.name, s.error().message));
    }
    command_ended_.WakeAll();
    co_return s;
}

Task<Status> PoolImpl::TrimShrunk(DiskId id) {
    Disk& disk = disks_.at(id);
    const uint64_t size = catalog_.disk(id).record.size;
    co_await Hop(disk.head->executor());
    disk.head->SetSize(size);
    Errno error = 0;
    if (!Mutated(Mutant::kShrinkKeepsData)) error = co_await disk.head->TrimFrom(size);
    co_await Hop(core_.home());
    Status s = co_await Settle(*disk.head);
    if (error == ECANCELED && core_.closing) co_return s;  // done it is; the next start goes on
    if (error != 0 && s.ok()) s = SystemError(error, "trimming a shrunk disk failed");
    // Fenced and busy it stays: a later growth must not show the old data.
    if (!s.ok()) co_return s;
    Change change = [&](CommitContext& context) {
        DiskRecord record = context.catalog.disk(id).record;
        record.trimming = false;
        context.catalog.UpdateDisk(id, std::move(record), context.batch);
        return Status();
    };
    s = co_await Commit(std::move(change));
    if (s.ok()) disk.busy = disk.fenced = false;
    co_return s;
}

Task<Status> PoolImpl::SetOffline(std::string name, bool offline, bool disconnect) {
    Task<Result<Hold>> reserving = Reserve("a change of its clients", DiskNamed(name));
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<DiskId> id = catalog_.FindDisk(name);
    if (!id.ok()) co_return id.error();
    if (catalog_.disk(id.value()).record.offline == offline) co_return Status();
    Status s;
    bool cut_off = false;
    if (offline) s = co_await FenceDisk(id.value(), disconnect, &cut_off);
    if (!s.ok()) co_return s;
    Change change = [&](CommitContext& context) {
        DiskRecord record = context.catalog.disk(id.value()).record;
        record.offline = offline;
        context.catalog.UpdateDisk(id.value(), std::move(record), context.batch);
        return Status();
    };
    s = co_await Commit(std::move(change));
    disks_.at(id.value()).fenced = false;
    co_return s;
}

void PoolImpl::BuildDelete(DiskId id, CommitContext& context) {
    Catalog& catalog = context.catalog;
    // One job for each branch that loses its views, above all of them: with nothing live above, the
    // job walks all that lies below. (Several views die at once here, so a row may be dead that was
    // superseded below the topmost of them.)
    std::set<BranchId> branches{catalog.disk(id).record.branch};
    while (!catalog.disk(id).snapshots.empty()) {
        const SnapshotId snapshot = catalog.disk(id).snapshots.begin()->second;
        branches.insert(catalog.snapshot(snapshot).branch);
        catalog.RemoveSnapshot(snapshot, context.batch);
        unique_.erase(snapshot);
    }
    while (!catalog.disk(id).bookmarks.empty()) {
        catalog.RemoveBookmark(catalog.disk(id).bookmarks.begin()->second, context.batch);
    }
    catalog.RemoveDisk(id, context.batch);
    for (const BranchId branch : branches) {
        catalog.AddJob({branch, Generation{catalog.NextId()}}, context.batch);
    }
    context.noted = true;
}

Task<Status> PoolImpl::DeleteDisk(std::string name, bool snapshots, bool disconnect) {
    Task<Result<Hold>> reserving = Reserve("a deletion", DiskNamed(name), About::kShrunkDisk);
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<DiskId> found = catalog_.FindDisk(name);
    if (!found.ok()) co_return found.error();
    const DiskId id = found.value();
    std::vector<SnapshotId> doomed;
    for (const auto& [unused, snapshot] : catalog_.disk(id).snapshots) doomed.push_back(snapshot);
    if (!doomed.empty() && !snapshots) {
        co_return MakeError(ErrorKind::kBusy,
                            fmt::format("disk '{}' has {}; say --snapshots to delete them "
                                        "with it",
                                        name, FormatCount(doomed.size(), "snapshot")));
    }
    bool cut_off = false;
    Status s = co_await FenceDisk(id, disconnect, &cut_off);
    if (!s.ok()) co_return s;
    for (const SnapshotId snapshot : doomed) {
        s = co_await FenceSnapshot(snapshot, disconnect);
        if (!s.ok()) break;
    }
    if (s.ok()) s = co_await Settle(*disks_.at(id).head);
    if (s.ok()) {
        Change change = [&](CommitContext& context) {
            BuildDelete(id, context);
            return Status();
        };
        s = co_await Commit(std::move(change));
    }
    for (const SnapshotId snapshot : doomed) UnfenceSnapshot(snapshot);
    if (s.ok()) {
        co_await DropHead(id);
    } else {
        disks_.at(id).fenced = disks_.at(id).busy;
    }
    co_return s;
}

/// Destroys the head on its lane; its lease goes back.
Task<void> PoolImpl::DropHead(DiskId id) {
    while (disks_.at(id).visitors > 0) co_await visit_ended_.Wait();
    std::unique_ptr<Head> head = std::move(disks_.at(id).head);
    disks_.erase(id);
    co_await Hop(head->executor());
    co_await head->Quiesce();
    const std::vector<Extent> lease = head->TakeLease();
    co_await head->Empty();
    head.reset();
    co_await Hop(core_.home());
    lanes_.Remove(id);
    leases_.Release(lease);
}

}  // namespace varve::cow
