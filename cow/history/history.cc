#include "cow/history/history.h"

#include <algorithm>

#include "cow/mutants.h"

namespace varve::cow {

void History::AddBranch(BranchId id, BranchId parent, Generation fork) {
    VARVE_CHECK(!branches_.contains(id));
    Branch& branch = branches_[id];
    branch.parent = parent;
    branch.fork = fork;
    if (parent.value != 0) branches_.at(parent).children.emplace(fork, id);
}

void History::RemoveBranch(BranchId id) {
    const Branch& branch = Get(id);
    VARVE_CHECK(branch.snapshots.empty() && branch.children.empty() && !branch.head);
    if (branch.parent.value != 0) {
        auto& siblings = branches_.at(branch.parent).children;
        const auto [begin, end] = siblings.equal_range(branch.fork);
        siblings.erase(std::find_if(begin, end, [id](auto& child) { return child.second == id; }));
    }
    branches_.erase(id);
}

void History::AddSnapshot(BranchId id, Generation generation) {
    VARVE_CHECK(branches_.at(id).snapshots.insert(generation).second);
}

void History::RemoveSnapshot(BranchId id, Generation generation) {
    VARVE_CHECK(branches_.at(id).snapshots.erase(generation) == 1);
}

void History::SetHead(BranchId id, bool head) {
    branches_.at(id).head = head;
}

const History::Branch& History::Get(BranchId id) const {
    const auto branch = branches_.find(id);
    VARVE_CHECK(branch != branches_.end());
    return branch->second;
}

BranchId History::Root(BranchId id) const {
    while (Get(id).parent.value != 0) id = Get(id).parent;
    return id;
}

Line History::LineOf(BranchId id, Generation generation) const {
    Line line;
    while (id.value != 0) {
        const Branch& branch = Get(id);
        line.push_back({id, branch.fork, generation});
        generation = Mutated(Mutant::kWrongVersionAtFork) ? kHead : branch.fork;
        id = branch.parent;
    }
    return line;
}

Line History::StretchesBelow(BranchId id, Generation generation) const {
    return StretchesDownTo(id, generation, [](Generation) { return true; });
}

Line History::StretchesDownTo(BranchId id, Generation generation,
                              const std::function<bool(Generation)>& counts) const {
    Line path;
    while (id.value != 0) {
        const Branch& branch = Get(id);
        for (auto at = branch.snapshots.upper_bound(generation); at != branch.snapshots.begin();) {
            if (!counts(*--at)) continue;
            path.push_back({id, *at, generation});
            return path;
        }
        path.push_back({id, branch.fork, generation});
        generation = branch.fork;
        id = branch.parent;
    }
    return path;
}

Generation History::SnapshotBelow(BranchId id, Generation generation) const {
    if (generation.value == 0) return Generation{0};
    const Line path = StretchesBelow(id, Generation{generation.value - 1});
    // The lowest stretch ends at a snapshot, or at the root's fork, which is 0.
    return path.back().after;
}

Region History::RegionOf(BranchId id, Generation generation) const {
    return RegionAround(id, generation, Point{});
}

Region History::RegionThrough(BranchId id, Generation generation) const {
    return RegionAround(id, Generation{generation.value - 1}, Point{id, generation});
}

Region History::RegionAround(BranchId id, Generation generation, const Point& through) const {
    const Line path = StretchesBelow(id, generation);
    Region region;
    region.floor = path.back().after;
    // The floor's snapshot may stand at a fork: then the path's last stretch is empty, and only
    // the child it came from belongs to the region, not the floor's other lines.
    size_t bottom = path.size() - 1;
    if (bottom > 0 && path[bottom].after == path[bottom].to) --bottom;
    Grow(region, path[bottom].branch, path[bottom].after, -1, through);
    return region;
}

void History::Grow(Region& region, BranchId id, Generation after, int parent,
                   const Point& through) const {
    const Branch& branch = Get(id);
    for (;;) {
        const auto snapshot = branch.snapshots.upper_bound(after);
        const auto child = branch.children.upper_bound(after);
        const Generation next_snapshot = snapshot == branch.snapshots.end() ? kHead : *snapshot;
        const Generation next_fork = child == branch.children.end() ? kHead : child->first;
        const Generation to = std::min(next_snapshot, next_fork);
        const bool top = to == kHead;
        const bool view = top ? branch.head : to == next_snapshot;
        region.segments.push_back({{id, after, to}, parent, view});
        parent = static_cast<int>(region.segments.size()) - 1;
        const bool passed = view && id == through.branch && to == through.generation;
        if (passed) region.through = parent;
        if (top || (view && !passed)) return;
        const auto [begin, end] = branch.children.equal_range(to);
        for (auto fork = begin; fork != end; ++fork) {
            Grow(region, fork->second, to, parent, through);
        }
        after = to;
    }
}

bool History::ClimbTo(Line& path, BranchId id, Generation after) const {
    const Branch& branch = Get(id);
    const auto snapshot = branch.snapshots.upper_bound(after);
    if (snapshot != branch.snapshots.end() || branch.head) {
        const bool found = snapshot != branch.snapshots.end();
        path.push_back({id, after, found ? *snapshot : kHead});
        return true;
    }
    for (auto child = branch.children.lower_bound(after); child != branch.children.end(); ++child) {
        path.push_back({id, after, child->first});
        if (ClimbTo(path, child->second, child->first)) return true;
        path.pop_back();
    }
    return false;
}

Line History::StretchesAbove(BranchId id, Generation generation) const {
    Line path;
    if (generation != kHead) ClimbTo(path, id, generation);
    return path;
}

}  // namespace varve::cow
