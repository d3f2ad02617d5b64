// Connection: receiving, in the order in which bytes pass, up to the request that is run.
#include <linux/sockios.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {
namespace {

// From here on the rest of a payload is received in place; below, copying is cheaper.
constexpr uint32_t kDirectBytesMin = 32 << 10;
// The payload of a WRITE over the limit is read and thrown away, so that the stream goes on, up to
// this many times the limit. A client that asks for more loses its connection.
constexpr uint64_t kSkipFactorMax = 4;
// What a receive may bring has to be kept if the connection must pause then, so it is bounded for
// all together, on all reactors: half of it for whoever comes first, half for those with requests
// under way. Beyond it a receive brings little.
constexpr uint32_t kReceiveBytes = 256 << 10;
constexpr uint32_t kReceiveBytesWhenScarce = 8 << 10;
constexpr uint64_t kReceivedBytesMax = 128 << 20;
// Of a payload that is received in place: at most so much at a time, so that no turn of the reactor
// has to copy all of it.
constexpr uint32_t kPieceBytes = 1 << 20;
// A receive that brings fewer requests than this makes a rest worthwhile.
constexpr uint64_t kFewRequests = 8;
// Fewer than this come from a client that has few under way, and waits for the answers.
constexpr uint64_t kTrickle = 12;
constexpr unsigned kTrickleLong = 8;  // receives
constexpr int64_t kRestNanoseconds = 40'000;
constexpr uint64_t kRestSends = 4;         // unread ones that make a rest worthwhile
constexpr uint64_t kRestReplies = 10;      // unread ones that a rest must not outlast
constexpr uint64_t kUnreadOverhead = 768;  // what the system counts for each send besides its bytes

int64_t NowNanoseconds() {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

/// Requests since it was asked before, which is at each receive.
uint64_t Connection::CountArrived() {
    const uint64_t came = arrived_ - std::exchange(arrived_then_, arrived_);
    if (came >= kTrickle) {
        trickle_ = 0;
    } else if (came > 0 && trickle_ < kTrickleLong) {
        ++trickle_;
    }
    if (local_) rests_or_not_.Count(came, NowNanoseconds);
    return came;
}

/// Whether the client has several replies to read before it can miss anything. Then requests that
/// it sends one by one shall not wake this thread one by one: each wake-up costs the client more
/// than the request itself, and this side two entries into the kernel. Where waking is cheap, it is
/// dearer that the client and this thread work in turns, not at once: so that is tried.
bool Connection::ShallRest(uint64_t came) {
    const bool first = replied_ == 0;
    if (std::exchange(rested_, false) || !local_ || first || came >= kFewRequests) return false;
    if (!rests_or_not_.first() || rest_checks_.Skip()) return false;
    int unread = 0;
    const uint64_t send = replied_bytes_ + kUnreadOverhead;
    const uint64_t enough = std::max(kRestSends * send, kRestReplies * send / replied_);
    const bool behind =
        ioctl(fd_, SIOCOUTQ, &unread) == 0 && static_cast<uint64_t>(unread) > enough;
    behind ? rest_checks_.Succeeded() : rest_checks_.Failed();
    return behind;
}

void Connection::Rest() {
    rested_ = true;
    shared_.reactor.StartTimer(rest_op_, kRestNanoseconds);
}

/// Whether the client has all it waits for, and had little to wait for, or a flush: it will ask for
/// more, or is just doing so: a header may come before its payload.
bool Connection::IsNextSoon() const {
    const size_t asking = filling_ ? 1 : 0;
    const bool waits = trickle_ == kTrickleLong || flushed_;
    return waits && requests_ == asking && receive_op_.in_flight();
}

void Connection::Receive() {
    if (state_ != State::kOpen || paused_) return;
    if (receive_op_.in_flight() || payload_op_.in_flight() || rest_op_.in_flight()) return;
    // Under TLS payloads are decrypted into place, from what a receive has brought.
    if (!tls_ && filling_ && filling_->payload_bytes - filled_ >= kDirectBytesMin) {
        expect_large_ = true;
        uint64_t piece = filling_->payload_bytes - filled_;
        if (piece >= kPieceBytes + kDirectBytesMin) piece = kPieceBytes;
        return shared_.reactor.ReceiveSome(payload_op_, fd_,
                                           filling_->payload.span().subspan(filled_, piece));
    }
    if (ShallRest(CountArrived())) return Rest();
    const uint32_t most = MostToReceive();
    receiving_.Set(most);
    expect_large_ = false;
    shared_.reactor.Receive(receive_op_, fd_, most, requests_ <= 1);
}

uint32_t Connection::MostToReceive() const {
    if (expect_large_ && !filling_ && !skip_) return static_cast<uint32_t>(HeaderBytes(rules_));
    uint64_t most = std::min(kReceivedBytesMax, shared_.limits.host_bytes_max / 8);
    if (requests_ <= 1) most /= 2;
    const bool room = shared_.received.everywhere() + kReceiveBytes <= most;
    return room && !(tls_ && tls_->small_records) ? kReceiveBytes : kReceiveBytesWhenScarce;
}

void Connection::OnReceived(int32_t result) {
    Wake();
    receiving_.Set(0);
    if (Reactor::WasNotIssued(result)) return;
    if (result <= 0) return OnStreamEnd(result);
    const std::span<std::byte> bytes = shared_.reactor.Received(receive_op_);
    if (tls_) {
        TakeSealed(bytes);
    } else {
        const std::span<const std::byte> rest = Parse(bytes);
        if (!rest.empty() && state_ == State::kOpen) Stash(rest, rest.size());
    }
    shared_.reactor.ReturnReceived(receive_op_);
}

void Connection::OnPayload(int32_t result) {
    Wake();
    if (Reactor::WasNotIssued(result)) return;
    if (result <= 0) return OnStreamEnd(result);
    filled_ += static_cast<uint32_t>(result);
    given_.bytes += static_cast<uint32_t>(result);
    if (state_ == State::kDropped || filled_ < filling_->payload_bytes) return;
    given_.Ended();
    RunFilled();
}

/// The client will send no more. Answers may still be wanted, unless the stream broke.
void Connection::OnStreamEnd(int32_t result) {
    if (result < 0) return Lose();
    if (state_ != State::kOpen) return;
    state_ = State::kDraining;
    Leaving(Poll());
}

/// Keeps what was received but finds no room now, so that the lent buffer can go back. `most`: what
/// may be kept until the next Resume(), these bytes included.
void Connection::Stash(std::span<const std::byte> bytes, size_t most) {
    if (!stash_) {
        stash_ = shared_.pool.Take(most);
        if (!stash_) return Drop();
        stashed_ = stash_.span().first(0);
        shared_.Hold(stash_.size());
        kept_.Set(BufferPool::Rounded(stash_.size()));
    }
    std::byte* const end = stash_.data() + (stashed_.data() - stash_.data()) + stashed_.size();
    VARVE_CHECK(end + bytes.size() <= stash_.data() + stash_.size());
    std::memcpy(end, bytes.data(), bytes.size());
    stashed_ = {stashed_.data(), stashed_.size() + bytes.size()};
}

/// Goes on with what had been received when a limit was met.
void Connection::Resume() {
    paused_ = false;
    if (state_ == State::kOpen) stashed_ = Parse(stashed_);
    if (state_ == State::kOpen && !stashed_.empty()) return;
    stashed_ = {};
    shared_.bytes -= stash_.size();
    kept_.Set(0);
    stash_.Release();
}

/// Takes requests out of `bytes`. Returns what is left when it had to pause.
std::span<const std::byte> Connection::Parse(std::span<const std::byte> bytes) {
    while (state_ == State::kOpen && !paused_) {
        if (skip_) {
            const uint64_t skipped = std::min<uint64_t>(skip_, bytes.size());
            skip_ -= skipped;
            bytes = bytes.subspan(skipped);
        } else if (filling_) {
            bytes = bytes.subspan(TakePayload(bytes));
        } else {
            bytes = bytes.subspan(TakeHeader(bytes));
        }
        if (bytes.empty() && header_bytes_ < HeaderBytes(rules_)) break;
    }
    return bytes;
}

/// Returns how many bytes it used. A complete header that finds no room stays where it is.
size_t Connection::TakeHeader(std::span<const std::byte> bytes) {
    const size_t whole = HeaderBytes(rules_);
    if (header_bytes_ == 0 && bytes.size() >= whole) return Accept(bytes.data()) ? whole : 0;
    const size_t used = std::min(whole - header_bytes_, bytes.size());
    if (used > 0) std::memcpy(header_.data() + header_bytes_, bytes.data(), used);
    header_bytes_ += used;
    if (header_bytes_ == whole && Accept(header_.data())) header_bytes_ = 0;
    return used;
}

size_t Connection::TakePayload(std::span<const std::byte> bytes) {
    const size_t used = std::min<size_t>(filling_->payload_bytes - filled_, bytes.size());
    if (used > 0) std::memcpy(filling_->payload.data() + filled_, bytes.data(), used);
    CountPayload(used);
    return used;
}

/// So many bytes more of the payload are in their place.
void Connection::CountPayload(size_t bytes) {
    filled_ += static_cast<uint32_t>(bytes);
    given_.bytes += bytes;
    if (filled_ == filling_->payload_bytes) RunFilled();
}

/// The payload is complete.
void Connection::RunFilled() {
    Request* const request = std::exchange(filling_, nullptr);
    if (request->type == wire::kCmdBlockStatus) {
        const bool sound = TakeStatusPayload(*request, rules_);
        request->error = sound ? Validate(*request, rules_, volume_.size()) : EINVAL;
        request->work = request->error ? 0 : WorkNeeded(*request);
    }
    Run(request);
}

/// Begins the request of `header`. False: there is no room for it now, ask again later.
bool Connection::Accept(const std::byte* header) {
    Request* request = shared_.free_requests.Take();
    if (!Decode(header, rules_, *request)) {
        shared_.ReturnRequest(request);
        Drop();
        return true;
    }
    if (request->type == wire::kCmdDisconnect) {
        shared_.ReturnRequest(request);
        state_ = State::kDraining;
        disconnecting_ = true;
        return true;
    }
    const bool asks = HasStatusPayload(*request, rules_);  // its length comes with the payload
    request->error = asks ? 0 : Validate(*request, rules_, volume_.size());
    if (request->payload_bytes > 0 && !asks && request->type != wire::kCmdWrite) {
        request->error = EINVAL;
    }
    request->work = request->error || asks ? 0 : WorkNeeded(*request);
    request->charge = request->error ? 0 : MemoryNeeded(*request, rules_);
    if (!TakeMemory(*request)) {
        shared_.ReturnRequest(request);
        paused_ = true;
        return false;
    }
    request->connection = this;
    ++arrived_;
    flushed_ = request->type == wire::kCmdFlush;
    const bool payload =
        request->type == wire::kCmdRead || request->type == wire::kCmdWrite || asks;
    if (payload && request->charge) {
        request->payload = shared_.pool.Take(request->length);
        if (!request->payload) request->error = ENOMEM;
    }
    if (request->payload_bytes > 0) {
        AcceptPayload(request);
    } else {
        Run(request);
    }
    return true;
}

void Connection::AcceptPayload(Request* request) {
    if (!request->error) {
        filling_ = request;
        filled_ = 0;
        return;
    }
    skip_ = request->payload_bytes;
    if (skip_ > rules_.payload_max * kSkipFactorMax) Drop();
    Run(request);
}

/// Counts the request, if its memory is within the limits now.
bool Connection::TakeMemory(Request& request) {
    const ConnectionLimits& limits = shared_.limits;
    const bool over =
        requests_ >= limits.requests_max || bytes_ + request.charge > limits.bytes_max;
    if (over && requests_ > 0) return false;
    const uint64_t bytes = request.charge + kRequestBytes;
    request.fund = shared_.budget.Take(share_, bytes);
    if (request.fund == MemoryBudget::Fund::kNone) {
        shared_.WatchStalled();
        return false;
    }
    ++requests_;
    bytes_ += request.charge;
    shared_.Hold(bytes);
    return true;
}

}  // namespace varve::nbdserver
