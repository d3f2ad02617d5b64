// What a head's commit round does to the store: its rows, touched marks, notes, blocks.
// Not when: that is the committer's and the head's matter.
#pragma once

#include "cow/head/committer.h"
#include "cow/head/head.h"

namespace varve::cow {

/// The blocks that it frees at once.
std::vector<Extent> FreedBy(const HeadCommit& commit);

/// Builds the rows of `commit` into the next batch. Follows the rule of sweep.h: blocks of the
/// commit's own generation are freed, older ones are held by a snapshot below or noted.
/// kDamaged (and the pool fails) if the allocator contradicts the map.
Status BuildHeadCommit(Core& core, CommitContext& context, DiskId disk, const HeadCommit& commit);

/// The rows of a commit without map rows, which need no building. Takes them out of `commit`.
PlainRows TakePlain(HeadCommit& commit);

}  // namespace varve::cow
