// What clients are attached to, and how commands keep them away.
#include <fmt/format.h>

#include <algorithm>
#include <set>

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

Error Unstored(const std::string& name, const std::string& failure) {
    return MakeError(ErrorKind::kIo,
                     fmt::format("the pool has failed: {}; '{}' can be opened after a restart of "
                                 "the server",
                                 failure, name));
}

}  // namespace

Error PoolImpl::NoBase(std::string_view name) {
    return MakeError(ErrorKind::kNotFound,
                     fmt::format("'{}' names no snapshot or bookmark of that disk to compare with",
                                 name.substr(0, 300)));
}

Status PoolImpl::FindExport(std::string_view name) const {
    if (name.find('@') == std::string_view::npos) return catalog_.FindDisk(name).status();
    return catalog_.FindSnapshot(name).status();
}

// ---- names

/// "disk", "disk@snapshot" or "disk@new~old"; "" stands for the only disk.
Result<PoolImpl::Asked> PoolImpl::FindAsked(std::string_view name) const {
    Asked asked;
    if (name.empty() && catalog_.disks().size() == 1) {
        asked.view.disk = catalog_.disks().begin()->first;
        return asked;
    }
    const size_t tilde = name.find('~');
    const std::string_view view = name.substr(0, tilde);
    if (view.find('@') == std::string_view::npos) {
        const Result<DiskId> id = catalog_.FindDisk(name);  // whose name has no tilde
        if (!id.ok()) return id.error();
        asked.view.disk = id.value();
        return asked;
    }
    const Result<SnapshotId> id = catalog_.FindSnapshot(view);
    if (!id.ok()) return id.error();
    asked.view = {catalog_.snapshot(id.value()).disk, id.value()};
    if (tilde == std::string_view::npos) return asked;
    asked.diff = catalog_.FindBase(asked.view.disk, name.substr(tilde + 1));
    if (!asked.diff) return NoBase(name);
    return asked;
}

std::string PoolImpl::NameOfView(const View& view) const {
    const std::string& disk = catalog_.disk(view.disk).record.name;
    if (view.snapshot.value == 0) return disk;
    return disk + "@" + catalog_.snapshot(view.snapshot).name;
}

std::pair<BranchId, Generation> PoolImpl::PlaceOf(const View& view) const {
    if (view.snapshot.value == 0) return {catalog_.disk(view.disk).record.branch, kHead};
    const SnapshotRecord& record = catalog_.snapshot(view.snapshot);
    return {record.branch, record.generation};
}

Result<ExportDetails> PoolImpl::DescribeExport(std::string name) {
    const Result<Asked> found = FindAsked(name);
    if (!found.ok()) return found.error();
    const Asked& asked = found.value();
    ExportDetails details;
    details.name = NameOfView(asked.view);
    details.read_only = asked.view.snapshot.value != 0;
    details.size = details.read_only ? catalog_.snapshot(asked.view.snapshot).size
                                     : catalog_.disk(asked.view.disk).record.size;
    details.diff = asked.diff.has_value();
    details.base = asked.diff ? catalog_.RecordOf(*asked.diff).name : BaseFor(asked.view);
    if (asked.diff) details.name.append("~").append(details.base);
    return details;
}

bool PoolImpl::HasBase(std::string_view name, std::string_view base) const {
    const Result<Asked> asked = FindAsked(name);
    if (!asked.ok()) return false;
    const std::optional<Catalog::Base> found = catalog_.FindBase(asked.value().view.disk, base);
    return found && (!asked.value().diff || asked.value().diff->id == found->id);
}

// ---- opening and closing

/// Waits until all snapshots that are to be read or compared with are in map rows, and a disk's
/// creation is durable. Whoever asks looks the names up again.
Task<Status> PoolImpl::AwaitStored(std::string name, std::vector<std::string> bases,
                                   const bool* given_up) {
    std::set<SnapshotId> waited;
    for (;;) {
        const Result<Asked> asked = FindAsked(name);
        if (!asked.ok()) co_return asked.error();
        const Result<std::vector<Catalog::Base>> found = FindBases(asked.value(), bases);
        if (!found.ok()) co_return found.error();
        const View view = asked.value().view;
        if (view.snapshot.value == 0 && !disks_.at(view.disk).stored) {
            // What is flushed must not be lost because the disk is.
            Change nothing = [](CommitContext&) { return Status(); };
            const Status s = co_await Commit(std::move(nothing));
            if (!s.ok()) co_return s;
            Stored(view.disk);
            continue;
        }
        std::set<SnapshotId> wanted;
        if (view.snapshot.value != 0) wanted.insert(view.snapshot);
        for (const Catalog::Base& base : found.value()) {
            if (!base.bookmark) wanted.insert(base.id);
        }
        const auto next = std::find_if(wanted.begin(), wanted.end(),
                                       [&](SnapshotId id) { return !waited.contains(id); });
        if (next == wanted.end() || Mutated(Mutant::kOpenedUnfolded)) co_return Status();
        const SnapshotId id = *next;
        waited.insert(id);
        const bool folded = co_await FoldedWithin(id, kSealedUs, given_up);
        if (folded) continue;
        co_return MakeError(ErrorKind::kBusy,
                            fmt::format("'{}' was taken a moment ago and is not stored yet: the "
                                        "device is slow; try again",
                                        name));
    }
}

/// Counts a client of the view.
Result<Volume*> PoolImpl::OpenView(const View& view) {
    const Error fenced = Fenced(NameOfView(view));
    if (view.snapshot.value == 0) {
        Disk& disk = disks_.at(view.disk);
        if (disk.fenced) return fenced;
        const DiskRecord& record = catalog_.disk(view.disk).record;
        if (record.offline) return Offline(record.name);
        ++disk.clients;
        return disk.head.get();
    }
    OpenSnapshot& open = snapshots_[view.snapshot];
    if (open.fenced) return fenced;
    if (!open.volume) {
        if (core_.failed) {
            // It may be one whose commit failed: then its last rows were never stored.
            if (open.clients == 0) snapshots_.erase(view.snapshot);
            return Unstored(NameOfView(view), core_.failure());
        }
        const SnapshotRecord& record = catalog_.snapshot(view.snapshot);
        open.volume = std::make_unique<MappedVolume>(
            core_, lanes_.Of(record.disk),
            catalog_.history().LineOf(record.branch, record.generation), record.size);
    }
    ++open.clients;
    return open.volume.get();
}

Task<Result<Export>> PoolImpl::OpenExport(std::string name, std::vector<std::string> bases,
                                          const bool* given_up) {
    const uint64_t id = next_export_++;
    Task<Status> storing = AwaitStored(name, bases, given_up);
    const Status stored = co_await storing;
    if (!stored.ok()) co_return stored.error();
    // From here on in one step.
    const Result<Asked> asked = FindAsked(name);
    if (!asked.ok()) co_return asked.error();
    const Result<std::vector<Catalog::Base>> found = FindBases(asked.value(), bases);
    if (!found.ok()) co_return found.error();
    if (core_.failed && !found.value().empty()) co_return Unstored(name, core_.failure());
    for (const Catalog::Base& base : found.value()) {
        const auto open = snapshots_.find(base.id);
        if (open != snapshots_.end() && open->second.fenced) co_return Fenced(name);
    }
    const View view = asked.value().view;
    const Result<Volume*> volume = OpenView(view);
    if (!volume.ok()) co_return volume.error();
    OpenExportState& state = exports_[id];
    state.view = view;
    if (asked.value().diff) state.diff = catalog_.RecordOf(*asked.value().diff).name;
    Export result;
    result.diff = asked.value().diff.has_value();
    result.volume = volume.value();
    result.id = id;
    for (const Catalog::Base& base : found.value()) {
        result.bases.push_back(MakeBase(view, base));
        if (base.bookmark) continue;
        ++snapshots_[base.id].clients;
        state.bases.push_back(base.id);
    }
    co_return result;
}

Task<void> PoolImpl::CloseExport(uint64_t id) {
    const auto found = exports_.find(id);
    VARVE_CHECK(found != exports_.end());
    const OpenExportState state = std::move(found->second);
    exports_.erase(found);
    if (state.view.snapshot.value == 0) {
        --disks_.at(state.view.disk).clients;
    } else {
        co_await ReleaseSnapshot(state.view.snapshot);
    }
    for (const SnapshotId base : state.bases) co_await ReleaseSnapshot(base);
    export_closed_.WakeAll();
}

std::string PoolImpl::ExportName(uint64_t id) {
    const OpenExportState& state = exports_.at(id);
    std::string name = NameOfView(state.view);
    if (!state.diff.empty()) name.append("~").append(state.diff);
    return name;
}

/// One client less. With the last one its volume goes.
Task<void> PoolImpl::ReleaseSnapshot(SnapshotId id) {
    OpenSnapshot& open = snapshots_.at(id);
    if (--open.clients > 0) co_return;
    std::unique_ptr<MappedVolume> volume = std::move(open.volume);
    if (!open.fenced) snapshots_.erase(id);
    if (!volume) co_return;
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
        const bool reads = state.view.disk == disk && state.view.snapshot == snapshot;
        const bool compares =
            std::find(state.bases.begin(), state.bases.end(), snapshot) != state.bases.end();
        if (reads || compares) ids.push_back(id);
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
    Disconnect(catalog_.snapshot(id).disk, id);
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
