#include "cow/reclaim/reclaim.h"

#include <algorithm>

#include "base/log.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Chunks of one step: bounds the batch, and how long a commit of others may wait for it.
constexpr size_t kStepChunks = 128;

struct NotePlace {
    BranchId branch;
    Generation generation;
    ChunkIndex chunk;
};

/// Some notes of the store, oldest branch first.
Result<std::vector<NotePlace>> ReadNotes(MetadataView& view, size_t most) {
    std::vector<NotePlace> places;
    const auto cursor = view.Range("W", PrefixEnd("W"));
    for (cursor->Seek("W"); cursor->valid() && places.size() < most; cursor->Next()) {
        if (KeyNumbers(cursor->key()) != 4) {
            return MakeError(ErrorKind::kDamaged, "a note's key has a wrong length");
        }
        places.push_back({BranchId{KeyNumber(cursor->key(), 0)},
                          Generation{KeyNumber(cursor->key(), 2)},
                          ChunkIndex{KeyNumber(cursor->key(), 1)}});
    }
    if (Status s = cursor->status(); !s.ok()) return s.error();
    return places;
}

bool AnyRow(MetadataStore& store, const std::string& key) {
    const std::string prefix = key.substr(0, 9);  // letter and branch
    const auto view = store.View();
    const auto cursor = view->Range(prefix, PrefixEnd(prefix));
    cursor->Seek(prefix);
    return cursor->valid() || !cursor->status().ok();
}

}  // namespace

Reclaimer::Reclaimer(Core& core, Catalog& catalog, Committer& committer,
                     std::function<bool()> scarce)
    : core_(core),
      catalog_(catalog),
      committer_(committer),
      scarce_(std::move(scarce)),
      wake_(core.home()),
      stepped_(core.home()) {}

void Reclaimer::Start() {
    running_ = true;
    idle_ = false;
    Spawn(Run());
}

Task<void> Reclaimer::Stop() {
    stopping_ = true;
    Wake();
    while (running_) co_await stepped_.Wait();
}

void Reclaimer::Wake() {
    woken_ = true;
    if (running_) idle_ = false;
    wake_.WakeAll();
}

Task<void> Reclaimer::WaitIdle() {
    while (!idle_ && running_) co_await stepped_.Wait();
}

Task<bool> Reclaimer::WaitStep() {
    if (idle_ || !running_) co_return false;
    co_await stepped_.Wait();
    co_return true;
}

Task<void> Reclaimer::Run() {
    while (!stopping_) {
        woken_ = false;
        const Pacer::Step step = core_.pacer.Begin();
        Result<bool> swept = co_await SweepNotes();
        Status s = swept.status();
        if (swept.ok() && !swept.value() && !catalog_.jobs().empty()) {
            const auto [number, job] = *catalog_.jobs().begin();
            s = co_await RunJob(number, job);
            woken_ = true;
        } else if (swept.ok() && swept.value()) {
            woken_ = true;
            stepped_.WakeAll();
            co_await Rest(step);
        } else if (swept.ok()) {
            s = co_await PruneBranches();
        }
        if (!s.ok()) {
            if (failure_.empty() && !core_.failed) {
                Log(LogLevel::kError, "space cannot be given back: " + s.error().message);
            }
            failure_ = s.error().message;
            break;
        }
        stepped_.WakeAll();
        if (!woken_ && !stopping_) {
            idle_ = true;
            co_await wake_.Wait();
        }
    }
    idle_ = true;
    running_ = false;
    stepped_.WakeAll();
}

Task<void> Reclaimer::Rest(Pacer::Step step) {
    if (!scarce_()) co_await core_.pacer.Rest(step, Pacer::Work::kSpace);
}

/// Sweeps the chunks of some notes. False if there are none.
Task<Result<bool>> Reclaimer::SweepNotes() {
    co_await Hop(core_.loader());
    const auto view = core_.metadata().View();
    Result<std::vector<NotePlace>> places = ReadNotes(*view, kStepChunks);
    co_await Hop(core_.home());
    if (!places.ok()) co_return places.error();
    std::vector<NotePlace>& notes = places.value();
    std::sort(notes.begin(), notes.end(), [](const NotePlace& a, const NotePlace& b) {
        return std::pair(a.branch, a.generation) < std::pair(b.branch, b.generation);
    });
    for (size_t i = 0; i < notes.size() && !stopping_;) {
        // Those of one head's generation share a region.
        std::vector<ChunkIndex> chunks;
        const NotePlace first = notes[i];
        for (; i < notes.size() && notes[i].branch == first.branch &&
               notes[i].generation == first.generation;
             ++i) {
            chunks.push_back(notes[i].chunk);
        }
        // The head stood above all that its note is about.
        const Generation below{first.generation.value - 1};
        Status s = co_await SweepChunks(first.branch, below, std::move(chunks));
        if (!s.ok()) co_return s.error();
    }
    co_return !notes.empty();
}

Task<Status> Reclaimer::RunJob(uint64_t number, JobRecord job) {
    // The job itself may not be stored yet, nor the rows that were built together with it.
    std::optional<CandidateScan> candidates;
    std::function<void()> look = [&] {
        const History& history = catalog_.history();
        candidates.emplace(history.StretchesBelow(job.branch, job.generation),
                           history.StretchesAbove(job.branch, job.generation));
    };
    co_await committer_.Look(std::move(look));
    CandidateScan& scan = *candidates;
    while (!scan.done() && !stopping_) {
        const Pacer::Step step = core_.pacer.Begin();
        std::vector<ChunkIndex> chunks;
        co_await Hop(core_.loader());
        const auto view = core_.metadata().View();
        Status s = scan.Next(*view, kStepChunks, chunks);
        co_await Hop(core_.home());
        if (!s.ok()) co_return s;
        s = co_await SweepChunks(job.branch, job.generation, std::move(chunks));
        if (!s.ok()) co_return s;
        stepped_.WakeAll();
        co_await Rest(step);
    }
    const bool resume = !Mutated(Mutant::kDeletionNotResumed);
    if (!scan.done() && resume) co_return Status();  // stopping; goes on after the next start
    co_return co_await FinishJob(number);
}

Task<Status> Reclaimer::SweepChunks(BranchId branch, Generation generation,
                                    std::vector<ChunkIndex> chunks) {
    std::sort(chunks.begin(), chunks.end());
    chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
    if (chunks.empty()) co_return Status();
    std::unique_ptr<MetadataView> view;
    std::optional<Sweeper> sweeper;
    std::function<void()> look = [&] {
        view = core_.metadata().View();
        sweeper.emplace(*view, catalog_.history().RegionOf(branch, generation));
    };
    co_await committer_.Look(std::move(look));
    co_await Hop(core_.loader());
    SweepPlan plan;
    Status s;
    for (const ChunkIndex chunk : chunks) {
        s = sweeper->Sweep(chunk, plan);
        if (!s.ok()) break;
    }
    co_await Hop(core_.home());
    if (!s.ok()) co_return s;
    swept_chunks_ += chunks.size();
    if (plan.deletes.empty()) co_return Status();
    Change change = [this, &plan](CommitContext& context) -> Status {
        for (const Extent& extent : plan.freed) {
            Status marked = context.allocator.MarkFree(extent);
            if (!marked.ok()) {
                core_.Fail(marked.error().message);
                return marked;
            }
            context.freed.push_back(extent);
        }
        for (std::string& key : plan.deletes) context.batch.Delete(std::move(key));
        return Status();
    };
    s = co_await committer_.Commit(std::move(change), core_.home());
    if (s.ok()) freed_blocks_ += plan.freed_blocks;
    co_return s;
}

Task<Status> Reclaimer::FinishJob(uint64_t number) {
    Change change = [number](CommitContext& context) {
        context.catalog.RemoveJob(number, context.batch);
        return Status();
    };
    co_return co_await committer_.Commit(std::move(change), core_.home());
}

/// Removes branches that nobody stands on and that have no rows left, leaves first.
/// Runs when there are no jobs and were no notes a moment ago.
Task<Status> Reclaimer::PruneBranches() {
    std::vector<BranchId> leaves;
    for (const auto& [id, branch] : catalog_.history().branches()) {
        const bool bare = branch.snapshots.empty() && branch.children.empty() && !branch.head;
        if (bare) leaves.push_back(id);
    }
    if (leaves.empty()) co_return Status();
    co_await Hop(core_.loader());
    std::erase_if(leaves, [this](BranchId id) {
        return AnyRow(core_.metadata(), MapKey(id, ChunkIndex{0}, kHead)) ||
               AnyRow(core_.metadata(), NoteKey(id, ChunkIndex{0}, kHead, 0));
    });
    co_await Hop(core_.home());
    if (leaves.empty()) co_return Status();
    // A bare branch stays bare, and nobody writes rows into it: they are still empty.
    bool pruned = false;
    Change change = [&leaves, &pruned](CommitContext& context) {
        if (!context.catalog.jobs().empty()) return Status();
        for (const BranchId id : leaves) context.catalog.RemoveBranch(id, context.batch);
        pruned = true;
        return Status();
    };
    Status s = co_await committer_.Commit(std::move(change), core_.home());
    if (pruned) woken_ = true;  // their parents may be bare now
    co_return s;
}

}  // namespace varve::cow
