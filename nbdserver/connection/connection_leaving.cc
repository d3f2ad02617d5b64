// Connection: clients that have left, and what must not land any more when others come.
//
// A client that goes without DISC may have changes under way. Whoever opens the disk next must not
// see them land in what it has written: so it waits until those connections have ended.
#include <poll.h>

#include <vector>

#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {

/// What the system knows of the peer: POLLRDHUP has sent its last byte, POLLHUP takes nothing
/// either, POLLERR it broke off.
int Connection::Poll() const {
    pollfd socket{fd_, POLLRDHUP, 0};
    return poll(&socket, 1, 0) == 1 ? socket.revents : 0;
}

bool Connection::Leaving(int revents) {
    // What a client that has closed sent before may still be there, a DISC at its end.
    const bool heard = state_ == State::kDraining && (revents & POLLHUP) != 0;
    if (state_ != State::kDropped && ((revents & POLLERR) != 0 || heard)) Lose();
    return state_ != State::kOpen || revents != 0;
}

/// While nothing is received, nobody else would notice that the client broke off.
void Connection::WatchPeer() {
    if (hang_up_op_.in_flight()) {
        if (state_ != State::kOpen && requests_ == 0) shared_.reactor.Cancel(hang_up_op_);
        return;
    }
    if (state_ == State::kOpen && paused_ && !hung_up_) {
        shared_.reactor.WaitForHangUp(hang_up_op_, fd_);
    }
}

void Connection::OnHangUp(int32_t result) {
    Wake();
    if (result <= 0) return;
    hung_up_ = true;
    Leaving(result);
}

bool ConnectionHost::Shared::AnyLeaver(cow::Volume& volume, uint64_t count, bool end) {
    std::vector<Connection*> candidates;
    std::vector<pollfd> sockets;
    for (Connection* connection : all) {
        if (&connection->volume_ != &volume || connection->number_ >= count) continue;
        candidates.push_back(connection);
        sockets.push_back({connection->fd_, POLLRDHUP, 0});
    }
    poll(sockets.data(), sockets.size(), 0);
    bool any = false;
    for (size_t i = 0; i < candidates.size(); ++i) {
        if (!candidates[i]->Leaving(sockets[i].revents)) continue;
        any = true;
        if (end) candidates[i]->Drop();
    }
    return any;
}

struct ConnectionHost::Shared::LeaveDeadline : TimerOp {
    WaitList* left = nullptr;
    bool over = false;
};

Task<void> ConnectionHost::AwaitLeavers(cow::Volume& volume) {
    Shared& shared = *shared_;
    const uint64_t count = shared.connections_started;
    if (!shared.AnyLeaver(volume, count, false)) co_return;
    Shared::LeaveDeadline deadline;
    deadline.left = &shared.left;
    deadline.done = [](Op* op, int32_t) {
        auto* self = static_cast<Shared::LeaveDeadline*>(op);
        self->over = true;
        self->left->WakeAll();
    };
    const auto grace_ms = static_cast<int64_t>(shared.limits.leave_ms_max);
    shared.reactor.StartTimer(deadline, grace_ms * 1'000'000);
    while (shared.AnyLeaver(volume, count, deadline.over)) co_await shared.left.Wait();
    shared.reactor.Cancel(deadline);
    while (!deadline.over) co_await shared.left.Wait();
}

}  // namespace varve::nbdserver
