// RowFilter: knows of branches which chunks have rows or notes there, so that the store need not be
// asked where there are none. A chain of 10,000 restores is 10,000 branches with a few rows each:
// a sweep asks all of them about its chunk, and a seek of the store costs a hundred times what a
// look at this does.
//
// Only a no counts: whoever is told "perhaps" asks the store. A branch that is asked about again
// and again, and has not changed meanwhile, is read once, whole. Questions that had to go to the
// store pay for the moves of cursors here, so reading costs less than asking did. What a commit
// puts into a branch or takes out of it makes it unknown again (Committer::TakeChanged).
//
// Used by one step of the reclaimer at a time, on whichever executor that runs.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cow/format/types.h"
#include "cow/store/stores.h"

namespace varve::cow {

class RowFilter {
  public:
    /// A branch is read once so many questions about it had to go to the store; at least 1. What is
    /// remembered: chunk numbers of so many bytes in all, and an eighth as many branches, of some
    /// 80 bytes each.
    explicit RowFilter(size_t read_after = 16, size_t bytes_most = 8 << 20);

    /// Their rows or notes have changed. REQUIRES: called for all that was committed before the
    /// view of the next question was taken. If there is little room left it forgets all others too:
    /// many may be of branches that are gone.
    void Forget(const std::unordered_set<BranchId>& changed);

    /// False: neither a row nor a note of `chunk` is in the branch, of whatever generation.
    bool MayHave(MetadataView& view, BranchId branch, ChunkIndex chunk);
    /// The same for any chunk.
    bool MayHaveAny(MetadataView& view, BranchId branch);

  private:
    struct Known {
        size_t asked = 0;
        size_t read_at;  // questions after which it is worth while to read it
        bool read = false;
        std::vector<ChunkIndex> chunks;  // ascending; once it has been read
    };
    const Known* Find(MetadataView& view, BranchId branch);
    bool Read(MetadataView& view, BranchId branch, std::vector<ChunkIndex>& chunks);
    bool ReadChunks(MetadataView& view, const std::string& prefix, std::vector<ChunkIndex>& chunks);

    const size_t read_after_;
    const size_t chunks_most_, branches_most_;
    std::unordered_map<BranchId, Known> branches_;
    size_t chunks_ = 0;  // in all
    size_t moves_ = 0;   // that are paid for
};

}  // namespace varve::cow
