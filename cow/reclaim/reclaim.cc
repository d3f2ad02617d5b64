#include "cow/reclaim/reclaim.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/log.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Scans that are kept open; each may hold a line of history. Others wait for one to end.
constexpr size_t kOpenJobs = 64;
/// Bare branches that are looked at in one step, and branches that are passed over.
constexpr size_t kPruneTogether = 64;
constexpr size_t kPruneLooks = 4096;
/// Things set aside that are told apart, and logged one by one.
constexpr size_t kLogMax = 10'000;

bool AnyRow(MetadataView& view, const std::string& key) {
    const std::string prefix = key.substr(0, 9);  // letter and branch
    const auto cursor = view.Range(prefix, PrefixEnd(prefix));
    cursor->Seek(prefix);
    return cursor->valid() || !cursor->status().ok();
}

}  // namespace

Reclaimer::Reclaimer(Core& core, Catalog& catalog, Committer& committer,
                     std::function<bool()> scarce, std::function<void()> lines_changed,
                     size_t step_chunks)
    : core_(core),
      catalog_(catalog),
      committer_(committer),
      scarce_(std::move(scarce)),
      step_chunks_(step_chunks),
      wake_(core.home()),
      stepped_(core.home()),
      lines_changed_(std::move(lines_changed)),
      flattener_(core, catalog, committer, lines_changed_, step_chunks) {}

void Reclaimer::Start() {
    running_ = true;
    idle_ = false;
    Spawn(Run());
}

Task<void> Reclaimer::Stop() {
    stopping_ = true;
    Wake({});
    while (running_) co_await stepped_.Wait();
}

void Reclaimer::Wake(const std::vector<NotePlace>& notes) {
    notes_.Add(notes);
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
    while (!Ending()) {
        woken_ = false;
        const Pacer::Step step = core_.pacer.Begin();
        const Result<bool> worked = co_await Turn();
        if (!worked.ok()) {  // a commit failed, and the pool with it
            failure_ = worked.error().message;
            break;
        }
        stepped_.WakeAll();
        if (worked.value()) {
            co_await Rest(step);
        } else if (!woken_ && !Ending()) {
            idle_ = true;
            co_await wake_.Wait();
        }
    }
    idle_ = true;
    running_ = false;
    stepped_.WakeAll();
}

Task<void> Reclaimer::Rest(Pacer::Step step) {
    if (!scarce_() && !notes_.crowded()) co_await core_.pacer.Rest(step, Pacer::Work::kSpace);
}

/// One step of whatever has work and waited longest. False if nothing has.
Task<Result<bool>> Reclaimer::Turn() {
    constexpr unsigned kKinds = 4;
    for (unsigned i = 0; i < kKinds; ++i) {
        const unsigned kind = turn_++ % kKinds;
        Result<bool> worked = false;
        if (kind == 0) worked = co_await NoteStep();
        if (kind == 1) worked = co_await JobStep();
        if (kind == 2) worked = co_await FlattenStep();
        if (kind == 3) worked = co_await PruneStep();
        if (!worked.ok() || worked.value()) co_return worked;
    }
    co_return false;
}

/// Whether it is new; then it has been logged. Cleared by the next start.
bool Reclaimer::SetAside(const std::string& what) {
    if (logged_.contains(what)) return false;
    ++aside_;
    if (logged_.size() < kLogMax) {
        logged_.insert(what);
        Log(LogLevel::kError, "some space is not given back until the next start: " + what);
    }
    return true;
}

// ---- notes

Task<Result<bool>> Reclaimer::NoteStep() {
    std::vector<NotePlace> notes = notes_.Take(step_chunks_);
    if (notes.empty() && notes_.pass_needed()) {
        Result<std::vector<NotePlace>> found = co_await PassStep();
        if (!found.ok()) {
            SetAside("the notes cannot be read: " + found.error().message);
            notes_.PassedTo("");
            co_return true;
        }
        notes = std::move(found.value());
        if (notes.empty()) co_return true;
    }
    if (notes.empty()) co_return false;
    const Status s = co_await SweepNotes(std::move(notes));
    if (!s.ok()) co_return s.error();
    prune_ = true;
    co_return true;
}

/// The next notes of the pass over the table.
Task<Result<std::vector<NotePlace>>> Reclaimer::PassStep() {
    std::vector<NotePlace> places;
    const std::string from = notes_.pass_from();
    std::string next;
    co_await Hop(core_.loader());
    const auto view = core_.metadata().View();
    const auto cursor = view->Range("W", PrefixEnd("W"));
    size_t left = step_chunks_;
    for (cursor->Seek(from); cursor->valid() && left > 0; cursor->Next(), --left) {
        const std::string_view key = cursor->key();
        if (KeyNumbers(key) != 4) continue;  // varve check finds it
        places.push_back({BranchId{KeyNumber(key, 0)}, Generation{KeyNumber(key, 2)},
                          ChunkIndex{KeyNumber(key, 1)}});
    }
    if (cursor->valid()) next = std::string(cursor->key());
    const Status s = cursor->status();
    co_await Hop(core_.home());
    if (!s.ok()) co_return s.error();
    // Of branches that are gone: damage, which varve check finds.
    std::erase_if(places, [this](const NotePlace& place) {
        return !catalog_.history().Contains(place.branch);
    });
    notes_.PassedTo(std::move(next));
    co_return places;
}

Task<Status> Reclaimer::SweepNotes(std::vector<NotePlace> notes) {
    std::map<std::pair<BranchId, Generation>, std::vector<ChunkIndex>> heads;
    for (const NotePlace& note : notes) {
        heads[{note.branch, note.generation}].push_back(note.chunk);
    }
    std::unique_ptr<MetadataView> view;
    Targets targets;
    std::function<void()> look = [&] {
        view = core_.metadata().View();
        for (const auto& [head, chunks] : heads) {
            // The head stood above all that its note is about.
            const Generation below{head.second.value - 1};
            if (!catalog_.history().Contains(head.first)) continue;
            AddTarget(*view, targets, head.first, below, head.second, chunks);
        }
    };
    co_await committer_.Look(std::move(look));
    const Result<Swept> swept = co_await Sweep(std::move(targets));
    if (!swept.ok()) co_return swept.error();
    for (const auto& [chunk, why] : swept.value().unread) SetAside(why);
    co_return Status();
}

// ---- sweeps

/// Adds chunks in which something may have died below the end of `generation`. `from`: a
/// generation in the segment to begin from. On home, at the same moment as `view`.
void Reclaimer::AddTarget(MetadataView& view, Targets& targets, BranchId branch,
                          Generation generation, Generation from,
                          const std::vector<ChunkIndex>& chunks) {
    const History& history = catalog_.history();
    Target& target = targets[history.RegionKeyOf(branch, generation)];
    if (!target.sweeper) {
        auto region = std::make_shared<const Region>(history.RegionOf(branch, generation));
        target.sweeper = std::make_unique<Sweeper>(view, std::move(region), hints_);
    }
    const int segment = target.sweeper->region().SegmentAt(branch, from);
    VARVE_CHECK(segment >= 0);
    for (const ChunkIndex chunk : chunks) {
        std::vector<int>& begin = target.chunks[chunk];
        if (begin.empty() || begin.back() != segment) begin.push_back(segment);
    }
}

/// Sweeps, and commits what that gives. Stops early when the pool closes. An error is the
/// commit's.
Task<Result<Reclaimer::Swept>> Reclaimer::Sweep(Targets targets) {
    Swept swept;
    co_await Hop(core_.loader());
    for (auto& [key, target] : targets) {
        for (const auto& [chunk, from] : target.chunks) {
            if (core_.closing) break;
            SweepPlan plan;
            const Status s = target.sweeper->Sweep(chunk, from, plan);
            if (!s.ok()) swept.unread.emplace_back(chunk, s.error().message);
            if (!plan.deletes.empty()) swept.plans.emplace_back(chunk, std::move(plan));
            ++swept.chunks;
        }
    }
    targets.clear();
    co_await Hop(core_.home());
    swept_chunks_ += swept.chunks;
    if (swept.plans.empty()) co_return swept;
    std::vector<Extent> freed;
    for (const auto& [chunk, plan] : swept.plans) {
        freed.insert(freed.end(), plan.freed.begin(), plan.freed.end());
    }
    Change change = [this, &swept](CommitContext& context) { return BuildSwept(swept, context); };
    std::vector<uint64_t> regions = RegionsOf(freed);
    const Status s =
        co_await committer_.CommitIn(std::move(regions), std::move(change), core_.home());
    if (!s.ok()) co_return s.error();
    co_return swept;
}

/// A chunk of whose blocks some are in a region that cannot be read keeps its rows and notes: so
/// they stay named, and are freed once it can be. An error is a contradiction, and the pool's end.
Status Reclaimer::BuildSwept(Swept& swept, CommitContext& context) {
    for (auto& [chunk, plan] : swept.plans) {
        Status opened;
        for (const Extent& extent : plan.freed) {
            if (opened.ok()) opened = context.allocator.Open(extent);
        }
        if (!opened.ok()) {
            swept.unread.emplace_back(chunk, opened.error().message);
            continue;
        }
        for (const Extent& extent : plan.freed) {
            Status marked = context.allocator.MarkFree(extent);
            if (!marked.ok()) {
                core_.Fail(marked.error().message);
                return marked;
            }
            context.freed.push_back(extent);
        }
        for (std::string& key : plan.deletes) context.batch.Delete(std::move(key));
        freed_blocks_ += plan.freed_blocks;
    }
    return Status();
}

// ---- jobs

/// Files the jobs that came since the last time under their families.
void Reclaimer::ListJobs() {
    const auto& jobs = catalog_.jobs();
    for (auto job = jobs.upper_bound(listed_); job != jobs.end(); ++job) {
        families_[catalog_.history().Root(job->second.branch)].push_back(job->first);
        listed_ = job->first;
    }
}

/// The next family's oldest job. Nothing if there is none.
Reclaimer::OpenJob* Reclaimer::ChooseJob() {
    ListJobs();
    for (size_t i = 0; i < families_.size(); ++i) {
        auto family = families_.lower_bound(next_family_);
        if (family == families_.end()) family = families_.begin();
        next_family_ = BranchId{family->first.value + 1};
        const auto open = open_jobs_.find(family->first);
        if (open != open_jobs_.end()) return &open->second;
        if (open_jobs_.size() >= kOpenJobs) continue;
        const uint64_t number = family->second.front();
        const JobRecord job = catalog_.jobs().at(number);
        const History& history = catalog_.history();
        CandidateScan scan(history.StretchesBelow(job.branch, job.generation),
                           history.StretchesAbove(job.branch, job.generation));
        OpenJob opened{number, job, std::move(scan), {}};
        return &open_jobs_.emplace(family->first, std::move(opened)).first->second;
    }
    return nullptr;
}

/// The job is done, or set aside.
void Reclaimer::CloseJob(uint64_t number) {
    for (auto family = families_.begin(); family != families_.end(); ++family) {
        if (family->second.front() != number) continue;
        open_jobs_.erase(family->first);
        family->second.erase(family->second.begin());
        if (family->second.empty()) families_.erase(family);
        return;
    }
}

Task<Result<bool>> Reclaimer::JobStep() {
    if (catalog_.jobs().empty()) co_return false;
    // A job may not be stored yet, nor the rows that were built together with it.
    OpenJob* open = nullptr;
    std::function<void()> look = [&] { open = ChooseJob(); };
    co_await committer_.Look(std::move(look));
    if (!open) co_return false;
    const Status s = co_await JobStepOf(*open);
    if (!s.ok()) co_return s.error();
    co_return true;
}

Task<Status> Reclaimer::JobStepOf(OpenJob& open) {
    std::vector<ChunkIndex> chunks;
    co_await Hop(core_.loader());
    Status s;
    {
        const auto view = core_.metadata().View();
        s = open.scan.Next(*view, step_chunks_, chunks);
    }
    co_await Hop(core_.home());
    if (!s.ok()) {  // its marks cannot be read
        SetAside(fmt::format("deletion {}: {}", open.number, s.error().message));
        jobs_aside_.insert(open.number);
        CloseJob(open.number);
        co_return Status();
    }
    if (!chunks.empty()) {
        std::unique_ptr<MetadataView> view;
        Targets targets;
        std::function<void()> look = [&] {
            view = core_.metadata().View();
            AddTarget(*view, targets, open.job.branch, open.job.generation, open.job.generation,
                      chunks);
        };
        co_await committer_.Look(std::move(look));
        const Result<Swept> swept = co_await Sweep(std::move(targets));
        if (!swept.ok()) co_return swept.error();
        for (const auto& [chunk, why] : swept.value().unread) {
            SetAside(why);
            open.unread.push_back(chunk);
        }
    }
    const bool resume = !Mutated(Mutant::kDeletionNotResumed);
    // Closing: not all of these chunks may have been swept. It goes on after the next start.
    if (Ending() && resume) co_return Status();
    if (open.unread.size() > kLogMax) {  // the whole job is tried again
        jobs_aside_.insert(open.number);
        CloseJob(open.number);
        co_return Status();
    }
    if (!open.scan.done() && !Ending()) co_return Status();
    co_return co_await FinishJob(open);
}

/// What could not be read stays as notes without blocks, so that it is tried again.
Task<Status> Reclaimer::FinishJob(OpenJob& open) {
    const uint64_t number = open.number;
    const JobRecord job = open.job;
    const std::vector<ChunkIndex> unread = std::move(open.unread);
    Change change = [&](CommitContext& context) {
        context.catalog.RemoveJob(number, context.batch);
        const Generation above{job.generation.value + 1};
        for (const ChunkIndex chunk : unread) {
            context.batch.Put(NoteKey(job.branch, chunk, above, context.catalog.NextId()),
                              EncodeNote({}));
        }
        return Status();
    };
    const Status s = co_await committer_.Commit(std::move(change), core_.home());
    if (!s.ok()) co_return s;
    CloseJob(number);
    prune_ = true;
    co_return Status();
}

// ---- branches

/// Looks at some of the branches that nobody stands on, and removes those that have no rows left:
/// leaves, and those with one child, which takes their place. (With more, it tells that they may
/// share blocks.) False if there is nothing to be done.
Task<Result<bool>> Reclaimer::PruneStep() {
    if (!prune_) co_return false;
    std::set<BranchId> busy;
    const auto bare = [&](BranchId id, const History::Branch& branch) {
        return branch.snapshots.empty() && branch.children.size() <= 1 && !branch.head &&
               !busy.contains(id);
    };
    std::vector<BranchId> empty;
    std::unique_ptr<MetadataView> view;
    bool last = false;
    std::function<void()> look = [&] {
        for (const auto& [number, job] : catalog_.jobs()) busy.insert(job.branch);
        const auto& branches = catalog_.history().branches();
        auto at = branches.lower_bound(prune_from_);
        for (size_t looks = 0;
             at != branches.end() && empty.size() < kPruneTogether && looks < kPruneLooks;
             ++at, ++looks) {
            if (bare(at->first, at->second)) empty.push_back(at->first);
        }
        last = at == branches.end();
        prune_from_ = last ? BranchId{0} : at->first;
        view = core_.metadata().View();
    };
    co_await committer_.Look(std::move(look));
    co_await Hop(core_.loader());
    std::erase_if(empty, [&view](BranchId id) {
        return AnyRow(*view, MapKey(id, ChunkIndex{0}, kHead)) ||
               AnyRow(*view, NoteKey(id, ChunkIndex{0}, kHead, 0));
    });
    view.reset();
    co_await Hop(core_.home());
    Status s;
    if (!empty.empty()) {
        // A bare branch stays bare, and nobody writes rows into it: they are still empty.
        Change change = [&](CommitContext& context) {
            busy.clear();
            for (const auto& [number, job] : context.catalog.jobs()) busy.insert(job.branch);
            for (const BranchId id : empty) {
                const History::Branch& branch = context.catalog.history().Get(id);
                if (!bare(id, branch)) continue;
                context.catalog.RemoveBranch(id, context.batch);
                pruned_ = true;
            }
            return Status();
        };
        s = co_await committer_.Commit(std::move(change), core_.home());
        if (!s.ok()) co_return s.error();
    }
    if (last && pruned_) lines_changed_();
    if (last) prune_ = std::exchange(pruned_, false);  // their parents may be bare now
    co_return true;
}

Task<Result<bool>> Reclaimer::FlattenStep() {
    std::string unread;
    const Result<bool> worked = co_await flattener_.Step(&unread);
    if (!unread.empty()) SetAside("a disk is not flattened: " + unread);
    co_return worked;
}

}  // namespace varve::cow
