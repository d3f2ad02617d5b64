#include "cow/history/catalog.h"

#include <fmt/format.h>

#include <functional>

#include "cow/mutants.h"

namespace varve::cow {
namespace {

Error Damaged(std::string_view what) {
    return MakeError(
        ErrorKind::kDamaged,
        fmt::format("the pool's metadata is damaged: {}; restore it from a copy", what));
}

/// Calls `take(number of the key, value)` for every row of `letter`, until it fails.
Status ForEachRow(MetadataView& view, char letter,
                  const std::function<Status(uint64_t, std::string_view)>& take) {
    const std::string lower(1, letter);
    const auto cursor = view.Range(lower, PrefixEnd(lower));
    for (cursor->Seek(lower); cursor->valid(); cursor->Next()) {
        if (KeyNumbers(cursor->key()) != 1) {
            return Damaged(fmt::format("a key of kind {} has a wrong length", letter));
        }
        if (Status s = take(KeyNumber(cursor->key(), 0), cursor->value()); !s.ok()) return s;
    }
    return cursor->status();
}

}  // namespace

bool IsValidName(std::string_view name) {
    const auto alphanumeric = [](char c) {
        return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
    };
    if (name.empty() || name.size() > 128 || !alphanumeric(name[0])) return false;
    for (const char c : name) {
        if (!alphanumeric(c) && std::string_view("._:+-").find(c) == std::string_view::npos) {
            return false;
        }
    }
    return true;
}

Result<SnapshotName> SplitSnapshotName(std::string_view name) {
    const size_t at = name.find('@');
    if (at != std::string_view::npos && IsValidName(name.substr(0, at)) &&
        IsValidName(name.substr(at + 1))) {
        return SnapshotName{std::string(name.substr(0, at)), std::string(name.substr(at + 1))};
    }
    return MakeError(
        ErrorKind::kInvalid,
        fmt::format("'{}' is not a snapshot's name; write DISK@SNAPSHOT, each part of "
                    "letters, digits and . _ : + -, at most 128, a letter or digit first",
                    name.substr(0, 300)));
}

Result<Catalog> Catalog::Load(MetadataView& view) {
    Catalog catalog;
    Result<std::optional<std::string>> row = view.Get(PoolKey());
    if (!row.ok()) return row.error();
    if (row.value().has_value()) {
        uint8_t version = 0;
        const bool sound = Decode(*row.value(), &catalog.pool_, &version);
        if (version != kFormatVersion) {
            return MakeError(ErrorKind::kInvalid,
                             fmt::format("the pool has format version {}, this program reads {}; "
                                         "use the program that wrote it",
                                         version, kFormatVersion));
        }
        if (!sound) return Damaged("the pool's record is unreadable");
    }
    for (const auto load : {&Catalog::LoadBranches, &Catalog::LoadDisks, &Catalog::LoadSnapshots,
                            &Catalog::LoadBookmarks, &Catalog::LoadJobs}) {
        if (Status s = (catalog.*load)(view); !s.ok()) return s.error();
    }
    return catalog;
}

Status Catalog::LoadBranches(MetadataView& view) {
    // A parent is older than its children, so it has been added when they come.
    return ForEachRow(view, 'B', [this](uint64_t id, std::string_view value) -> Status {
        BranchRecord record;
        const bool sound = Decode(value, &record) && id != 0 && record.parent.value < id;
        if (!sound) return Damaged(fmt::format("branch {} is unreadable", id));
        if (record.parent.value != 0 && !history_.Contains(record.parent)) {
            return Damaged(fmt::format("branch {} has no parent", id));
        }
        history_.AddBranch(BranchId{id}, record.parent, record.fork);
        const bool done =
            record.flattening == Flattening::kDone ||
            (record.flattening == Flattening::kUnderWay && Mutated(Mutant::kFlattenNotResumed));
        if (done) history_.SetWhole(BranchId{id});
        if (!done && record.flattening == Flattening::kUnderWay) flattening_.insert(BranchId{id});
        return Status();
    });
}

Status Catalog::LoadDisks(MetadataView& view) {
    return ForEachRow(view, 'D', [this](uint64_t id, std::string_view value) -> Status {
        DiskRecord record;
        const bool sound = Decode(value, &record) && IsValidName(record.name) &&
                           record.size % kSizeUnitBytes == 0 && record.size <= kDiskBytesMax &&
                           history_.Contains(record.branch) && !history_.Get(record.branch).head &&
                           record.generation > history_.Get(record.branch).fork &&
                           record.generation.value < pool_.sequence;
        if (!sound) return Damaged(fmt::format("disk {} is unreadable", id));
        if (!disk_names_.emplace(record.name, DiskId{id}).second) {
            return Damaged(fmt::format("two disks have the name {}", record.name));
        }
        history_.SetHead(record.branch, true);
        disks_[DiskId{id}].record = std::move(record);
        return Status();
    });
}

Status Catalog::LoadSnapshots(MetadataView& view) {
    return ForEachRow(view, 'S', [this](uint64_t id, std::string_view value) -> Status {
        SnapshotRecord record;
        const bool sound = Decode(value, &record) && IsValidName(record.name) &&
                           record.size % kSizeUnitBytes == 0 && record.size <= kDiskBytesMax &&
                           disks_.contains(record.disk) && history_.Contains(record.branch) &&
                           !history_.Get(record.branch).snapshots.contains(record.generation);
        if (!sound) return Damaged(fmt::format("snapshot {} is unreadable", id));
        if (!disks_[record.disk].snapshots.emplace(record.name, SnapshotId{id}).second) {
            return Damaged(fmt::format("two snapshots of a disk have the name {}", record.name));
        }
        history_.AddSnapshot(record.branch, record.generation);
        disks_[record.disk].bases[record.generation] = {SnapshotId{id}, false};
        snapshots_[SnapshotId{id}] = std::move(record);
        return Status();
    });
}

/// A program that does not know of bookmarks may have deleted the disk, or used the name: what is
/// left then is of no use.
Status Catalog::LoadBookmarks(MetadataView& view) {
    return ForEachRow(view, 'O', [this](uint64_t id, std::string_view value) -> Status {
        SnapshotRecord record;
        const bool sound = Decode(value, &record) && IsValidName(record.name) &&
                           record.size % kSizeUnitBytes == 0 && record.size <= kDiskBytesMax;
        if (!sound) return Damaged(fmt::format("bookmark {} is unreadable", id));
        const auto disk = disks_.find(record.disk);
        if (disk == disks_.end() || FindBase(record.disk, record.name)) return Status();
        EnterBookmark(SnapshotId{id}, std::move(record));
        return Status();
    });
}

void Catalog::EnterBookmark(SnapshotId id, SnapshotRecord record) {
    if (history_.Contains(record.branch)) history_.AddBookmark(record.branch);
    disks_.at(record.disk).bookmarks.emplace(record.name, id);
    disks_.at(record.disk).bases[record.generation] = {id, true};
    bookmarks_[id] = std::move(record);
}

Status Catalog::LoadJobs(MetadataView& view) {
    return ForEachRow(view, 'J', [this](uint64_t number, std::string_view value) -> Status {
        JobRecord record;
        if (!Decode(value, &record) || !history_.Contains(record.branch)) {
            return Damaged(fmt::format("reclaim job {} is unreadable", number));
        }
        jobs_[number] = record;
        job_branches_.insert(record.branch);
        return Status();
    });
}

Result<DiskId> Catalog::FindDisk(std::string_view name) const {
    const auto disk = disk_names_.find(name);
    if (disk != disk_names_.end()) return disk->second;
    return MakeError(ErrorKind::kNotFound,
                     fmt::format("there is no disk '{}'; 'varve list' shows those there are",
                                 name.substr(0, 300)));
}

Result<SnapshotId> Catalog::FindSnapshot(std::string_view name) const {
    const Result<SnapshotName> parts = SplitSnapshotName(name);
    if (!parts.ok()) return parts.error();
    const Result<DiskId> found = FindDisk(parts.value().disk);
    if (!found.ok()) return found.error();
    const auto& snapshots = disk(found.value()).snapshots;
    const auto snapshot = snapshots.find(parts.value().snapshot);
    if (snapshot != snapshots.end()) return snapshot->second;
    if (disk(found.value()).bookmarks.contains(parts.value().snapshot)) {
        return MakeError(
            ErrorKind::kNotFound,
            fmt::format("'{}@{}' is a bookmark: its data was freed, and it is only good "
                        "to compare with",
                        parts.value().disk, parts.value().snapshot));
    }
    return MakeError(
        ErrorKind::kNotFound,
        fmt::format("disk '{}' has no snapshot '{}'; 'varve list {}' shows its snapshots",
                    parts.value().disk, parts.value().snapshot, parts.value().disk));
}

std::optional<Catalog::Base> Catalog::FindBase(DiskId id, std::string_view name) const {
    const Disk& in = disk(id);
    const auto snapshot = in.snapshots.find(name);
    if (snapshot != in.snapshots.end()) return Base{snapshot->second, false};
    const auto bookmark = in.bookmarks.find(name);
    if (bookmark != in.bookmarks.end()) return Base{bookmark->second, true};
    return std::nullopt;
}

std::optional<Catalog::Owner> Catalog::OwnerOf(BranchId branch, Generation generation) const {
    for (const auto& [id, disk] : disks_) {
        if (disk.record.branch != branch) continue;
        if (disk.record.generation == generation) return Owner{id, SnapshotId{}};
        for (const auto& [name, snapshot] : disk.snapshots) {
            const SnapshotRecord& record = snapshots_.at(snapshot);
            const bool found = record.branch == branch && record.generation == generation;
            if (found) return Owner{id, snapshot};
        }
    }
    return std::nullopt;
}

DiskId Catalog::AddDisk(DiskRecord record, Batch& batch) {
    const DiskId id{NextId()};
    VARVE_CHECK(disk_names_.emplace(record.name, id).second);
    ++names_version_;
    history_.SetHead(record.branch, true);
    batch.Put(DiskKey(id), Encode(record));
    disks_[id].record = std::move(record);
    return id;
}

void Catalog::UpdateDisk(DiskId id, DiskRecord record, Batch& batch) {
    Disk& disk = disks_.at(id);
    if (record.name != disk.record.name || record.size != disk.record.size) ++names_version_;
    if (record.name != disk.record.name) {
        disk_names_.erase(disk.record.name);
        VARVE_CHECK(disk_names_.emplace(record.name, id).second);
    }
    if (record.branch != disk.record.branch) {
        history_.SetHead(disk.record.branch, false);
        history_.SetHead(record.branch, true);
    }
    batch.Put(DiskKey(id), Encode(record));
    disk.record = std::move(record);
}

void Catalog::RemoveDisk(DiskId id, Batch& batch) {
    const Disk& disk = disks_.at(id);
    VARVE_CHECK(disk.snapshots.empty() && disk.bookmarks.empty());
    ++names_version_;
    history_.SetHead(disk.record.branch, false);
    disk_names_.erase(disk.record.name);
    batch.Delete(DiskKey(id));
    disks_.erase(id);
}

SnapshotId Catalog::AddSnapshot(SnapshotRecord record, Batch& batch) {
    const SnapshotId id{NextId()};
    VARVE_CHECK(disks_.at(record.disk).snapshots.emplace(record.name, id).second);
    ++names_version_;
    history_.AddSnapshot(record.branch, record.generation);
    disks_.at(record.disk).bases[record.generation] = {id, false};
    batch.Put(SnapshotKey(id), Encode(record));
    snapshots_[id] = std::move(record);
    return id;
}

void Catalog::RenameSnapshot(SnapshotId id, std::string to, Batch& batch) {
    SnapshotRecord& record = snapshots_.at(id);
    auto& names = disks_.at(record.disk).snapshots;
    names.erase(record.name);
    ++names_version_;
    VARVE_CHECK(names.emplace(to, id).second);
    record.name = std::move(to);
    batch.Put(SnapshotKey(id), Encode(record));
}

void Catalog::AddMapped(SnapshotId id, int64_t change, Batch& batch) {
    SnapshotRecord& record = snapshots_.at(id);
    record.mapped_blocks += static_cast<uint64_t>(change);
    batch.Put(SnapshotKey(id), Encode(record));
}

void Catalog::RemoveSnapshot(SnapshotId id, Batch& batch) {
    const SnapshotRecord& record = snapshots_.at(id);
    disks_.at(record.disk).snapshots.erase(record.name);
    disks_.at(record.disk).bases.erase(record.generation);
    ++names_version_;
    history_.RemoveSnapshot(record.branch, record.generation);
    batch.Delete(SnapshotKey(id));
    batch.Delete(SummedKey(id));
    snapshots_.erase(id);
}

void Catalog::MakeBookmark(SnapshotId id, Batch& batch) {
    SnapshotRecord record = snapshots_.at(id);
    record.mapped_blocks = 0;
    RemoveSnapshot(id, batch);
    batch.Put(BookmarkKey(id), Encode(record));
    EnterBookmark(id, std::move(record));
}

void Catalog::RenameBookmark(SnapshotId id, std::string to, Batch& batch) {
    SnapshotRecord& record = bookmarks_.at(id);
    auto& names = disks_.at(record.disk).bookmarks;
    names.erase(record.name);
    VARVE_CHECK(names.emplace(to, id).second);
    record.name = std::move(to);
    batch.Put(BookmarkKey(id), Encode(record));
}

void Catalog::RemoveBookmark(SnapshotId id, Batch& batch) {
    const SnapshotRecord& record = bookmarks_.at(id);
    disks_.at(record.disk).bookmarks.erase(record.name);
    disks_.at(record.disk).bases.erase(record.generation);
    if (history_.Contains(record.branch)) history_.RemoveBookmark(record.branch);
    batch.Delete(BookmarkKey(id));
    bookmarks_.erase(id);
}

BranchId Catalog::AddBranch(BranchId parent, Generation fork, Batch& batch) {
    const BranchId id{NextId()};
    history_.AddBranch(id, parent, fork);
    PutBranch(id, batch);
    return id;
}

void Catalog::PutBranch(BranchId id, Batch& batch) const {
    const History::Branch& branch = history_.Get(id);
    BranchRecord record{branch.parent, branch.fork, Flattening::kNone};
    if (flattening_.contains(id)) record.flattening = Flattening::kUnderWay;
    if (branch.whole) record.flattening = Flattening::kDone;
    batch.Put(BranchKey(id), Encode(record));
}

void Catalog::SetFlattening(BranchId id, Flattening flattening, Batch& batch) {
    flattening_.erase(id);
    if (flattening == Flattening::kUnderWay) flattening_.insert(id);
    if (flattening == Flattening::kDone) history_.SetWhole(id);
    PutBranch(id, batch);
}

void Catalog::RemoveBranch(BranchId id, Batch& batch) {
    const History::Branch branch = history_.Get(id);
    history_.RemoveBranch(id);
    flattening_.erase(id);
    batch.Delete(BranchKey(id));
    for (const auto& [fork, child] : branch.children) PutBranch(child, batch);
}

void Catalog::AddJob(JobRecord job, Batch& batch) {
    const uint64_t number = NextId();
    jobs_[number] = job;
    job_branches_.insert(job.branch);
    batch.Put(JobKey(number), Encode(job));
}

void Catalog::RemoveJob(uint64_t number, Batch& batch) {
    job_branches_.erase(job_branches_.find(jobs_.at(number).branch));
    jobs_.erase(number);
    batch.Delete(JobKey(number));
}

}  // namespace varve::cow
