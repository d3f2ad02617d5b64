// History: the tree of branches with the views on it, and what follows from its shape.
// Pure data in memory; knows no rows and no names.
//
// A branch is a line of generations. A view is something that somebody can read: a snapshot, at a
// generation, or a head, above all generations of its branch. A branch may start from its
// parent's state at the end of a generation, its fork. A view resolves a chunk to the newest row
// at or below it on its line: its own branch from the view down, then the parent from the fork
// down, and so on to the root.
//
// A region is a part of the tree between views: it has one live snapshot (or nothing) at its
// bottom, live views at its tops, and none inside. A block born in a region is visible somewhere
// only if it is visible at one of the region's tops, because what a view sees of older blocks the
// views below it see as well. So the fate of a block is decided inside one region, however large
// the tree is.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "cow/format/types.h"

namespace varve::cow {

/// Above all generations: where a head stands.
inline constexpr Generation kHead{~uint64_t{0}};

/// Rows of `branch` at generations in (after, to].
struct Stretch {
    BranchId branch;
    Generation after;
    Generation to;
};

/// From the view down to the root: where to look for a chunk's row, in this order.
using Line = std::vector<Stretch>;

struct Segment : Stretch {
    int parent = -1;    // index of the segment below, which comes earlier; -1: the floor
    bool view = false;  // a live view stands at `to`
};

/// Views that questions about regions shall take for gone.
struct Views {
    std::set<Generation> snapshots;
    std::set<BranchId> heads;
};

struct Region {
    Generation floor;  // of the live snapshot at the bottom; 0: none
    std::vector<Segment> segments;
    std::vector<int> gone;  // those that end at views that are to be gone: see `Views`

    /// Index of the segment that holds the end of that generation; -1 if none does.
    int SegmentAt(BranchId branch, Generation generation) const;
    /// The segments `from` and all below them down to the floor, highest first, each once.
    std::vector<int> PathDown(const std::vector<int>& from) const;
    /// What the segments of such a path hold, each branch once.
    Line StretchesOf(const std::vector<int>& path) const;

    /// A branch's segments are [first, end), ascending. By branch.
    struct Part {
        BranchId branch;
        int first, end;
    };
    std::vector<Part> parts;
};

class History {
  public:
    struct Branch {
        BranchId parent;  // 0: none
        Generation fork;
        std::set<Generation> snapshots;
        std::multimap<Generation, BranchId> children;  // by fork
        bool head = false;
        uint32_t bookmarks = 0;  // no views, but they need to find the branch
        /// Its rows alone say what its views see (docs/design/flatten.md): a line ends here. But
        /// its blocks may still be the parent's, so regions go on.
        bool whole = false;
    };

    // ---- changes
    void AddBranch(BranchId id, BranchId parent, Generation fork);
    /// A child takes its place. REQUIRES: no views, at most one child.
    void RemoveBranch(BranchId id);
    void AddSnapshot(BranchId id, Generation generation);
    void RemoveSnapshot(BranchId id, Generation generation);
    void SetHead(BranchId id, bool head);
    void AddBookmark(BranchId id);
    void RemoveBookmark(BranchId id);
    /// Grows with each change of the views or of the branches.
    uint64_t version() const { return version_; }
    void SetWhole(BranchId id) { branches_.at(id).whole = true; }

    // ---- questions
    bool Contains(BranchId id) const { return branches_.contains(id); }
    const Branch& Get(BranchId id) const;
    const std::map<BranchId, Branch>& branches() const { return branches_; }
    /// Those that could be removed: without views and bookmarks, and with one child at most.
    const std::set<BranchId>& bare() const { return bare_; }
    /// The branch after that one, by its number.
    std::optional<BranchId> After(BranchId id) const;
    /// Costs a step for each branch below it that is not in `known`, where it is kept then: whoever
    /// asks for many must give one.
    using Roots = std::map<BranchId, BranchId>;
    BranchId Root(BranchId id, Roots* known) const;
    /// Whether the branch's head is the only view of all that have to do with it.
    bool StandsAlone(BranchId id) const;
    /// The line of a view at (`id`, `generation`); kHead for a head. Down to the root, or to the
    /// first branch that is whole.
    Line LineOf(BranchId id, Generation generation) const;
    /// All that the view's blocks come from: its line as it would be if nothing was whole.
    Line PathOf(BranchId id, Generation generation) const;
    /// Where two views, or what is left of one, may have rows that the other does not see: between
    /// each of them and the state that both come from.
    struct Apart {
        Line stretches;
        bool below = false;  // the base is that state: the view comes from it
    };
    Apart ApartFrom(BranchId id, Generation generation, BranchId base, Generation at) const;
    /// The live snapshots that the view comes from, ascending; not itself.
    std::vector<Generation> SnapshotsUnder(BranchId id, Generation generation) const;
    /// The newest live snapshot on the line strictly below (`id`, `generation`); 0 if none.
    Generation SnapshotBelow(BranchId id, Generation generation) const;
    /// The region in which the row of a view at (`id`, `generation`) was born, with the views that
    /// are live now: the one just below the generation that follows.
    Region RegionOf(BranchId id, Generation generation) const;
    /// The same without the views `gone`.
    Region RegionWithout(BranchId id, Generation generation, const Views& gone) const {
        return RegionOver(id, generation, gone, false);
    }
    /// The part of the tree that is one region without the views `gone`, as it is with them:
    /// segments end at them, are in `Region::gone`, and have `view` set.
    Region RegionLosing(BranchId id, Generation generation, const Views& gone) const {
        return RegionOver(id, generation, gone, true);
    }
    /// What tells that region from all others: its lowest branch, and where it begins there. Cheap.
    std::pair<BranchId, Generation> RegionKeyOf(BranchId id, Generation generation,
                                                const Views& gone = {}) const;
    /// From (`id`, `generation`) down to the nearest live snapshot at or below it, or to the root.
    Line StretchesBelow(BranchId id, Generation generation, const Views& gone = {}) const;
    /// The same, down to where `end` says: the highest place at or below a generation of a branch
    /// at which the way ends, if there is one.
    using WayEnd = std::function<std::optional<Generation>(BranchId, Generation)>;
    Line StretchesDownTo(BranchId id, Generation generation, const WayEnd& end) const;
    /// The branch's newest snapshot at or below `generation` that `counts`.
    std::optional<Generation> SnapshotDownFrom(BranchId id, Generation generation,
                                               const std::function<bool(Generation)>& counts) const;
    /// From just above (`id`, `generation`) up to one of the nearest live views; empty if no live
    /// view is above.
    Line StretchesAbove(BranchId id, Generation generation, const Views& gone = {}) const;

  private:
    struct Sprout {  // a branch's part of a region: from `after` on, over the segment `parent`
        BranchId branch;
        Generation after;
        int parent;
    };
    Stretch BottomOf(BranchId id, Generation generation, const Views& gone,
                     Generation* floor) const;
    Region RegionOver(BranchId id, Generation generation, const Views& gone, bool losing) const;
    void Grow(Region& region, Sprout sprout, const Views& gone, bool losing,
              std::vector<Sprout>& sprouts) const;

    void Changed(BranchId id);

    std::map<BranchId, Branch> branches_;
    std::set<BranchId> bare_;
    uint64_t version_ = 0;
};

}  // namespace varve::cow
