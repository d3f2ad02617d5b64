#include "cow/head/committer.h"

#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// A region's row: its bitmap and key.
constexpr uint64_t kRegionRowBytes = kRegionBlocks / 8 + 32;

}  // namespace

struct Committer::Request : Resumption {
    Committer& committer;
    Change change;
    Executor& resume_on;
    std::vector<uint64_t> regions;  // held until it is built
    Status status;

    Request(Committer& c, Change ch, Executor& on)
        : committer(c), change(std::move(ch)), resume_on(on) {}

    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter) {
        handle = waiter;
        committer.queue_.push_back(this);
        committer.Wake();
    }
    void await_resume() const noexcept {}
};

struct Committer::Looker : Resumption {
    Committer& committer;
    const std::function<void()>& look;
    Looker(Committer& c, const std::function<void()>& l) : committer(c), look(l) {}

    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter) {
        handle = waiter;
        committer.lookers_.push_back(this);
        committer.Wake();
    }
    void await_resume() const noexcept {}
};

struct Committer::Plain : Resumption {
    Committer& committer;
    PlainRows rows;
    Executor& lane;
    Status status;

    Plain(Committer& c, PlainRows r, Executor& on) : committer(c), rows(std::move(r)), lane(on) {}

    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter) {
        handle = waiter;
        committer.HandOver(nullptr, this);
    }
    void await_resume() const noexcept {}
};

/// A batch that home built. Lives in the frame of Run(), which it resumes when it is stored.
struct Committer::Built : Resumption {
    Committer& committer;
    Batch batch;
    std::vector<Extent> freed;
    bool noted = false;
    std::vector<NotePlace> notes;
    std::vector<Request*> requests;
    Status status;

    explicit Built(Committer& c) : committer(c) {}

    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter) {
        handle = waiter;
        committer.HandOver(this, nullptr);
    }
    void await_resume() const noexcept {}
};

Committer::Committer(Core& core, const Lanes& lanes, Catalog& catalog, Allocator& allocator,
                     Leases& leases, WakeReclaimer wake_reclaimer)
    : core_(core),
      lanes_(lanes),
      catalog_(catalog),
      allocator_(allocator),
      leases_(leases),
      wake_reclaimer_(std::move(wake_reclaimer)),
      resting_(core.home()),
      idle_(core.home()) {}

Committer::~Committer() {
    VARVE_CHECK(inbox_.empty() && !storing_ && !running_);
}

// ---- home: building

Task<Status> Committer::Commit(Change change, Executor& resume_on) {
    return CommitIn(std::vector<uint64_t>(), std::move(change), resume_on);
}

Task<Status> Committer::CommitIn(std::vector<uint64_t> regions, Change change,
                                 Executor& resume_on) {
    allocator_.Hold(regions);
    std::vector<uint64_t> closed = regions;
    co_await leases_.Open(std::move(closed));
    Request request(*this, std::move(change), resume_on);
    request.regions = std::move(regions);
    co_await request;
    co_return request.status;
}

Task<void> Committer::Look(std::function<void()> look) {
    if (!running_) {
        look();
        co_return;
    }
    Looker looker(*this, look);
    co_await looker;
}

void Committer::Wake() {
    if (running_) return;
    running_ = true;
    Spawn(Run());
}

Task<void> Committer::Run() {
    co_await Hop(core_.home());  // what is posted already joins the first group
    while (!queue_.empty() || !lookers_.empty()) {
        for (Looker* looker : std::exchange(lookers_, {})) {
            looker->look();
            core_.home().Post(looker);
        }
        Built built(*this);
        Build(built);
        for (const Request* request : built.requests) allocator_.Unhold(request->regions);
        const bool stores = built.status.ok() && !built.batch.empty();
        if (stores) co_await built;
        if (stores && built.status.ok()) allocator_.Stored();
        if (built.status.ok() && !built.freed.empty()) Spawn(Rest(std::move(built.freed)));
        if (built.status.ok() && built.noted) wake_reclaimer_(built.notes);
        for (Request* request : built.requests) {  // the store has taken out those on lanes
            if (!built.status.ok()) request->status = built.status;
            request->resume_on.Post(request);
        }
        co_await Hop(core_.home());  // those who came meanwhile hand in before the next group
    }
    running_ = false;
    idle_.WakeAll();
}

/// Builds the changes of those who have waited longest, as many as fit into one batch.
void Committer::Build(Built& built) {
    const auto failed = [this] {
        return MakeError(ErrorKind::kIo, "the pool has failed: " + core_.failure());
    };
    if (core_.failed) {
        built.requests.assign(queue_.begin(), queue_.end());
        queue_.clear();
        built.status = failed();
        return;
    }
    CommitContext context{built.batch, catalog_, allocator_, built.freed, false, {}};
    uint64_t bytes = 0;
    while (!queue_.empty() && bytes < kGroupBytes) {
        Request* request = queue_.front();
        queue_.pop_front();
        built.requests.push_back(request);
        request->status = request->change(context);
        bytes = built.batch.bytes() + allocator_.changed() * kRegionRowBytes;
    }
    built.noted = context.noted;
    built.notes = std::move(context.notes);
    if (core_.failed) {  // a change found damage
        built.status = failed();
        return;
    }
    if (built.batch.empty()) return;
    NoteChanged(built.batch);
    catalog_.PutPool(built.batch);
    if (Mutated(Mutant::kBitsAfterRows)) built.status = Write(std::exchange(built.batch, {}));
    allocator_.Encode(built.batch);
}

/// Rows that come straight from lanes are none of a branch's.
void Committer::NoteChanged(const Batch& batch) {
    std::optional<BranchId> last;
    for (const Batch::Op& op : batch.ops()) {
        const std::optional<BranchId> branch = BranchOfRow(op.key);
        if (!branch || branch == last) continue;
        changed_.insert(*branch);
        last = branch;
    }
}

std::unordered_set<BranchId> Committer::TakeChanged() {
    if (Mutated(Mutant::kChangedNotToldOf)) changed_.clear();
    return std::exchange(changed_, {});
}

// ---- the committer: storing

Task<Status> Committer::CommitPlain(PlainRows rows, Executor& lane) {
    Plain plain(*this, std::move(rows), lane);
    co_await plain;
    co_return plain.status;
}

void Committer::HandOver(Built* built, Plain* plain) {
    {
        const std::lock_guard lock(mutex_);
        if (plain) inbox_.plain.push_back(plain);
        if (built) inbox_.built = built;
        if (std::exchange(storing_, true)) return;
    }
    Spawn(Store());
}

Task<void> Committer::Store() {
    co_await Hop(core_.committer());
    for (;;) {
        Inbox inbox;
        {
            const std::lock_guard lock(mutex_);
            if (inbox_.empty()) {
                storing_ = false;
                co_return;
            }
            inbox = TakeInbox();
        }
        StoreInbox(std::move(inbox));
    }
}

/// What home built, and rows of lanes as they came, as many as fit into one batch. REQUIRES: mutex_
/// is locked.
Committer::Inbox Committer::TakeInbox() {
    Inbox some;
    some.built = std::exchange(inbox_.built, nullptr);
    for (uint64_t bytes = 0; !inbox_.plain.empty() && bytes < kGroupBytes;) {
        Plain* plain = inbox_.plain.front();
        inbox_.plain.pop_front();
        some.plain.push_back(plain);
        bytes += plain->rows.batch.bytes();
    }
    return some;
}

/// Stores all of it in one commit. Home is told first: whatever the lanes do then, what they post
/// to home comes behind.
void Committer::StoreInbox(Inbox inbox) {
    Batch batch;
    if (inbox.built) batch = std::move(inbox.built->batch);
    std::vector<Extent> freed;
    for (Plain* plain : inbox.plain) {
        batch.Append(std::move(plain->rows.batch));
        freed.insert(freed.end(), plain->rows.freed.begin(), plain->rows.freed.end());
    }
    const Status status = Write(batch);
    std::vector<Request*> on_lanes;
    if (inbox.built) {
        Built& built = *inbox.built;
        built.status = status;
        std::erase_if(built.requests, [&](Request* request) {
            if (&request->resume_on == &core_.home()) return false;
            if (!status.ok()) request->status = status;
            on_lanes.push_back(request);
            return true;
        });
    }
    if (status.ok() && !freed.empty()) Spawn(RestLater(std::move(freed)));
    if (inbox.built) core_.home().Post(inbox.built);
    for (Plain* plain : inbox.plain) {
        plain->status = status;
        plain->lane.Post(plain);
    }
    for (Request* request : on_lanes) request->resume_on.Post(request);
}

Status Committer::Write(const Batch& batch) {
    if (core_.failed) {
        return MakeError(ErrorKind::kIo, "the pool has failed: " + core_.failure());
    }
    if (batch.empty()) return Status();  // blocks were given up before any row named them
    const Waits::Scope waiting(core_.waits, "metadata commit");
    Status status = core_.metadata().Commit(batch);
    if (!status.ok()) core_.Fail("a metadata commit failed: " + status.error().message);
    commits_.fetch_add(1, std::memory_order_relaxed);
    return status;
}

// ---- what was freed

Task<void> Committer::RestLater(std::vector<Extent> freed) {
    co_await Hop(core_.home());
    Spawn(Rest(std::move(freed)));
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
    co_await Hop(core_.committer());  // behind the end of what stores, and its news for home
    co_await Hop(core_.home());
    co_await resting_.Drained();
}

}  // namespace varve::cow
