// FakePool: a pool of names and numbers in memory, for tests of what stands in front of a pool.
// Not an engine: its disks hold no data and serve no volumes.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/sync.h"
#include "cow/pool/pool.h"

namespace varve::testing {

/// All methods run on `home`, as those of a real pool do. Commands wait while it is held.
class FakePool : public cow::Pool {
  public:
    explicit FakePool(Executor& home) : home_(home), held_(home) {}

    // ---- what a test sets and looks at, on home
    void Hold() { holding_ = true; }
    /// Only those that make disks.
    void HoldCreation() { holding_creation_ = true; }
    void Release() {
        holding_ = holding_creation_ = false;
        held_.WakeAll();
    }
    void SetExports(const std::vector<std::string>& names) {
        auto list = std::make_shared<std::vector<cow::ExportEntry>>();
        for (const std::string& name : names) list->push_back({name, 4096, false});
        exports_list_ = std::move(list);
    }
    uint64_t listed() const { return listed_; }  // exports, how often
    /// Exports are not opened while this is so; until it is given up.
    void HoldExports(bool hold) { holding_exports_ = hold; }
    uint64_t waiting() const { return waiting_; }
    uint64_t opening() const { return opening_; }  // exports
    uint64_t closed() const { return closed_; }    // likewise
    uint64_t commands() const { return commands_; }
    uint64_t hurries() const { return hurries_; }
    void SetClients(const std::string& disk, uint64_t clients) { disks_[disk].clients = clients; }
    void SetFull(bool full) { full_ = full; }
    void SetFailure(std::string failure) { failure_ = std::move(failure); }
    void SetDamage(std::vector<std::string> errors) { damage_ = std::move(errors); }
    /// How often the status will still report the next deletions as pending.
    void SetReclaimSteps(uint64_t steps) { reclaim_steps_ = steps; }

    // ---- cow::Pool
    void PrepareShutdown() override {}
    Task<Status> Shutdown() override { co_return Status(); }

    Task<Status> CreateDisk(std::string name, uint64_t size) override {
        co_await Enter(true);
        if (Status valid = CheckName(name); !valid.ok()) co_return valid;
        if (disks_.count(name)) co_return Exists("disk", name);
        if (full_) co_return MakeError(ErrorKind::kNoSpace, "the pool is full; delete snapshots");
        disks_[name] = Disk{size, kCreatedMs, 0, false, {}};
        co_return Status();
    }

    Task<Result<std::vector<cow::DiskInfo>>> ListDisks() override {
        co_await Enter();
        std::vector<cow::DiskInfo> list;
        for (const auto& [name, disk] : disks_) list.push_back(Info(name, disk));
        co_return std::move(list);
    }

    Task<Result<cow::DiskInfo>> ShowDisk(std::string name) override {
        co_await Enter();
        const auto disk = disks_.find(name);
        if (disk == disks_.end()) co_return NoDisk(name);
        co_return Info(name, disk->second);
    }

    Task<Status> RenameDisk(std::string name, std::string to) override {
        co_await Enter();
        if (!disks_.count(name)) co_return NoDisk(name);
        if (Status valid = CheckName(to); !valid.ok()) co_return valid;
        if (disks_.count(to)) co_return Exists("disk", to);
        auto node = disks_.extract(name);
        node.key() = to;
        disks_.insert(std::move(node));
        co_return Status();
    }

    Task<Status> ResizeDisk(std::string name, uint64_t size, bool shrink,
                            bool disconnect) override {
        co_await Enter();
        const auto disk = disks_.find(name);
        if (disk == disks_.end()) co_return NoDisk(name);
        if (size < disk->second.size) {
            if (!shrink) {
                co_return MakeError(ErrorKind::kInvalid,
                                    fmt::format("disk '{}' is larger; add --shrink", name));
            }
            if (Status free = Fence(name, disk->second, disconnect); !free.ok()) co_return free;
        }
        disk->second.size = size;
        co_return Status();
    }

    Task<Status> DeleteDisk(std::string name, bool snapshots, bool disconnect) override {
        co_await Enter();
        const auto disk = disks_.find(name);
        if (disk == disks_.end()) co_return NoDisk(name);
        if (!disk->second.snapshots.empty() && !snapshots) {
            co_return MakeError(ErrorKind::kInvalid,
                                fmt::format("disk '{}' has snapshots; add --snapshots", name));
        }
        if (Status free = Fence(name, disk->second, disconnect); !free.ok()) co_return free;
        disks_.erase(disk);
        pending_ = reclaim_steps_;
        co_return Status();
    }

    Task<Result<uint64_t>> EstimateDelete(std::vector<std::string> names, bool) override {
        co_await Enter();
        co_return names.size() << 20;
    }
    Task<Status> FlattenDisk(std::string name) override {
        co_await Enter();
        if (!disks_.count(name)) co_return NoDisk(name);
        co_return Status();
    }
    Task<Status> CloneSnapshot(std::string snapshot, std::string name) override {
        co_await Enter();
        Result<cow::SnapshotInfo*> found = Find(snapshot);
        if (!found.ok()) co_return found.error();
        if (Status valid = CheckName(name); !valid.ok()) co_return valid;
        if (disks_.count(name)) co_return Exists("disk", name);
        disks_[name] = Disk{found.value()->size, kCreatedMs, 0, false, {}};
        co_return Status();
    }

    Task<Status> CreateSnapshots(std::vector<std::string> names) override {
        co_await Enter();
        for (const std::string& name : names) {
            const size_t at = name.find('@');
            if (at == std::string::npos) {
                co_return MakeError(ErrorKind::kInvalid,
                                    fmt::format("'{}' is no snapshot; write DISK@SNAP", name));
            }
            if (!disks_.count(name.substr(0, at))) co_return NoDisk(name.substr(0, at));
            if (Status valid = CheckName(name.substr(at + 1)); !valid.ok()) co_return valid;
            if (Find(name).ok()) co_return Exists("snapshot", name);
        }
        ++generation_;
        for (const std::string& name : names) {
            const size_t at = name.find('@');
            Disk& disk = disks_[name.substr(0, at)];
            disk.snapshots.push_back({name.substr(0, at), name.substr(at + 1),
                                      kCreatedMs + static_cast<int64_t>(generation_) * 1000,
                                      disk.size, generation_, 8192, 40960});
        }
        co_return Status();
    }

    Task<Result<std::vector<cow::SnapshotInfo>>> ListSnapshots(std::string disk) override {
        co_await Enter();
        const auto found = disks_.find(disk);
        if (found == disks_.end()) co_return NoDisk(disk);
        co_return found->second.snapshots;
    }

    Task<Result<cow::SnapshotInfo>> ShowSnapshot(std::string name) override {
        co_await Enter();
        Result<cow::SnapshotInfo*> found = Find(name);
        if (!found.ok()) co_return found.error();
        co_return *found.value();
    }

    Task<Status> RenameSnapshot(std::string name, std::string to) override {
        co_await Enter();
        Result<cow::SnapshotInfo*> found = Find(name);
        if (!found.ok()) co_return found.error();
        if (Status valid = CheckName(to); !valid.ok()) co_return valid;
        if (Find(found.value()->disk + "@" + to).ok()) co_return Exists("snapshot", to);
        found.value()->name = to;
        co_return Status();
    }

    Result<std::vector<cow::BookmarkInfo>> ListBookmarks(std::string disk) const override {
        const auto found = disks_.find(disk);
        if (found == disks_.end()) return NoDisk(disk);
        return found->second.bookmarks;
    }
    /// Each megabyte from `offset` to the disk's end, one at a time.
    Task<Result<cow::Difference>> Diff(std::string from, std::string to, uint64_t offset) override {
        co_await Enter();
        for (const std::string& name : {from, to}) {
            Result<cow::SnapshotInfo*> found = Find(name);
            if (!found.ok()) co_return found.error();
        }
        cow::Difference part;
        part.extents.push_back({offset, 4096, offset != 0});
        if (offset < 3 << 20) part.next = offset + (1 << 20);
        co_return part;
    }

    Task<Status> DeleteSnapshot(std::string name, bool disconnect, bool bookmark) override {
        co_await Enter();
        Result<cow::SnapshotInfo*> found = Find(name);
        if (!found.ok()) co_return found.error();
        Disk& disk = disks_[found.value()->disk];
        if (disk.clients && !disconnect) co_return Busy(name);
        if (bookmark) {
            const cow::SnapshotInfo& info = *found.value();
            disk.bookmarks.push_back({info.name, info.created_ms, info.size, info.generation});
        }
        disk.snapshots.erase(disk.snapshots.begin() + (found.value() - disk.snapshots.data()));
        pending_ = reclaim_steps_;
        co_return Status();
    }

    Task<Status> RestoreSnapshot(std::string name, std::optional<std::string> keep_as,
                                 bool disconnect, bool online) override {
        co_await Enter();
        Result<cow::SnapshotInfo*> found = Find(name);
        if (!found.ok()) co_return found.error();
        const cow::SnapshotInfo snapshot = *found.value();
        Disk& disk = disks_[snapshot.disk];
        const bool cut_off = disk.clients > 0;
        if (Status free = Fence(snapshot.disk, disk, disconnect); !free.ok()) co_return free;
        disk.offline = (disk.offline || cut_off) && !online;
        if (keep_as) {
            ++generation_;
            disk.snapshots.push_back(
                {snapshot.disk, *keep_as, kCreatedMs, disk.size, generation_, 0, 40960});
        }
        disk.size = snapshot.size;
        co_return Status();
    }

    void HurryReclaim() override { ++hurries_; }
    Task<Result<cow::PoolStatus>> GetStatus() override {
        co_await Enter();
        cow::PoolStatus status;
        status.capacity = uint64_t{100} << 30;
        for (const auto& [name, disk] : disks_) {
            status.used += kUsed;
            status.snapshots += disk.snapshots.size();
        }
        status.free = status.capacity - status.used;
        status.disks = disks_.size();
        status.reclaim_pending = pending_ > 0 ? 1 : 0;
        if (pending_ > 0) {
            --pending_;
            reclaimed_ += 4096;
        }
        status.reclaimed_bytes = reclaimed_;
        status.map_cache_limit = 256 << 20;
        status.failed = !failure_.empty();
        status.failure = failure_;
        co_return status;
    }

    Task<Result<cow::CheckReport>> Check() override {
        co_await Enter();
        cow::CheckReport report;
        report.errors = damage_;
        report.disks = disks_.size();
        report.used_blocks = disks_.size() * kUsed / cow::kBlockBytes;
        co_return std::move(report);
    }

    Task<Result<cow::ScrubReport>> Scrub(std::optional<std::string> disk) override {
        co_await Enter();
        if (disk && !disks_.contains(*disk)) co_return NoDisk(*disk);
        cow::ScrubReport report;
        report.verified_blocks = 10;
        if (!damage_.empty()) {
            report.damage = {{"disk0", "snap", 8192, 77, false}, {"disk0", "", 8192, 77, false}};
            report.damaged_blocks = 1;
        }
        co_return std::move(report);
    }
    Task<void> WaitForChecksums() override { co_return; }
    Task<void> WaitForReclaim() override { co_return; }
    Task<void> CommitDirty() override { co_return; }
    Task<std::shared_ptr<const std::vector<cow::ExportEntry>>> ListExports() override {
        ++listed_;
        co_return exports_list_;
    }
    Status FindExport(std::string_view name) const override {
        const std::string disk(name.substr(0, name.find('@')));
        if (!disks_.contains(disk)) return NoDisk(disk);
        return Status();
    }
    Task<Status> SetOffline(std::string name, bool offline, bool disconnect) override {
        co_await Enter();
        const auto disk = disks_.find(name);
        if (disk == disks_.end()) co_return NoDisk(name);
        if (offline) {
            if (Status free = Fence(name, disk->second, disconnect); !free.ok()) co_return free;
        }
        disk->second.offline = offline;
        co_return Status();
    }
    Result<cow::ExportDetails> DescribeExport(std::string name) override {
        for (const cow::ExportEntry& entry : *exports_list_) {
            if (entry.name == name) return cow::ExportDetails{entry};
        }
        return NoDisk(name);
    }
    bool HasBase(std::string_view, std::string_view) const override { return false; }
    std::shared_ptr<const cow::Layers> LayersOf(uint64_t) override { return nullptr; }
    /// What is opened has no volume.
    Task<Result<cow::Export>> OpenExport(std::string name, std::vector<std::string>,
                                         const bool* given_up) override {
        ++opening_;
        while (holding_exports_ && !*given_up) co_await Hop(home_);
        --opening_;
        if (holding_exports_) co_return MakeError(ErrorKind::kBusy, "given up");
        if (Result<cow::ExportDetails> found = DescribeExport(name); !found.ok()) {
            co_return found.error();
        }
        opened_.push_back(name);
        cow::Export opened;
        opened.id = opened_.size() - 1;
        co_return opened;
    }
    Task<void> CloseExport(uint64_t) override {
        ++closed_;
        co_return;
    }
    std::string ExportName(uint64_t id) override { return opened_.at(id); }
    void SetDisconnector(std::function<void(const std::vector<uint64_t>&)>) override {}

  private:
    static constexpr int64_t kCreatedMs = 1'700'000'000'000;
    static constexpr uint64_t kUsed = 1 << 20;

    struct Disk {
        uint64_t size = 0;
        int64_t created_ms = 0;
        uint64_t clients = 0;
        bool offline = false;
        std::vector<cow::SnapshotInfo> snapshots;
        std::vector<cow::BookmarkInfo> bookmarks;
    };

    Task<void> Enter(bool creates = false) {
        ++waiting_;
        while (holding_ || (creates && holding_creation_)) co_await held_.Wait();
        --waiting_;
        ++commands_;
    }

    static Status CheckName(const std::string& name) {
        const bool valid = !name.empty() && name.size() <= 128 &&
                           std::isalnum(static_cast<unsigned char>(name[0]));
        const auto allowed = [](unsigned char c) {
            return std::isalnum(c) || c == '.' || c == '_' || c == ':' || c == '+' || c == '-';
        };
        if (valid && std::all_of(name.begin(), name.end(), allowed)) return Status();
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("'{}' is no name; use letters, digits and . _ : + -", name));
    }
    static Error NoDisk(const std::string& name) {
        return MakeError(ErrorKind::kNotFound,
                         fmt::format("there is no disk '{}'; see varve list", name));
    }
    static Error Exists(const char* what, const std::string& name) {
        return MakeError(ErrorKind::kExists,
                         fmt::format("{} '{}' exists; choose another name", what, name));
    }
    static Error Busy(const std::string& name) {
        return MakeError(ErrorKind::kBusy,
                         fmt::format("a client is attached to '{}'; add --disconnect", name));
    }
    static Status Fence(const std::string& name, Disk& disk, bool disconnect) {
        if (disk.clients && !disconnect) return Busy(name);
        disk.clients = 0;
        return Status();
    }
    cow::DiskInfo Info(const std::string& name, const Disk& disk) const {
        return {name,         disk.size,       kUsed,       disk.snapshots.size(),
                disk.clients, disk.created_ms, generation_, 1,
                disk.offline};
    }
    Result<cow::SnapshotInfo*> Find(const std::string& name) {
        const size_t at = name.find('@');
        const auto disk = disks_.find(name.substr(0, at));
        if (at != std::string::npos && disk != disks_.end()) {
            for (cow::SnapshotInfo& snapshot : disk->second.snapshots) {
                if (snapshot.name == name.substr(at + 1)) return &snapshot;
            }
        }
        return MakeError(ErrorKind::kNotFound,
                         fmt::format("there is no snapshot '{}'; see varve list", name));
    }

    Executor& home_;
    WaitList held_;
    bool holding_ = false;
    bool holding_creation_ = false;
    bool holding_exports_ = false;
    std::vector<std::string> opened_;  // exports
    uint64_t closed_ = 0;
    std::shared_ptr<const std::vector<cow::ExportEntry>> exports_list_ =
        std::make_shared<std::vector<cow::ExportEntry>>();
    uint64_t listed_ = 0;
    uint64_t opening_ = 0;
    uint64_t waiting_ = 0;
    uint64_t commands_ = 0;
    uint64_t hurries_ = 0;
    bool full_ = false;
    std::string failure_;
    std::vector<std::string> damage_;
    uint64_t reclaim_steps_ = 0;
    uint64_t pending_ = 0;
    uint64_t reclaimed_ = 0;
    uint64_t generation_ = 1;
    std::map<std::string, Disk> disks_;
};

}  // namespace varve::testing
