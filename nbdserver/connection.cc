// How a connection works
//
// Receiving. One Receive brings many requests; Parse() takes them apart. A small WRITE's payload is
// copied from there into an aligned buffer; what is missing of a large one is received straight
// into it (ReceiveAll), and then the next receive asks for a header only, so that the payload
// behind it can go the direct way too. While a limit is exceeded (`stash_` holds what was received
// already) nothing is received: the client's socket fills up and it waits.
//
// Running. Each request is a coroutine on the volume; they run side by side and finish in any
// order, which the protocol allows.
//
// Replying. A finished request joins `replies_`. At the end of the reactor's turn all of them leave
// in one send; one send is under way at a time. The memory of a request is given back when its
// reply has left.
//
//   state       receives   runs requests   sends replies   left by
//   kOpen       yes        yes             yes             DISC or end of stream -> kDraining,
//                                                          failure or End() -> kDropped
//   kDraining   no         yes             yes             failure or End() -> kDropped
//   kDropped    no         yes             no
//
// Not open, no request left, no operation in flight: the socket is closed and the connection gone.
// The socket is only shut down before that, since close() would cancel nothing.
#include "nbdserver/connection.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "base/buffers.h"
#include "base/task.h"
#include "nbdserver/request.h"
#include "nbdserver/wire.h"

namespace varve::nbdserver {
namespace {

constexpr size_t kSendPiecesMax = 1024;      // IOV_MAX
constexpr uint64_t kSendBytesMax = 2 << 20;  // so that a send's memory comes back soon
// From here on the rest of a payload is received in place; below, copying is cheaper.
constexpr uint32_t kDirectBytesMin = 32 << 10;
// The payload of a WRITE over the limit is read and thrown away, so that the stream goes on, up to
// this many times the limit. A client that asks for more loses its connection.
constexpr uint64_t kSkipFactorMax = 4;
// What a request costs besides its payload, roughly: its state and the frames of its coroutines.
constexpr uint64_t kRequestBytes = 2048;
// When half of the host's memory is in use, a pause shall not stash much.
constexpr uint32_t kReceiveBytesWhenScarce = 8 << 10;
constexpr unsigned kUnusedRequestsMax = 4096;
constexpr size_t kKeptMapMax = 64;  // stretches whose memory an unused request keeps
static_assert(kReplyPiecesMax <= kSendPiecesMax);

/// Lets more of a large reply leave at once: with the default of some 200 KiB, reads of 1 MiB over
/// a unix socket measured 1.4 times slower. The system caps it (net.core.wmem_max). TCP sizes its
/// buffers by itself, better than a fixed number.
void EnlargeSendBuffer(int fd) {
    int domain = 0;
    socklen_t length = sizeof domain;
    if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) != 0 || domain != AF_UNIX) return;
    const int bytes = 4 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

/// What one send needs until it is complete.
struct SendBatch {
    SendBatch* next = nullptr;  // among the unused
    msghdr message{};
    uint64_t bytes = 0;
    Request* requests = nullptr;  // whose replies these are
    std::array<iovec, kSendPiecesMax> pieces;
};

template <typename T>
void DeleteList(T* head) {
    while (head) delete std::exchange(head, head->next);
}

void Count(std::atomic<uint64_t>& counter, uint64_t amount) {
    // One writer: no need for a locked instruction.
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
}

Task<Errno> Succeed() {
    co_return 0;
}

}  // namespace

/// What the connections of a reactor share.
struct ConnectionHost::Shared {
    Shared(Reactor& r, ConnectionLimits l) : reactor(r), limits(l), pool(l.unused_bytes_max) {}
    ~Shared() {
        DeleteList(unused_requests);
        DeleteList(unused_batches);
    }

    Request* TakeRequest() {
        if (!unused_requests) return new Request;
        --unused_request_count;
        return std::exchange(unused_requests, unused_requests->next);
    }
    void ReturnRequest(Request* request);

    SendBatch* TakeBatch() {
        if (!unused_batches) return new SendBatch;
        return std::exchange(unused_batches, unused_batches->next);
    }
    void ReturnBatch(SendBatch* batch) { batch->next = std::exchange(unused_batches, batch); }

    void WakeStarved();
    void Hold(uint64_t more) {
        bytes += more;
        if (bytes > peak.load(std::memory_order_relaxed)) {
            peak.store(bytes, std::memory_order_relaxed);
        }
    }

    Reactor& reactor;
    const ConnectionLimits limits;
    BufferPool pool;
    uint64_t bytes = 0;              // in flight
    std::atomic<uint64_t> peak = 0;  // of `bytes`, since somebody asked
    Request* unused_requests = nullptr;
    unsigned unused_request_count = 0;
    SendBatch* unused_batches = nullptr;
    std::vector<Connection*> starved;  // wait for others to give memory back
    std::vector<Connection*> all;
};

class Connection {
  public:
    Connection(ConnectionHost& host, int fd, TransmissionOptions options, cow::Volume& volume,
               std::function<void()> ended);
    ~Connection();

    void Drop();
    void Wake() { shared_.reactor.AtBatchEnd(hook_); }
    void NoLongerStarved() {
        starved_ = false;
        Wake();
    }

  private:
    using Shared = ConnectionHost::Shared;
    enum class State : uint8_t { kOpen, kDraining, kDropped };

    // Receiving, in the order in which bytes pass.
    void Receive();
    void OnReceived(int32_t result);
    void OnPayload(int32_t result);
    void OnStreamEnd(int32_t result);
    void Stash(std::span<const std::byte> bytes);
    void Resume();
    std::span<const std::byte> Parse(std::span<const std::byte> bytes);
    size_t TakeHeader(std::span<const std::byte> bytes);
    size_t TakePayload(std::span<const std::byte> bytes);
    bool Accept(const std::byte* header);
    bool HasRoom(uint64_t charge);
    void AcceptWrite(Request* request);

    // Running.
    void Run(Request* request);
    Task<void> Serve(Request* request);
    Task<Errno> Execute(Request* request);

    // Replying.
    void Reply(Request* request);
    void SendReplies();
    void OnSent(int32_t result);
    void CountReply(const Request& request);
    void DropUnwanted();
    void Release(Request* request);

    void OnBatchEnd();
    bool Finished() const;
    void Finish();

    // The operations and the hook know their connection by their place in it.
    struct Hook : BatchHook {
        Connection* connection = nullptr;
    };
    struct Receiving : ReceiveOp {
        Connection* connection = nullptr;
    };
    struct Other : Op {
        Connection* connection = nullptr;
    };

    // Fixed from the start.
    Shared& shared_;
    const int fd_;
    cow::Volume& volume_;
    RequestRules rules_;
    std::shared_ptr<ConnectionCounters> counters_;
    std::function<void()> ended_;

    State state_ = State::kOpen;
    bool paused_ = false;        // a limit was met, or there is a stash to begin with
    bool starved_ = false;       // stands in shared_.starved
    bool expect_large_ = false;  // the last payload was received directly
    uint32_t requests_ = 0;      // in flight
    uint64_t bytes_ = 0;         // in flight

    std::array<std::byte, sizeof(wire::Request)> header_;  // one that arrives in pieces
    size_t header_bytes_ = 0;
    uint64_t skip_ = 0;           // bytes of a refused payload that are still to come
    Request* filling_ = nullptr;  // a WRITE whose payload is not complete
    uint32_t filled_ = 0;         // bytes of it
    Buffer stash_;                // received before the pause
    std::span<const std::byte> stashed_;

    Request* replies_ = nullptr;
    Request** replies_tail_ = &replies_;
    SendBatch* batch_ = nullptr;  // being sent

    Hook hook_;
    Receiving receive_op_;
    Other payload_op_;
    Other send_op_;
};

// ---------------------------------------------------------------------------------------------
// Shared by the connections of a reactor

void ConnectionHost::Shared::ReturnRequest(Request* request) {
    request->payload.Release();
    request->layout.Release();
    request->pieces = {};
    request->map.clear();
    if (request->map.capacity() > kKeptMapMax) request->map = {};
    if (unused_request_count >= kUnusedRequestsMax) {
        delete request;
        return;
    }
    ++unused_request_count;
    request->next = std::exchange(unused_requests, request);
}

void ConnectionHost::Shared::WakeStarved() {
    // Some room at once, so that not every single reply wakes everybody.
    if (starved.empty() || bytes > limits.host_bytes_max - limits.host_bytes_max / 8) return;
    for (Connection* connection : starved) connection->NoLongerStarved();
    starved.clear();
}

ConnectionHost::ConnectionHost(Reactor& reactor, ConnectionLimits limits)
    : shared_(std::make_unique<Shared>(reactor, limits)) {}

ConnectionHost::~ConnectionHost() {
    VARVE_CHECK(shared_->all.empty());
}

Connection* ConnectionHost::Start(int fd, TransmissionOptions options, cow::Volume& volume,
                                  std::function<void()> ended) {
    VARVE_CHECK(shared_->reactor.InThread());
    VARVE_CHECK(&volume.executor() == &shared_->reactor);
    Connection* connection =
        new Connection(*this, fd, std::move(options), volume, std::move(ended));
    shared_->all.push_back(connection);
    connection->Wake();
    return connection;
}

void ConnectionHost::EndAll() {
    for (Connection* connection : shared_->all) connection->Drop();
}

uint64_t ConnectionHost::connections() const {
    return shared_->all.size();
}

uint64_t ConnectionHost::bytes_in_flight() const {
    return shared_->bytes;
}

uint64_t ConnectionHost::TakePeak() {
    return shared_->peak.exchange(0, std::memory_order_relaxed);
}

void End(Connection* connection) {
    connection->Drop();
}

uint16_t TransmissionFlags(bool read_only, bool structured_replies) {
    uint16_t flags = wire::kTransmissionHasFlags | wire::kTransmissionSendFlush |
                     wire::kTransmissionSendFua | wire::kTransmissionCanMultiConn |
                     wire::kTransmissionSendCache;
    if (read_only) {
        flags |= wire::kTransmissionReadOnly;
    } else {
        flags |= wire::kTransmissionSendTrim | wire::kTransmissionSendWriteZeroes |
                 wire::kTransmissionSendFastZero;
    }
    if (structured_replies) flags |= wire::kTransmissionSendDf;
    return flags;
}

// ---------------------------------------------------------------------------------------------
// Beginning and end

Connection::Connection(ConnectionHost& host, int fd, TransmissionOptions options,
                       cow::Volume& volume, std::function<void()> ended)
    : shared_(*host.shared_),
      fd_(fd),
      volume_(volume),
      counters_(std::move(options.counters)),
      ended_(std::move(ended)) {
    rules_.structured_replies = options.structured_replies;
    rules_.base_allocation = options.base_allocation && options.structured_replies;
    rules_.base_allocation_id = options.base_allocation_id;
    rules_.payload_max = shared_.limits.payload_max;
    if (!counters_) counters_ = std::make_shared<ConnectionCounters>();

    hook_.connection = receive_op_.connection = payload_op_.connection = send_op_.connection = this;
    hook_.run = [](BatchHook* h) { static_cast<Hook*>(h)->connection->OnBatchEnd(); };
    receive_op_.done = [](Op* op, int32_t result) {
        static_cast<Receiving*>(op)->connection->OnReceived(result);
    };
    payload_op_.done = [](Op* op, int32_t result) {
        static_cast<Other*>(op)->connection->OnPayload(result);
    };
    send_op_.done = [](Op* op, int32_t result) {
        static_cast<Other*>(op)->connection->OnSent(result);
    };

    EnlargeSendBuffer(fd);
    if (!options.received.empty()) {
        Stash(options.received);
        paused_ = true;
    }
}

Connection::~Connection() {
    VARVE_CHECK(requests_ == 0 && bytes_ == 0);
    close(fd_);
}

/// Nothing more is received or sent; what runs in the volume is waited for.
void Connection::Drop() {
    if (state_ == State::kDropped) return;
    state_ = State::kDropped;
    shutdown(fd_, SHUT_RDWR);
    Wake();
}

void Connection::OnBatchEnd() {
    if (paused_) Resume();
    DropUnwanted();
    SendReplies();
    Receive();
    if (Finished()) Finish();
}

bool Connection::Finished() const {
    return state_ != State::kOpen && requests_ == 0 && !hook_.queued() &&
           !receive_op_.in_flight() && !payload_op_.in_flight() && !send_op_.in_flight();
}

void Connection::Finish() {
    if (starved_) std::erase(shared_.starved, this);
    std::erase(shared_.all, this);
    const std::function<void()> ended = std::move(ended_);
    delete this;
    if (ended) ended();
}

// ---------------------------------------------------------------------------------------------
// Receiving

void Connection::Receive() {
    if (state_ != State::kOpen || paused_) return;
    if (receive_op_.in_flight() || payload_op_.in_flight()) return;
    if (filling_ && filling_->length - filled_ >= kDirectBytesMin) {
        expect_large_ = true;
        return shared_.reactor.ReceiveAll(payload_op_, fd_,
                                          filling_->payload.span().subspan(filled_));
    }
    uint32_t most = 0;
    if (expect_large_ && !filling_ && !skip_) {
        most = sizeof(wire::Request);
    } else if (shared_.bytes > shared_.limits.host_bytes_max / 2) {
        most = kReceiveBytesWhenScarce;
    }
    expect_large_ = false;
    shared_.reactor.Receive(receive_op_, fd_, most, requests_ <= 1);
}

void Connection::OnReceived(int32_t result) {
    Wake();
    if (result <= 0) return OnStreamEnd(result);
    const std::span<const std::byte> rest = Parse(shared_.reactor.Received(receive_op_));
    if (!rest.empty() && state_ == State::kOpen) Stash(rest);
    shared_.reactor.ReturnReceived(receive_op_);
}

void Connection::OnPayload(int32_t result) {
    Wake();
    if (result > 0) filled_ += static_cast<uint32_t>(result);
    if (result <= 0 || filled_ < filling_->length) return OnStreamEnd(std::min(result, 0));
    if (state_ == State::kDropped) return;
    Run(std::exchange(filling_, nullptr));
}

/// The client will send no more. Answers may still be wanted, unless the stream broke.
void Connection::OnStreamEnd(int32_t result) {
    if (result < 0) return Drop();
    if (state_ == State::kOpen) state_ = State::kDraining;
}

/// Keeps what was received but finds no room now, so that the lent buffer can go back.
void Connection::Stash(std::span<const std::byte> bytes) {
    stash_ = shared_.pool.Take(bytes.size());
    if (!stash_) return Drop();
    std::memcpy(stash_.data(), bytes.data(), bytes.size());
    stashed_ = stash_.span();
    shared_.Hold(stash_.size());
}

/// Goes on with what had been received when a limit was met.
void Connection::Resume() {
    paused_ = false;
    if (state_ == State::kOpen) stashed_ = Parse(stashed_);
    if (state_ == State::kOpen && !stashed_.empty()) return;
    stashed_ = {};
    shared_.bytes -= stash_.size();
    stash_.Release();
    shared_.WakeStarved();
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
        if (bytes.empty() && header_bytes_ < sizeof header_) break;
    }
    return bytes;
}

/// Returns how many bytes it used. A complete header that finds no room stays where it is.
size_t Connection::TakeHeader(std::span<const std::byte> bytes) {
    if (header_bytes_ == 0 && bytes.size() >= sizeof header_) {
        return Accept(bytes.data()) ? sizeof header_ : 0;
    }
    const size_t used = std::min(sizeof header_ - header_bytes_, bytes.size());
    std::memcpy(header_.data() + header_bytes_, bytes.data(), used);
    header_bytes_ += used;
    if (header_bytes_ == sizeof header_ && Accept(header_.data())) header_bytes_ = 0;
    return used;
}

size_t Connection::TakePayload(std::span<const std::byte> bytes) {
    const size_t used = std::min<size_t>(filling_->length - filled_, bytes.size());
    std::memcpy(filling_->payload.data() + filled_, bytes.data(), used);
    filled_ += static_cast<uint32_t>(used);
    if (filled_ == filling_->length) Run(std::exchange(filling_, nullptr));
    return used;
}

/// Begins the request of `header`. False: there is no room for it now, ask again later.
bool Connection::Accept(const std::byte* header) {
    Request* request = shared_.TakeRequest();
    if (!Decode(header, *request)) {
        shared_.ReturnRequest(request);
        Drop();
        return true;
    }
    if (request->type == wire::kCmdDisconnect) {
        shared_.ReturnRequest(request);
        state_ = State::kDraining;
        return true;
    }
    request->error = Validate(*request, rules_, volume_.size(), volume_.read_only());
    request->charge = request->error ? 0 : MemoryNeeded(*request);
    if (!HasRoom(request->charge)) {
        shared_.ReturnRequest(request);
        paused_ = true;
        return false;
    }
    request->connection = this;
    ++requests_;
    bytes_ += request->charge;
    shared_.Hold(request->charge + kRequestBytes);
    const bool payload = request->type == wire::kCmdRead || request->type == wire::kCmdWrite;
    if (payload && request->charge) {
        request->payload = shared_.pool.Take(request->length);
        if (!request->payload) request->error = ENOMEM;
    }
    if (request->type == wire::kCmdWrite && request->length) {
        AcceptWrite(request);
    } else {
        Run(request);
    }
    return true;
}

void Connection::AcceptWrite(Request* request) {
    if (!request->error) {
        filling_ = request;
        filled_ = 0;
        return;
    }
    skip_ = request->length;
    if (skip_ > rules_.payload_max * kSkipFactorMax) Drop();
    Run(request);
}

bool Connection::HasRoom(uint64_t charge) {
    if (requests_ == 0) return true;  // always one, or stuck clients could stop the others
    const ConnectionLimits& limits = shared_.limits;
    if (requests_ >= limits.requests_max || bytes_ + charge > limits.bytes_max) return false;
    if (shared_.bytes + charge + kRequestBytes <= limits.host_bytes_max) return true;
    if (!starved_) shared_.starved.push_back(this);
    starved_ = true;
    return false;
}

// ---------------------------------------------------------------------------------------------
// Running

void Connection::Run(Request* request) {
    if (request->error || (request->length == 0 && request->type != wire::kCmdFlush)) {
        return Reply(request);
    }
    Spawn(Serve(request));
}

Task<void> Connection::Serve(Request* request) {
    request->error = co_await Execute(request);
    const bool durable = (request->flags & wire::kFlagFua) &&
                         (request->type == wire::kCmdWrite || request->type == wire::kCmdTrim ||
                          request->type == wire::kCmdWriteZeroes);
    if (durable && !request->error) request->error = co_await volume_.Flush();
    Reply(request);
}

/// The request's one call of the volume.
Task<Errno> Connection::Execute(Request* request) {
    const uint64_t offset = request->offset;
    const uint32_t length = request->length;
    switch (request->type) {
        case wire::kCmdRead: {
            std::vector<cow::Allocation>* map = nullptr;
            if (rules_.structured_replies) map = &request->map;
            return volume_.Read(offset, request->payload.span(), map);
        }
        case wire::kCmdWrite:
            return volume_.Write(offset, request->payload.span());
        case wire::kCmdFlush:
            return volume_.Flush();
        case wire::kCmdTrim:
            return volume_.Trim(offset, length);
        case wire::kCmdWriteZeroes: {
            const bool allocate = (request->flags & wire::kFlagNoHole) != 0;
            return volume_.WriteZeroes(offset, length, allocate);
        }
        case wire::kCmdBlockStatus: {
            const bool one = (request->flags & wire::kFlagReqOne) != 0;
            return volume_.Status(offset, length, one ? 1 : kStatusExtentsMax, &request->map);
        }
        default:
            return Succeed();  // CACHE is a hint
    }
}

// ---------------------------------------------------------------------------------------------
// Replying

void Connection::CountReply(const Request& request) {
    Count(counters_->requests, 1);
    if (request.error) {
        Count(counters_->errors, 1);
    } else if (request.type == wire::kCmdRead) {
        Count(counters_->bytes_read, request.length);
    } else if (request.type == wire::kCmdWrite) {
        Count(counters_->bytes_written, request.length);
    }
}

void Connection::Reply(Request* request) {
    Wake();
    if (state_ == State::kDropped) return Release(request);
    BuildReply(*request, rules_, shared_.pool);
    CountReply(*request);
    request->next = nullptr;
    *replies_tail_ = request;
    replies_tail_ = &request->next;
}

/// Sends what has been queued, unless a send is under way: its end leads here again.
void Connection::SendReplies() {
    if (send_op_.in_flight() || !replies_) return;
    batch_ = shared_.TakeBatch();
    batch_->bytes = 0;
    Request** tail = &batch_->requests;
    size_t count = 0;
    while (replies_ && count + replies_->pieces.size() <= kSendPiecesMax &&
           (count == 0 || batch_->bytes + replies_->reply_bytes <= kSendBytesMax)) {
        Request* request = std::exchange(replies_, replies_->next);
        *tail = request;
        tail = &request->next;
        for (const iovec& piece : request->pieces) batch_->pieces[count++] = piece;
        batch_->bytes += request->reply_bytes;
    }
    *tail = nullptr;
    if (!replies_) replies_tail_ = &replies_;
    batch_->message.msg_iov = batch_->pieces.data();
    batch_->message.msg_iovlen = count;
    shared_.reactor.SendAll(send_op_, fd_, batch_->message);
}

void Connection::OnSent(int32_t result) {
    if (result < 0 || static_cast<uint32_t>(result) != batch_->bytes) Drop();
    SendBatch* sent = std::exchange(batch_, nullptr);
    for (Request* request = sent->requests; request;) {
        Release(std::exchange(request, request->next));
    }
    shared_.ReturnBatch(sent);
}

/// Gives up what nobody will finish or read any more.
void Connection::DropUnwanted() {
    if (state_ == State::kOpen) return;
    if (filling_ && !payload_op_.in_flight()) Release(std::exchange(filling_, nullptr));
    if (state_ == State::kDraining) return;
    while (replies_) Release(std::exchange(replies_, replies_->next));
    replies_tail_ = &replies_;
}

void Connection::Release(Request* request) {
    --requests_;
    bytes_ -= request->charge;
    shared_.bytes -= request->charge + kRequestBytes;
    shared_.ReturnRequest(request);
    shared_.WakeStarved();
    Wake();
}

}  // namespace varve::nbdserver
