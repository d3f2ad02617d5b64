#include "cow/reclaim/note_queue.h"

#include <algorithm>

#include "cow/mutants.h"

namespace varve::cow {

void NoteQueue::Add(const std::vector<NotePlace>& notes) {
    for (const NotePlace& note : notes) {
        if (count_ >= kMost) {
            incomplete_ = true;
            break;
        }
        places_[note.branch][note.generation].push_back(note.chunk);
        ++count_;
    }
    if (!pass_ && incomplete_) PassedTo("");
}

std::vector<NotePlace> NoteQueue::Take(size_t most) {
    std::vector<NotePlace> taken;
    const size_t target = std::min(most, count_);
    while (taken.size() < target) {
        auto branch = places_.lower_bound(next_);
        if (branch == places_.end()) branch = places_.begin();
        auto& generations = branch->second;
        while (!generations.empty() && taken.size() < target) {
            const auto oldest = generations.begin();
            std::vector<ChunkIndex>& chunks = oldest->second;
            for (; !chunks.empty() && taken.size() < target; chunks.pop_back()) {
                taken.push_back({branch->first, oldest->first, chunks.back()});
            }
            if (chunks.empty()) generations.erase(oldest);
        }
        next_ = BranchId{branch->first.value + 1};
        if (generations.empty()) places_.erase(branch);
    }
    count_ -= taken.size();
    return taken;
}

void NoteQueue::PassedTo(std::string key) {
    pass_from_ = std::move(key);
    if (!pass_from_.empty() && !Mutated(Mutant::kNotesSkipped)) return;
    // What did not fit meanwhile may lie before the place where the pass was.
    pass_ = incomplete_;
    incomplete_ = false;
    pass_from_ = "W";
}

}  // namespace varve::cow
