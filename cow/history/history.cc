#include "cow/history/history.h"

#include <algorithm>

#include "cow/mutants.h"

namespace varve::cow {

void History::AddBranch(BranchId id, BranchId parent, Generation fork) {
    VARVE_CHECK(!branches_.contains(id));
    Branch& branch = branches_[id];
    branch.parent = parent;
    branch.fork = fork;
    Changed(id);
    if (parent.value == 0) return;
    branches_.at(parent).children.emplace(fork, id);
    Changed(parent);
}

/// Its views or children.
void History::Changed(BranchId id) {
    ++version_;
    const Branch& branch = branches_.at(id);
    const bool bare = branch.snapshots.empty() && branch.children.size() <= 1 && !branch.head &&
                      branch.bookmarks == 0;
    if (bare) bare_.insert(id);
    if (!bare) bare_.erase(id);
}

void History::RemoveBranch(BranchId id) {
    const Branch branch = Get(id);
    VARVE_CHECK(bare_.contains(id));
    if (branch.parent.value != 0) {
        auto& siblings = branches_.at(branch.parent).children;
        const auto [begin, end] = siblings.equal_range(branch.fork);
        siblings.erase(std::find_if(begin, end, [id](auto& child) { return child.second == id; }));
        for (const auto& [fork, child] : branch.children) siblings.emplace(branch.fork, child);
    }
    for (const auto& [fork, child] : branch.children) {
        branches_.at(child).parent = branch.parent;
        branches_.at(child).fork = branch.fork;
    }
    branches_.erase(id);
    bare_.erase(id);
    ++version_;
    if (branch.parent.value != 0) Changed(branch.parent);
}

void History::AddSnapshot(BranchId id, Generation generation) {
    VARVE_CHECK(branches_.at(id).snapshots.insert(generation).second);
    Changed(id);
}

void History::RemoveSnapshot(BranchId id, Generation generation) {
    VARVE_CHECK(branches_.at(id).snapshots.erase(generation) == 1);
    Changed(id);
}

void History::SetHead(BranchId id, bool head) {
    branches_.at(id).head = head;
    Changed(id);
}

void History::AddBookmark(BranchId id) {
    ++branches_.at(id).bookmarks;
    Changed(id);
}

void History::RemoveBookmark(BranchId id) {
    VARVE_CHECK(branches_.at(id).bookmarks > 0);
    --branches_.at(id).bookmarks;
    Changed(id);
}

const History::Branch& History::Get(BranchId id) const {
    const auto branch = branches_.find(id);
    VARVE_CHECK(branch != branches_.end());
    return branch->second;
}

std::optional<BranchId> History::After(BranchId id) const {
    const auto after = branches_.upper_bound(id);
    if (after == branches_.end()) return std::nullopt;
    return after->first;
}

BranchId History::Root(BranchId id, Roots* known) const {
    std::vector<BranchId> path;
    auto found = known->find(id);
    while (found == known->end()) {
        path.push_back(id);
        const BranchId parent = Get(id).parent;
        if (parent.value == 0) break;
        id = parent;
        found = known->find(id);
    }
    const BranchId root = found == known->end() ? id : found->second;
    for (const BranchId on_path : path) (*known)[on_path] = root;
    return root;
}

bool History::StandsAlone(BranchId id) const {
    const Branch& branch = Get(id);
    return branch.head && branch.snapshots.empty() && branch.children.empty() &&
           branch.parent.value == 0;
}

Line History::LineOf(BranchId id, Generation generation) const {
    Line line;
    while (id.value != 0) {
        const Branch& branch = Get(id);
        line.push_back({id, branch.fork, generation});
        if (branch.whole) break;
        generation = Mutated(Mutant::kWrongVersionAtFork) ? kHead : branch.fork;
        id = branch.parent;
    }
    return line;
}

Line History::PathOf(BranchId id, Generation generation) const {
    return StretchesDownTo(id, generation, [](BranchId, Generation) { return std::nullopt; });
}

History::Apart History::ApartFrom(BranchId id, Generation generation, BranchId base,
                                  Generation at) const {
    Apart apart;
    const Line mine = PathOf(id, generation);
    std::map<BranchId, Generation> places;  // where my path leaves each branch
    for (const Stretch& stretch : mine) places[stretch.branch] = stretch.to;
    // Down from the base to a branch that both have; to the root if there is none.
    std::optional<Stretch> meeting;
    for (const Stretch& stretch : Contains(base) ? PathOf(base, at) : Line()) {
        const auto common = places.find(stretch.branch);
        if (common == places.end()) {
            apart.stretches.push_back(stretch);
            continue;
        }
        const Generation met = std::min(common->second, stretch.to);
        if (met < stretch.to) apart.stretches.push_back({stretch.branch, met, stretch.to});
        meeting = Stretch{stretch.branch, met, common->second};
        break;
    }
    apart.below = meeting && apart.stretches.empty();
    for (const Stretch& stretch : mine) {
        if (meeting && stretch.branch == meeting->branch) {
            if (meeting->after < meeting->to) apart.stretches.push_back(*meeting);
            break;
        }
        apart.stretches.push_back(stretch);
    }
    return apart;
}

std::vector<Generation> History::SnapshotsUnder(BranchId id, Generation generation) const {
    std::vector<Generation> found;
    const Line path = PathOf(id, generation);
    for (auto stretch = path.rbegin(); stretch != path.rend(); ++stretch) {
        const std::set<Generation>& snapshots = Get(stretch->branch).snapshots;
        for (auto at = snapshots.upper_bound(stretch->after);
             at != snapshots.end() && *at <= stretch->to && *at < generation; ++at) {
            found.push_back(*at);
        }
    }
    return found;
}

Line History::StretchesBelow(BranchId id, Generation generation, const Views& gone) const {
    return StretchesDownTo(id, generation, [&](BranchId branch, Generation from) {
        return SnapshotDownFrom(branch, from,
                                [&gone](Generation g) { return !gone.snapshots.contains(g); });
    });
}

Line History::StretchesDownTo(BranchId id, Generation generation, const WayEnd& end) const {
    Line path;
    while (id.value != 0) {
        if (const std::optional<Generation> at = end(id, generation)) {
            path.push_back({id, *at, generation});
            return path;
        }
        const Branch& branch = Get(id);
        path.push_back({id, branch.fork, generation});
        generation = branch.fork;
        id = branch.parent;
    }
    return path;
}

std::optional<Generation> History::SnapshotDownFrom(
    BranchId id, Generation generation, const std::function<bool(Generation)>& counts) const {
    const std::set<Generation>& snapshots = Get(id).snapshots;
    for (auto at = snapshots.upper_bound(generation); at != snapshots.begin();) {
        if (counts(*--at)) return *at;
    }
    return std::nullopt;
}

Generation History::SnapshotBelow(BranchId id, Generation generation) const {
    if (generation.value == 0) return Generation{0};
    const Line path = StretchesBelow(id, Generation{generation.value - 1});
    // The lowest stretch ends at a snapshot, or at the root's fork, which is 0.
    return path.back().after;
}

Region History::RegionOf(BranchId id, Generation generation) const {
    return RegionWithout(id, generation, Views{});
}

/// Where the region of a view at (`id`, `generation`) begins.
Stretch History::BottomOf(BranchId id, Generation generation, const Views& gone,
                          Generation* floor) const {
    const Line path = StretchesBelow(id, generation, gone);
    *floor = path.back().after;
    // The floor's snapshot may stand at a fork: then the path's last stretch is empty, and only
    // the child it came from belongs to the region, not the floor's other lines.
    size_t bottom = path.size() - 1;
    if (bottom > 0 && path[bottom].after == path[bottom].to) --bottom;
    return path[bottom];
}

std::pair<BranchId, Generation> History::RegionKeyOf(BranchId id, Generation generation,
                                                     const Views& gone) const {
    Generation floor;
    const Stretch bottom = BottomOf(id, generation, gone, &floor);
    return {bottom.branch, bottom.after};
}

Region History::RegionOver(BranchId id, Generation generation, const Views& gone,
                           bool losing) const {
    Region region;
    const Stretch bottom = BottomOf(id, generation, gone, &region.floor);
    std::vector<Sprout> sprouts{{bottom.branch, bottom.after, -1}};
    while (!sprouts.empty()) {
        const Sprout sprout = sprouts.back();
        sprouts.pop_back();
        const int first = static_cast<int>(region.segments.size());
        Grow(region, sprout, gone, losing, sprouts);
        region.parts.push_back({sprout.branch, first, static_cast<int>(region.segments.size())});
    }
    std::sort(region.parts.begin(), region.parts.end(),
              [](const Region::Part& a, const Region::Part& b) { return a.branch < b.branch; });
    return region;
}

/// Adds a branch up to its first live view; what forks off below is left in `sprouts`. `losing`:
/// views that are to be gone end segments too.
void History::Grow(Region& region, Sprout sprout, const Views& gone, bool losing,
                   std::vector<Sprout>& sprouts) const {
    const Branch& branch = Get(sprout.branch);
    auto snapshot = branch.snapshots.upper_bound(sprout.after);
    auto child = branch.children.upper_bound(sprout.after);
    const bool head_goes = branch.head && gone.heads.contains(sprout.branch);
    for (;;) {
        const auto end = branch.snapshots.end();
        while (!losing && snapshot != end && gone.snapshots.contains(*snapshot)) ++snapshot;
        const Generation next_snapshot = snapshot == end ? kHead : *snapshot;
        const Generation next_fork = child == branch.children.end() ? kHead : child->first;
        const Generation to = std::min(next_snapshot, next_fork);
        const bool top = to == kHead;
        const bool goes = top ? head_goes : losing && gone.snapshots.contains(to);
        const bool view = top ? branch.head && (losing || !goes) : to == next_snapshot;
        const int here = static_cast<int>(region.segments.size());
        region.segments.push_back({{sprout.branch, sprout.after, to}, sprout.parent, view});
        if (view && goes) region.gone.push_back(here);
        if (top || (view && !goes)) return;
        if (to == next_snapshot) ++snapshot;
        for (; child != branch.children.end() && child->first == to; ++child) {
            sprouts.push_back({child->second, to, here});
        }
        sprout = {sprout.branch, to, here};
    }
}

/// Depth first, without recursion: a chain of branches may be long.
Line History::StretchesAbove(BranchId id, Generation generation, const Views& gone) const {
    if (generation == kHead) return {};
    struct Place {
        Sprout sprout;  // `parent`: index of the place it forked from
        Generation to;  // where that one is left
    };
    std::vector<Place> seen{{{id, generation, -1}, Generation{0}}};
    std::vector<size_t> open{0};
    while (!open.empty()) {
        const size_t here = open.back();
        open.pop_back();
        const Sprout at = seen[here].sprout;
        const Branch& branch = Get(at.branch);
        auto snapshot = branch.snapshots.upper_bound(at.after);
        while (snapshot != branch.snapshots.end() && gone.snapshots.contains(*snapshot)) ++snapshot;
        const bool found = snapshot != branch.snapshots.end();
        if (found || (branch.head && !gone.heads.contains(at.branch))) {
            Line path{{at.branch, at.after, found ? *snapshot : kHead}};
            Generation to = seen[here].to;
            for (int p = at.parent; p >= 0;) {
                const Place& place = seen[static_cast<size_t>(p)];
                path.push_back({place.sprout.branch, place.sprout.after, to});
                to = place.to;
                p = place.sprout.parent;
            }
            std::reverse(path.begin(), path.end());
            return path;
        }
        for (auto child = branch.children.rbegin();
             child != branch.children.rend() && child->first >= at.after; ++child) {
            open.push_back(seen.size());
            seen.push_back({{child->second, child->first, static_cast<int>(here)}, child->first});
        }
    }
    return {};
}

int Region::SegmentAt(BranchId branch, Generation generation) const {
    const auto part = std::lower_bound(parts.begin(), parts.end(), branch,
                                       [](const Part& p, BranchId id) { return p.branch < id; });
    if (part == parts.end() || part->branch != branch) return -1;
    const auto first = segments.begin() + part->first, end = segments.begin() + part->end;
    const auto at = std::lower_bound(first, end, generation,
                                     [](const Segment& s, Generation g) { return s.to < g; });
    if (at == end || at->after >= generation) return -1;
    return static_cast<int>(at - segments.begin());
}

std::vector<int> Region::PathDown(const std::vector<int>& from) const {
    std::set<int, std::greater<>> path;
    for (int segment : from) {
        while (segment >= 0 && path.insert(segment).second) {
            segment = segments[static_cast<size_t>(segment)].parent;
        }
    }
    return {path.begin(), path.end()};
}

Line Region::StretchesOf(const std::vector<int>& path) const {
    std::map<BranchId, Stretch> by_branch;
    for (const int segment : path) {
        const Stretch& part = segments[static_cast<size_t>(segment)];
        Stretch& whole = by_branch.try_emplace(part.branch, part).first->second;
        whole.after = std::min(whole.after, part.after);
        whole.to = std::max(whole.to, part.to);
    }
    Line line;
    for (const auto& [branch, stretch] : by_branch) line.push_back(stretch);
    return line;
}

}  // namespace varve::cow
