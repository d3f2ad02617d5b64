#include "cow/reclaim/dead_blocks.h"

#include <algorithm>
#include <utility>

#include "cow/format/runs.h"

namespace varve::cow {
namespace {

/// Lists that are compared pair by pair.
constexpr size_t kFew = 4;

}  // namespace

DeadBlocks::DeadBlocks(std::vector<Runs> lists) {
    if (lists.size() > kFew) {
        Index(lists);
        return;
    }
    lists_ = std::move(lists);
    for (size_t i = 0; i < lists_.size(); ++i) {
        for (size_t j = 0; j < i && !lists_[i].empty(); ++j) {
            lists_[i] = Subtract(lists_[i], lists_[j]);
        }
    }
}

void DeadBlocks::Index(const std::vector<Runs>& lists) {
    indexed_ = true;
    for (const Runs& runs : lists) {
        const auto list = static_cast<uint32_t>(lists_.size());
        Runs& own = lists_.emplace_back();
        for (const Run& run : runs) {
            for (uint32_t i = 0; i < run.count; ++i) {
                Run block = run;
                block.place += i;
                block.first += i;
                block.count = 1;
                const Position position{list, static_cast<uint32_t>(block.first)};
                if (blocks_.try_emplace(block.place, position).second) Map(own, block, nullptr);
            }
        }
    }
}

void DeadBlocks::Remove(const Runs& named) {
    if (!indexed_) {
        for (Runs& runs : lists_) {
            if (!runs.empty()) runs = Subtract(runs, named);
        }
        return;
    }
    for (const Run& run : named) {
        for (uint32_t i = 0; i < run.count && !blocks_.empty(); ++i) {
            const auto block = blocks_.find(run.place + i);
            if (block == blocks_.end()) continue;
            const Position at = block->second;
            Unmap(lists_[at.list], at.first, at.first + 1, nullptr);
            blocks_.erase(block);
        }
    }
}

/// Blocks only go: a list that had none goes on having none.
bool DeadBlocks::BornBy(Generation end) {
    if (std::exchange(end_, end) != end) before_ = 0;
    const auto early = [end](const Run& run) { return run.birth <= end; };
    for (; before_ < lists_.size(); ++before_) {
        if (std::any_of(lists_[before_].begin(), lists_[before_].end(), early)) return true;
    }
    return false;
}

}  // namespace varve::cow
