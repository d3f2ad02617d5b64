// The insides of Reactor, for reactor*.cc: its ring, its queues, and the memory it lends.
#pragma once

#include <liburing.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <utility>

#include "base/backoff.h"
#include "base/check.h"
#include "base/reactor.h"

namespace varve {

constexpr uint16_t kBufferGroup = 0;  // of what Receive() lends

struct Reactor::State {
    using Clock = std::chrono::steady_clock;

    explicit State(ReactorOptions o) : options(std::move(o)) {
        stop.run = [](Runnable* self) { static_cast<StopRequest*>(self)->requested = true; };
        wake_op.done = [](Op*, int32_t) {};
    }
    ~State();

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
    void Poll();
    void LookUntil(Clock::time_point end);
    bool FallAsleep();
    void Submit();
    void SubmitTransfer();
    void Enter(bool wait);
    void Entered(int result);
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

    /// That something is about to come, and until when it is looked for.
    struct Expectation {
        bool expected = false;
        bool polled = false;  // for this one
        Clock::time_point until;
        Backoff polls{63};

        void Expect() {
            expected = true;
            polled = false;
        }
        void Came() {
            if (expected && polled) polls.Succeeded();
            expected = false;
        }
        bool ShallPoll(Clock::time_point now, std::chrono::nanoseconds most) {
            if (expected && !polled) {
                expected = !polls.Skip();
                polled = true;
                until = now + most;
            }
            return expected;
        }
        void GiveUpIfLate(Clock::time_point now) {
            if (!expected || now < until) return;
            polls.Failed();
            expected = false;
        }
    };

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
    std::atomic<uint64_t> polls{0};
    StopRequest stop;
    Expectation receive;
    Expectation post;
    uint64_t turn = 0;
    unsigned transfers_prepared = 0;  // since the last submission
    Op wake_op;
    uint64_t wake_count = 0;

    // Memory for Receive: one mapping cut into equal pieces, of which [0, lent) take part. The
    // rest is never touched and so costs nothing.
    io_uring_buf_ring* lent_ring = nullptr;
    std::byte* buffers = nullptr;
    unsigned lent = 0;
};

inline io_uring_sqe* Reactor::State::NextSqe() {
    for (;;) {
        io_uring_sqe* sqe = io_uring_get_sqe(&ring);
        if (sqe) return sqe;
        Enter(false);
        Reap();
    }
}

inline io_uring_sqe* Reactor::State::Begin(Op& op, Op::Kind kind) {
    VARVE_CHECK(!op.in_flight_);
    op.in_flight_ = true;
    op.kind_ = kind;
    ++in_flight;
    return NextSqe();
}

}  // namespace varve
