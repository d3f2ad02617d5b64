#include "cow/reclaim/reclaim.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/log.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Scans that are kept open; each may hold a line of history. Of others only the place is kept.
constexpr size_t kOpenScans = 64;
/// Regions that are kept; each may have thousands of segments.
constexpr size_t kRegionsKept = 16;
/// Bare branches that are looked at in one step.
constexpr size_t kPruneTogether = 64;
/// Jobs that are listed in one step.
constexpr size_t kListTogether = 1024;
/// Jobs in a row that leave what they share to a later one, and those among which it is sought.
constexpr size_t kPassedOnMost = 64;
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
                     size_t step_chunks, size_t read_after)
    : core_(core),
      catalog_(catalog),
      committer_(committer),
      scarce_(std::move(scarce)),
      step_chunks_(step_chunks),
      wake_(core.home()),
      stepped_(core.home()),
      filter_(read_after),
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
    // In turns: under a steady load of notes the queue is never empty.
    pass_turn_ = notes_.pass_needed() && (notes_.empty() || !pass_turn_);
    std::vector<NotePlace> notes;
    if (!pass_turn_) notes = notes_.Take(step_chunks_);
    if (pass_turn_) {
        notes = co_await PassStep();
        if (notes.empty()) co_return true;
    }
    if (notes.empty()) co_return false;
    const Status s = co_await SweepNotes(std::move(notes));
    if (!s.ok()) co_return s.error();
    prune_ = prune_again_ = true;
    co_return true;
}

/// The next notes of the pass over the table. Where they cannot be read it goes on with those of
/// the next branch.
Task<std::vector<NotePlace>> Reclaimer::PassStep() {
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
    if (!s.ok()) {
        SetAside("some notes cannot be read: " + s.error().message);
        const BranchId here = !places.empty()        ? places.back().branch
                              : KeyNumbers(from) > 0 ? BranchId{KeyNumber(from, 0)}
                                                     : BranchId{0};
        const std::optional<BranchId> after = catalog_.history().After(here);
        if (after) next = NoteKey(*after, ChunkIndex{0}, Generation{0}, 0);
    }
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
        LearnChanges();
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
    for (const std::string& why : swept.value().kept) SetAside(why);
    co_return Status();
}

// ---- sweeps

/// The region of that view. Kept from step to step, since it may have thousands of branches.
std::shared_ptr<const Region> Reclaimer::RegionAt(BranchId branch, Generation generation) {
    const History& history = catalog_.history();
    if (std::exchange(regions_version_, history.version()) != history.version()) regions_.clear();
    const auto key = history.RegionKeyOf(branch, generation);
    const auto kept = regions_.find(key);
    if (kept != regions_.end()) return kept->second;
    if (regions_.size() >= kRegionsKept) regions_.clear();
    return regions_[key] = std::make_shared<const Region>(history.RegionOf(branch, generation));
}

/// Adds chunks in which something may have died below the end of `generation`. `from`: a
/// generation in the segment to begin from. On home, at the same moment as `view`.
void Reclaimer::AddTarget(MetadataView& view, Targets& targets, BranchId branch,
                          Generation generation, Generation from,
                          const std::vector<ChunkIndex>& chunks) {
    Target& target = targets[catalog_.history().RegionKeyOf(branch, generation)];
    if (!target.sweeper) {
        target.sweeper =
            std::make_unique<Sweeper>(view, RegionAt(branch, generation), hints_, filter_);
    }
    const int segment = target.sweeper->region().SegmentAt(branch, from);
    VARVE_CHECK(segment >= 0);
    for (const ChunkIndex chunk : chunks) {
        Origin& origin = target.chunks[chunk];
        std::vector<int>& begin = origin.segments;
        if (begin.empty() || begin.back() != segment) begin.push_back(segment);
        origin.note = {branch, from, chunk};
    }
}

/// Sweeps, and commits what that gives. Stops early when the pool closes. An error is the
/// commit's.
Task<Result<Reclaimer::Swept>> Reclaimer::Sweep(Targets targets) {
    Swept swept;
    co_await Hop(core_.loader());
    for (auto& [key, target] : targets) {
        for (const auto& [chunk, origin] : target.chunks) {
            if (core_.closing) break;
            SweepPlan plan;
            const Status s = target.sweeper->Sweep(chunk, origin.segments, plan);
            if (!s.ok()) swept.unread.emplace_back(chunk, s.error().message);
            if (!plan.deletes.empty()) swept.plans.emplace_back(origin.note, std::move(plan));
            ++swept.chunks;
        }
    }
    targets.clear();
    co_await Hop(core_.home());
    swept_chunks_ += swept.chunks;
    if (swept.plans.empty()) co_return swept;
    std::vector<Extent> freed;
    for (const auto& [note, plan] : swept.plans) {
        for (const Runs& runs : plan.freed) {
            for (const cow::Run& run : runs) freed.push_back({run.place, run.count});
        }
    }
    Change change = [this, &swept](CommitContext& context) { return BuildSwept(swept, context); };
    std::vector<uint64_t> regions = RegionsOf(freed);
    const Status s =
        co_await committer_.CommitIn(std::move(regions), std::move(change), core_.home());
    if (!s.ok()) co_return s.error();
    co_return swept;
}

/// Blocks in a region that cannot be read stay named, by a note, and are freed once it can be. It
/// takes the place of those before it, so that a pass that came by does not meet it again. An error
/// is a contradiction, and the pool's end.
Status Reclaimer::BuildSwept(Swept& swept, CommitContext& context) {
    for (auto& [place, plan] : swept.plans) {
        for (std::string& key : plan.deletes) context.batch.Delete(std::move(key));
        uint64_t number = 0;  // those that had these before are deleted now
        for (const Runs& runs : plan.freed) {
            Runs kept;
            if (Status s = Free(runs, context, &kept, &swept.kept); !s.ok()) {
                core_.Fail(s.error().message);
                return s;
            }
            if (kept.empty()) continue;
            context.batch.Put(NoteKey(place.branch, place.chunk, place.generation, number++),
                              EncodeNote(kept));
        }
    }
    return Status();
}

/// What cannot be freed goes to `kept`, and to `whys` why.
Status Reclaimer::Free(const Runs& runs, CommitContext& context, Runs* kept,
                       std::vector<std::string>* whys) {
    for (const cow::Run& run : runs) {
        const Extent extent{run.place, run.count};
        if (const Status opened = context.allocator.Open(extent); !opened.ok()) {
            whys->push_back(opened.error().message);
            kept->push_back(run);
            continue;
        }
        if (Status s = context.allocator.MarkFree(extent); !s.ok()) return s;
        context.freed.push_back(extent);
        freed_blocks_ += run.count;
    }
    return Status();
}

// ---- jobs

/// Files jobs that came since the last time under their families: some, if there are many.
void Reclaimer::ListJobs() {
    const auto& jobs = catalog_.jobs();
    History::Roots roots;
    auto job = jobs.upper_bound(listed_);
    for (size_t i = 0; job != jobs.end() && i < kListTogether; ++job, ++i) {
        families_[catalog_.history().Root(job->second.branch, &roots)].jobs.push_back(job->first);
        listed_ = job->first;
    }
}

/// The next family's oldest job. Nothing if there is none.
Reclaimer::OpenJob* Reclaimer::ChooseJob() {
    ListJobs();
    if (families_.empty()) return nullptr;
    auto family = families_.upper_bound(family_);
    if (family == families_.end()) family = families_.begin();
    OpenJob& open = open_jobs_[family->first];
    if (open.number == 0) {
        std::deque<uint64_t>& jobs = family->second.jobs;
        size_t& passed_on = family->second.passed_on;
        open.number = jobs.front();
        open.job = catalog_.jobs().at(open.number);
        open.family = family->first;
        open.passes_on = passed_on < kPassedOnMost && SiblingFollows(open.job, jobs);
        if (open.passes_on) {
            ++passed_on;
        } else if (passed_on > 0 && WalksBelow(open.job)) {
            passed_on = 0;
        }
    }
    OpenScan(open);
    family_ = family->first;
    return &open;
}

/// Whether the job walks all that lies below its branch: there is something, and nothing above that
/// could end it before.
bool Reclaimer::WalksBelow(const JobRecord& job) const {
    const History& history = catalog_.history();
    return history.StretchesAbove(job.branch, job.generation).empty() &&
           history.StretchesBelow(job.branch, job.generation).size() > 1;
}

/// Whether one of the next jobs is about a branch that forked off where this one's did, and has to
/// walk all that lies below: there it finds what this one would. Nobody can come to stand above it,
/// nor below the fork, meanwhile.
bool Reclaimer::SiblingFollows(const JobRecord& job, const std::deque<uint64_t>& jobs) const {
    const History& history = catalog_.history();
    const History::Branch& own = history.Get(job.branch);
    const size_t end = std::min(jobs.size(), kPassedOnMost);
    for (size_t i = 1; i < end && own.parent.value != 0; ++i) {
        const JobRecord& other = catalog_.jobs().at(jobs[i]);
        const History::Branch& branch = history.Get(other.branch);
        const bool sibling = branch.parent == own.parent && branch.fork == own.fork;
        if (!sibling || other.branch == job.branch) continue;
        return WalksBelow(other);
    }
    return false;
}

/// With too many open, that of the family which had the last turn, and has the next one after all
/// others, is closed.
void Reclaimer::OpenScan(OpenJob& open) {
    if (open.scan) return;
    const auto last = open_jobs_.find(family_);
    if (open_scans_ >= kOpenScans && last != open_jobs_.end() && last->second.scan) {
        last->second.place = last->second.scan->place();
        last->second.scan.reset();
        --open_scans_;
    }
    const History& history = catalog_.history();
    Line below = history.StretchesBelow(open.job.branch, open.job.generation);
    const auto shared = [&](const Stretch& stretch) { return stretch.branch != open.job.branch; };
    if (open.passes_on) std::erase_if(below, shared);
    open.scan.emplace(std::move(below),
                      history.StretchesAbove(open.job.branch, open.job.generation), open.place);
    ++open_scans_;
}

/// The job is done, or set aside.
void Reclaimer::CloseJob(BranchId family) {
    open_jobs_.erase(family);
    --open_scans_;
    std::deque<uint64_t>& jobs = families_.at(family).jobs;
    jobs.pop_front();
    if (jobs.empty()) families_.erase(family);
}

/// It is tried again after the next start.
void Reclaimer::SetJobAside(const OpenJob& job) {
    jobs_aside_.insert(job.number);
    CloseJob(job.family);
}

Task<Result<bool>> Reclaimer::JobStep() {
    if (catalog_.jobs().empty()) co_return false;
    // A job may not be stored yet, nor the rows that were built together with it.
    OpenJob* open = nullptr;
    std::function<void()> look = [&] {
        LearnChanges();
        open = ChooseJob();
    };
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
        s = open.scan->Next(*view, &filter_, step_chunks_, chunks);
    }
    co_await Hop(core_.home());
    if (!s.ok()) {  // some marks cannot be read; others' deletions may rely on what lies behind
        open.gap = s.error().message;
        open.scan->Skip();
    }
    if (!chunks.empty()) {
        std::unique_ptr<MetadataView> view;
        Targets targets;
        std::function<void()> look = [&] {
            LearnChanges();
            view = core_.metadata().View();
            AddTarget(*view, targets, open.job.branch, open.job.generation, open.job.generation,
                      chunks);
        };
        co_await committer_.Look(std::move(look));
        const Result<Swept> swept = co_await Sweep(std::move(targets));
        if (!swept.ok()) co_return swept.error();
        for (const std::string& why : swept.value().kept) SetAside(why);
        for (const auto& [chunk, why] : swept.value().unread) {
            SetAside(why);
            open.unread.push_back(chunk);
        }
    }
    const bool resume = !Mutated(Mutant::kDeletionNotResumed);
    // Closing: not all of these chunks may have been swept. It goes on after the next start.
    if (Ending() && resume) co_return Status();
    const bool ends = open.scan->done() || Ending();
    const bool gap = open.scan->done() && !open.scan->complete();
    if (gap) SetAside(fmt::format("deletion {}: {}", open.number, open.gap));
    if (gap || open.unread.size() > kLogMax) {
        SetJobAside(open);
        co_return Status();
    }
    if (!ends) co_return Status();
    co_return co_await FinishJob(open);
}

/// What could not be read stays as notes without blocks, so that it is tried again.
Task<Status> Reclaimer::FinishJob(OpenJob& open) {
    const uint64_t number = open.number;
    const BranchId family = open.family;
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
    CloseJob(family);
    prune_ = prune_again_ = true;
    co_return Status();
}

// ---- branches

/// Looks at some of the branches that nobody stands on, and removes those that have no rows left:
/// leaves, and those with one child, which takes their place. (With more, it tells that they may
/// share blocks.) False if there is nothing to be done.
Task<Result<bool>> Reclaimer::PruneStep() {
    if (!prune_) co_return false;
    const auto removable = [](const Catalog& catalog, BranchId id) {
        return catalog.history().bare().contains(id) && !catalog.HasJob(id);
    };
    std::vector<BranchId> empty;
    std::unique_ptr<MetadataView> view;
    bool last = false;
    if (prune_from_.value == 0) prune_again_ = false;
    std::function<void()> look = [&] {
        const std::set<BranchId>& bare = catalog_.history().bare();
        auto at = bare.lower_bound(prune_from_);
        for (size_t i = 0; at != bare.end() && i < kPruneTogether; ++at, ++i) {
            if (removable(catalog_, *at)) empty.push_back(*at);
        }
        last = at == bare.end();
        prune_from_ = last ? BranchId{0} : *at;
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
            for (const BranchId id : empty) {
                if (!removable(context.catalog, id)) continue;
                context.catalog.RemoveBranch(id, context.batch);
                pruned_ = true;
            }
            return Status();
        };
        s = co_await committer_.Commit(std::move(change), core_.home());
        if (!s.ok()) co_return s.error();
    }
    if (last && pruned_) lines_changed_();
    if (last) prune_ = std::exchange(pruned_, false) || prune_again_;  // parents may be bare now
    co_return true;
}

Task<Result<bool>> Reclaimer::FlattenStep() {
    std::string unread;
    const Result<bool> worked = co_await flattener_.Step(&unread);
    if (!unread.empty()) SetAside("a disk is not flattened: " + unread);
    co_return worked;
}

}  // namespace varve::cow
