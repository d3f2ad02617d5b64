// Losses: what changes in the tree when several views go at once, region by region.
// Costs a few steps for each segment of those regions, however many of the views stand in one.
#pragma once

#include <vector>

#include "cow/history/history.h"

namespace varve::cow {

struct ViewAt {
    BranchId branch;
    Generation generation;  // kHead: the head
};

/// A region of the tree without the views, and what it is with them.
struct Loss {
    Region with;  // `with.gone` are the views
    Region without;
    std::vector<int> from;  // the segments of `without` in which they stood
    /// Where the chunks are in which something would be dead: all of them were touched in `below`,
    /// and all in `above`, if there is that. For a CandidateScan.
    Line below, above;
};

/// REQUIRES: the views are there.
std::vector<Loss> FindLosses(const History& history, const std::vector<ViewAt>& views);

}  // namespace varve::cow
