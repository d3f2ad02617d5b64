// Connection: large reads, in slices. Zeros for holes, and the pages of new memory, cost time on
// the reactor's thread; so one slice begins in each turn of its loop, whoever reads, and requests
// of others come between. It also bounds what an unaligned read takes besides its payload.
// Other requests that work on much begin in the same way; they yield by themselves.
#include <algorithm>
#include <coroutine>
#include <utility>

#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {
namespace {

constexpr int64_t kNextTurnNanoseconds = 1000;

}  // namespace

/// Waits until a slice may begin; in the order of asking.
class ConnectionHost::Shared::SliceTurn {
  public:
    explicit SliceTurn(Shared& shared) : shared_(shared) {}
    bool await_ready() { return !shared_.slices_ && shared_.BeginSlice(); }
    void await_suspend(std::coroutine_handle<> waiter) {
        handle_ = waiter;
        *shared_.slices_tail_ = this;
        shared_.slices_tail_ = &next_;
        if (!shared_.slice_timer.in_flight()) {
            shared_.reactor.StartTimer(shared_.slice_timer, kNextTurnNanoseconds);
        }
    }
    void await_resume() const {}

  private:
    friend struct Shared;

    Shared& shared_;
    std::coroutine_handle<> handle_;
    SliceTurn* next_ = nullptr;
};

/// Whether none has begun in this turn.
bool ConnectionHost::Shared::BeginSlice() {
    return std::exchange(slice_turn_, reactor.turn()) != reactor.turn();
}

void ConnectionHost::Shared::OnSliceTimer() {
    if (!BeginSlice()) return reactor.StartTimer(slice_timer, kNextTurnNanoseconds);
    SliceTurn* const first = slices_;
    slices_ = first->next_;
    if (!slices_) slices_tail_ = &slices_;
    if (slices_) reactor.StartTimer(slice_timer, kNextTurnNanoseconds);
    first->handle_.resume();
}

Task<Errno> Connection::ExecuteInTurn(Request* request) {
    Shared::SliceTurn turn(shared_);
    co_await turn;
    if (requester_.gone()) co_return ECANCELED;
    Task<Errno> executing = Execute(request);
    co_return co_await executing;
}

Task<Errno> Connection::ReadInSlices(Request* request, std::vector<cow::Allocation>* map) {
    const std::span<std::byte> payload = request->payload.span();
    for (size_t done = 0; done < payload.size();) {
        Shared::SliceTurn turn(shared_);
        co_await turn;
        if (state_ == State::kDropped) co_return ECANCELED;
        const size_t length = std::min<size_t>(kReadSliceBytes, payload.size() - done);
        Task<Errno> reading =
            volume_.Read(request->offset + done, payload.subspan(done, length), map, &requester_);
        const Errno error = co_await reading;
        if (error) co_return error;
        done += length;
    }
    co_return 0;
}

}  // namespace varve::nbdserver
