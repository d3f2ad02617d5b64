// Head, second part: changes of the map in memory, and the cuts that end a generation.

#include <algorithm>

#include "cow/format/runs.h"
#include "cow/head/head.h"
#include "cow/mutants.h"

namespace varve::cow {

// ---- changes

void Head::Pin(std::vector<Chunk*>& list, Chunk& chunk) {
    ++chunk.pins;
    list.push_back(&chunk);
    lane_.AddUnfolded(1);
    if (++unfolded_ == 1) lane_.unfolded_heads.push_back(this);
    changed_ = true;
}

/// One was appended; `end` is the number after it.
void Head::CountEntry(uint64_t end) {
    if (first_entry_ == kNoEntry) {
        first_entry_ = end - 1;
        lane_.journaled_heads.push_back(this);
    }
    last_entry_ = end;
    ++entries_;
    unsynced_ = changed_ = true;
}

/// Says what the map will be. REQUIRES: `generation` is the present one or the one that is being
/// sealed; `sums` are of all blocks of fresh stretches.
void Head::Announce(ChunkIndex chunk, Generation generation, const Stretches& stretches,
                    const Sums& sums, Announcement* announcement) {
    if (sums.empty()) return;
    lane_.journal.Begin(announcement->entries, announced_);
    std::span<const uint32_t> left(sums);
    for (const Stretch& stretch : stretches) {
        if (!stretch.fresh) continue;
        const MapChange change = MapChangeOf(chunk, stretch.first, stretch.count, stretch.place);
        CountEntry(
            lane_.journal.Append({disk_, branch_, generation}, change, left.first(stretch.count)));
        left = left.subspan(stretch.count);
    }
    announcement->end = lane_.journal.appended();
}

/// It will not be: its data could not be written. Until the journal says so, nobody may take the
/// entries for completed.
Task<void> Head::Recall(Generation generation, Announcement* announcement) {
    const uint64_t first = announcement->entries.first;
    announcement->end =
        lane_.journal.AppendVoid({disk_, branch_, generation}, first, announcement->end - first);
    CountEntry(announcement->end);
    co_await lane_.journal.Written(announcement->end);
}

void Head::Prepare(Chunk& chunk) {
    if (!chunk.pending) {
        chunk.pending = std::make_unique<Chunk::Pending>();
        chunk.pending->base = chunk.runs;
    } else if (chunk.pending->generation != generation_) {
        chunk.pending->sealed = chunk.runs;
    } else {
        return;
    }
    chunk.pending->generation = generation_;
    Pin(dirty_, chunk);
}

/// Makes room for a change of the sealed generation. Gives its state if that is not `runs`.
Runs* Head::PrepareSealed(Chunk& chunk, Generation generation) {
    if (!chunk.pending) {
        chunk.pending = std::make_unique<Chunk::Pending>();
        chunk.pending->base = chunk.runs;
        chunk.pending->generation = generation;
        Pin(sealed_, chunk);
    }
    Chunk::Pending& pending = *chunk.pending;
    if (pending.generation == generation) return nullptr;
    if (!pending.sealed) {
        pending.sealed = pending.base;
        Pin(sealed_, chunk);
    }
    return &*pending.sealed;
}

/// `entries_end`: the number after those that announced it.
void Head::MapStretches(Chunk& chunk, Generation generation, const Stretches& stretches,
                        uint64_t entries_end) {
    Runs* sealed = nullptr;
    bool prepared = false;
    for (const Stretch& stretch : stretches) {
        if (!stretch.fresh) continue;
        if (!prepared) {
            if (generation == generation_) {
                Prepare(chunk);
            } else {
                sealed = PrepareSealed(chunk, generation);
            }
            prepared = true;
        }
        MapStretch(chunk, generation, stretch, sealed);
        MakeYoung(chunk, stretch.first, stretch.count, entries_end);
    }
    if (prepared) lane_.cache.Recharge(chunk);
}

/// `sealed`: the state of `generation`, if that is not the chunk's present one.
void Head::MapStretch(Chunk& chunk, Generation generation, const Stretch& stretch, Runs* sealed) {
    Run run;
    run.place = stretch.place;
    run.first = stretch.first;
    run.count = stretch.count;
    run.birth = generation;
    Runs replaced;
    if (sealed && !Mutated(Mutant::kLateWriteMissesSeal)) {
        Map(*sealed, run, &replaced);
        Map(chunk.runs, run, nullptr);
    } else {
        Map(chunk.runs, run, &replaced);
    }
    if (!replaced.empty()) {
        ReleaseTentative(replaced, sealed ? chunk.pending->base : StateBefore(chunk));
    }
}

void Head::MakeYoung(Chunk& chunk, uint32_t first, uint32_t count, uint64_t entries_end) {
    if (chunk.young == 0) {
        ++chunk.pins;
        aging_.push_back(&chunk);
    }
    chunk.young |= MaskOf(first, first + count);
    chunk.young_until = std::max(chunk.young_until, entries_end);
}

/// Of chunks that became young first, those whose changes are settled are so no more.
void Head::Age() {
    for (size_t most = aging_.size(); most > 0; --most) {
        Chunk& chunk = *aging_.front();
        aging_.pop_front();
        if (chunk.young_until > lane_.journal.settled()) {
            aging_.push_back(&chunk);
            continue;
        }
        chunk.young = 0;
        --chunk.pins;
    }
}

void Head::GiveUp(const Stretches& stretches) {
    for (const Stretch& stretch : stretches) {
        if (!stretch.fresh) continue;
        Release({stretch.place, stretch.count});
        changed_ = true;
    }
}

void Head::UnmapNow(Chunk& chunk, uint32_t first, uint32_t end) {
    Prepare(chunk);
    Runs removed;
    Unmap(chunk.runs, first, end, &removed);
    if (!removed.empty() && !Mutated(Mutant::kTrimNotDurable)) {
        const MapChange change = MapChangeOf(chunk.index, first, end - first, 0);
        CountEntry(lane_.journal.Append({disk_, branch_, generation_}, change, {}));
    }
    ReleaseTentative(removed, StateBefore(chunk));
    lane_.cache.Recharge(chunk);
}

/// What a row says of the chunk, or will, before anything of its newest generation.
const Runs& Head::StateBefore(const Chunk& chunk) {
    const Chunk::Pending& pending = *chunk.pending;
    return pending.sealed ? *pending.sealed : pending.base;
}

/// Blocks that were mapped and unmapped again before any row named them: no fold will notice.
/// `kept`: what a row names.
void Head::ReleaseTentative(const Runs& removed, const Runs& kept) {
    const bool ours = std::any_of(removed.begin(), removed.end(), [this](const Run& run) {
        return run.birth == generation_ || run.birth == sealed_generation_;
    });
    if (!ours) return;  // rows name all of them
    for (const Run& run : Subtract(removed, kept)) {
        VARVE_CHECK(run.birth == generation_ || run.birth == sealed_generation_);
        Release({run.place, run.count});
    }
}

/// They are free once what the journal says now is synced.
void Head::Release(Extent extent) {
    released_.push_back({lane_.journal.appended(), extent});
    released_blocks_ += extent.count;
}

// ---- cuts

void Head::Freeze(Generation next, bool hold) {
    VARVE_CHECK(!cut_ && !sealed_open_ && sealed_.empty());
    VARVE_CHECK(next > generation_ && writers_[era_ ^ 1] == 0);
    cut_ = true;
    hold_ = hold;
    sealed_generation_ = generation_;
    generation_ = next;
    era_ ^= 1;
    sealed_.swap(dirty_);
    sealed_.insert(sealed_.end(), folding_.begin(), folding_.end());
    folding_.clear();
    sealed_end_ = lane_.journal.appended();
}

void Head::Unhold() {
    hold_ = false;
    unheld_.WakeAll();
}

Task<Errno> Head::Seal(HeadCommit* commit) {
    while (round_active_) co_await round_done_.Wait();
    const bool drain = !Mutated(Mutant::kFreezeWithoutDraining);
    while (writers_[era_ ^ 1] != 0 && drain) co_await writers_gone_.Wait();
    commit->branch = branch_;
    commit->generation = sealed_generation_;
    if (Mutated(Mutant::kSealNotSynced)) co_return 0;
    co_await lane_.journal.Written(last_entry_);
    co_return co_await SyncData();
}

void Head::FinishCut(SnapshotId snapshot) {
    cut_ = false;
    if (!core_.failed) {
        sealed_open_ = true;
        sealed_snapshot_ = snapshot;
        SortForFold(sealed_);
        RequestRound();
    }
    round_done_.WakeAll();
}

bool Head::IsFolded(Generation generation) const {
    return generation < sealed_generation_ || !(sealed_open_ || cut_);
}

Task<void> Head::SealedFolded() {
    while ((sealed_open_ || cut_) && !core_.failed) co_await round_done_.Wait();
}

}  // namespace varve::cow
