#include "cow/pool/freed_count.h"

#include <algorithm>

#include "base/sort_unique.h"

namespace varve::cow {
namespace {

/// Moves in the store that are made before others get the auditor. One costs some microseconds.
constexpr uint64_t kMovesTogether = 1024;
/// Branches that are looked up in memory in the time of a move.
constexpr uint64_t kLooksLikeMove = 64;

class CountedCursor : public Cursor {
  public:
    CountedCursor(std::unique_ptr<Cursor> cursor, uint64_t& moves)
        : cursor_(std::move(cursor)), moves_(moves) {}
    void Seek(std::string_view key) override {
        ++moves_;
        cursor_->Seek(key);
    }
    void Next() override {
        ++moves_;
        cursor_->Next();
    }
    bool valid() const override { return cursor_->valid(); }
    std::string_view key() const override { return cursor_->key(); }
    std::string_view value() const override { return cursor_->value(); }
    Status status() const override { return cursor_->status(); }
    bool gave_up() const override { return cursor_->gave_up(); }

  private:
    const std::unique_ptr<Cursor> cursor_;
    uint64_t& moves_;
};

}  // namespace

Result<std::optional<std::string>> CountedView::Get(std::string_view key) {
    ++moves_;
    return view_.Get(key);
}

std::unique_ptr<Cursor> CountedView::Range(std::string_view lower, std::string_view upper,
                                           uint64_t deleted_most) {
    return std::make_unique<CountedCursor>(view_.Range(lower, upper, deleted_most), moves_);
}

void FreedCount::Side::AddJobs(const std::vector<JobRecord>& jobs) {
    for (const JobRecord& job : jobs) {
        const int segment = region->SegmentAt(job.branch, job.generation);
        if (segment >= 0) from.push_back(segment);
    }
    SortUnique(from);
}

void FreedCount::Side::AddNote(BranchId branch, ChunkIndex chunk, Generation generation) {
    const std::pair note(chunk, region->SegmentAt(branch, generation));
    if (note.second >= 0 && (notes.empty() || notes.back() != note)) notes.push_back(note);
}

Status FreedCount::Side::Sweep(ChunkIndex chunk, SweepPlan& plan) {
    auto note = std::lower_bound(notes.begin(), notes.end(), std::pair(chunk, 0));
    if (note == notes.end() || note->first != chunk) return sweeper.Sweep(chunk, from, plan);
    std::vector<int> begin = from;
    for (; note != notes.end() && note->first == chunk; ++note) begin.push_back(note->second);
    SortUnique(begin);
    return sweeper.Sweep(chunk, begin, plan);
}

FreedCount::FreedCount(MetadataView& view, Loss loss, const Pending& pending)
    : view_(view),
      with_(view_, loss.with, loss.with.gone, hints_, filter_),
      without_(view_, std::move(loss.without), std::move(loss.from), hints_, filter_),
      scan_(std::move(loss.below), std::move(loss.above)),
      notes_found_(!pending.any) {
    with_.AddJobs(pending.jobs);
    without_.AddJobs(pending.jobs);
}

Status FreedCount::Step() {
    const uint64_t end = view_.moves() + kMovesTogether;
    if (!scan_.done()) return Collect();
    if (!notes_found_) return FindNotes();
    // A chunk may be answered from memory, but looks at each branch.
    const uint64_t looks = with_.region->segments.size() / kLooksLikeMove + 1;
    Status s;
    for (uint64_t looked = 0; s.ok() && !done() && view_.moves() + looked < end; looked += looks) {
        s = SweepChunk();
    }
    return s;
}

/// More of the chunks that may have something dead. A chunk comes up once for each generation
/// that touched it: memory is for chunks only.
Status FreedCount::Collect() {
    if (Status s = scan_.Next(view_, &filter_, kMovesTogether, chunks_); !s.ok()) return s;
    if (chunks_.size() < 2 * sorted_ + kMovesTogether && !scan_.done()) return Status();
    SortUnique(chunks_);
    sorted_ = chunks_.size();
    return Status();
}

/// More of the notes on those chunks that the region's branches left. Those that left none cost
/// nothing.
Status FreedCount::FindNotes() {
    const std::vector<Region::Part>& parts = with_.region->parts;
    const auto cursor = view_.Range(notes_from_, PrefixEnd("W"), 0);
    const uint64_t end = view_.moves() + kMovesTogether;
    cursor->Seek(notes_from_);
    while (cursor->valid() && view_.moves() < end) {
        const std::string_view key = cursor->key();
        const BranchId branch{KeyNumber(key, 0)};
        const ChunkIndex chunk{KeyNumber(key, 1)};
        const auto part =
            std::lower_bound(parts.begin(), parts.end(), branch,
                             [](const Region::Part& one, BranchId id) { return one.branch < id; });
        if (part == parts.end()) break;
        if (part->branch != branch) {
            cursor->Seek(NoteKey(part->branch, ChunkIndex{0}, Generation{0}, 0));
            continue;
        }
        if (std::binary_search(chunks_.begin(), chunks_.end(), chunk)) {
            with_.AddNote(branch, chunk, Generation{KeyNumber(key, 2)});
            without_.AddNote(branch, chunk, Generation{KeyNumber(key, 2)});
        }
        cursor->Next();
    }
    notes_found_ = !cursor->valid() || view_.moves() < end;
    if (!notes_found_) notes_from_ = std::string(cursor->key());
    if (notes_found_) SortUnique(with_.notes);
    if (notes_found_) SortUnique(without_.notes);
    return cursor->status();
}

Status FreedCount::SweepChunk() {
    const ChunkIndex chunk = chunks_[next_++];
    SweepPlan now, then;
    if (Status s = with_.Sweep(chunk, now); !s.ok()) return s;
    if (Status s = without_.Sweep(chunk, then); !s.ok()) return s;
    blocks_ += then.freed_blocks - now.freed_blocks;
    return Status();
}

}  // namespace varve::cow
