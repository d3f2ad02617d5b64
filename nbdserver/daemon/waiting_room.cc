#include "nbdserver/daemon/waiting_room.h"

#include <poll.h>

#include <utility>

namespace varve::nbdserver {
namespace {

constexpr uint64_t kLookMs = 25;
constexpr unsigned kLooksToBeSeated = 3;  // so whoever gets an answer at once is never counted

}  // namespace

WaitingRoom::WaitingRoom(Control& control, Gate& gate, uint64_t each_max, uint64_t all_max,
                         std::function<void()> seated)
    : gate_(gate),
      each_max_(each_max),
      all_max_(all_max),
      on_seated_(std::move(seated)),
      timer_(control) {}

void WaitingRoom::Enter(Guest& guest) {
    guest.looks = 0;
    guest.seated = guest.ended = false;
    guest.place = guests_.insert(guests_.end(), &guest);
    if (std::exchange(watching_, true)) return;
    gate_.Enter();
    Spawn(Watch());
}

void WaitingRoom::Leave(Guest& guest) {
    guests_.erase(guest.place);
    if (!guest.seated) return;
    --seated_;
    const auto count = seated_for_.find(guest.name);
    if (--count->second == 0) seated_for_.erase(count);
}

Task<void> WaitingRoom::Watch() {
    while (!guests_.empty()) {
        Task<bool> waiting = timer_.Wait(kLookMs);
        co_await waiting;
        Look();
    }
    watching_ = false;
    gate_.Leave();
}

/// Asks the system about all of them at once. Nobody reads from them meanwhile, so nobody else
/// would see that a peer has closed.
void WaitingRoom::Look() {
    const std::vector<Guest*> guests(guests_.begin(), guests_.end());
    std::vector<pollfd> sockets;
    sockets.reserve(guests.size());
    for (const Guest* guest : guests) sockets.push_back({guest->fd, POLLRDHUP, 0});
    ::poll(sockets.data(), sockets.size(), 0);
    for (size_t i = 0; i < guests.size(); ++i) {
        Guest& guest = *guests[i];
        if (guest.ended) continue;
        if (sockets[i].revents != 0) {
            End(guest, Reason::kPeerGone);
        } else if (!guest.seated && ++guest.looks >= kLooksToBeSeated) {
            Seat(guest);
        }
    }
}

void WaitingRoom::Seat(Guest& guest) {
    const auto count = seated_for_.find(guest.name);
    const bool full = count != seated_for_.end() && count->second >= each_max_;
    if (full || seated_ >= all_max_) return End(guest, Reason::kCrowded);
    guest.seated = true;
    ++seated_;
    ++seated_for_[guest.name];
    on_seated_();
}

void WaitingRoom::End(Guest& guest, Reason reason) {
    guest.ended = true;
    guest.end(reason);
}

}  // namespace varve::nbdserver
