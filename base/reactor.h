// Reactor: a thread with one io_uring, on which sockets, files and coroutines are served.
// Not a scheduler with priorities, and not for calls that block: those belong on a Worker.
//
// One turn of the loop: run what completed, run what was posted, run the batch hooks, then submit
// everything that those prepared and wait for the next completion, in one system call. So a
// hundred requests that arrive together cost few system calls together. Only transfers of files do
// not wait for the end of the turn: each four of them leave, with all that was prepared before, so
// that the device begins.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/check.h"
#include "base/executor.h"
#include "base/result.h"

namespace varve {

/// One operation of the ring. It lives in its owner and must not move or die while in flight;
/// afterwards it may be used again, also from inside `done`.
struct Op {
    /// Called once on the reactor's thread, never from inside the call that started the operation.
    /// `result`: bytes, or a negative errno value.
    void (*done)(Op* op, int32_t result) = nullptr;

    Op() = default;
    Op(const Op&) = delete;
    Op& operator=(const Op&) = delete;
    ~Op() { VARVE_CHECK(!in_flight_); }

    bool in_flight() const { return in_flight_; }

  private:
    friend class Reactor;
    enum class Kind : uint8_t { kPlain, kReceive, kTimer, kWake };

    Op* next_ = nullptr;  // among those that completed
    int32_t result_ = 0;
    uint32_t flags_ = 0;  // of the completion
    Kind kind_ = Kind::kPlain;
    bool in_flight_ = false;
};

/// A receive into memory that the reactor lends. See Reactor::Receive.
struct ReceiveOp : Op {
  private:
    friend class Reactor;
    int fd_ = -1;
    uint32_t most_ = 0;
    bool idle_ = false;
};

/// See Reactor::StartTimer.
struct TimerOp : Op {
  private:
    friend class Reactor;
    int64_t when_[2] = {0, 0};  // seconds, nanoseconds; read by the kernel
};

/// Something to do once at the end of the current turn, before the loop enters the kernel: for
/// instance to send all replies that came together. Lives in its owner.
struct BatchHook {
    void (*run)(BatchHook*) = nullptr;

    BatchHook() = default;
    BatchHook(const BatchHook&) = delete;
    BatchHook& operator=(const BatchHook&) = delete;
    ~BatchHook() { VARVE_CHECK(!queued_); }
    bool queued() const { return queued_; }

  private:
    friend class Reactor;
    BatchHook* next_ = nullptr;
    bool queued_ = false;
};

struct ReactorOptions {
    std::string name = "reactor";        // the thread's; 15 characters are shown by the system
    unsigned queue_entries = 256;        // submissions that leave in one system call at most
    unsigned completion_entries = 8192;  // operations in flight beyond this cost more, not fail
    unsigned receive_buffers = 64;       // lent by Receive(), a power of two; 0: none
    uint32_t receive_buffer_bytes = 256 << 10;
    int64_t poll_nanoseconds = 0;  // see Reactor::ExpectSoon; 0: never
};

class Reactor : public Executor {
  public:
    /// Starts the thread and its ring. kFailed, with a message that names the reason and the
    /// remedy, where io_uring cannot be used: kernel before 6.1, sysctl, seccomp.
    static Result<std::unique_ptr<Reactor>> Start(ReactorOptions options);

    /// Stop(), if that was not done. REQUIRES: every Post() has returned.
    ~Reactor() override;

    /// Waits until everything posted has run and no operation is in flight, then ends the thread.
    /// Cancels nothing: owners end their receives first. From another thread, once; nothing may be
    /// posted from other threads afterwards.
    void Stop();

    /// Lock-free; wakes the thread only if it sleeps. From the reactor's own thread it is a list.
    void Post(Runnable* runnable) override;

    /// As ExpectSoon() below, for twice the time.
    void ExpectPost() override;

    /// Whether the caller is the reactor's thread. All methods below are for that thread only.
    bool InThread() const;

    /// Runs `hook` at the end of this turn. Once, however often it is asked.
    void AtBatchEnd(BatchHook& hook);

    // ---- files. `vectors` must stay valid until completion if count > 1, the memory always.
    // Short transfers are the caller's matter. At most 1024 vectors.
    void Read(Op& op, int fd, const iovec* vectors, unsigned count, uint64_t offset);
    void Write(Op& op, int fd, const iovec* vectors, unsigned count, uint64_t offset);
    void DataSync(Op& op, int fd);

    // ---- stream sockets
    /// Receives at most `most` bytes (0: as many as a lent buffer holds) into a buffer that is
    /// chosen only when data is there: who waits for data holds no memory. If result > 0, the
    /// bytes are at Received(op) until ReturnReceived(op), which the caller owes, soon: inside
    /// `done` at best; until then they may be written, too. result 0: the peer has sent its last
    /// byte.
    /// `idle`: nothing is expected to be there already, so the system need not look first.
    void Receive(ReceiveOp& op, int fd, uint32_t most, bool idle = false);
    std::span<std::byte> Received(const ReceiveOp& op) const;
    void ReturnReceived(ReceiveOp& op);

    /// Receives what there is once there is any, at most `memory.size()` bytes; 0 at the end of the
    /// stream. Not all: an operation that goes on and on in small steps ends up in a thread of the
    /// ring's, each in one of its own.
    void ReceiveSome(Op& op, int fd, std::span<std::byte> memory);

    /// Sends of what `message` names as much as there is room for, once there is any. `message` and
    /// what it points to stay valid until completion. A closed peer gives EPIPE, no signal.
    void SendSome(Op& op, int fd, const msghdr& message);

    /// Completes when the peer of the stream socket `fd` has sent its last byte or is gone; with
    /// what poll(2) tells. At once if that is so already.
    void WaitForHangUp(Op& op, int fd);

    /// Whether an operation that nobody cancelled was never begun, for want of a thread to do it:
    /// to be done again, or in another way. Says nothing about the file or the peer.
    static bool WasNotIssued(int32_t result) { return result == -ECANCELED || result == -EAGAIN; }

    /// Says that a receive is about to complete. When there is nothing else to do the thread looks
    /// for one, from then on for ReactorOptions::poll_nanoseconds, before it falls asleep: to be
    /// woken takes longer than that in a virtual machine, and as much processor time. It does so
    /// less and less often while nothing comes in time.
    void ExpectSoon();

    // ---- others
    /// Completes with 0 after `nanoseconds`, with -ECANCELED if it was cancelled.
    void StartTimer(TimerOp& op, int64_t nanoseconds);

    /// Asks that `op` end early; it still completes, with -ECANCELED or as if nothing had happened.
    void Cancel(Op& op);

    /// Operations in flight, the reactor's own not counted.
    uint64_t in_flight() const;

    /// A number that every turn of the loop has of its own.
    uint64_t turn() const;

    /// How often the loop entered the kernel. From any thread.
    uint64_t enters() const;

    /// How often the loop looked for what was expected, in vain or not. From any thread.
    uint64_t polls() const;

  private:
    struct State;  // with liburing, kept out of this header

    explicit Reactor(ReactorOptions options);

    std::unique_ptr<State> state_;
};

}  // namespace varve
