#include "cow/integrity/scrub.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "cow/format/runs.h"

namespace varve::cow {
namespace {

/// Lines of a report. Beyond it blocks are counted.
constexpr size_t kDamageShown = 1000;

std::string Describe(const ScrubDamage& damage) {
    return fmt::format("{}{}{}: the block at offset {} {} (block {} of the data file)", damage.disk,
                       damage.snapshot.empty() ? "" : "@", damage.snapshot, damage.offset,
                       damage.unreadable ? "cannot be read" : "is damaged", damage.place);
}

}  // namespace

Task<Result<ScrubReport>> Scrubber::Run(std::optional<DiskId> disk) {
    if (running_) {
        co_return MakeError(ErrorKind::kBusy,
                            "a scrub is running already; 'varve status' shows how far it is");
    }
    running_ = true;
    verified_ = 0;
    ScrubReport report;
    Status s;
    for (const View& view : PlanViews(disk)) {
        if (!Exists(view)) continue;
        s = co_await ScrubView(view, &report);
        if (!s.ok()) break;
    }
    report.verified_blocks = verified_;
    covered_.clear();
    told_.clear();
    running_ = false;
    if (!s.ok()) co_return s.error();
    co_return report;
}

/// Snapshots and forks, oldest first, then heads.
std::vector<Scrubber::View> Scrubber::PlanViews(std::optional<DiskId> disk) const {
    std::vector<View> views;
    for (const auto& [id, record] : catalog_.snapshots()) {
        if (disk && record.disk != *disk) continue;
        views.push_back({record.disk, id, record.generation, BranchId{}});
    }
    if (!disk) PlanForks(&views);
    std::sort(views.begin(), views.end(),
              [](const View& a, const View& b) { return a.generation < b.generation; });
    for (const auto& [id, unused] : catalog_.disks()) {
        if (!disk || id == *disk) views.push_back({id, SnapshotId{}, kHead, BranchId{}});
    }
    return views;
}

/// What clones share is seen by all of them, and read once, even if the snapshot that they were
/// made from is gone: as if it were there.
void Scrubber::PlanForks(std::vector<View>* views) const {
    const History& history = catalog_.history();
    History::Roots roots;
    std::map<BranchId, DiskId> families;
    for (const auto& [id, disk] : catalog_.disks()) {
        families[history.Root(disk.record.branch, &roots)] = id;
    }
    std::set<std::pair<BranchId, Generation>> forks;
    for (const auto& [id, branch] : history.branches()) {
        if (branch.parent.value == 0 || history.Get(branch.parent).snapshots.contains(branch.fork))
            continue;
        const auto family = families.find(history.Root(id, &roots));
        if (family == families.end() || !forks.emplace(branch.parent, branch.fork).second) continue;
        views->push_back({family->second, SnapshotId{}, branch.fork, branch.parent});
    }
}

bool Scrubber::Exists(const View& view) const {
    if (view.fork.value != 0 && !catalog_.history().Contains(view.fork)) return false;
    if (view.snapshot.value != 0) return catalog_.snapshots().contains(view.snapshot);
    return catalog_.disks().contains(view.disk);
}

BranchId Scrubber::BranchOf(const View& view) const {
    if (view.fork.value != 0) return view.fork;
    if (view.snapshot.value != 0) return catalog_.snapshot(view.snapshot).branch;
    return catalog_.disk(view.disk).record.branch;
}

std::optional<FrozenWalk::View> Scrubber::WalkOf(const View& view) const {
    if (!Exists(view)) return std::nullopt;
    const BranchId branch = BranchOf(view);
    const History& history = catalog_.history();
    FrozenWalk::View walk;
    walk.line = history.LineOf(branch, view.generation);
    walk.stretches = history.StretchesDownTo(
        branch, view.generation,
        [this](BranchId id, Generation from) { return CoveredBelow(id, from); });
    walk.fork = view.fork.value != 0;
    if (view.generation == kHead) walk.present = catalog_.disk(view.disk).record.generation;
    return walk;
}

/// The highest place of the branch, at or below `from`, that this run has been at.
std::optional<Generation> Scrubber::CoveredBelow(BranchId branch, Generation from) const {
    const auto covered = covered_.find(branch);
    if (covered == covered_.end()) return std::nullopt;
    const auto place = covered->second.upper_bound(from);
    if (place == covered->second.begin()) return std::nullopt;
    return *std::prev(place);
}

Task<Status> Scrubber::ScrubView(const View& view, ScrubReport* report) {
    co_await folded_(view.disk);
    std::optional<FrozenWalk::View> where = WalkOf(view);
    if (!where) co_return Status();
    LaneState& lane = lanes_.Of(view.disk);
    FrozenWalk walk(std::move(*where));
    std::vector<FrozenBlock> damaged;
    FrozenVisitor visitor;
    visitor.wants = [report](const FrozenBlock& block) {
        if (!block.sum) ++report->unverified_blocks;
        return block.sum.has_value();
    };
    visitor.read = [&](FrozenBlock& block, uint32_t sum) {
        ++verified_;
        if (block.error != 0 || sum != block.sum) damaged.push_back(block);
    };
    while (!walk.done()) {
        Status s = co_await StepFrozen(core_, lane, walk, visitor);
        if (!s.ok()) co_return s;
        if (!Exists(view)) co_return Status();
        if (damaged.empty()) continue;
        std::vector<FrozenBlock> some = std::exchange(damaged, {});
        s = co_await Tell(view, std::move(some), report);
        if (!s.ok()) co_return s;
    }
    if (view.generation != kHead && !walk.left_out() && Exists(view)) {
        covered_[BranchOf(view)].insert(view.generation);
    }
    co_return Status();
}

/// All views that may see a block of `view`: those of its family of branches.
std::vector<Scrubber::Name> Scrubber::NamesBeside(const View& view) const {
    const History& history = catalog_.history();
    History::Roots roots;
    const BranchId root = history.Root(catalog_.disk(view.disk).record.branch, &roots);
    std::vector<Name> names;
    for (const auto& [id, disk] : catalog_.disks()) {
        if (history.Root(disk.record.branch, &roots) != root) continue;
        names.push_back({disk.record.name, "", history.LineOf(disk.record.branch, kHead)});
        for (const auto& [name, snapshot] : disk.snapshots) {
            const SnapshotRecord& record = catalog_.snapshot(snapshot);
            names.push_back(
                {disk.record.name, name, history.LineOf(record.branch, record.generation)});
        }
    }
    return names;
}

/// Puts `damaged` into the report, once for each view that sees it, and into the log.
Task<Status> Scrubber::Tell(const View& view, std::vector<FrozenBlock> damaged,
                            ScrubReport* report) {
    const std::vector<Name> names = NamesBeside(view);
    Status s;
    co_await Hop(core_.auditor());
    const auto metadata = core_.metadata().View();
    for (const FrozenBlock& block : damaged) {
        if (!told_.emplace(block.place, block.birth).second) continue;
        const bool listed = report->damage.size() < kDamageShown;
        std::string where;
        for (const Name& name : names) {
            if (report->damage.size() == kDamageShown) break;
            const ChunkIndex end{block.chunk.value + 1};
            const Result<MapRows> rows = ReadMap(*metadata, name.line, block.chunk, end);
            if (!rows.ok()) s = rows.error();
            if (!rows.ok() || rows.value().rows.empty()) continue;
            const Piece piece = PieceAt(rows.value().rows[0].runs, block.block, block.block + 1);
            if (!piece.mapped || piece.place != block.place) continue;
            ScrubDamage damage{name.disk, name.snapshot, block.offset(), block.place,
                               block.error != 0};
            if (where.empty()) where = Describe(damage);
            report->damage.push_back(std::move(damage));
        }
        if (where.empty() && listed) continue;  // nobody sees it any more
        ++report->damaged_blocks;
        if (where.empty()) where = fmt::format("block {} of the data file is damaged", block.place);
        core_.FoundDamage(block.place, block.birth, where);
    }
    co_await Hop(core_.home());
    co_return s;
}

}  // namespace varve::cow
