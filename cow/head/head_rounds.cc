// Head, third part: rounds, which make changes durable, and passes, which fold them into map rows.
// docs/design/ring.md has the rules.

#include <algorithm>

#include "cow/format/runs.h"
#include "cow/head/head.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Blocks that were given up from which on a flush begins a round, which gives them back.
constexpr uint64_t kReleasedByFlush = 1024;

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

/// Of its entries in the journal, those below `number` are in map rows.
void Head::FoldedBelow(uint64_t number) {
    if (core_.failed || first_entry_ >= number) return;  // it may have none
    first_entry_ = number;
    if (number >= last_entry_) {
        first_entry_ = kNoEntry;
        std::erase(lane_.journaled_heads, this);
    }
    uint64_t oldest = lane_.journal.appended();
    for (const Head* head : lane_.journaled_heads) oldest = std::min(oldest, head->first_entry_);
    lane_.journal.Folded(oldest);
}

/// Blocks that were given up, as far as nobody can bring them back any more.
void Head::TakeReleased(HeadCommit& commit) {
    const bool all = Mutated(Mutant::kReleasedUnsynced);
    while (!released_.empty() && (all || released_.front().number <= lane_.journal.synced())) {
        commit.released.push_back(released_.front().extent);
        released_blocks_ -= released_.front().extent.count;
        released_.pop_front();
    }
}

bool Head::SyncsUnderWay(uint64_t begun) const {
    return std::any_of(syncs_.begin(), syncs_.end(), [begun](uint64_t s) { return s <= begun; });
}

/// Returns when those that are under way have ended.
Task<void> Head::SyncsEnd() {
    const uint64_t begun = syncs_begun_;
    while (SyncsUnderWay(begun)) co_await synced_.Wait();
}

/// Whether the last sync that has begun covers all that is written, or has covered it.
bool Head::Synced() const {
    const uint64_t written = std::min(last_entry_, lane_.journal.written());
    return !unsynced_ && written <= covered_ && aging_.empty() && !lane_.journal.HoldsFolded();
}

/// Makes durable what was answered before: data, and what the journal says of it.
Task<Errno> Head::SyncData() {
    if (Synced()) {
        co_await SyncsEnd();  // it may be on its way
        co_return core_.failed ? EIO : 0;
    }
    unsynced_ = false;  // what completes from now on is for the next sync
    const Waits::Scope waiting(core_.waits, "data sync");
    const uint64_t number = ++syncs_begun_;
    syncs_.push_back(number);
    co_await lane_.journal.Tell();
    LaneJournal::Covered covered = lane_.journal.Covers();
    covered_ = covered.written;
    Errno error = 0;
    if (!Mutated(Mutant::kNeverSynced)) {
        error = co_await Transfer(lane_.blocks, BlockIo::Kind::kSync, 0, nullptr, 0);
    }
    std::erase(syncs_, number);
    synced_.WakeAll();
    if (Mutated(Mutant::kWritesDuringSyncForgotten)) {
        covered = lane_.journal.Covers();
        covered_ = covered.written;
        unsynced_ = false;
    }
    if (Mutated(Mutant::kFailedSyncIgnored)) error = 0;
    if (error != 0) core_.Fail(SystemError(error, "syncing the data file failed").message);
    // Another lane's sync may have failed meanwhile: a device may tell only one of them.
    if (core_.failed) co_return EIO;
    lane_.journal.EndSync(covered);
    Age();
    co_return 0;
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
    const bool last = waiting.empty() && (sealed || pass_);
    const bool early = Mutated(Mutant::kJournalForgottenEarly) && (sealed || pass_);
    // Rows in the order of their keys: the store takes them twice as fast.
    for (auto chunk = chunks.rbegin(); chunk != chunks.rend(); ++chunk) Encode(**chunk, commit);
    // No suspension since then: this is what rows will hold.
    uint64_t folded = 0;
    if (last || early) folded = sealed ? sealed_end_ : pass_end_;
    if (NothingToFold()) folded = FoldableEnd();
    entries_ = 0;
    if (Mutated(Mutant::kReusedBeforeCommit)) ReuseDropped(commit, &lease_, &lease_blocks_);
    // The journal and data before metadata: what the rows name must be durable before the rows can
    // be, and so must be what they would be replaced by if the journal ended earlier.
    const bool late = Mutated(Mutant::kRowsBeforeData);
    if (!late) co_await lane_.journal.Written(last_entry_);
    Errno error = 0;
    const bool never = Mutated(Mutant::kReleasedUnsynced) && commit.rows.empty();
    if (!late && !never) error = co_await SyncData();
    TakeReleased(commit);
    if (error == 0 && !commit.empty()) {
        if (!round_done_.empty()) lane_.executor.ExpectPost();
        const varve::Status s = co_await host_.CommitHead(disk_, commit, lane_.executor);
        VARVE_CHECK(s.ok() || core_.failed);
    }
    if (late) error = co_await SyncData();
    Unpin(chunks);
    FoldedBelow(folded);
    if (last && sealed) {
        sealed_open_ = false;
    } else if (last) {
        pass_ = false;
        passes_done_ = passes_started_;
    }
    // Somebody may wait for what this freed of the ring.
    if (lane_.journal.HoldsFolded() && lane_.journal.crowded()) error = co_await SyncData();
    if (last && !core_.failed && lane_.journal.hungry())
        FoldLane(lane_);  // what came since the pass began
    changed_ = unfolded_ > 0 || !released_.empty() || !aging_.empty() || first_entry_ != kNoEntry;
}

// ---- passes

/// So that Round() takes chunks from the end in ascending order.
void Head::SortForFold(std::vector<Chunk*>& chunks) {
    std::sort(chunks.begin(), chunks.end(),
              [](const Chunk* a, const Chunk* b) { return a->index > b->index; });
}

/// Entries below are in memory as they are in the journal: their data has been written.
uint64_t Head::FoldableEnd() const {
    if (Mutated(Mutant::kFoldedBeforeWritten)) return lane_.journal.appended();
    return lane_.journal.CompletedOf(announced_);
}

void Head::BeginPass() {
    if (!pass_wanted_ || pass_ || sealed_open_) return;
    pass_wanted_ = false;
    pass_ = true;
    pass_end_ = FoldableEnd();
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
    if (released_blocks_ >= kReleasedByFlush) RequestRound();
    if (Mutated(Mutant::kFlushAnsweredBeforeSync)) {
        Spawn(SyncAlone());
        co_return 0;
    }
    if (Mutated(Mutant::kFlushJoinsRunningSync) && !syncs_.empty()) {
        co_await SyncsEnd();
        co_return core_.failed ? EIO : 0;
    }
    co_return co_await SyncData();
}

Task<void> Head::SyncAlone() {
    const Errno ignored = co_await SyncData();
    (void)ignored;
}

/// A round that begins now, and all before it.
Task<Errno> Head::Commit() {
    if (core_.failed) co_return EIO;
    if (!changed_ && !unsynced_ && !round_active_ && !cut_) co_return 0;
    const uint64_t mine = rounds_started_ + 1;
    RequestRound();
    while (rounds_done_ < mine && !core_.failed) co_await round_done_.Wait();
    co_return core_.failed ? EIO : 0;
}

Task<Errno> Head::Settle() {
    Errno error = 0;
    while (!aging_.empty() && error == 0) error = co_await SyncData();
    co_return core_.failed ? EIO : error;
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
