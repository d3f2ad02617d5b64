// FrozenWalk: the frozen blocks of a view, some chunks at a time, and their data.
// Used to make checksums (checksummer.h) and to verify all of them (scrub.h).
#pragma once

#include <functional>
#include <span>

#include "cow/reclaim/sweep.h"
#include "cow/volume/lane.h"

namespace varve::cow {

struct FrozenBlock {
    uint64_t place = 0;
    Generation birth;
    ChunkIndex chunk;
    uint32_t block = 0;  // of the chunk
    std::optional<uint32_t> sum;
    Errno error = 0;  // it could not be read

    uint64_t offset() const { return (chunk.value * kChunkBlocks + block) * kBlockBytes; }
};

/// What a view sees and the views at the lower end of its stretches do not: whatever they see of
/// older blocks is the same. A block that is named by several rows may come up more than once.
class FrozenWalk {
  public:
    struct View {
        Line line;
        Line stretches;      // from the view down to where others take over: all their rows
        Generation present;  // blocks of this generation are not frozen; 0: none
        bool fork = false;   // nobody stands there: a row that cannot be read may be dead
    };
    explicit FrozenWalk(View view)
        : view_(std::move(view)), chunks_(view_.stretches, Line()), floor_(Floor()) {}

    /// Appends the blocks of some chunks, ordered by place, with the checksums that are stored.
    /// Blocks the thread. kDamaged names an unreadable row.
    Status Next(MetadataView& view, std::vector<FrozenBlock>& blocks);
    bool done() const { return chunks_.done(); }
    /// At a fork: whether rows that cannot be read were left out.
    bool left_out() const { return left_out_; }

  private:
    Generation Floor() const {
        return view_.stretches.empty() ? Generation{0} : view_.stretches.back().after;
    }
    Status AddChunks(MetadataView& view, ChunkIndex first, ChunkIndex end,
                     std::vector<FrozenBlock>& blocks);

    const View view_;
    CandidateScan chunks_;
    const Generation floor_;
    bool left_out_ = false;
};

/// Fills in the checksums that are stored, with their births. `blocks` are ordered by place.
/// An unreadable row counts as absent.
Status FindSums(MetadataView& view, std::vector<FrozenBlock>& blocks);

/// What to do with blocks that a step of the walk found.
struct FrozenVisitor {
    /// Whether to read it. On the loader.
    std::function<bool(const FrozenBlock&)> wants;
    /// Its data was read, or could not be (FrozenBlock::error). On the loader.
    std::function<void(FrozenBlock&, uint32_t sum)> read;
};

/// One step: a few chunks are resolved, the wanted blocks read, little by little, so that others
/// are served in between. Starts and ends on home. ECANCELED when the pool closes.
Task<Status> StepFrozen(Core& core, LaneState& lane, FrozenWalk& walk,
                        const FrozenVisitor& visitor);

}  // namespace varve::cow
