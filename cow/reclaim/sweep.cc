#include "cow/reclaim/sweep.h"

#include <fmt/format.h>

#include <algorithm>

#include "cow/format/format.h"
#include "cow/format/runs.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

struct SegmentRows {
    std::vector<MapRow> rows;  // newest first
    bool needed = false;       // somebody reads the state at the segment's upper end
};

/// Blocks of `candidate` that were born above `floor` and are in none of `kept`.
Runs StillDead(Runs candidate, const std::vector<Runs>& kept, Generation floor) {
    if (Mutated(Mutant::kSweepIgnoresFloor)) floor = Generation{0};
    std::erase_if(candidate, [floor](const Run& run) { return run.birth <= floor; });
    for (const Runs& runs : kept) {
        if (candidate.empty() || Mutated(Mutant::kSweepFreesVisible)) break;
        candidate = Subtract(candidate, runs);
    }
    return candidate;
}

}  // namespace

Sweeper::Sweeper(MetadataView& view, Region region)
    : view_(view), region_(std::move(region)), map_(MapCursor(view)) {
    notes_ = view_.Range("W", PrefixEnd("W"));
}

Status Sweeper::Sweep(ChunkIndex chunk, SweepPlan& plan) {
    const std::vector<Segment>& segments = region_.segments;
    std::vector<SegmentRows> state(segments.size());
    for (size_t i = 0; i < segments.size(); ++i) {
        Result<std::vector<MapRow>> rows = ReadVersions(*map_, segments[i], chunk);
        if (!rows.ok()) return rows.error();
        state[i].rows = std::move(rows.value());
        state[i].needed = segments[i].view;
    }
    // From the tops down: a segment without rows passes the need on to the one below.
    for (size_t i = segments.size(); i-- > 0;) {
        const bool passes = state[i].needed && state[i].rows.empty() && segments[i].parent >= 0;
        if (!passes || Mutated(Mutant::kSweepForgetsInherited)) continue;
        state[static_cast<size_t>(segments[i].parent)].needed = true;
    }
    std::vector<Runs> kept, dead;
    for (SegmentRows& segment : state) {
        for (size_t r = 0; r < segment.rows.size(); ++r) {
            const MapRow& row = segment.rows[r];
            if (segment.needed && r == 0) {
                kept.push_back(row.runs);
                continue;
            }
            plan.deletes.push_back(MapKey(row.at.branch, chunk, row.at.generation));
            plan.deletes.push_back(TouchedKey(row.at.branch, row.at.generation, chunk));
            dead.push_back(row.runs);
        }
    }
    if (Status s = CollectNotes(chunk, plan, dead); !s.ok()) return s;
    for (Runs& candidate : dead) {
        Runs runs = StillDead(std::move(candidate), kept, region_.floor);
        for (const Run& run : runs) {
            plan.freed.push_back({run.place, run.count});
            plan.freed_blocks += run.count;
        }
        if (!runs.empty()) kept.push_back(std::move(runs));  // not twice
    }
    return Status();
}

Status Sweeper::CollectNotes(ChunkIndex chunk, SweepPlan& plan, std::vector<Runs>& dead) {
    // Only notes of heads that stood in this region: another region's views decide the others.
    for (const Segment& segment : region_.segments) {
        const std::string lower =
            NoteKey(segment.branch, chunk, Generation{segment.after.value + 1}, 0);
        const std::string prefix = lower.substr(0, 17);
        for (notes_->Seek(lower); notes_->valid(); notes_->Next()) {
            const std::string_view key = notes_->key();
            if (!key.starts_with(prefix) || Generation{KeyNumber(key, 2)} > segment.to) break;
            std::optional<NoteRecord> note = DecodeNote(notes_->value());
            if (!note) {
                return MakeError(ErrorKind::kDamaged,
                                 fmt::format("a note on chunk {} is damaged", chunk.value));
            }
            dead.push_back(std::move(*note));
            plan.deletes.emplace_back(key);
        }
        if (Status s = notes_->status(); !s.ok()) return s;
    }
    return Status();
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
