// Head, third part: rounds, which make changes durable, and passes, which fold them into map rows.
// docs/design/journal.md has the rules.

#include <algorithm>

#include "cow/format/format.h"
#include "cow/format/runs.h"
#include "cow/head/head.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Journal rows that one commit deletes: a fraction of a millisecond of the home thread.
constexpr size_t kObsoleteTogether = 256;

}  // namespace

// ---- one round

void Head::Encode(Chunk& chunk, HeadCommit& commit) const {
    if (!chunk.pending) return;
    Chunk::Pending& pending = *chunk.pending;
    if (pending.generation != commit.generation && !pending.sealed) return;
    const Runs& state = pending.sealed ? *pending.sealed : chunk.runs;
    HeadCommit::Row row;
    row.chunk = chunk.index;
    row.added = Subtract(state, pending.base);
    row.dropped = Subtract(pending.base, state);
    if (!row.added.empty() || !row.dropped.empty()) {
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

void Head::CountJournaled(int64_t weight) {
    journaled_ += static_cast<uint64_t>(weight);
    lane_.journaled += static_cast<uint64_t>(weight);
}

/// Takes the present generation's journal, and drops rows that this commit makes useless, from the
/// front, at most kObsoleteTogether: those before `folded_below`, or any if nothing is left to fold
/// afterwards. Returns their weight, which counts until they are gone. REQUIRES: no suspension
/// since the last chunk of `commit` was encoded.
uint64_t Head::TakeJournal(uint64_t folded_below, HeadCommit& commit) {
    PendingJournal journal = std::exchange(journal_, {});
    const bool nothing_left = NothingToFold();
    // A row that stays would take back what a newer one says of the same block, if that is missing.
    const bool all = nothing_left && rows_.size() <= kObsoleteTogether;
    uint64_t weight = 0;
    for (size_t most = kObsoleteTogether; most > 0 && !rows_.empty(); --most) {
        const JournalRow& row = rows_.front();
        if (!nothing_left && row.number >= folded_below) break;
        if (!Mutated(Mutant::kJournalKept)) {
            commit.obsolete.push_back(JournalKey(branch_, row.generation, row.number));
        }
        weight += row.weight;
        rows_.pop_front();
    }
    if (all) {
        CountJournaled(-static_cast<int64_t>(journal.changes.size()));
        journal.changes.clear();
    }
    PutJournal(std::move(journal), generation_, commit);
    return weight;
}

void Head::PutJournal(PendingJournal journal, Generation generation, HeadCommit& commit) {
    commit.released = std::move(journal.released);
    if (journal.changes.empty()) return;
    commit.journal_key = JournalKey(branch_, generation, next_row_);
    commit.journal = EncodeChanges(journal.changes);
    rows_.push_back({generation, next_row_++, journal.changes.size() + kJournalRowWeight});
    CountJournaled(kJournalRowWeight);
}

Task<Errno> Head::SyncData() {
    if (!unsynced_) co_return 0;
    unsynced_ = false;  // what completes from now on is for the next sync
    if (Mutated(Mutant::kNeverSynced)) co_return 0;
    const Waits::Scope waiting(core_.waits, "data sync");
    const Errno error = co_await Transfer(lane_.blocks, BlockIo::Kind::kSync, 0, nullptr, 0);
    if (Mutated(Mutant::kWritesDuringSyncForgotten)) unsynced_ = false;
    if (Mutated(Mutant::kFailedSyncIgnored)) co_return 0;
    if (error != 0) core_.Fail(SystemError(error, "syncing the data file failed").message);
    // Another lane's sync may have failed meanwhile: a device may tell only one of them.
    co_return error == 0 && core_.failed ? EIO : error;
}

void Head::Unpin(std::vector<Chunk*>& chunks) {
    if (core_.failed) {
        // The store may lack what these chunks hold, so they must not be read from there again.
        stranded_.insert(stranded_.end(), chunks.begin(), chunks.end());
        return;
    }
    ++settled_;
    for (Chunk* chunk : chunks) --chunk->pins;
    unfolded_ -= chunks.size();
    lane_.RemoveUnfolded(chunks.size());
    if (unfolded_ == 0) std::erase(lane_.unfolded_heads, this);
    lane_.cache.Shrink();
}

Task<void> Head::Round() {
    BeginPass();
    const bool sealed = sealed_open_;
    std::vector<Chunk*>& waiting = sealed ? sealed_ : folding_;
    HeadCommit commit;
    commit.branch = branch_;
    commit.generation = sealed ? sealed_generation_ : generation_;
    if (sealed) commit.snapshot = sealed_snapshot_;
    const auto rest = waiting.end() - static_cast<std::ptrdiff_t>(std::min<uint64_t>(
                                          waiting.size(), limits_.fold_together));
    std::vector<Chunk*> chunks(rest, waiting.end());
    waiting.erase(rest, waiting.end());
    const bool folded = waiting.empty() && (sealed || pass_);
    const bool early = Mutated(Mutant::kJournalForgottenEarly) && (sealed || pass_);
    const uint64_t folded_below = !folded && !early ? 0 : sealed ? sealed_rows_ : pass_rows_;
    // Rows in the order of their keys: the store takes them twice as fast.
    for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) Encode(**chunk, commit);
    const uint64_t obsolete = TakeJournal(folded_below, commit);
    const bool kept = !rows_.empty() && (NothingToFold() || rows_.front().number < folded_below);
    const bool last = folded && !kept;
    if (Mutated(Mutant::kReusedBeforeCommit)) ReuseDropped(commit, &lease_, &lease_blocks_);
    // Data before metadata: what the rows name must be durable before the rows can be.
    Errno error = 0;
    if (!Mutated(Mutant::kRowsBeforeData)) error = co_await SyncData();
    if (error == 0 && !commit.empty()) {
        if (!round_done_.empty()) lane_.executor.ExpectPost();
        const varve::Status s = co_await host_.CommitHead(disk_, commit, lane_.executor);
        VARVE_CHECK(s.ok() || core_.failed);
    }
    if (Mutated(Mutant::kRowsBeforeData)) error = co_await SyncData();
    CountJournaled(-static_cast<int64_t>(obsolete));
    Unpin(chunks);
    if (last && sealed) {
        sealed_open_ = false;
    } else if (last) {
        pass_ = false;
        passes_done_ = passes_started_;
    }
    changed_ = unfolded_ > 0 || !journal_.empty() || !rows_.empty();
}

// ---- passes

/// So that Round() takes chunks from the end in ascending order.
void Head::SortForFold(std::vector<Chunk*>& chunks) {
    std::sort(chunks.begin(), chunks.end(),
              [](const Chunk* a, const Chunk* b) { return a->index > b->index; });
}

void Head::BeginPass() {
    if (!pass_wanted_ || pass_ || sealed_open_) return;
    pass_wanted_ = false;
    pass_ = true;
    pass_rows_ = next_row_;
    ++passes_started_;
    folding_ = std::exchange(dirty_, {});
    SortForFold(folding_);
}

// ---- when

bool Head::RoundWanted() const {
    if (rounds_wanted_ > rounds_started_) return true;
    return !core_.failed && (sealed_open_ || pass_ || pass_wanted_);
}

Task<void> Head::Rounds() {
    while (RoundWanted()) {
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

void Head::RequestFold() {
    pass_wanted_ = true;
    RequestRound();
}

Task<Errno> Head::Flush() {
    if (core_.failed) co_return EIO;
    if (journal_.empty() && !unsynced_ && !round_active_ && !cut_) co_return 0;
    const bool join = Mutated(Mutant::kFlushJoinsRunningRound) && round_active_;
    // A round that runs already may have missed some.
    const uint64_t mine = rounds_started_ + (join ? 0 : 1);
    RequestRound();
    if (Mutated(Mutant::kFlushAnsweredBeforeRound)) co_return 0;
    while (rounds_done_ < mine && !core_.failed) co_await round_done_.Wait();
    co_return core_.failed ? EIO : 0;
}

Task<Errno> Head::Fold() {
    if (core_.failed) co_return EIO;
    if (!changed_ && !unsynced_ && !round_active_ && !cut_) co_return 0;
    // A pass that runs already may have missed some.
    const uint64_t mine = passes_started_ + 1;
    RequestFold();
    while (passes_done_ < mine && !core_.failed) co_await round_done_.Wait();
    co_return core_.failed ? EIO : 0;
}

Task<void> Head::Quiesce() {
    while (rounds_running_ || refilling_ || seeking_room_) {
        if (rounds_running_) co_await round_done_.Wait();
        if (refilling_) co_await refilled_.Wait();
        if (seeking_room_) co_await room_sought_.Wait();
    }
}

}  // namespace varve::cow
