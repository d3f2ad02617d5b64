// NoteQueue: which notes wait for a sweep, so that nobody has to look for them among all there
// were. Not the notes themselves, which are rows of the store: after a start, and when more came
// than memory may hold, a pass over the table finds the others.
//
// Belongs to the home executor.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cow/head/committer.h"

namespace varve::cow {

class NoteQueue {
  public:
    /// Notes whose commit is durable.
    void Add(const std::vector<NotePlace>& notes);
    /// Takes some, at most `most`: of one branch after the other, in turns.
    std::vector<NotePlace> Take(size_t most);
    bool empty() const { return count_ == 0; }
    size_t count() const { return count_; }
    /// So many that whoever leaves them is faster than the sweep.
    bool crowded() const { return count_ > kMost / 2 || incomplete_; }

    /// The table holds notes that never were in the queue, from `pass_from()` on.
    bool pass_needed() const { return pass_; }
    const std::string& pass_from() const { return pass_from_; }
    /// The pass came as far as before `key`; empty: to the end.
    void PassedTo(std::string key);

  private:
    static constexpr size_t kMost = 256 << 10;  // places: some 4 MiB

    std::map<BranchId, std::map<Generation, std::vector<ChunkIndex>>> places_;
    size_t count_ = 0;
    BranchId next_;  // whose turn it is
    bool pass_ = true;
    bool incomplete_ = false;  // some did not fit since the pass began
    std::string pass_from_ = "W";
};

}  // namespace varve::cow
