// The second half of Head: changes of the map, and how they become durable.

#include <algorithm>

#include "cow/head.h"
#include "cow/mutants.h"
#include "cow/runs.h"

namespace varve::cow {
namespace {

/// Chunks encoded without letting others run: about 0.2 ms.
constexpr size_t kEncodeTogether = 128;

}  // namespace

// ---- changes

void Head::Pin(std::vector<Chunk*>& list, Chunk& chunk) {
    ++chunk.pins;
    list.push_back(&chunk);
    changed_ = true;
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
    }
    if (prepared) lane_.cache.Recharge(chunk);
}

void Head::GiveUp(const Stretches& stretches) {
    for (const Stretch& stretch : stretches) {
        if (!stretch.fresh) continue;
        released_.push_back({stretch.place, stretch.count});
        changed_ = true;
    }
}

void Head::UnmapNow(Chunk& chunk, uint32_t first, uint32_t end) {
    Prepare(chunk);
    Runs removed;
    Unmap(chunk.runs, first, end, &removed);
    ReleaseTentative(chunk, removed);
    lane_.cache.Recharge(chunk);
}

/// Blocks that were mapped and unmapped again before any row named them: no commit will notice.
void Head::ReleaseTentative(const Chunk& chunk, const Runs& removed) {
    const Chunk::Pending& pending = *chunk.pending;
    for (const Run& run : Subtract(removed, pending.sealed ? *pending.sealed : pending.base)) {
        VARVE_CHECK(run.birth == generation_);
        released_.push_back({run.place, run.count});
    }
}

// ---- rounds

void Head::Encode(Chunk& chunk, HeadCommit& commit) const {
    if (!chunk.pending) return;
    Chunk::Pending& pending = *chunk.pending;
    if (pending.generation != commit.generation && !pending.sealed) return;
    const Runs& state = pending.sealed ? *pending.sealed : chunk.runs;
    HeadCommit::Row row;
    row.chunk = chunk.index;
    row.added = Subtract(state, pending.base);
    row.dropped = Subtract(pending.base, state);
    const bool lost = Mutated(Mutant::kTrimNotDurable) && row.added.empty();
    if ((!row.added.empty() || !row.dropped.empty()) && !lost) {
        row.value = EncodeRuns(state, commit.generation);
        row.previous = chunk.row;
        commit.rows.push_back(std::move(row));
        chunk.row = RowAt{commit.branch, commit.generation};
    }
    if (pending.sealed) {
        pending.base = std::move(*pending.sealed);
        pending.sealed.reset();
    } else {
        chunk.pending.reset();
    }
}

Task<void> Head::EncodeAll(HeadCommit& commit) {
    // Rows in the order of their keys: the store takes them twice as fast.
    std::sort(commit.chunks.begin(), commit.chunks.end(),
              [](const Chunk* a, const Chunk* b) { return a->index < b->index; });
    for (size_t i = 0; i < commit.chunks.size(); ++i) {
        if (i % kEncodeTogether == kEncodeTogether - 1) co_await Hop(lane_.executor);
        Encode(*commit.chunks[i], commit);
    }
}

Task<Errno> Head::SyncData() {
    if (!unsynced_) co_return 0;
    unsynced_ = false;  // what completes from now on is for the next sync
    if (Mutated(Mutant::kNeverSynced)) co_return 0;
    const Errno error = co_await Transfer(lane_.blocks, BlockIo::Kind::kSync, 0, nullptr, 0);
    if (Mutated(Mutant::kWritesDuringSyncForgotten)) unsynced_ = false;
    if (Mutated(Mutant::kFailedSyncIgnored)) co_return 0;
    if (error != 0) core_.Fail(SystemError(error, "syncing the data file failed").message);
    co_return error;
}

void Head::Unpin(HeadCommit& commit) {
    if (core_.failed) {
        // The store may lack what these chunks hold, so they must not be read from there again.
        stranded_.insert(stranded_.end(), commit.chunks.begin(), commit.chunks.end());
        commit.chunks.clear();
        return;
    }
    ++settled_;
    for (Chunk* chunk : commit.chunks) --chunk->pins;
    commit.chunks.clear();
    lane_.cache.Shrink();
}

/// What the next round is for: all changes if a flush waits for it, else some of the oldest, so
/// that a flush or a snapshot that comes during the round need not wait long for its end.
std::vector<Chunk*> Head::TakeDirty() {
    const size_t most = 2 * dirty_soft_;
    if (flushes_ >= rounds_started_ || dirty_.size() <= most) return std::exchange(dirty_, {});
    const auto end = dirty_.begin() + static_cast<std::ptrdiff_t>(most);
    std::vector<Chunk*> oldest(dirty_.begin(), end);
    dirty_.erase(dirty_.begin(), end);
    return oldest;
}

Task<void> Head::Round() {
    HeadCommit commit;
    commit.branch = branch_;
    commit.generation = generation_;
    commit.chunks = TakeDirty();
    commit.released = std::exchange(released_, {});
    changed_ = !dirty_.empty();
    co_await EncodeAll(commit);
    if (Mutated(Mutant::kReusedBeforeCommit)) ReuseDropped(commit, &lease_, &lease_blocks_);
    // Data before metadata: what the rows name must be durable before the rows can be.
    Errno error = 0;
    if (!Mutated(Mutant::kRowsBeforeData)) error = co_await SyncData();
    if (error == 0 && !commit.empty()) {
        const varve::Status s = co_await host_.CommitHead(disk_, commit, lane_.executor);
        VARVE_CHECK(s.ok() || core_.failed);
    }
    if (Mutated(Mutant::kRowsBeforeData)) error = co_await SyncData();
    Unpin(commit);
}

Task<void> Head::Rounds() {
    while (rounds_wanted_ > rounds_started_) {
        while (cut_ && !Mutated(Mutant::kRoundDuringCut)) co_await round_done_.Wait();
        ++rounds_started_;
        round_active_ = true;
        if (!core_.failed) co_await Round();
        round_active_ = false;
        rounds_done_ = rounds_started_;
        round_done_.WakeAll();
    }
    rounds_running_ = false;
    round_done_.WakeAll();
}

void Head::RequestRound() {
    rounds_wanted_ = std::max(rounds_wanted_, rounds_started_ + 1);
    if (rounds_running_) return;
    rounds_running_ = true;
    Spawn(Rounds());
}

Task<Errno> Head::Flush() {
    if (core_.failed) co_return EIO;
    if (!dirty() && !round_active_ && !cut_) co_return 0;
    const bool join = Mutated(Mutant::kFlushJoinsRunningRound) && round_active_;
    // A round that runs already may have missed some.
    const uint64_t mine = rounds_started_ + (join ? 0 : 1);
    RequestRound();
    flushes_ = mine;
    if (Mutated(Mutant::kFlushAnsweredBeforeRound)) co_return 0;
    while (rounds_done_ < mine && !core_.failed) co_await round_done_.Wait();
    co_return core_.failed ? EIO : 0;
}

Task<void> Head::Quiesce() {
    while (rounds_running_ || refilling_) {
        if (rounds_running_) co_await round_done_.Wait();
        if (refilling_) co_await refilled_.Wait();
    }
}

// ---- cuts

void Head::Freeze(Generation next, bool hold) {
    VARVE_CHECK(!cut_ && sealed_.empty() && next > generation_ && writers_[era_ ^ 1] == 0);
    cut_ = true;
    hold_ = hold;
    sealed_generation_ = generation_;
    generation_ = next;
    era_ ^= 1;
    sealed_.swap(dirty_);
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
    commit->chunks = std::exchange(sealed_, {});
    co_await EncodeAll(*commit);
    co_return co_await SyncData();
}

void Head::FinishCut(HeadCommit& commit) {
    Unpin(commit);
    cut_ = false;
    round_done_.WakeAll();
}

}  // namespace varve::cow
