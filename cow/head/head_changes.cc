// Head, second part: changes of the map in memory, and the cuts that end a generation.

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

/// REQUIRES: `generation` is the present one or the one that is being sealed.
void Head::Journal(Generation generation, const MapChange& change) {
    PendingJournal& journal = generation == generation_ ? journal_ : sealed_journal_;
    journal.changes.push_back(change);
    CountJournaled(1);
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

void Head::MapStretches(Chunk& chunk, Generation generation, const Stretches& stretches) {
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
        Run run;
        run.place = stretch.place;
        run.first = stretch.first;
        run.count = stretch.count;
        run.birth = generation;
        if (sealed && !Mutated(Mutant::kLateWriteMissesSeal)) Map(*sealed, run, nullptr);
        Map(chunk.runs, run, nullptr);
        MapChange change{.chunk = chunk.index};
        change.place = stretch.place;
        change.first = stretch.first;
        change.count = stretch.count;
        Journal(generation, change);
    }
    if (prepared) lane_.cache.Recharge(chunk);
}

void Head::GiveUp(const Stretches& stretches) {
    for (const Stretch& stretch : stretches) {
        if (!stretch.fresh) continue;
        journal_.released.push_back({stretch.place, stretch.count});
        changed_ = true;
    }
}

void Head::UnmapNow(Chunk& chunk, uint32_t first, uint32_t end) {
    Prepare(chunk);
    Runs removed;
    Unmap(chunk.runs, first, end, &removed);
    ReleaseTentative(chunk, removed);
    if (!removed.empty() && !Mutated(Mutant::kTrimNotDurable)) {
        MapChange change{.chunk = chunk.index};
        change.place = 0;
        change.first = first;
        change.count = end - first;
        Journal(generation_, change);
    }
    lane_.cache.Recharge(chunk);
}

/// Blocks that were mapped and unmapped again before any row named them: no fold will notice.
void Head::ReleaseTentative(const Chunk& chunk, const Runs& removed) {
    const Chunk::Pending& pending = *chunk.pending;
    for (const Run& run : Subtract(removed, pending.sealed ? *pending.sealed : pending.base)) {
        VARVE_CHECK(run.birth == generation_);
        journal_.released.push_back({run.place, run.count});
    }
}

// ---- cuts

void Head::Freeze(Generation next, bool hold) {
    VARVE_CHECK(!cut_ && !sealed_open_ && sealed_.empty() && sealed_journal_.empty());
    VARVE_CHECK(next > generation_ && writers_[era_ ^ 1] == 0);
    cut_ = true;
    hold_ = hold;
    sealed_generation_ = generation_;
    generation_ = next;
    era_ ^= 1;
    sealed_.swap(dirty_);
    sealed_.insert(sealed_.end(), folding_.begin(), folding_.end());
    folding_.clear();
    std::swap(sealed_journal_, journal_);
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
    PutJournal(std::exchange(sealed_journal_, {}), sealed_generation_, *commit);
    if (Mutated(Mutant::kSealNotJournaled)) commit->journal.clear();
    co_return co_await SyncData();
}

void Head::FinishCut(SnapshotId snapshot) {
    cut_ = false;
    if (!core_.failed) {
        sealed_open_ = true;
        sealed_rows_ = next_row_;
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
