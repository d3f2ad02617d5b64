// Reclaimer: gives back, in the background and in small steps, what deleted views held.
// What is dead is decided in sweep.h; this does the scanning, the commits and the order.
//
// Notes, jobs and flattening take turns, a step each; so do the branches that left notes, and the
// families of branches that jobs are about: nobody's backlog keeps another's space waiting. Each
// step goes on where the last one stopped, and ends early when the pool closes. Of jobs about
// clones of one snapshot, each walks what is its own, and one of 65 what lies below all of them.
//
// What cannot be read is set aside: remembered, logged once, counted, and tried again after the
// next start; all else goes on.
//
// Gives way to requests (pacer.h), unless space is scarce, or somebody waits for it, or notes come
// faster than they go.
// Belongs to the home executor; reads on the loader. Jobs are rows of the store, so a deletion
// goes on after a crash; a step that was not committed is simply done again.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "cow/head/committer.h"
#include "cow/reclaim/flatten.h"
#include "cow/reclaim/note_queue.h"
#include "cow/reclaim/sweep.h"

namespace varve::cow {

class Reclaimer {
  public:
    /// `scarce`: whether there is little space left, on home. `step_chunks`: chunks of one step,
    /// which bounds its batch, and how long a commit of others may wait for it. `read_after`: see
    /// RowFilter.
    /// `lines_changed`: on home, when lines may be shorter than they were.
    Reclaimer(Core& core, Catalog& catalog, Committer& committer, std::function<bool()> scarce,
              std::function<void()> lines_changed, size_t step_chunks, size_t read_after);

    /// Starts the background work, which looks for notes and jobs first of all.
    void Start();
    /// Ends it after the step under way.
    Task<void> Stop();
    /// New jobs may have come, and these notes.
    void Wake(const std::vector<NotePlace>& notes);

    bool idle() const { return idle_; }
    /// Waits until nothing is left to do, or the pool failed.
    Task<void> WaitIdle();
    /// Waits for the next step to end (or for idleness). False if idle.
    Task<bool> WaitStep();

    uint64_t swept_chunks() const { return swept_chunks_; }
    uint64_t freed_blocks() const { return freed_blocks_; }
    /// Why the work stopped before its end, if it did.
    const std::string& failure() const { return failure_; }
    /// Chunks, notes and deletions that cannot be read, and wait for the next start.
    uint64_t set_aside() const { return aside_; }
    /// Jobs that are not set aside.
    uint64_t jobs_pending() const { return catalog_.jobs().size() - jobs_aside_.size(); }

  private:
    /// A family's oldest job.
    struct OpenJob {
        uint64_t number = 0;
        JobRecord job;
        BranchId family;
        bool passes_on = false;             // what lies below its branch, to a later job
        std::optional<CandidateScan> scan;  // nothing: too many are open
        CandidateScan::Place place;         // where it goes on then
        std::vector<ChunkIndex> unread;     // could not be read
        std::string gap;                    // why some of its marks could not be read
    };
    /// From where a chunk is swept, and where a note would have it swept again.
    struct Origin {
        std::vector<int> segments;
        NotePlace note;
    };
    /// Chunks to sweep, by where their regions begin.
    struct Target {
        std::unique_ptr<Sweeper> sweeper;
        std::map<ChunkIndex, Origin> chunks;
    };
    using Targets = std::map<std::pair<BranchId, Generation>, Target>;
    struct Swept {
        std::vector<std::pair<NotePlace, SweepPlan>> plans;  // of chunks with something dead
        uint64_t chunks = 0;
        std::vector<std::pair<ChunkIndex, std::string>> unread;  // and why
        std::vector<std::string> kept;                           // why blocks are not freed
    };

    bool Ending() const { return stopping_ || core_.closing || core_.failed; }
    Task<void> Run();
    Task<Result<bool>> Turn();
    Task<Result<bool>> NoteStep();
    Task<std::vector<NotePlace>> PassStep();
    Task<Status> SweepNotes(std::vector<NotePlace> notes);
    void ListJobs();
    OpenJob* ChooseJob();
    bool WalksBelow(const JobRecord& job) const;
    bool SiblingFollows(const JobRecord& job, const std::deque<uint64_t>& jobs) const;
    void OpenScan(OpenJob& job);
    void CloseJob(BranchId family);
    void SetJobAside(const OpenJob& job);
    std::shared_ptr<const Region> RegionAt(BranchId branch, Generation generation);
    Status BuildSwept(Swept& swept, CommitContext& context);
    Status Free(const Runs& runs, CommitContext& context, Runs* kept,
                std::vector<std::string>* whys);
    Task<Result<bool>> JobStep();
    Task<Status> JobStepOf(OpenJob& open);
    void AddTarget(MetadataView& view, Targets& targets, BranchId branch, Generation generation,
                   Generation from, const std::vector<ChunkIndex>& chunks);
    void LearnChanges() { filter_.Forget(committer_.TakeChanged()); }
    Task<Result<Swept>> Sweep(Targets targets);
    Task<Status> FinishJob(OpenJob& open);
    Task<Result<bool>> PruneStep();
    Task<Result<bool>> FlattenStep();
    Task<void> Rest(Pacer::Step step);
    bool SetAside(const std::string& what);

    Core& core_;
    Catalog& catalog_;
    Committer& committer_;
    const std::function<bool()> scarce_;
    const size_t step_chunks_;
    bool running_ = false;
    bool stopping_ = false;
    bool woken_ = true;
    bool idle_ = true;
    WaitList wake_;
    WaitList stepped_;
    unsigned turn_ = 0;
    SweepHints hints_;
    RowFilter filter_;

    NoteQueue notes_;
    bool pass_turn_ = false;  // of the pass over the table, else of the queue

    // As long as the tree is the same.
    std::map<std::pair<BranchId, Generation>, std::shared_ptr<const Region>> regions_;
    uint64_t regions_version_ = 0;

    // Jobs, oldest first, by the root of the branches they are about; those of one are done one
    // after the other.
    struct Family {
        std::deque<uint64_t> jobs;
        size_t passed_on = 0;  // jobs in a row that have left the rest to later ones
    };
    std::map<BranchId, Family> families_;
    uint64_t listed_ = 0;                    // jobs up to this number are in families_
    std::map<BranchId, OpenJob> open_jobs_;  // that were begun
    size_t open_scans_ = 0;
    BranchId family_;  // who had the last turn
    std::set<uint64_t> jobs_aside_;

    bool prune_ = true;         // bare branches may have become empty
    bool prune_again_ = false;  // more of them, since the pass over them began
    BranchId prune_from_;       // where it goes on
    bool pruned_ = false;       // since it began

    const std::function<void()> lines_changed_;
    Flattener flattener_;

    uint64_t swept_chunks_ = 0;
    uint64_t freed_blocks_ = 0;
    uint64_t aside_ = 0;
    std::set<std::string> logged_;  // what was set aside; at most kLogMax
    std::string failure_;
};

}  // namespace varve::cow
