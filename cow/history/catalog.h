// Catalog: the disks, snapshots and branches of a pool, in memory as they are in the store.
// Every change goes into a Batch at the same time. Not a cache: it is complete.
//
// Belongs to the home executor. A change is visible here before its batch is durable; when a
// commit fails, the pool refuses all further changes, so the difference is never built upon.
#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>

#include "cow/format/format.h"
#include "cow/history/history.h"
#include "cow/store/stores.h"

namespace varve::cow {

class Catalog {
  public:
    /// What a disk can be compared with.
    struct Base {
        SnapshotId id;
        bool bookmark = false;
    };
    struct Disk {
        DiskRecord record;
        std::map<std::string, SnapshotId, std::less<>> snapshots;  // by name
        std::map<std::string, SnapshotId, std::less<>> bookmarks;  // no name is in both
        std::map<Generation, Base> bases;                          // all of them
    };

    /// Reads everything from `view`. kDamaged names the row that breaks a rule; kInvalid for
    /// another version of the format. An empty store gives an empty catalog.
    static Result<Catalog> Load(MetadataView& view);

    // ---- reading
    const std::map<DiskId, Disk>& disks() const { return disks_; }
    const std::map<SnapshotId, SnapshotRecord>& snapshots() const { return snapshots_; }
    /// What is left of snapshots that were deleted, as bases (docs/design/changes.md).
    const std::map<SnapshotId, SnapshotRecord>& bookmarks() const { return bookmarks_; }
    const std::map<uint64_t, JobRecord>& jobs() const { return jobs_; }
    bool HasJob(BranchId id) const { return job_branches_.contains(id); }
    const History& history() const { return history_; }
    /// Branches that are being flattened.
    const std::set<BranchId>& flattening() const { return flattening_; }
    bool IsFlattened(BranchId id) const {
        return flattening_.contains(id) || history_.Get(id).whole;
    }
    const PoolRecord& pool() const { return pool_; }
    /// Grows whenever the name or the size of a disk or snapshot changes.
    uint64_t names_version() const { return names_version_; }
    PoolRecord& mutable_pool() { return pool_; }
    /// kNotFound with a message.
    Result<DiskId> FindDisk(std::string_view name) const;
    /// By "disk@snapshot"; kInvalid if it has no such form, kNotFound.
    Result<SnapshotId> FindSnapshot(std::string_view name) const;
    std::optional<Base> FindBase(DiskId id, std::string_view name) const;
    const SnapshotRecord& RecordOf(Base base) const {
        return base.bookmark ? bookmarks_.at(base.id) : snapshots_.at(base.id);
    }
    const Disk& disk(DiskId id) const { return disks_.at(id); }
    const SnapshotRecord& snapshot(SnapshotId id) const { return snapshots_.at(id); }
    /// Who sees the end of that generation: the head that is writing it, or the snapshot it ended
    /// with, of the disk that went on. Nothing if nobody does.
    struct Owner {
        DiskId disk;
        SnapshotId snapshot;  // 0: the head
    };
    std::optional<Owner> OwnerOf(BranchId branch, Generation generation) const;

    // ---- changing
    uint64_t NextId() { return pool_.sequence++; }
    /// A new branch with the head of `record` on it; its branch must exist.
    DiskId AddDisk(DiskRecord record, Batch& batch);
    /// Replaces the record; a changed branch moves the head.
    void UpdateDisk(DiskId id, DiskRecord record, Batch& batch);
    /// REQUIRES: the disk has no snapshots and no bookmarks.
    void RemoveDisk(DiskId id, Batch& batch);
    SnapshotId AddSnapshot(SnapshotRecord record, Batch& batch);
    void RenameSnapshot(SnapshotId id, std::string to, Batch& batch);
    /// Counts `change` more blocks as mapped.
    void AddMapped(SnapshotId id, int64_t change, Batch& batch);
    void RemoveSnapshot(SnapshotId id, Batch& batch);
    /// Removes the snapshot and keeps its record.
    void MakeBookmark(SnapshotId id, Batch& batch);
    void RenameBookmark(SnapshotId id, std::string to, Batch& batch);
    void RemoveBookmark(SnapshotId id, Batch& batch);
    BranchId AddBranch(BranchId parent, Generation fork, Batch& batch);
    /// A child takes its place: see History.
    void RemoveBranch(BranchId id, Batch& batch);
    void SetFlattening(BranchId id, Flattening flattening, Batch& batch);
    void AddJob(JobRecord job, Batch& batch);
    void RemoveJob(uint64_t number, Batch& batch);
    void PutPool(Batch& batch) const { batch.Put(PoolKey(), Encode(pool_)); }

  private:
    Status LoadBranches(MetadataView& view);
    Status LoadDisks(MetadataView& view);
    Status LoadSnapshots(MetadataView& view);
    Status LoadBookmarks(MetadataView& view);
    Status LoadJobs(MetadataView& view);
    void EnterBookmark(SnapshotId id, SnapshotRecord record);
    void PutBranch(BranchId id, Batch& batch) const;

    std::map<DiskId, Disk> disks_;
    std::map<std::string, DiskId, std::less<>> disk_names_;
    std::map<SnapshotId, SnapshotRecord> snapshots_;
    std::map<SnapshotId, SnapshotRecord> bookmarks_;
    std::map<uint64_t, JobRecord> jobs_;
    std::multiset<BranchId> job_branches_;  // that `jobs_` are about
    uint64_t names_version_ = 0;
    History history_;
    std::set<BranchId> flattening_;
    PoolRecord pool_;
};

/// A disk's size is a multiple of it. In the last block, what lies beyond the end is never shown;
/// whoever makes a disk larger clears it before (Head::ClearTail).
inline constexpr uint64_t kSizeUnitBytes = 512;

/// Valid disk and snapshot names: [A-Za-z0-9][A-Za-z0-9._:+-]{0,127}.
bool IsValidName(std::string_view name);

/// "disk" and "snapshot" of "disk@snapshot"; kInvalid with the form if it is not one.
struct SnapshotName {
    std::string disk;
    std::string snapshot;
};
Result<SnapshotName> SplitSnapshotName(std::string_view name);

}  // namespace varve::cow
