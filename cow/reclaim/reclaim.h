// Reclaimer: gives back, in the background and in small steps, what deleted views held.
// What is dead is decided in sweep.h; this does the scanning, the commits and the order.
//
// Gives way to requests (pacer.h), unless space is scarce or somebody waits for it.
// Belongs to the home executor; reads on the loader. Jobs are rows of the store, so a deletion
// goes on after a crash; a step that was not committed is simply done again.
#pragma once

#include <functional>

#include "cow/head/committer.h"
#include "cow/reclaim/sweep.h"

namespace varve::cow {

class Reclaimer {
  public:
    /// `scarce`: whether there is little space left, on home.
    Reclaimer(Core& core, Catalog& catalog, Committer& committer, std::function<bool()> scarce);

    /// Starts the background work, which looks for notes and jobs first of all.
    void Start();
    /// Ends it after the step under way.
    Task<void> Stop();
    /// New jobs or notes may have come.
    void Wake();

    bool idle() const { return idle_; }
    /// Waits until nothing is left to do, or the pool failed.
    Task<void> WaitIdle();
    /// Waits for the next step to end (or for idleness). False if idle.
    Task<bool> WaitStep();

    uint64_t swept_chunks() const { return swept_chunks_; }
    uint64_t freed_blocks() const { return freed_blocks_; }
    /// Why the work stopped before its end, if it did.
    const std::string& failure() const { return failure_; }

  private:
    struct Work;
    Task<void> Run();
    Task<Result<bool>> SweepNotes();
    Task<Status> RunJob(uint64_t number, JobRecord job);
    Task<Status> SweepChunks(BranchId branch, Generation generation,
                             std::vector<ChunkIndex> chunks);
    Task<Status> FinishJob(uint64_t number);
    Task<Status> PruneBranches();
    Task<void> Rest(Pacer::Step step);

    Core& core_;
    Catalog& catalog_;
    Committer& committer_;
    const std::function<bool()> scarce_;
    bool running_ = false;
    bool stopping_ = false;
    bool woken_ = true;
    bool idle_ = true;
    WaitList wake_;
    WaitList stepped_;
    uint64_t swept_chunks_ = 0;
    uint64_t freed_blocks_ = 0;
    std::string failure_;
};

}  // namespace varve::cow
