// What views are compared with, and what differs: docs/design/changes.md.
#include <fmt/format.h>

#include <algorithm>

#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// Of one Diff().
constexpr uint32_t kExtentsMost = 8192;

}  // namespace

// ---- bases

/// The newest snapshot or bookmark of the disk that the view comes from; "" if there is none.
std::string PoolImpl::BaseFor(const View& view) const {
    const auto [branch, generation] = PlaceOf(view);
    std::map<BranchId, Generation> path;
    for (const Stretch& stretch : catalog_.history().PathOf(branch, generation)) {
        path[stretch.branch] = stretch.to;
    }
    const auto& bases = catalog_.disk(view.disk).bases;
    for (auto base = bases.lower_bound(generation); base != bases.begin();) {
        const SnapshotRecord& record = catalog_.RecordOf((--base)->second);
        const auto place = path.find(record.branch);
        if (place != path.end() && record.generation <= place->second) return record.name;
    }
    return "";
}

/// A diff export has just its own.
Result<std::vector<Catalog::Base>> PoolImpl::FindBases(
    const Asked& asked, const std::vector<std::string>& names) const {
    if (asked.diff) return std::vector<Catalog::Base>{*asked.diff};
    std::vector<Catalog::Base> bases;
    for (const std::string& name : names) {
        const std::optional<Catalog::Base> base = catalog_.FindBase(asked.view.disk, name);
        if (!base) return NoBase(name);
        bases.push_back(*base);
    }
    return bases;
}

std::shared_ptr<const Base> PoolImpl::MakeBase(const View& view, Catalog::Base from) const {
    const SnapshotRecord& record = catalog_.RecordOf(from);
    const auto [branch, generation] = PlaceOf(view);
    const History& history = catalog_.history();
    History::Apart apart = history.ApartFrom(branch, generation, record.branch, record.generation);
    auto base = std::make_shared<Base>();
    base->generation = record.generation;
    base->size = record.size;
    if (!from.bookmark) {
        base->kind = Base::Kind::kSnapshot;
        base->line = history.LineOf(record.branch, record.generation);
    } else if (apart.below) {
        base->kind = Base::Kind::kBelow;
    }
    base->apart = std::move(apart.stretches);
    return base;
}

std::shared_ptr<const Layers> PoolImpl::LayersOf(uint64_t id) {
    OpenExportState& state = exports_.at(id);
    const uint64_t version = catalog_.history().version();
    const auto [branch, generation] = PlaceOf(state.view);
    const Generation newest = state.view.snapshot.value == 0
                                  ? catalog_.disk(state.view.disk).record.generation
                                  : generation;
    std::shared_ptr<const Layers> known = layers_[state.view].lock();
    if (!known || known->version != version || known->newest != newest) {
        auto layers = std::make_shared<Layers>();
        layers->version = version;
        layers->newest = newest;
        layers->below = catalog_.history().SnapshotsUnder(branch, generation);
        known = std::move(layers);
        layers_[state.view] = known;
        if (layers_.size() > exports_.size()) {  // those of exports that were closed
            std::erase_if(layers_, [](const auto& entry) { return entry.second.expired(); });
        }
    }
    state.layers = known;
    return known;
}

// ---- bookmarks

Result<std::vector<BookmarkInfo>> PoolImpl::ListBookmarks(std::string disk) const {
    const Result<DiskId> id = catalog_.FindDisk(disk);
    if (!id.ok()) return id.error();
    std::vector<BookmarkInfo> infos;
    for (const auto& [generation, base] : catalog_.disk(id.value()).bases) {
        if (!base.bookmark) continue;
        const SnapshotRecord& record = catalog_.RecordOf(base);
        infos.push_back({record.name, record.created_ms, record.size, generation.value});
    }
    return infos;
}

/// Whoever compares with it has all that he needs. A branch that nobody needs now goes after the
/// next deletion of a snapshot.
Task<Status> PoolImpl::RemoveBookmark(SnapshotId id) {
    Change change = [id](CommitContext& context) {
        context.catalog.RemoveBookmark(id, context.batch);
        return Status();
    };
    co_return co_await Commit(std::move(change));
}

// ---- differences

Task<Result<Difference>> PoolImpl::Diff(std::string from, std::string to, uint64_t offset) {
    const Result<SnapshotName> base = SplitSnapshotName(from);
    if (!base.ok()) co_return base.error();
    const Result<SnapshotName> view = SplitSnapshotName(to);
    if (!view.ok()) co_return view.error();
    if (base.value().disk != view.value().disk) {
        co_return MakeError(ErrorKind::kInvalid,
                            fmt::format("'{}' and '{}' are of different disks", from, to));
    }
    const Hold under_way(*this, {}, nullptr);  // the pool is not closed meanwhile
    if (core_.closing) co_return Stopping();
    Task<Result<Export>> opening = OpenExport(fmt::format("{}~{}", to, base.value().snapshot));
    const Result<Export> opened = co_await opening;
    if (!opened.ok()) co_return opened.error();
    Volume& volume = *opened.value().volume;
    const Base* const against = opened.value().bases.front().get();
    std::vector<Delta> changes;
    const uint64_t size = volume.size();
    const uint64_t begin = std::min(offset, size);
    co_await Hop(volume.executor());
    Task<Errno> looking =
        volume.Changes(against, begin, size - begin, kExtentsMost, &changes, nullptr);
    const Errno error = co_await looking;
    co_await Hop(core_.home());
    co_await CloseExport(opened.value().id);
    if (error != 0) co_return SystemError(error, fmt::format("cannot compare '{}'", to));
    Difference difference;
    uint64_t at = begin;
    for (const Delta& change : changes) {
        if (change.changed) difference.extents.push_back({at, change.length, change.zero});
        at += change.length;
    }
    if (at < size) difference.next = at;
    co_return difference;
}

}  // namespace varve::cow
