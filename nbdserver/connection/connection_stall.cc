// Connection: clients that hold memory others wait for, and neither take their replies nor send
// their payloads. Those are closed; a slow one is not.
#include <fmt/format.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>

#include "base/log.h"
#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {
namespace {

// So many looks in the time that a client may stall, and so much must pass between two of them.
constexpr unsigned kLooks = 4;
constexpr uint64_t kLeastBytes = 64 << 10;

}  // namespace

/// What the peer has taken of what was sent. The system holds up to some MiB that it has not: on a
/// slow line that is many seconds' worth.
uint64_t Connection::BytesTaken() const {
    if (local_) {
        int unread = 0;
        if (ioctl(fd_, SIOCOUTQ, &unread) != 0) return sent_bytes_;
        return sent_bytes_ - std::min(sent_bytes_, static_cast<uint64_t>(unread));
    }
    tcp_info info{};
    socklen_t length = sizeof info;
    if (getsockopt(fd_, IPPROTO_TCP, TCP_INFO, &info, &length) != 0) return sent_bytes_;
    return info.tcpi_bytes_acked;
}

void ConnectionHost::Shared::WatchStalled() {
    if (watch.in_flight()) return;
    watch_begins = true;
    reactor.StartTimer(watch, static_cast<int64_t>(limits.stall_ms_max) * 1'000'000 / kLooks);
}

void ConnectionHost::Shared::LookForStalled(int32_t timer_result) {
    if (!budget.anybody_waits() || all.empty()) return;
    unsigned stalled = 0;
    if (timer_result == 0) {
        for (Connection* connection : all) {
            if (!connection->Stalled(watch_begins)) continue;
            connection->Drop();
            ++stalled;
        }
    }
    if (stalled) {
        Log(LogLevel::kWarning,
            fmt::format("closing {} connections that hold memory which others wait for, and do not "
                        "go on",
                        stalled));
    }
    const bool began = timer_result == 0;
    WatchStalled();
    if (began) watch_begins = false;
}

void ConnectionHost::Shared::Poke() {
    if (!poked.posted.exchange(true)) reactor.Post(&poked);
}

/// Others wait on other reactors for what is held on this one, or the other way round.
void ConnectionHost::Shared::OnPoke() {
    poked.posted = false;
    budget.LookAgain();
    if (budget.anybody_waits() && !all.empty()) WatchStalled();
}

bool Connection::Progress::Stalled(bool due, uint64_t more_bytes, bool first) {
    const uint64_t now_bytes = bytes + more_bytes;
    if (first || !due || now_bytes >= seen_bytes + kLeastBytes) {
        looks = 0;
        seen_bytes = now_bytes;
        return false;
    }
    return ++looks >= kLooks;
}

bool Connection::Stalled(bool first) {
    const bool holds = state_ != State::kDropped && share_.bytes() > kSmallRequestBytes;
    const bool sends = holds && send_op_.in_flight();
    const bool fills = holds && filling_ != nullptr;
    const bool not_taken = taken_.Stalled(sends, sends ? BytesTaken() : 0, first);
    const bool not_given = given_.Stalled(fills, 0, first);
    return not_taken || not_given;
}

void Connection::Progress::Ended() {
    bytes += kLeastBytes;
}

}  // namespace varve::nbdserver
