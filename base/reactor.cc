#include "base/reactor.h"

#include <fmt/format.h>
#include <liburing.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <future>
#include <thread>

namespace varve {
namespace {

// Posted work may post more: so many rounds of it make one turn before the ring has its say.
constexpr unsigned kPostRounds = 16;
constexpr uint16_t kBufferGroup = 0;
// Lent at first, doubled when too few: few buffers that are used often stay in the cache.
constexpr unsigned kLentAtFirst = 4;
constexpr size_t kTransferMax = 1 << 30;

thread_local const Reactor* current_reactor = nullptr;

int DisabledSysctl() {
    std::FILE* file = std::fopen("/proc/sys/kernel/io_uring_disabled", "re");
    if (!file) return 0;
    int value = 0;
    if (std::fscanf(file, "%d", &value) != 1) value = 0;
    std::fclose(file);
    return value;
}

/// Says why io_uring cannot be used here and what to do about it.
Error Unusable(int error) {
    const char* const seccomp =
        "a seccomp filter (of a container, most likely) forbids it: allow io_uring_setup, "
        "io_uring_enter and io_uring_register in its profile";
    std::string reason;
    if (error == ENOSYS) {
        reason = fmt::format("this kernel has none, or {}. Linux 6.1 or later is needed", seccomp);
    } else if (error == EPERM || error == EACCES) {
        const int disabled = DisabledSysctl();
        reason = disabled ? fmt::format(
                                "it is switched off, kernel.io_uring_disabled is {}: set "
                                "it to 0 with sysctl",
                                disabled)
                          : seccomp;
    } else if (error == EINVAL) {
        reason = "this kernel is too old: Linux 6.1 or later is needed";
    } else if (error == ENOMEM) {
        reason = "not enough memory: raise the memory limit, or RLIMIT_MEMLOCK";
    } else {
        reason = std::strerror(error);
    }
    return MakeError(ErrorKind::kFailed, "io_uring cannot be used: " + reason);
}

void* MapMemory(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

}  // namespace

struct Reactor::State {
    explicit State(ReactorOptions o) : options(std::move(o)) {
        stop.run = [](Runnable* self) { static_cast<StopRequest*>(self)->requested = true; };
        wake_op.done = [](Op*, int32_t) {};
    }

    // Start and end of the thread.
    Status SetUp();
    Status SetUpBuffers();
    void Loop();
    void TearDown();

    // One turn.
    void RunCompleted();
    void Complete(Op& op);
    void RunPosted();
    void RunHooks();
    bool Finished() const;
    bool FallAsleep();
    void Enter(bool wait);
    void Reap();

    void PostLocally(Runnable* runnable) {
        runnable->next = nullptr;
        *local_tail = runnable;
        local_tail = &runnable->next;
    }
    void TakePosted();

    io_uring_sqe* NextSqe();
    io_uring_sqe* Begin(Op& op, Op::Kind kind);
    void ArmWake();
    void StartReceive(ReceiveOp& op);
    void Lend(unsigned index);
    void LendMore();
    std::byte* BufferAt(const Op& op) const {
        const size_t index = op.flags_ >> IORING_CQE_BUFFER_SHIFT;
        return buffers + index * options.receive_buffer_bytes;
    }

    struct StopRequest : Runnable {
        bool requested = false;
    };

    const ReactorOptions options;
    std::thread thread;
    int wake_fd = -1;

    // Changed by every thread: a stack of what others posted, or &asleep while the thread sleeps
    // and nothing is posted.
    alignas(64) std::atomic<Runnable*> posted{nullptr};
    Runnable asleep;

    // Changed by the reactor's thread only.
    alignas(64) io_uring ring{};
    bool ring_open = false;
    Runnable* local_head = nullptr;
    Runnable** local_tail = &local_head;
    Op* completed_head = nullptr;
    Op** completed_tail = &completed_head;
    BatchHook* hooks_head = nullptr;
    BatchHook** hooks_tail = &hooks_head;
    uint64_t in_flight = 0;
    std::atomic<uint64_t> enters{0};
    StopRequest stop;
    Op wake_op;
    uint64_t wake_count = 0;

    // Memory for Receive: one mapping cut into equal pieces, of which [0, lent) take part. The
    // rest is never touched and so costs nothing.
    io_uring_buf_ring* lent_ring = nullptr;
    std::byte* buffers = nullptr;
    unsigned lent = 0;
};

// ---------------------------------------------------------------------------------------------
// Start and end

Reactor::Reactor(ReactorOptions options) : state_(std::make_unique<State>(std::move(options))) {}

Reactor::~Reactor() {
    Stop();
}

Result<std::unique_ptr<Reactor>> Reactor::Start(ReactorOptions options) {
    VARVE_CHECK((options.receive_buffers & (options.receive_buffers - 1)) == 0);
    VARVE_CHECK(options.receive_buffers <= 32768);
    std::unique_ptr<Reactor> reactor(new Reactor(std::move(options)));
    std::promise<Status> started;
    reactor->state_->thread = std::thread([self = reactor.get(), &started] {
        State& state = *self->state_;
        pthread_setname_np(pthread_self(), state.options.name.substr(0, 15).c_str());
        // Signals are for the thread that waits for them.
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_BLOCK, &all, nullptr);
        current_reactor = self;
        Status set_up = state.SetUp();
        const bool ok = set_up.ok();
        started.set_value(std::move(set_up));
        if (ok) state.Loop();
        state.TearDown();
    });
    Status result = started.get_future().get();
    if (result.ok()) return reactor;
    reactor->state_->thread.join();
    return result.error();
}

Status Reactor::State::SetUp() {
    io_uring_params params{};
    // DEFER_TASKRUN: the kernel's own work for this ring runs only inside Enter().
    params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                   IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE;
    params.cq_entries = std::max(options.completion_entries, options.queue_entries * 2);
    const int error = io_uring_queue_init_params(options.queue_entries, &ring, &params);
    if (error < 0) return Unusable(-error);
    ring_open = true;
    if (!(params.features & IORING_FEAT_NODROP)) return Unusable(EINVAL);
    io_uring_register_ring_fd(&ring);  // a cheaper entry; it works without

    wake_fd = eventfd(0, EFD_CLOEXEC);
    if (wake_fd < 0) return SystemError(errno, "cannot make an eventfd");
    if (options.receive_buffers) {
        Status buffers_ready = SetUpBuffers();
        if (!buffers_ready.ok()) return buffers_ready;
    }
    ArmWake();
    return {};
}

Status Reactor::State::SetUpBuffers() {
    lent_ring =
        static_cast<io_uring_buf_ring*>(MapMemory(options.receive_buffers * sizeof(io_uring_buf)));
    buffers = static_cast<std::byte*>(
        MapMemory(size_t{options.receive_buffers} * options.receive_buffer_bytes));
    if (!lent_ring || !buffers) return SystemError(ENOMEM, "cannot allocate receive buffers");
    io_uring_buf_reg registration{};
    registration.ring_addr = reinterpret_cast<uintptr_t>(lent_ring);
    registration.ring_entries = options.receive_buffers;
    registration.bgid = kBufferGroup;
    const int error = io_uring_register_buf_ring(&ring, &registration, 0);
    if (error < 0) return Unusable(-error);
    io_uring_buf_ring_init(lent_ring);
    LendMore();
    return {};
}

void Reactor::State::TearDown() {
    if (ring_open) io_uring_queue_exit(&ring);
    if (lent_ring) munmap(lent_ring, options.receive_buffers * sizeof(io_uring_buf));
    if (buffers) munmap(buffers, size_t{options.receive_buffers} * options.receive_buffer_bytes);
    current_reactor = nullptr;
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
    for (;;) {
        RunCompleted();
        RunPosted();
        RunHooks();
        if (Finished()) break;
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

/// Whether the thread may sleep now: from then on, who posts wakes it.
bool Reactor::State::FallAsleep() {
    if (local_head || completed_head) return false;
    Runnable* none = nullptr;
    return posted.compare_exchange_strong(none, &asleep, std::memory_order_acq_rel);
}

void Reactor::State::Enter(bool wait) {
    enters.store(enters.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    const int result =
        wait ? io_uring_submit_and_wait(&ring, 1) : io_uring_submit_and_get_events(&ring);
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

// ---------------------------------------------------------------------------------------------
// Operations

io_uring_sqe* Reactor::State::NextSqe() {
    for (;;) {
        io_uring_sqe* sqe = io_uring_get_sqe(&ring);
        if (sqe) return sqe;
        Enter(false);
        Reap();
    }
}

io_uring_sqe* Reactor::State::Begin(Op& op, Op::Kind kind) {
    VARVE_CHECK(!op.in_flight_);
    op.in_flight_ = true;
    op.kind_ = kind;
    ++in_flight;
    return NextSqe();
}

void Reactor::State::Lend(unsigned index) {
    io_uring_buf_ring_add(lent_ring, buffers + size_t{index} * options.receive_buffer_bytes,
                          options.receive_buffer_bytes, static_cast<uint16_t>(index),
                          io_uring_buf_ring_mask(options.receive_buffers), 0);
    io_uring_buf_ring_advance(lent_ring, 1);
}

void Reactor::State::LendMore() {
    const unsigned wanted = std::min(options.receive_buffers, std::max(kLentAtFirst, lent * 2));
    while (lent < wanted) Lend(lent++);
}

void Reactor::State::StartReceive(ReceiveOp& op) {
    io_uring_sqe* sqe = Begin(op, Op::Kind::kReceive);
    io_uring_prep_recv(sqe, op.fd_, nullptr, op.most_, 0);
    if (op.idle_) sqe->ioprio |= IORING_RECVSEND_POLL_FIRST;
    sqe->flags |= IOSQE_BUFFER_SELECT;
    sqe->buf_group = kBufferGroup;
    io_uring_sqe_set_data(sqe, static_cast<Op*>(&op));
}

void Reactor::AtBatchEnd(BatchHook& hook) {
    if (hook.queued_) return;
    hook.queued_ = true;
    hook.next_ = nullptr;
    *state_->hooks_tail = &hook;
    state_->hooks_tail = &hook.next_;
}

void Reactor::Read(Op& op, int fd, const iovec* vectors, unsigned count, uint64_t offset) {
    io_uring_sqe* sqe = state_->Begin(op, Op::Kind::kPlain);
    if (count == 1) {
        const size_t length = std::min(vectors->iov_len, kTransferMax);
        io_uring_prep_read(sqe, fd, vectors->iov_base, static_cast<unsigned>(length), offset);
    } else {
        io_uring_prep_readv(sqe, fd, vectors, count, offset);
    }
    io_uring_sqe_set_data(sqe, &op);
}

void Reactor::Write(Op& op, int fd, const iovec* vectors, unsigned count, uint64_t offset) {
    io_uring_sqe* sqe = state_->Begin(op, Op::Kind::kPlain);
    if (count == 1) {
        const size_t length = std::min(vectors->iov_len, kTransferMax);
        io_uring_prep_write(sqe, fd, vectors->iov_base, static_cast<unsigned>(length), offset);
    } else {
        io_uring_prep_writev(sqe, fd, vectors, count, offset);
    }
    io_uring_sqe_set_data(sqe, &op);
}

void Reactor::DataSync(Op& op, int fd) {
    io_uring_sqe* sqe = state_->Begin(op, Op::Kind::kPlain);
    io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    io_uring_sqe_set_data(sqe, &op);
}

void Reactor::Receive(ReceiveOp& op, int fd, uint32_t most, bool idle) {
    VARVE_CHECK(state_->lent > 0);
    op.fd_ = fd;
    op.most_ = most;
    op.idle_ = idle;
    state_->StartReceive(op);
}

std::span<const std::byte> Reactor::Received(const ReceiveOp& op) const {
    VARVE_CHECK(op.flags_ & IORING_CQE_F_BUFFER);
    return {state_->BufferAt(op), static_cast<size_t>(op.result_)};
}

void Reactor::ReturnReceived(ReceiveOp& op) {
    VARVE_CHECK(op.flags_ & IORING_CQE_F_BUFFER);
    state_->Lend(op.flags_ >> IORING_CQE_BUFFER_SHIFT);
    op.flags_ = 0;
}

void Reactor::ReceiveAll(Op& op, int fd, std::span<std::byte> memory) {
    io_uring_sqe* sqe = state_->Begin(op, Op::Kind::kPlain);
    io_uring_prep_recv(sqe, fd, memory.data(), memory.size(), MSG_WAITALL);
    io_uring_sqe_set_data(sqe, &op);
}

void Reactor::SendAll(Op& op, int fd, const msghdr& message) {
    io_uring_sqe* sqe = state_->Begin(op, Op::Kind::kPlain);
    io_uring_prep_sendmsg(sqe, fd, &message, MSG_WAITALL | MSG_NOSIGNAL);
    io_uring_sqe_set_data(sqe, &op);
}

void Reactor::StartTimer(TimerOp& op, int64_t nanoseconds) {
    static_assert(sizeof(op.when_) == sizeof(__kernel_timespec));
    op.when_[0] = nanoseconds / 1'000'000'000;
    op.when_[1] = nanoseconds % 1'000'000'000;
    io_uring_sqe* sqe = state_->Begin(op, Op::Kind::kTimer);
    io_uring_prep_timeout(sqe, reinterpret_cast<__kernel_timespec*>(op.when_), 0, 0);
    io_uring_sqe_set_data(sqe, static_cast<Op*>(&op));
}

void Reactor::Cancel(Op& op) {
    if (!op.in_flight_) return;
    io_uring_sqe* sqe = state_->NextSqe();
    io_uring_prep_cancel(sqe, &op, 0);
    io_uring_sqe_set_data(sqe, nullptr);
}

uint64_t Reactor::in_flight() const {
    return state_->in_flight;
}

uint64_t Reactor::enters() const {
    return state_->enters.load(std::memory_order_relaxed);
}

}  // namespace varve
