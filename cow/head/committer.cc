#include "cow/head/committer.h"

#include "cow/mutants.h"

namespace varve::cow {

struct Committer::Request : Resumption {
    Committer& committer;
    Change change;
    Executor& resume_on;
    Status status;

    Request(Committer& c, Change ch, Executor& on)
        : committer(c), change(std::move(ch)), resume_on(on) {}

    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter) {
        handle = waiter;
        committer.queue_.push_back(this);
        if (!committer.running_) {
            committer.running_ = true;
            Spawn(committer.Run());
        }
    }
    void await_resume() const noexcept {}
};

Committer::Committer(Core& core, const Lanes& lanes, Catalog& catalog, Allocator& allocator,
                     Leases& leases, std::function<void()> wake_reclaimer)
    : core_(core),
      lanes_(lanes),
      catalog_(catalog),
      allocator_(allocator),
      leases_(leases),
      wake_reclaimer_(std::move(wake_reclaimer)),
      resting_(core.home()),
      idle_(core.home()) {}

Task<Status> Committer::Commit(Change change, Executor& resume_on) {
    Request request(*this, std::move(change), resume_on);
    co_await request;
    co_return request.status;
}

Task<void> Committer::Run() {
    co_await Hop(core_.home());  // what is posted already joins the first group
    while (!queue_.empty()) {
        const std::vector<Request*> group = std::exchange(queue_, {});
        Batch batch;
        std::vector<Extent> freed;
        CommitContext context{batch, catalog_, allocator_, freed, false};
        Status result;
        if (core_.failed) {
            result = MakeError(ErrorKind::kIo, "the pool has failed: " + core_.failure());
        }
        for (Request* request : group) {
            if (result.ok()) request->status = request->change(context);
        }
        if (result.ok() && !core_.failed) {
            catalog_.PutPool(batch);
            if (Mutated(Mutant::kBitsAfterRows)) {
                result = core_.metadata().Commit(std::exchange(batch, {}));
            }
            allocator_.Encode(batch);
            result = core_.metadata().Commit(batch);
            if (!result.ok()) core_.Fail("a metadata commit failed: " + result.error().message);
            ++commits_;
        } else if (result.ok()) {  // a change found damage
            result = MakeError(ErrorKind::kIo, "the pool has failed: " + core_.failure());
        }
        if (result.ok() && !freed.empty()) Spawn(Rest(std::move(freed)));
        if (result.ok() && context.noted) wake_reclaimer_();
        for (Request* request : group) {
            if (!result.ok()) request->status = result;
            request->resume_on.Post(request);
        }
        co_await Hop(core_.home());  // those who came meanwhile hand in before the next group
    }
    running_ = false;
    idle_.WakeAll();
}

Task<void> Committer::Rest(std::vector<Extent> freed) {
    resting_.Enter();
    for (const auto& lane : lanes_) {
        co_await Hop(lane->executor);
        if (!Mutated(Mutant::kReusedDuringRead)) co_await lane->epochs.Barrier();
    }
    co_await Hop(core_.home());
    leases_.Release(freed);
    for (const Extent& extent : freed) released_blocks_ += extent.count;
    resting_.Leave();
}

Task<void> Committer::Settled() {
    Change nothing = [](CommitContext&) { return Status(); };
    const Status ignored = co_await Commit(std::move(nothing), core_.home());
    (void)ignored;
    std::vector<Extent> none;
    co_await Rest(std::move(none));  // passes each lane behind those that came before
}

Task<void> Committer::Idle() {
    while (running_) co_await idle_.Wait();
    co_await resting_.Drained();
}

}  // namespace varve::cow
