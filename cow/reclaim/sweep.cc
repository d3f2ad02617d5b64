#include "cow/reclaim/sweep.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <iterator>
#include <map>

#include "cow/format/format.h"
#include "cow/format/runs.h"
#include "cow/mutants.h"

namespace varve::cow {
BranchId SweepHints::Find(BranchId below, ChunkIndex chunk) const {
    const auto found = hints_.find({below, chunk});
    return found == hints_.end() ? BranchId{0} : found->second;
}

void SweepHints::Set(BranchId below, ChunkIndex chunk, BranchId witness) {
    if (hints_.size() >= kMost) hints_.clear();
    hints_[{below, chunk}] = witness;
}

/// Not in the constructor, which home calls.
void Sweeper::Prepare() {
    children_.resize(region_->segments.size());
    for (size_t i = 0; i < children_.size(); ++i) {
        const int parent = region_->segments[i].parent;
        if (parent >= 0) children_[static_cast<size_t>(parent)].push_back(static_cast<int>(i));
    }
}

Status Sweeper::Sweep(ChunkIndex chunk, const std::vector<int>& from, SweepPlan& plan) {
    if (children_.empty()) Prepare();
    if (path_.from != from) FindPath(from);
    if (Status s = ReadPath(chunk); !s.ok()) return s;
    SweepPlan mine;
    std::vector<Runs> kept, lists;  // lists: of what is dead
    for (auto& [segment, found] : on_path_) {
        for (size_t r = 0; r < found.rows.size(); ++r) {
            if (r == 0) {
                const Result<bool> needed = Needed(segment, chunk);
                if (!needed.ok()) return needed.error();
                if (needed.value()) {
                    kept.push_back(found.rows[r].runs);
                    continue;
                }
            }
            const RowAt& at = found.rows[r].at;
            mine.deletes.push_back(MapKey(at.branch, chunk, at.generation));
            mine.deletes.push_back(TouchedKey(at.branch, at.generation, chunk));
            lists.push_back(found.rows[r].runs);
        }
        std::move(found.notes.begin(), found.notes.end(), std::back_inserter(lists));
        std::move(found.marks.begin(), found.marks.end(), std::back_inserter(mine.deletes));
    }
    Generation floor = region_->floor;
    if (Mutated(Mutant::kSweepIgnoresFloor)) floor = Generation{0};
    for (Runs& runs : lists) {
        std::erase_if(runs, [floor](const Run& run) { return run.birth <= floor; });
    }
    DeadBlocks dead(std::move(lists));
    if (Status s = KeepNamed(chunk, kept, dead); !s.ok()) return s;
    for (Runs& runs : dead.Take()) {
        plan.freed_blocks += MappedBlocks(runs);
        if (!runs.empty()) plan.freed.push_back(std::move(runs));
    }
    plan.deletes.insert(plan.deletes.end(), std::move_iterator(mine.deletes.begin()),
                        std::move_iterator(mine.deletes.end()));
    return Status();
}

bool Sweeper::Path::Contains(int segment) const {
    return std::binary_search(segments.begin(), segments.end(), segment, std::greater<>());
}

void Sweeper::FindPath(const std::vector<int>& from) {
    path_.from = from;
    path_.segments = region_->PathDown(from);
    path_.stretches = region_->StretchesOf(path_.segments);
    path_.forks.clear();
    for (const int segment : path_.segments) {
        const std::vector<int>& children = children_[static_cast<size_t>(segment)];
        const bool forks = std::any_of(children.begin(), children.end(),
                                       [this](int child) { return !path_.Contains(child); });
        if (forks) path_.forks.push_back(segment);
    }
}

/// The path's rows and notes. Those of one branch lie side by side, and are read at once.
Status Sweeper::ReadPath(ChunkIndex chunk) {
    on_path_.clear();
    beside_.clear();
    const auto found_at = [this](BranchId branch, Generation generation) -> Found* {
        const int segment = region_->SegmentAt(branch, generation);
        return segment >= 0 && path_.Contains(segment) ? &on_path_[segment] : nullptr;
    };
    for (const Stretch& stretch : path_.stretches) {
        if (!filter_.MayHave(view_, stretch.branch, chunk)) continue;
        Result<std::vector<MapRow>> rows = ReadVersions(view_, stretch, chunk);
        if (!rows.ok()) return rows.error();
        for (MapRow& row : rows.value()) {
            Found* found = found_at(row.at.branch, row.at.generation);
            if (found) found->rows.push_back(std::move(row));
        }
        const auto take = [&](Generation generation, std::string_view key, Runs note) {
            Found* found = found_at(stretch.branch, generation);
            if (!found) return;
            found->notes.push_back(std::move(note));
            found->marks.emplace_back(key);
        };
        if (Status s = ReadNotes(stretch, chunk, take); !s.ok()) return s;
    }
    return Status();
}

/// What a segment has, on the path or beside it; of the latter, rows only. Null: nothing.
Result<Sweeper::Found*> Sweeper::Read(int segment, ChunkIndex chunk) {
    if (path_.Contains(segment)) {
        const auto found = on_path_.find(segment);
        return found == on_path_.end() ? nullptr : &found->second;
    }
    if (!filter_.MayHave(view_, At(segment).branch, chunk)) return nullptr;
    const auto [found, fresh] = beside_.try_emplace(segment);
    if (fresh) {
        Result<std::vector<MapRow>> rows = ReadVersions(view_, At(segment), chunk);
        if (!rows.ok()) return rows.error();
        found->second.rows = std::move(rows.value());
    }
    return &found->second;
}

/// Which of the segment's children is asked first.
size_t Sweeper::FirstToAsk(int segment, ChunkIndex chunk) const {
    const std::vector<int>& children = children_[static_cast<size_t>(segment)];
    if (children.size() < 2) return 0;
    const BranchId hint = hints_.Find(At(segment).branch, chunk);
    for (size_t i = 0; i < children.size(); ++i) {
        if (At(children[i]).branch == hint) return i;
    }
    return chunk.value % children.size();
}

/// Whether a view reads the state at the segment's upper end: its own, or one that is reached
/// through segments without rows.
Result<bool> Sweeper::Needed(int segment, ChunkIndex chunk) {
    if (At(segment).view) return true;
    if (Mutated(Mutant::kSweepForgetsInherited)) return false;
    std::vector<int> open;
    const auto ask_children = [&](int of) {
        const std::vector<int>& children = children_[static_cast<size_t>(of)];
        const size_t first = FirstToAsk(of, chunk);
        for (size_t i = children.size(); i-- > 0;) {  // the first one on top
            open.push_back(children[(first + i) % children.size()]);
        }
    };
    ask_children(segment);
    while (!open.empty()) {
        const int here = open.back();
        open.pop_back();
        const Result<Found*> found = Read(here, chunk);
        if (!found.ok()) return found.error();
        if (found.value() && !found.value()->rows.empty()) continue;
        if (At(here).view) {
            for (int child = here; child != segment; child = At(child).parent) {
                const BranchId below = At(At(child).parent).branch;
                hints_.Set(below, chunk, At(child).branch);
            }
            return true;
        }
        ask_children(here);
    }
    return false;
}

/// Takes out of `dead` what rows that stay name, and rows and notes beside the path.
Status Sweeper::KeepNamed(ChunkIndex chunk, const std::vector<Runs>& kept, DeadBlocks& dead) {
    if (Mutated(Mutant::kSweepFreesVisible)) return Status();
    for (const Runs& runs : kept) dead.Remove(runs);
    for (const int segment : path_.forks) {
        if (Status s = KeepNamedAbove(segment, chunk, dead); !s.ok()) return s;
    }
    return Status();
}

/// A block is named on the line from its birth upwards, and on what forks off from there: so what
/// leaves the path at the end of `segment` names nothing that was born later.
Status Sweeper::KeepNamedAbove(int segment, ChunkIndex chunk, DeadBlocks& dead) {
    const Generation end = At(segment).to;
    std::vector<int> open;
    const auto look_at_children = [&](int of) {
        const std::vector<int>& children = children_[static_cast<size_t>(of)];
        const size_t first = FirstToAsk(of, chunk);
        for (size_t i = children.size(); i-- > 0;) {
            const int child = children[(first + i) % children.size()];
            if (!path_.Contains(child)) open.push_back(child);
        }
    };
    if (!dead.BornBy(end)) return Status();
    look_at_children(segment);
    while (!open.empty()) {
        const int here = open.back();
        open.pop_back();
        if (Status s = RemoveNamed(here, chunk, dead); !s.ok()) return s;
        if (!dead.BornBy(end)) {
            hints_.Set(At(At(here).parent).branch, chunk, At(here).branch);
            return Status();
        }
        look_at_children(here);
    }
    return Status();
}

Status Sweeper::RemoveNamed(int segment, ChunkIndex chunk, DeadBlocks& dead) {
    const Result<Found*> found = Read(segment, chunk);
    if (!found.ok()) return found.error();
    if (!found.value()) return Status();
    const auto remove = [&dead](Generation, std::string_view, const Runs& note) {
        dead.Remove(note);
    };
    if (Status s = ReadNotes(At(segment), chunk, remove); !s.ok()) return s;
    for (const MapRow& row : found.value()->rows) dead.Remove(row.runs);
    return Status();
}

/// Calls take(generation, key, note) for those of heads that stood in that stretch.
template <typename F>
Status Sweeper::ReadNotes(const Stretch& stretch, ChunkIndex chunk, F&& take) {
    const std::string lower =
        NoteKey(stretch.branch, chunk, Generation{stretch.after.value + 1}, 0);
    const std::string upper =
        stretch.to == kHead ? PrefixEnd(lower.substr(0, 17))
                            : NoteKey(stretch.branch, chunk, Generation{stretch.to.value + 1}, 0);
    const auto notes = view_.Range(lower, upper);
    for (notes->Seek(lower); notes->valid(); notes->Next()) {
        const std::string_view key = notes->key();
        const Generation generation{KeyNumber(key, 2)};
        std::optional<NoteRecord> note = DecodeNote(notes->value());
        if (!note) {
            return MakeError(
                ErrorKind::kDamaged,
                fmt::format("the note on branch {}, chunk {}, generation {} is damaged",
                            stretch.branch.value, chunk.value, generation.value));
        }
        take(generation, key, std::move(*note));
    }
    return notes->status();
}

CandidateScan::CandidateScan(Line below, Line above, const Place& place)
    : below_(SideAt(std::move(below), place.below, place.gap_below)),
      above_(SideAt(std::move(above), place.above, place.gap_above)) {}

/// One way only leads from a view to a mark, so all before it has been walked. If the line goes
/// elsewhere now, the walk begins again.
CandidateScan::Side CandidateScan::SideAt(Line line, const std::string& place, bool gap) {
    Side side{std::move(line), 0, {}, gap};
    if (place.empty()) return side;
    const BranchId branch{KeyNumber(place, 0)};
    const Generation generation{KeyNumber(place, 1)};
    for (size_t i = 0; i < side.stretches.size(); ++i) {
        const Stretch& stretch = side.stretches[i];
        if (stretch.branch != branch) continue;
        if (stretch.after >= generation || generation > stretch.to) continue;
        side.index = i;
        side.resume = place;
    }
    return side;
}

std::string CandidateScan::PlaceOf(const Side& side) {
    if (!side.resume.empty() || side.index == 0) return side.resume;
    if (side.index >= side.stretches.size()) return {};
    const Stretch& stretch = side.stretches[side.index];
    return TouchedKey(stretch.branch, Generation{stretch.after.value + 1}, ChunkIndex{0});
}

Status CandidateScan::Next(MetadataView& view, RowFilter* filter, size_t most,
                           std::vector<ChunkIndex>& chunks) {
    const size_t half = std::max<size_t>(1, most / 2);
    in_above_ = false;
    if (Status s = Step(view, filter, below_, half, chunks); !s.ok()) return s;
    LookForEnd();
    if (done_ || above_.stretches.empty()) return Status();
    in_above_ = true;
    if (Status s = Step(view, filter, above_, half, chunks); !s.ok()) return s;
    LookForEnd();
    return Status();
}

/// A side that has a gap does not end the scan before the other one has ended too.
void CandidateScan::LookForEnd() {
    const bool below = below_.ended() && !below_.gap;
    const bool above = above_.ended() && !above_.gap && !above_.stretches.empty();
    complete_ = below || above;
    done_ = complete_ || (below_.ended() && above_.ended());
}

void CandidateScan::Skip() {
    Side& side = in_above_ ? above_ : below_;
    const auto empty = [&side] {
        return side.stretches[side.index].after >= side.stretches[side.index].to;
    };
    side.gap = true;
    side.resume.clear();
    do ++side.index;
    while (!side.ended() && empty());  // where no scan could go on from
    LookForEnd();
}

Status CandidateScan::Step(MetadataView& view, RowFilter* filter, Side& side, size_t most,
                           std::vector<ChunkIndex>& chunks) {
    while (side.index < side.stretches.size()) {
        const Stretch& stretch = side.stretches[side.index];
        const std::string first =
            TouchedKey(stretch.branch, Generation{stretch.after.value + 1}, ChunkIndex{0});
        const std::string upper =
            stretch.to == kHead
                ? PrefixEnd(first.substr(0, 9))
                : TouchedKey(stretch.branch, Generation{stretch.to.value + 1}, ChunkIndex{0});
        if (first < upper && (!filter || filter->MayHaveAny(view, stretch.branch))) {
            const auto cursor = view.Range(first, upper);
            cursor->Seek(side.resume.empty() ? first : side.resume);
            for (; cursor->valid() && most > 0; cursor->Next(), --most) {
                chunks.push_back(ChunkIndex{KeyNumber(cursor->key(), 2)});
            }
            if (Status s = cursor->status(); !s.ok()) return s;
            if (cursor->valid()) {
                side.resume = std::string(cursor->key());
                return Status();
            }
        }
        side.resume.clear();
        ++side.index;
    }
    return Status();
}

}  // namespace varve::cow
