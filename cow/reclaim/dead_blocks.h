// DeadBlocks: what a sweep has found dead of one chunk, by the row or note that named it, while
// what others name is taken out. Many rows of one chunk may be dead, with many others alive beside
// them (thousands of clones that wrote it): pair by pair that would take the square, so blocks are
// found by their place then.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "cow/format/types.h"

namespace varve::cow {

class DeadBlocks {
  public:
    /// Each block stays in the first of `lists` that names it only.
    explicit DeadBlocks(std::vector<Runs> lists);

    /// Somebody else names these.
    void Remove(const Runs& named);
    /// Whether some of what is left was born at `end` or before.
    bool BornBy(Generation end);
    /// What is left, in the order of the lists. Last call.
    std::vector<Runs> Take() { return std::move(lists_); }

  private:
    struct Position {
        uint32_t list;
        uint32_t first;  // block of the chunk
    };
    void Index(const std::vector<Runs>& lists);

    std::vector<Runs> lists_;
    // Of many lists; else empty. By place.
    std::unordered_map<uint64_t, Position> blocks_;
    bool indexed_ = false;
    Generation end_;     // that was asked for last
    size_t before_ = 0;  // lists up to this one have nothing born at end_ or before
};

}  // namespace varve::cow
