#include "cow/history/losses.h"
#include "base/sort_unique.h"

#include <algorithm>

namespace varve::cow {
namespace {

/// From above the lowest view that goes up to one that stays, if they all stand on one branch.
/// Whoever reads a row of theirs that is not read up there, does so because it was superseded
/// somewhere in between. Where several branches lose views, one line does not tell.
Line FindAbove(const History& history, const Region& with, const Views& gone) {
    const auto at = [&with](int index) { return with.segments[static_cast<size_t>(index)]; };
    const BranchId branch = at(with.gone.front()).branch;
    Generation lowest = kHead, highest;
    for (const int segment : with.gone) {
        if (at(segment).branch != branch) return {};
        lowest = std::min(lowest, at(segment).to);
        highest = std::max(highest, at(segment).to);
    }
    Line above = history.StretchesAbove(branch, highest, gone);
    if (!above.empty()) above.front().after = lowest;
    return above;
}

}  // namespace

std::vector<Loss> FindLosses(const History& history, const std::vector<ViewAt>& views) {
    Views gone;
    for (const ViewAt& view : views) {
        if (view.generation == kHead) gone.heads.insert(view.branch);
        if (view.generation != kHead) gone.snapshots.insert(view.generation);
    }
    std::vector<Loss> losses;
    std::set<std::pair<BranchId, Generation>> found;
    for (const ViewAt& view : views) {
        if (found.contains({view.branch, view.generation})) continue;
        Loss& loss = losses.emplace_back();
        loss.with = history.RegionLosing(view.branch, view.generation, gone);
        loss.without = history.RegionWithout(view.branch, view.generation, gone);
        for (const int segment : loss.with.gone) {
            const Segment& lost = loss.with.segments[static_cast<size_t>(segment)];
            found.emplace(lost.branch, lost.to);
            const int stood = loss.without.SegmentAt(lost.branch, lost.to);
            VARVE_CHECK(stood >= 0);
            loss.from.push_back(stood);
        }
        SortUnique(loss.from);
        loss.below = loss.with.StretchesOf(loss.with.PathDown(loss.with.gone));
        loss.above = FindAbove(history, loss.with, gone);
    }
    return losses;
}

}  // namespace varve::cow
