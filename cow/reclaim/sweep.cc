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
namespace {

/// Whether some of it was born at `end` or before.
bool BornBy(Generation end, const std::vector<Runs>& list) {
    const auto early = [end](const Run& run) { return run.birth <= end; };
    return std::any_of(list.begin(), list.end(), [&](const Runs& runs) {
        return std::any_of(runs.begin(), runs.end(), early);
    });
}

}  // namespace

BranchId SweepHints::Find(BranchId below, ChunkIndex chunk) const {
    const auto found = hints_.find({below, chunk});
    return found == hints_.end() ? BranchId{0} : found->second;
}

void SweepHints::Set(BranchId below, ChunkIndex chunk, BranchId witness) {
    if (hints_.size() >= kMost) hints_.clear();
    hints_[{below, chunk}] = witness;
}

Sweeper::Sweeper(MetadataView& view, Region region, SweepHints& hints)
    : view_(view), region_(std::move(region)), hints_(hints), children_(region_.segments.size()) {
    for (size_t i = 0; i < region_.segments.size(); ++i) {
        const int parent = region_.segments[i].parent;
        if (parent >= 0) children_[static_cast<size_t>(parent)].push_back(static_cast<int>(i));
    }
}

Status Sweeper::Sweep(ChunkIndex chunk, const std::vector<int>& from, SweepPlan& plan) {
    rows_.clear();
    FindPath(from);
    if (Status s = ReadPath(chunk); !s.ok()) return s;
    SweepPlan mine;
    std::vector<Runs> kept, dead;
    for (const int segment : path_) {
        const std::vector<MapRow>& rows = rows_[segment].rows;
        for (size_t r = 0; r < rows.size(); ++r) {
            if (r == 0) {
                const Result<bool> needed = Needed(segment, chunk);
                if (!needed.ok()) return needed.error();
                if (needed.value()) {
                    kept.push_back(rows[r].runs);
                    continue;
                }
            }
            const RowAt& at = rows[r].at;
            mine.deletes.push_back(MapKey(at.branch, chunk, at.generation));
            mine.deletes.push_back(TouchedKey(at.branch, at.generation, chunk));
            dead.push_back(rows[r].runs);
        }
        if (Status s = CollectNotes(segment, chunk, &mine, dead); !s.ok()) return s;
    }
    Generation floor = region_.floor;
    if (Mutated(Mutant::kSweepIgnoresFloor)) floor = Generation{0};
    for (size_t i = 0; i < dead.size(); ++i) {
        std::erase_if(dead[i], [floor](const Run& run) { return run.birth <= floor; });
        for (const Runs& runs : kept) {
            if (dead[i].empty() || Mutated(Mutant::kSweepFreesVisible)) break;
            dead[i] = Subtract(dead[i], runs);
        }
        for (size_t j = 0; j < i && !dead[i].empty(); ++j) dead[i] = Subtract(dead[i], dead[j]);
    }
    if (Status s = KeepNamedElsewhere(chunk, dead); !s.ok()) return s;
    for (const Runs& runs : dead) {
        for (const Run& run : runs) {
            plan.freed.push_back({run.place, run.count});
            plan.freed_blocks += run.count;
        }
    }
    plan.deletes.insert(plan.deletes.end(), std::move_iterator(mine.deletes.begin()),
                        std::move_iterator(mine.deletes.end()));
    return Status();
}

void Sweeper::FindPath(const std::vector<int>& from) {
    path_.clear();
    for (int segment : from) {
        for (; segment >= 0; segment = At(segment).parent) path_.push_back(segment);
    }
    std::sort(path_.begin(), path_.end(), std::greater<>());
    path_.erase(std::unique(path_.begin(), path_.end()), path_.end());
}

/// The rows of the path's segments. Those of one branch lie side by side, and are read at once.
Status Sweeper::ReadPath(ChunkIndex chunk) {
    std::map<BranchId, Stretch> stretches;
    for (const int segment : path_) {
        const Stretch& part = At(segment);
        Stretch& whole = stretches.try_emplace(part.branch, part).first->second;
        whole.after = std::min(whole.after, part.after);
        whole.to = std::max(whole.to, part.to);
        rows_[segment].read = true;
    }
    for (const auto& [branch, stretch] : stretches) {
        Result<std::vector<MapRow>> rows = ReadVersions(view_, stretch, chunk);
        if (!rows.ok()) return rows.error();
        for (MapRow& row : rows.value()) {
            const auto holds = [&row](const Segment& s) {
                return s.branch == row.at.branch && s.after < row.at.generation &&
                       row.at.generation <= s.to;
            };
            const auto segment = std::find_if(path_.begin(), path_.end(),
                                              [&](int index) { return holds(At(index)); });
            if (segment != path_.end()) rows_[*segment].rows.push_back(std::move(row));
        }
    }
    return Status();
}

Status Sweeper::Read(int segment, ChunkIndex chunk) {
    Rows& found = rows_[segment];
    if (found.read) return Status();
    Result<std::vector<MapRow>> rows = ReadVersions(view_, At(segment), chunk);
    if (!rows.ok()) return rows.error();
    found.rows = std::move(rows.value());
    found.read = true;
    return Status();
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
        if (Status s = Read(here, chunk); !s.ok()) return s.error();
        if (!rows_[here].rows.empty()) continue;
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

/// Takes out of `dead` what rows and notes beside the path name.
Status Sweeper::KeepNamedElsewhere(ChunkIndex chunk, std::vector<Runs>& dead) {
    if (Mutated(Mutant::kSweepFreesVisible)) return Status();
    for (const int segment : path_) {
        if (Status s = KeepNamedAbove(segment, chunk, dead); !s.ok()) return s;
    }
    return Status();
}

/// A block is named on the line from its birth upwards, and on what forks off from there: so what
/// leaves the path at the end of `segment` names nothing that was born later.
Status Sweeper::KeepNamedAbove(int segment, ChunkIndex chunk, std::vector<Runs>& dead) {
    const Generation end = At(segment).to;
    const auto on_path = [this](int other) {
        return std::binary_search(path_.begin(), path_.end(), other, std::greater<>());
    };
    std::vector<int> open;
    const auto look_at_children = [&](int of) {
        const std::vector<int>& children = children_[static_cast<size_t>(of)];
        const size_t first = FirstToAsk(of, chunk);
        for (size_t i = children.size(); i-- > 0;) {
            const int child = children[(first + i) % children.size()];
            if (!on_path(child)) open.push_back(child);
        }
    };
    if (!BornBy(end, dead)) return Status();
    look_at_children(segment);
    while (!open.empty()) {
        const int here = open.back();
        open.pop_back();
        if (Status s = SubtractNamed(here, chunk, dead); !s.ok()) return s;
        if (!BornBy(end, dead)) {
            hints_.Set(At(At(here).parent).branch, chunk, At(here).branch);
            return Status();
        }
        look_at_children(here);
    }
    return Status();
}

Status Sweeper::SubtractNamed(int segment, ChunkIndex chunk, std::vector<Runs>& dead) {
    if (Status s = Read(segment, chunk); !s.ok()) return s;
    std::vector<Runs> named;
    if (Status s = CollectNotes(segment, chunk, nullptr, named); !s.ok()) return s;
    for (const MapRow& row : rows_[segment].rows) named.push_back(row.runs);
    for (Runs& runs : dead) {
        for (const Runs& other : named) runs = Subtract(runs, other);
    }
    return Status();
}

/// Of heads that stood in this segment. With a `plan` they go with it.
Status Sweeper::CollectNotes(int segment, ChunkIndex chunk, SweepPlan* plan,
                             std::vector<Runs>& named) {
    const Stretch& stretch = At(segment);
    const std::string lower =
        NoteKey(stretch.branch, chunk, Generation{stretch.after.value + 1}, 0);
    const std::string upper =
        stretch.to == kHead ? PrefixEnd(lower.substr(0, 17))
                            : NoteKey(stretch.branch, chunk, Generation{stretch.to.value + 1}, 0);
    const auto notes = view_.Range(lower, upper);
    for (notes->Seek(lower); notes->valid(); notes->Next()) {
        const std::string_view key = notes->key();
        std::optional<NoteRecord> note = DecodeNote(notes->value());
        if (!note) {
            return MakeError(
                ErrorKind::kDamaged,
                fmt::format("the note on branch {}, chunk {}, generation {} is damaged",
                            stretch.branch.value, chunk.value, KeyNumber(key, 2)));
        }
        named.push_back(std::move(*note));
        if (plan) plan->deletes.emplace_back(key);
    }
    return notes->status();
}

CandidateScan::CandidateScan(Line below, Line above) {
    below_.stretches = std::move(below);
    above_.stretches = std::move(above);
}

Status CandidateScan::Next(MetadataView& view, size_t most, std::vector<ChunkIndex>& chunks) {
    const size_t half = std::max<size_t>(1, most / 2);
    if (Status s = Step(view, below_, half, chunks); !s.ok()) return s;
    done_ = below_.index == below_.stretches.size();
    if (done_ || above_.stretches.empty()) return Status();
    if (Status s = Step(view, above_, half, chunks); !s.ok()) return s;
    done_ = above_.index == above_.stretches.size();
    return Status();
}

Status CandidateScan::Step(MetadataView& view, Side& side, size_t most,
                           std::vector<ChunkIndex>& chunks) {
    while (side.index < side.stretches.size()) {
        const Stretch& stretch = side.stretches[side.index];
        const std::string first =
            TouchedKey(stretch.branch, Generation{stretch.after.value + 1}, ChunkIndex{0});
        const std::string upper =
            stretch.to == kHead
                ? PrefixEnd(first.substr(0, 9))
                : TouchedKey(stretch.branch, Generation{stretch.to.value + 1}, ChunkIndex{0});
        if (first < upper) {
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
