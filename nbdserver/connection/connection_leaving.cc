// Connection: clients that have left, and what must not land any more when others come.
//
// A client that goes without DISC may have changes under way. Whoever opens the disk next must not
// see them land in what it has written: so it waits until those connections have ended.
#include <poll.h>

#include <vector>

#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {
namespace {

/// Clients that have left a read-only volume and whose requests hang, before the next ones wait:
/// else those who come and go while the device hangs would take all connections.
constexpr size_t kReadersLeftMax = 64;

}  // namespace

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

/// Looks at the first `count` connections that are of `volume`; `*look`: this look's number. True
/// if clients are found, now or before, who have left it and whose connections have not ended.
bool ConnectionHost::Shared::FindLeavers(cow::Volume& volume, uint64_t count, uint64_t* look) {
    std::vector<Connection*> candidates;
    std::vector<pollfd> sockets;
    for (Connection* connection : all) {
        if (&connection->volume_ != &volume || connection->number_ >= count) continue;
        candidates.push_back(connection);
        sockets.push_back({connection->fd_, POLLRDHUP, 0});
    }
    *look = ++looks;
    const bool read_only = volume.read_only();
    if (!read_only) {  // what is not noticed yet matters only where something may land
        poll(sockets.data(), sockets.size(), 0);
        peers_asked += candidates.size();
    }
    size_t found = 0;
    for (size_t i = 0; i < candidates.size(); ++i) {
        Connection& connection = *candidates[i];
        if (!connection.Leaving(sockets[i].revents)) continue;
        ++found;
        if (connection.seen_leaving_ != 0) continue;
        connection.seen_leaving_ = *look;
        ++leavers[&volume].left[*look];
    }
    return found > (read_only ? kReadersLeftMax : 0);
}

/// Gives up what is left of those that were seen leaving up to `look`.
void ConnectionHost::Shared::DropLeavers(cow::Volume& volume, uint64_t look) {
    for (Connection* connection : all) {
        const uint64_t seen = connection->seen_leaving_;
        if (&connection->volume_ == &volume && seen != 0 && seen <= look) connection->Drop();
    }
}

/// A connection of `volume` that was seen leaving at `look` has ended. Wakes who waited for it and
/// has nobody else to wait for, once.
void ConnectionHost::Shared::LeaverEnded(cow::Volume& volume, uint64_t look) {
    Leavers& of = leavers.at(&volume);
    const auto at = of.left.find(look);
    if (--at->second > 0) return;
    of.left.erase(at);
    while (!of.waiters.empty() && !of.AnyUpTo(of.waiters.begin()->first)) {
        LeaverWait& wait = *of.waiters.begin()->second;
        of.waiters.erase(of.waiters.begin());
        wait.over_ = true;
        wait.changed_->WakeAll();
    }
    if (of.left.empty()) leavers.erase(&volume);
}

/// Until those that were seen up to `look` have ended, or `wait` is given up.
Task<void> ConnectionHost::Shared::LeaversEnded(cow::Volume& volume, uint64_t look,
                                                LeaverWait& wait) {
    WaitList changed(reactor);
    wait.over_ = false;
    wait.changed_ = &changed;
    const auto place = leavers.at(&volume).waiters.emplace(look, &wait);
    while (!wait.over_ && !wait.given_up_) co_await changed.Wait();
    if (!wait.over_) leavers.at(&volume).waiters.erase(place);
    wait.changed_ = nullptr;
}

/// When the time is over that leavers have to finish what is outstanding.
struct ConnectionHost::Shared::LeaveDeadline : TimerOp {
    LeaveDeadline(Shared& s, cow::Volume& v) : shared(s), volume(v), ended(s.reactor) {
        done = [](Op* op, int32_t) { static_cast<LeaveDeadline*>(op)->OnTimer(); };
        const auto grace_ms = static_cast<int64_t>(s.limits.leave_ms_max);
        s.reactor.StartTimer(*this, grace_ms * 1'000'000);
    }
    void OnTimer() {
        over = true;
        if (look != 0) shared.DropLeavers(volume, look);
        ended.WakeAll();
    }
    /// Those that are found up to `now` have to hurry too, if the time is over.
    void CountFor(uint64_t now) {
        look = now;
        if (over) shared.DropLeavers(volume, look);
    }
    Task<void> Stop() {
        look = 0;
        if (!over) shared.reactor.Cancel(*this);
        while (!over) co_await ended.Wait();
    }

    Shared& shared;
    cow::Volume& volume;
    WaitList ended;
    uint64_t look = 0;
    bool over = false;
};

void LeaverWait::GiveUp() {
    given_up_ = true;
    if (changed_) changed_->WakeAll();
}

Task<bool> ConnectionHost::AwaitLeavers(cow::Volume& volume, LeaverWait& wait) {
    Shared& shared = *shared_;
    const uint64_t count = shared.connections_started;
    uint64_t look = 0;
    if (wait.given_up_) co_return false;
    if (!shared.FindLeavers(volume, count, &look)) co_return true;
    Shared::LeaveDeadline deadline(shared, volume);
    do {
        deadline.CountFor(look);
        Task<void> ending = shared.LeaversEnded(volume, look, wait);
        co_await ending;
    } while (!wait.given_up_ && shared.FindLeavers(volume, count, &look));
    Task<void> stopping = deadline.Stop();
    co_await stopping;
    co_return !wait.given_up_;
}

}  // namespace varve::nbdserver
