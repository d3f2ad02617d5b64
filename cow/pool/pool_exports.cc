// What clients are attached to, and how commands keep them away.
#include <fmt/format.h>

#include "base/units.h"
#include "cow/mutants.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {

namespace {

/// For clients that were cut off: their requests are given up between two pieces of work.
constexpr int64_t kFenceUs = 10'000'000;
/// For a snapshot that was taken a moment ago to be in map rows: less than a client is given to
/// negotiate.
constexpr int64_t kSealedUs = 5'000'000;

Error StillThere(std::string_view what, uint64_t clients, bool closing) {
    if (closing) {
        return MakeError(ErrorKind::kBusy, "the server is stopping; nothing was changed");
    }
    return MakeError(
        ErrorKind::kBusy,
        fmt::format("{} was cut off from {}, but a request is still under way after {} s: "
                    "nothing was changed; see 'varve status' for what is waited for",
                    FormatCount(clients, "client"), what, kFenceUs / 1'000'000));
}

Error Offline(const std::string& name) {
    return MakeError(
        ErrorKind::kBusy,
        fmt::format("disk '{}' is offline; 'varve online {}' lets clients in again", name, name));
}

Error Fenced(const std::string& name) {
    return MakeError(ErrorKind::kBusy, fmt::format("'{}' is in use by a command; try again", name));
}

}  // namespace

Status PoolImpl::FindExport(std::string_view name) const {
    if (name.find('@') == std::string_view::npos) return catalog_.FindDisk(name).status();
    return catalog_.FindSnapshot(name).status();
}

/// "" stands for the only disk.
std::string PoolImpl::ExportAsked(std::string name) const {
    if (!name.empty() || catalog_.disks().size() != 1) return name;
    return catalog_.disks().begin()->second.record.name;
}

Result<ExportEntry> PoolImpl::DescribeExport(std::string name) {
    name = ExportAsked(std::move(name));
    if (name.find('@') == std::string::npos) {
        const Result<DiskId> id = catalog_.FindDisk(name);
        if (!id.ok()) return id.error();
        return ExportEntry{name, catalog_.disk(id.value()).record.size, false};
    }
    const Result<SnapshotId> id = catalog_.FindSnapshot(name);
    if (!id.ok()) return id.error();
    return ExportEntry{name, catalog_.snapshot(id.value()).size, true};
}

Task<Result<Export>> PoolImpl::OpenExport(std::string name, const bool* given_up) {
    name = ExportAsked(std::move(name));
    const Error fenced = Fenced(name);
    Export result{nullptr, next_export_++};
    if (name.find('@') == std::string::npos) {
        Result<DiskId> id = catalog_.FindDisk(name);
        // What is flushed must not be lost because the disk is.
        while (id.ok() && !disks_.at(id.value()).stored) {
            const DiskId waited = id.value();
            Change nothing = [](CommitContext&) { return Status(); };
            const Status s = co_await Commit(std::move(nothing));
            if (!s.ok()) co_return s.error();
            Stored(waited);
            id = catalog_.FindDisk(name);
        }
        if (!id.ok()) co_return id.error();
        Disk& disk = disks_.at(id.value());
        if (disk.fenced) co_return fenced;
        if (catalog_.disk(id.value()).record.offline) co_return Offline(name);
        ++disk.clients;
        result.volume = disk.head.get();
        exports_[result.id].disk = id.value();
        co_return result;
    }
    // A snapshot's volume reads map rows.
    Result<SnapshotId> id = catalog_.FindSnapshot(name);
    for (SnapshotId folded; id.ok() && id.value() != folded; id = catalog_.FindSnapshot(name)) {
        folded = id.value();
        if (Mutated(Mutant::kOpenedUnfolded)) continue;
        const bool stored = co_await FoldedWithin(folded, kSealedUs, given_up);
        if (!stored) {
            co_return MakeError(
                ErrorKind::kBusy,
                fmt::format("'{}' was taken a moment ago and is not stored yet: the "
                            "device is slow; try again",
                            name));
        }
    }
    if (!id.ok()) co_return id.error();
    OpenSnapshot& open = snapshots_[id.value()];
    if (open.fenced) co_return fenced;
    if (!open.volume) {
        if (core_.failed) {
            // It may be one whose commit failed: then its last rows were never stored.
            snapshots_.erase(id.value());
            co_return MakeError(ErrorKind::kIo,
                                fmt::format("the pool has failed: {}; '{}' can be opened after a "
                                            "restart of the server",
                                            core_.failure(), name));
        }
        const SnapshotRecord& record = catalog_.snapshot(id.value());
        open.volume = std::make_unique<MappedVolume>(
            core_, lanes_.Of(record.disk),
            catalog_.history().LineOf(record.branch, record.generation), record.size);
    }
    ++open.clients;
    result.volume = open.volume.get();
    exports_[result.id].snapshot = id.value();
    co_return result;
}

Task<void> PoolImpl::CloseExport(uint64_t id) {
    const auto found = exports_.find(id);
    VARVE_CHECK(found != exports_.end());
    const OpenExportState state = found->second;
    exports_.erase(found);
    if (state.disk.value != 0) {
        --disks_.at(state.disk).clients;
    } else if (--snapshots_.at(state.snapshot).clients == 0) {
        co_await DropSnapshotVolume(state.snapshot);
    }
    export_closed_.WakeAll();
}

std::string PoolImpl::ExportName(uint64_t id) {
    const OpenExportState& state = exports_.at(id);
    if (state.disk.value != 0) return catalog_.disk(state.disk).record.name;
    const SnapshotRecord& snapshot = catalog_.snapshot(state.snapshot);
    return catalog_.disk(snapshot.disk).record.name + "@" + snapshot.name;
}

Task<void> PoolImpl::DropSnapshotVolume(SnapshotId id) {
    OpenSnapshot& open = snapshots_.at(id);
    std::unique_ptr<MappedVolume> volume = std::move(open.volume);
    if (!open.fenced) snapshots_.erase(id);
    background_.Enter();
    co_await Hop(volume->executor());
    co_await volume->Empty();
    volume.reset();
    co_await Hop(core_.home());
    background_.Leave();
}

void PoolImpl::SetDisconnector(std::function<void(const std::vector<uint64_t>&)> disconnect) {
    disconnect_ = std::move(disconnect);
}

void PoolImpl::Disconnect(DiskId disk, SnapshotId snapshot) {
    std::vector<uint64_t> ids;
    for (const auto& [id, state] : exports_) {
        if (state.disk == disk && state.snapshot == snapshot) ids.push_back(id);
    }
    if (disconnect_) disconnect_(ids);
}

/// Waits until nobody is counted in `clients`, who were told to go; false if that takes too long.
Task<bool> PoolImpl::ClientsGone(const uint64_t* clients) {
    const Waits::Scope waiting(core_.waits, "requests of clients that were cut off");
    std::function<bool(int64_t*)> gone = [this, clients](int64_t* until_us) {
        if (core_.closing) *until_us = 0;
        return *clients == 0;
    };
    co_return co_await ticker_.Wait(export_closed_, kFenceUs, std::move(gone));
}

Task<Status> PoolImpl::FenceDisk(DiskId id, bool disconnect, bool* cut_off) {
    Disk& disk = disks_.at(id);
    if (disk.clients > 0 && !disconnect) {
        co_return MakeError(
            ErrorKind::kBusy,
            fmt::format("disk '{}' has {} attached; detach them, or say "
                        "--disconnect to cut them off",
                        catalog_.disk(id).record.name, FormatCount(disk.clients, "client")));
    }
    disk.fenced = true;
    if (disk.clients == 0) co_return Status();
    *cut_off = true;
    Disconnect(id, SnapshotId{});
    const bool gone = co_await ClientsGone(&disk.clients);
    if (gone) co_return Status();
    disk.fenced = false;
    co_return StillThere("disk '" + catalog_.disk(id).record.name + "'", disk.clients,
                         core_.closing);
}

Task<Status> PoolImpl::FenceSnapshot(SnapshotId id, bool disconnect) {
    OpenSnapshot& open = snapshots_[id];  // made if need be, so that nobody opens it meanwhile
    if (open.clients > 0 && !disconnect) {
        co_return MakeError(
            ErrorKind::kBusy,
            fmt::format("snapshot '{}' has {} attached; detach them, or say "
                        "--disconnect to cut them off",
                        catalog_.snapshot(id).name, FormatCount(open.clients, "client")));
    }
    open.fenced = true;
    if (open.clients == 0) co_return Status();
    Disconnect(DiskId{}, id);
    const bool gone = co_await ClientsGone(&open.clients);
    if (gone) co_return Status();
    const Error still =
        StillThere("snapshot '" + catalog_.snapshot(id).name + "'", open.clients, core_.closing);
    UnfenceSnapshot(id);
    co_return still;
}

void PoolImpl::UnfenceSnapshot(SnapshotId id) {
    const auto open = snapshots_.find(id);
    if (open == snapshots_.end()) return;
    open->second.fenced = false;
    if (open->second.clients == 0) snapshots_.erase(open);
}

}  // namespace varve::cow
