#include "cow/reclaim/row_filter.h"

#include <algorithm>
#include <optional>
#include <string>

#include "base/sort_unique.h"
#include "cow/format/format.h"

namespace varve::cow {
namespace {

/// Moves that may be saved: no step of the reclaimer's takes much longer for them.
constexpr size_t kMovesMost = 1024;
/// Deleted rows that a move of a cursor may meet: a branch that has lost many lately is read later.
constexpr uint64_t kDeletedMost = 16;
/// Moves that a cursor and its seek cost.
constexpr size_t kSeekMoves = 8;

}  // namespace

RowFilter::RowFilter(size_t read_after, size_t bytes_most)
    : read_after_(std::max<size_t>(1, read_after)),
      chunks_most_(bytes_most / sizeof(ChunkIndex)),
      branches_most_(chunks_most_ / 8) {}

void RowFilter::Forget(const std::unordered_set<BranchId>& changed) {
    for (const BranchId branch : changed) {
        const auto known = branches_.find(branch);
        if (known == branches_.end()) continue;
        chunks_ -= known->second.chunks.size();
        branches_.erase(known);
    }
    if (branches_.size() < branches_most_ && chunks_ < chunks_most_ / 8 * 7) return;
    branches_.clear();
    chunks_ = 0;
}

/// Null: unknown.
const RowFilter::Known* RowFilter::Find(MetadataView& view, BranchId branch) {
    auto at = branches_.find(branch);
    if (at == branches_.end()) {
        if (branches_.size() >= branches_most_) return nullptr;
        at = branches_.try_emplace(branch, Known{0, read_after_, false, {}}).first;
    }
    Known& known = at->second;
    if (known.read) return &known;
    const size_t paid = std::max<size_t>(1, 2 * kSeekMoves / read_after_);
    moves_ = std::min(moves_ + paid, kMovesMost);
    if (++known.asked < known.read_at || moves_ < 2 * kSeekMoves) return nullptr;
    known.read_at = 2 * known.asked;  // if it fails
    std::vector<ChunkIndex> chunks;
    if (!Read(view, branch, chunks)) return nullptr;
    known.chunks = std::move(chunks);
    known.read = true;
    chunks_ += known.chunks.size();
    return &known;
}

/// The chunks with rows or notes in the branch. False if that takes too many moves, too much
/// memory, or cannot be read.
bool RowFilter::Read(MetadataView& view, BranchId branch, std::vector<ChunkIndex>& chunks) {
    constexpr size_t kPrefix = 9;  // letter and branch
    const std::string rows = MapKey(branch, ChunkIndex{0}, Generation{0}).substr(0, kPrefix);
    const std::string notes = NoteKey(branch, ChunkIndex{0}, Generation{0}, 0).substr(0, kPrefix);
    if (!ReadChunks(view, rows, chunks) || !ReadChunks(view, notes, chunks)) return false;
    SortUnique(chunks);
    return chunks_ + chunks.size() <= chunks_most_;
}

bool RowFilter::ReadChunks(MetadataView& view, const std::string& prefix,
                           std::vector<ChunkIndex>& chunks) {
    moves_ -= std::min(moves_, kSeekMoves);
    const auto cursor = view.Range(prefix, PrefixEnd(prefix), kDeletedMost);
    for (cursor->Seek(prefix); cursor->valid(); cursor->Next()) {
        if (moves_ == 0 || KeyNumbers(cursor->key()) < 2) return false;
        --moves_;
        const ChunkIndex chunk{KeyNumber(cursor->key(), 1)};
        if (chunks.empty() || chunks.back() != chunk) chunks.push_back(chunk);
    }
    return cursor->status().ok() && !cursor->gave_up();
}

bool RowFilter::MayHave(MetadataView& view, BranchId branch, ChunkIndex chunk) {
    const Known* known = Find(view, branch);
    return !known || std::binary_search(known->chunks.begin(), known->chunks.end(), chunk);
}

bool RowFilter::MayHaveAny(MetadataView& view, BranchId branch) {
    const Known* known = Find(view, branch);
    return !known || !known->chunks.empty();
}

}  // namespace varve::cow
