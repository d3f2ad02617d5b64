// Commands on snapshots.
#include <fmt/format.h>

#include <set>

#include "cow/mutants.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// For a snapshot that was taken a moment ago to be in map rows, before figures are told.
constexpr int64_t kStoredUs = 1'000'000;

/// Branches a lookup may have to visit while the line is being flattened, which begins long before.
constexpr size_t kDepthMax = 1024;

}  // namespace

/// One disk's part of a snapshot command.
struct PoolImpl::Cut {
    DiskId disk;
    Head* head = nullptr;
    std::string name;  // of the snapshot
    Generation next;
    HeadCommit commit;
    SnapshotId snapshot;
    bool frozen = false;
    Errno error = 0;
};

Status PoolImpl::CheckNewSnapshot(DiskId id, std::string_view name) const {
    const Catalog::Disk& disk = catalog_.disk(id);
    if (!IsValidName(name)) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("'{}' cannot be a snapshot's name; use letters, digits and "
                                     ". _ : + -, at most 128, a letter or digit first",
                                     name.substr(0, 300)));
    }
    if (Status s = CheckNameFree(id, name); !s.ok()) return s;
    const size_t count = disk.snapshots.size() + disk.bookmarks.size();
    if (count >= options_.snapshots_max) {
        return MakeError(ErrorKind::kLimit,
                         fmt::format("disk '{}' has {} snapshots, which is the limit; delete some "
                                     "or raise it in the server's settings",
                                     disk.record.name, count));
    }
    return Status();
}

Status PoolImpl::CheckNameFree(DiskId id, std::string_view name) const {
    const std::optional<Catalog::Base> base = catalog_.FindBase(id, name);
    if (!base) return Status();
    return MakeError(ErrorKind::kExists,
                     fmt::format("disk '{}' has a {} '{}' already", catalog_.disk(id).record.name,
                                 base->bookmark ? "bookmark" : "snapshot", name));
}

Result<std::vector<DiskId>> PoolImpl::FindCutDisks(const std::vector<std::string>& names) const {
    std::vector<DiskId> disks;
    for (const std::string& name : names) {
        const Result<SnapshotName> parts = SplitSnapshotName(name);
        if (!parts.ok()) return parts.error();
        const Result<DiskId> id = catalog_.FindDisk(parts.value().disk);
        if (!id.ok()) return id.error();
        disks.push_back(id.value());
    }
    return disks;
}

Result<std::vector<PoolImpl::Cut>> PoolImpl::PlanCuts(const std::vector<std::string>& names) {
    if (names.empty()) return MakeError(ErrorKind::kInvalid, "name at least one DISK@SNAPSHOT");
    std::vector<Cut> cuts;
    std::set<DiskId> seen;
    for (const std::string& name : names) {
        Result<SnapshotName> parts = SplitSnapshotName(name);
        if (!parts.ok()) return parts.error();
        const Result<DiskId> id = catalog_.FindDisk(parts.value().disk);
        if (!id.ok()) return id.error();
        if (!seen.insert(id.value()).second) {
            return MakeError(ErrorKind::kInvalid,
                             fmt::format("disk '{}' is named twice; one cut gives one snapshot of "
                                         "each disk",
                                         parts.value().disk));
        }
        Status s = CheckNewSnapshot(id.value(), parts.value().snapshot);
        if (!s.ok()) return s.error();
        Cut& cut = cuts.emplace_back();
        cut.disk = id.value();
        cut.name = std::move(parts.value().snapshot);
        cut.head = disks_.at(cut.disk).head.get();
    }
    for (Cut& cut : cuts) cut.next = Generation{catalog_.NextId()};
    return cuts;
}

Task<void> PoolImpl::CutOne(Cut& cut, bool hold, Join* frozen, Join* sealed) {
    co_await Hop(cut.head->executor());
    co_await cut.head->SealedFolded();
    cut.frozen = !core_.failed;
    if (cut.frozen) cut.head->Freeze(cut.next, hold);
    if (hold) {
        co_await Hop(core_.home());
        frozen->Done();
        co_await Hop(cut.head->executor());
    }
    cut.error = EIO;
    if (cut.frozen) cut.error = co_await cut.head->Seal(&cut.commit);
    co_await Hop(core_.home());
    sealed->Done();
}

/// Waits until the disk's newest snapshot is in map rows, unless the pool has failed.
Task<void> PoolImpl::FoldSealed(DiskId id) {
    Head& head = *disks_.at(id).head;
    ++disks_.at(id).visitors;
    co_await Hop(head.executor());
    co_await head.SealedFolded();
    co_await Hop(core_.home());
    EndVisit(id);
}

Task<void> PoolImpl::UnholdOne(DiskId id, Head& head) {
    ++disks_.at(id).visitors;
    co_await Hop(head.executor());
    head.Unhold();
    co_await Hop(core_.home());
    EndVisit(id);
}

/// Nobody waits for it: whatever the next command asks of the head comes behind it on the lane.
Task<void> PoolImpl::FinishOne(Cut cut) {
    ++disks_.at(cut.disk).visitors;
    co_await Hop(cut.head->executor());
    if (cut.frozen) cut.head->FinishCut(cut.snapshot);
    co_await Hop(core_.home());
    EndVisit(cut.disk);
}

/// Freezes and seals all cuts. With several disks no write is answered by any of them between the
/// first freeze and the last: so a write that was sent after the answer of another can be in the
/// cut only if the other is.
Task<bool> PoolImpl::RunCuts(std::vector<Cut>& cuts) {
    const bool hold = cuts.size() > 1 && !Mutated(Mutant::kCutWithoutHold);
    Join frozen(static_cast<uint32_t>(cuts.size()));
    Join sealed(static_cast<uint32_t>(cuts.size()));
    for (Cut& cut : cuts) Spawn(CutOne(cut, hold, &frozen, &sealed));
    if (hold) {
        co_await frozen;
        for (const Cut& cut : cuts) Spawn(UnholdOne(cut.disk, *cut.head));
    }
    co_await sealed;
    for (const Cut& cut : cuts) {
        if (cut.error != 0) co_return false;
    }
    co_return true;
}

Task<Status> PoolImpl::CreateSnapshots(std::vector<std::string> names) {
    Task<Result<Hold>> reserving = Reserve("a snapshot", [&] { return FindCutDisks(names); });
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    if (core_.failed) {
        co_return MakeError(ErrorKind::kIo, "the pool has failed: " + core_.failure());
    }
    const Status room = Growable();
    if (!room.ok()) co_return room;
    Result<std::vector<Cut>> planned = PlanCuts(names);
    if (!planned.ok()) co_return planned.error();
    std::vector<Cut>& cuts = planned.value();
    // Before the first of several freezes: from then on nothing is answered until the last.
    for (size_t i = 0; i < cuts.size() && cuts.size() > 1; ++i) co_await FoldSealed(cuts[i].disk);
    Status result = MakeError(ErrorKind::kIo, "the data could not be made durable");
    const bool sealed = co_await RunCuts(cuts);
    if (sealed) {
        Change change = [&](CommitContext& context) -> Status {
            for (Cut& cut : cuts) {
                Status s = BuildHeadCommit(core_, context, cut.disk, cut.commit);
                if (!s.ok()) return s;
                DiskRecord disk = context.catalog.disk(cut.disk).record;
                SnapshotRecord record;
                record.disk = cut.disk;
                record.name = cut.name;
                record.size = disk.size;
                record.branch = disk.branch;
                record.generation = disk.generation;
                record.mapped_blocks = disk.mapped_blocks;
                record.created_ms = core_.environment.now_ms();
                cut.snapshot = context.catalog.AddSnapshot(std::move(record), context.batch);
                disk.generation = cut.next;
                context.catalog.UpdateDisk(cut.disk, std::move(disk), context.batch);
            }
            return Status();
        };
        result = co_await Commit(std::move(change));
    }
    for (const Cut& cut : cuts) {
        if (result.ok()) checksummer_.Add(cut.snapshot);
    }
    for (Cut& cut : cuts) Spawn(FinishOne(std::move(cut)));
    co_return result;
}

// ---- listing

/// Without `*waits` the figures are those of memory; it is cleared when something hangs.
Task<Result<SnapshotInfo>> PoolImpl::InfoOf(SnapshotId id, bool* waits) {
    const Error gone = MakeError(ErrorKind::kNotFound, "the snapshot was deleted meanwhile");
    if (*waits) *waits = co_await FoldedWithin(id, kStoredUs);
    if (!catalog_.snapshots().contains(id)) co_return gone;
    if (*waits) {
        const Result<bool> counted = co_await Counted(id);
        if (!counted.ok()) co_return counted.error();
        *waits = counted.value();
    }
    if (!catalog_.snapshots().contains(id)) co_return gone;
    SnapshotInfo info;
    const SnapshotRecord& record = catalog_.snapshot(id);
    info.disk = catalog_.disk(record.disk).record.name;
    info.name = record.name;
    info.created_ms = record.created_ms;
    info.size = record.size;
    info.generation = record.generation.value;
    info.referenced = record.mapped_blocks * kBlockBytes;
    const auto unique = unique_.find(id);
    if (unique != unique_.end()) info.unique = unique->second;
    info.approximate = !*waits;
    co_return info;
}

Task<Result<std::vector<SnapshotInfo>>> PoolImpl::ListSnapshots(std::string disk) {
    bool waits = co_await Refreshed();
    const Result<DiskId> found = catalog_.FindDisk(disk);
    if (!found.ok()) co_return found.error();
    std::vector<std::pair<Generation, SnapshotId>> order;
    for (const auto& [name, id] : catalog_.disk(found.value()).snapshots) {
        order.emplace_back(catalog_.snapshot(id).generation, id);
    }
    std::sort(order.begin(), order.end());
    std::vector<SnapshotInfo> infos;
    for (const auto& [generation, id] : order) {
        if (!catalog_.snapshots().contains(id)) continue;  // deleted meanwhile
        Result<SnapshotInfo> info = co_await InfoOf(id, &waits);
        if (!info.ok() && info.error().kind == ErrorKind::kNotFound) continue;
        if (!info.ok()) co_return info.error();
        infos.push_back(std::move(info.value()));
    }
    co_return infos;
}

Task<Result<SnapshotInfo>> PoolImpl::ShowSnapshot(std::string name) {
    bool waits = co_await Refreshed();
    const Result<SnapshotId> id = catalog_.FindSnapshot(name);
    if (!id.ok()) co_return id.error();
    co_return co_await InfoOf(id.value(), &waits);
}

// ---- changing

Status PoolImpl::CheckDepth(SnapshotId id) const {
    const SnapshotRecord& record = catalog_.snapshot(id);
    const size_t depth = catalog_.history().LineOf(record.branch, record.generation).size();
    if (depth < kDepthMax) return Status();
    return MakeError(ErrorKind::kBusy,
                     fmt::format("disk '{}' is the end of a chain of {} restores and clones, which "
                                 "is being flattened; try again in a while",
                                 catalog_.disk(record.disk).record.name, depth));
}

Task<Status> PoolImpl::RenameSnapshot(std::string name, std::string to) {
    Task<Result<Hold>> reserving = Reserve("a renaming", DiskOfBase(name), About::kSnapshots);
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<Catalog::Base> found = FindBaseNamed(name);
    if (!found.ok()) co_return found.error();
    const Catalog::Base base = found.value();
    if (!IsValidName(to)) {
        co_return MakeError(ErrorKind::kInvalid,
                            fmt::format("'{}' cannot be a snapshot's name; give the new name "
                                        "without the disk's: letters, digits and . _ : + -",
                                        to.substr(0, 300)));
    }
    if (Status s = CheckNameFree(catalog_.RecordOf(base).disk, to); !s.ok()) co_return s;
    Change change = [&](CommitContext& context) {
        const auto rename = base.bookmark ? &Catalog::RenameBookmark : &Catalog::RenameSnapshot;
        (context.catalog.*rename)(base.id, to, context.batch);
        return Status();
    };
    co_return co_await Commit(std::move(change));
}

/// By "disk@name".
Result<Catalog::Base> PoolImpl::FindBaseNamed(std::string_view name) const {
    const Result<SnapshotId> snapshot = catalog_.FindSnapshot(name);
    if (snapshot.ok()) return Catalog::Base{snapshot.value(), false};
    const Result<SnapshotName> parts = SplitSnapshotName(name);
    if (!parts.ok()) return parts.error();
    const Result<DiskId> disk = catalog_.FindDisk(parts.value().disk);
    if (!disk.ok()) return disk.error();
    const std::optional<Catalog::Base> base =
        catalog_.FindBase(disk.value(), parts.value().snapshot);
    if (!base) return snapshot.error();
    return *base;
}

Task<Status> PoolImpl::DeleteSnapshot(std::string name, bool disconnect, bool bookmark) {
    Task<Result<Hold>> reserving =
        Reserve("a snapshot's deletion", DiskOfBase(name), About::kSnapshots);
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<Catalog::Base> found = FindBaseNamed(name);
    if (!found.ok()) co_return found.error();
    const SnapshotId id = found.value().id;
    if (found.value().bookmark && bookmark) {
        co_return MakeError(ErrorKind::kExists, fmt::format("'{}' is a bookmark already", name));
    }
    if (found.value().bookmark) co_return co_await RemoveBookmark(id);
    Status s = co_await FenceSnapshot(id, disconnect);
    if (!s.ok()) co_return s;
    // Nobody's generation may be in the journal: its rows may go, and must not come back.
    if (!Mutated(Mutant::kDeletedUnfolded)) co_await FoldSealed(catalog_.snapshot(id).disk);
    Change change = [&](CommitContext& context) {
        const SnapshotRecord& record = context.catalog.snapshot(id);
        context.catalog.AddJob({record.branch, record.generation}, context.batch);
        const auto remove = bookmark ? &Catalog::MakeBookmark : &Catalog::RemoveSnapshot;
        (context.catalog.*remove)(id, context.batch);
        unique_.erase(id);
        context.noted = true;
        return Status();
    };
    s = co_await Commit(std::move(change));
    UnfenceSnapshot(id);
    co_return s;
}

/// Gives the snapshot that keeps the present state, if there is one.
std::optional<SnapshotId> PoolImpl::BuildRestore(SnapshotId id,
                                                 const std::optional<std::string>& keep_as,
                                                 bool offline, CommitContext& context) {
    std::optional<SnapshotId> kept_id;
    const SnapshotRecord source = context.catalog.snapshot(id);
    DiskRecord disk = context.catalog.disk(source.disk).record;
    if (keep_as) {
        SnapshotRecord kept;
        kept.disk = source.disk;
        kept.name = *keep_as;
        kept.size = disk.size;
        kept.branch = disk.branch;
        kept.generation = disk.generation;
        kept.mapped_blocks = disk.mapped_blocks;
        kept.created_ms = core_.environment.now_ms();
        kept_id = context.catalog.AddSnapshot(std::move(kept), context.batch);
    } else {
        context.catalog.AddJob({disk.branch, disk.generation}, context.batch);
        context.noted = true;
    }
    const bool keeps = Mutated(Mutant::kRestoreKeepsWrites) && disk.branch == source.branch;
    const Generation fork = keeps ? disk.generation : source.generation;
    disk.branch = context.catalog.AddBranch(source.branch, fork, context.batch);
    disk.generation = Generation{context.catalog.NextId()};
    disk.size = source.size;
    disk.offline = offline;
    disk.mapped_blocks = source.mapped_blocks;
    context.catalog.UpdateDisk(source.disk, std::move(disk), context.batch);
    FlattenIfDeep(source, context);
    return kept_id;
}

Task<Status> PoolImpl::RestoreSnapshot(std::string name, std::optional<std::string> keep_as,
                                       bool disconnect, bool online) {
    Task<Result<Hold>> reserving = Reserve("a restore", DiskOf(name));
    const Result<Hold> hold = co_await reserving;
    if (!hold.ok()) co_return hold.error();
    const Result<SnapshotId> found = catalog_.FindSnapshot(name);
    if (!found.ok()) co_return found.error();
    const DiskId id = catalog_.snapshot(found.value()).disk;
    Status s = CheckDepth(found.value());
    if (s.ok() && keep_as) s = CheckNewSnapshot(id, *keep_as);
    if (s.ok()) s = Growable();
    bool cut_off = false;
    if (s.ok()) s = co_await FenceDisk(id, disconnect, &cut_off);
    if (!s.ok()) co_return s;
    Disk& disk = disks_.at(id);
    // Nobody writes any more. What was answered goes to the kept snapshot, if there is one.
    s = co_await Settle(*disk.head);
    while (s.ok() && disk.visitors > 0) co_await visit_ended_.Wait();
    std::optional<SnapshotId> kept;
    if (s.ok()) {
        Change change = [&](CommitContext& context) {
            const bool offline = context.catalog.disk(id).record.offline || cut_off;
            kept = BuildRestore(found.value(), keep_as, offline && !online, context);
            return Status();
        };
        s = co_await Commit(std::move(change));
    }
    if (s.ok() && kept) checksummer_.Add(*kept);
    if (s.ok()) {
        Head::Place place = PlaceOf(id);
        disk.depth = place.line.size();
        co_await Hop(disk.head->executor());
        co_await disk.head->Empty();
        disk.head->Rebase(std::move(place));
        co_await Hop(core_.home());
    }
    disk.fenced = false;
    co_return s;
}

}  // namespace varve::cow
