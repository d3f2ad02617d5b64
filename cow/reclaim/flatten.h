// Flattener: gives a branch rows of its own for all that it inherited, so that lines end at it.
// docs/design/flatten.md has the shape and what may happen beside it. Not a task: the reclaimer
// runs its steps, so that no sweep comes between what a step reads and what it commits.
//
// Belongs to the home executor; reads on the loader.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "cow/head/committer.h"

namespace varve::cow {

class Flattener {
  public:
    /// `done`: lines may be shorter now, on home.
    Flattener(Core& core, Catalog& catalog, Committer& committer, std::function<void()> done,
              size_t step_chunks)
        : core_(core),
          catalog_(catalog),
          committer_(committer),
          done_(std::move(done)),
          step_chunks_(step_chunks) {}

    /// Does one step of one branch, in turns with the others. False if there is none to be
    /// flattened. `*unread`: why one was given up, if it was. An error is the commit's.
    Task<Result<bool>> Step(std::string* unread);

  private:
    struct Rows {
        std::vector<MapRow> rows;  // as the branch inherited them, those that it needs
        ChunkIndex next;           // where to go on
        Status status;
    };
    static Rows Read(MetadataView& view, BranchId branch, const Line& inherited, Generation lowest,
                     ChunkIndex from, size_t chunks);
    Task<Status> Put(BranchId branch, const std::vector<MapRow>& rows);
    Task<Status> End(BranchId branch, Flattening flattening);

    Core& core_;
    Catalog& catalog_;
    Committer& committer_;
    const std::function<void()> done_;
    const size_t step_chunks_;
    BranchId branch_;                      // the one that had the last turn
    std::map<BranchId, ChunkIndex> next_;  // where those that are being flattened go on
};

}  // namespace varve::cow
