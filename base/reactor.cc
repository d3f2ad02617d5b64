// The thread, what others post to it, and the turns of its loop. reactor_setup.cc: the ring's start
// and end; reactor_operations.cc: what is done with it.
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <future>
#include <utility>

#include "base/reactor_state.h"

namespace varve {
namespace {

// Posted work may post more: so many rounds of it make one turn before the ring has its say.
constexpr unsigned kPostRounds = 16;

thread_local const Reactor* current_reactor = nullptr;

}  // namespace

// ---------------------------------------------------------------------------------------------
// Start and end

Reactor::Reactor(ReactorOptions options) : state_(std::make_unique<State>(std::move(options))) {}

Reactor::~Reactor() {
    Stop();
}

/// Not with the rest in TearDown(): who posted last may still be waking the thread.
Reactor::State::~State() {
    if (wake_fd >= 0) close(wake_fd);
}

Result<std::unique_ptr<Reactor>> Reactor::Start(ReactorOptions options) {
    VARVE_CHECK((options.receive_buffers & (options.receive_buffers - 1)) == 0);
    VARVE_CHECK(options.receive_buffers <= 32768);
    std::unique_ptr<Reactor> reactor(new Reactor(std::move(options)));
    std::promise<Status> started;
    reactor->state_->thread = std::thread([self = reactor.get(), &started] {
        State& state = *self->state_;
        pthread_setname_np(pthread_self(), state.options.name.substr(0, 15).c_str());
        // Signals are for the thread that waits for them, but for the one that a failed access to
        // mapped memory causes: nobody else can get that.
        sigset_t all;
        sigfillset(&all);
        sigdelset(&all, SIGBUS);
        pthread_sigmask(SIG_BLOCK, &all, nullptr);
        current_reactor = self;
        Status set_up = state.SetUp();
        const bool ok = set_up.ok();
        started.set_value(std::move(set_up));
        if (ok) state.Loop();
        state.TearDown();
        current_reactor = nullptr;
    });
    Status result = started.get_future().get();
    if (result.ok()) return reactor;
    reactor->state_->thread.join();
    return result.error();
}

void Reactor::Stop() {
    if (!state_->thread.joinable()) return;
    VARVE_CHECK(!InThread());
    Post(&state_->stop);
    state_->thread.join();
}

// ---------------------------------------------------------------------------------------------
// Posting

bool Reactor::InThread() const {
    return current_reactor == this;
}

void Reactor::Post(Runnable* runnable) {
    if (InThread()) return state_->PostLocally(runnable);
    Runnable* const asleep = &state_->asleep;
    std::atomic<Runnable*>& posted = state_->posted;
    const int wake_fd = state_->wake_fd;
    Runnable* before = posted.load(std::memory_order_relaxed);
    do {
        runnable->next = before == asleep ? nullptr : before;
    } while (!posted.compare_exchange_weak(before, runnable, std::memory_order_release,
                                           std::memory_order_relaxed));
    if (before != asleep) return;
    const uint64_t one = 1;
    VARVE_CHECK(write(wake_fd, &one, sizeof one) == sizeof one);
}

/// Moves what others posted behind the local queue, oldest first.
void Reactor::State::TakePosted() {
    if (!posted.load(std::memory_order_relaxed)) return;
    Runnable* newest = posted.exchange(nullptr, std::memory_order_acquire);
    if (newest == &asleep) return;
    post.Came();
    Runnable* const last = newest;
    Runnable* oldest = nullptr;
    while (newest) {
        Runnable* const older = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = older;
    }
    *local_tail = oldest;
    local_tail = &last->next;
}

void Reactor::State::ArmWake() {
    io_uring_sqe* sqe = Begin(wake_op, Op::Kind::kWake);
    --in_flight;  // it must not keep the loop from ending
    io_uring_prep_read(sqe, wake_fd, &wake_count, sizeof wake_count, 0);
    io_uring_sqe_set_data(sqe, &wake_op);
}

// ---------------------------------------------------------------------------------------------
// The loop

void Reactor::State::Loop() {
    for (;; ++turn) {
        RunCompleted();
        RunPosted();
        RunHooks();
        if (Finished()) break;
        Poll();
        Enter(FallAsleep());
        Reap();
    }
    // The kernel writes to wake_count until that read is over.
    const uint64_t one = 1;
    VARVE_CHECK(write(wake_fd, &one, sizeof one) == sizeof one);
    while (!completed_head) {
        Enter(true);
        Reap();
    }
    VARVE_CHECK(completed_head == &wake_op);
    wake_op.in_flight_ = false;
}

void Reactor::State::RunCompleted() {
    Op* op = std::exchange(completed_head, nullptr);
    completed_tail = &completed_head;
    while (op) {
        Op* const following = op->next_;
        op->in_flight_ = false;
        --in_flight;
        if (op->kind_ == Op::Kind::kReceive) receive.Came();
        Complete(*op);
        op = following;
    }
}

void Reactor::State::Complete(Op& op) {
    if (op.kind_ == Op::Kind::kWake) {
        ++in_flight;  // was never counted
        return ArmWake();
    }
    if (op.kind_ == Op::Kind::kReceive && op.result_ <= 0) {
        if (op.flags_ & IORING_CQE_F_BUFFER) Lend(op.flags_ >> IORING_CQE_BUFFER_SHIFT);
        if (op.result_ == -ENOBUFS) {
            LendMore();
            return StartReceive(static_cast<ReceiveOp&>(op));
        }
    }
    if (op.kind_ == Op::Kind::kTimer && op.result_ == -ETIME) op.result_ = 0;
    op.done(&op, op.result_);
}

void Reactor::State::RunPosted() {
    for (unsigned round = 0; round < kPostRounds; ++round) {
        TakePosted();
        Runnable* runnable = std::exchange(local_head, nullptr);
        local_tail = &local_head;
        if (!runnable) return;
        while (runnable) {
            Runnable* const following = runnable->next;
            runnable->run(runnable);
            runnable = following;
        }
    }
}

void Reactor::State::RunHooks() {
    while (BatchHook* hook = hooks_head) {
        hooks_head = hook->next_;
        if (!hooks_head) hooks_tail = &hooks_head;
        hook->queued_ = false;
        hook->run(hook);
    }
}

bool Reactor::State::Finished() const {
    return stop.requested && in_flight == 0 && !local_head && !completed_head &&
           !posted.load(std::memory_order_relaxed);
}

/// Looks for what is expected, in as many turns as it takes, until its time is over.
void Reactor::State::Poll() {
    if (options.poll_nanoseconds == 0 || local_head || completed_head) return;
    if (!receive.expected && !post.expected) return;
    const std::chrono::nanoseconds most(options.poll_nanoseconds);
    const Clock::time_point began = Clock::now();
    Clock::time_point end = began;
    if (receive.ShallPoll(began, most)) end = std::max(end, receive.until);
    if (post.ShallPoll(began, 2 * most)) end = std::max(end, post.until);
    if (end == began) return;
    polls.store(polls.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    LookUntil(end);
    const Clock::time_point now = Clock::now();
    receive.GiveUpIfLate(now);
    post.GiveUpIfLate(now);
}

/// Until anything completes or is posted.
void Reactor::State::LookUntil(Clock::time_point end) {
    for (bool late = false;; late = Clock::now() >= end) {
        Enter(false);
        Reap();
        if (late || completed_head || posted.load(std::memory_order_relaxed)) return;
        sched_yield();  // what is looked for may need this processor
    }
}

/// Whether the thread may sleep now: from then on, who posts wakes it.
bool Reactor::State::FallAsleep() {
    if (local_head || completed_head) return false;
    Runnable* none = nullptr;
    return posted.compare_exchange_strong(none, &asleep, std::memory_order_acq_rel);
}

void Reactor::State::Enter(bool wait) {
    Entered(wait ? io_uring_submit_and_wait(&ring, 1) : io_uring_submit_and_get_events(&ring));
}

void Reactor::State::Submit() {
    Entered(io_uring_submit(&ring));
}

void Reactor::State::Entered(int result) {
    enters.store(enters.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    transfers_prepared = 0;
    // What could not be submitted now stays in the queue for the next turn.
    VARVE_CHECK(result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY);
}

/// Takes completions off the ring; they run in the next turn, never from inside a submission.
void Reactor::State::Reap() {
    io_uring_cqe* cqe = nullptr;
    unsigned head = 0;
    unsigned count = 0;
    io_uring_for_each_cqe(&ring, head, cqe) {
        ++count;
        Op* const op = static_cast<Op*>(io_uring_cqe_get_data(cqe));
        if (!op) continue;  // a cancellation itself
        op->result_ = cqe->res;
        op->flags_ = cqe->flags;
        op->next_ = nullptr;
        *completed_tail = op;
        completed_tail = &op->next_;
    }
    io_uring_cq_advance(&ring, count);
}

}  // namespace varve
