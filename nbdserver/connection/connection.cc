// How a connection works
//
// Receiving. One Receive brings many requests; Parse() takes them apart. A small WRITE's payload is
// copied from there into an aligned buffer; what is missing of a large one is received straight
// into it (ReceiveSome), and then the next receive asks for a header only, so that the payload
// behind it can go the direct way too. While a limit is exceeded (`stash_` holds what was received
// already) nothing is received: the client's socket fills up and it waits. The limits are its own,
// or those of the memory that all connections share (memory_budget.h).
//
// Under TLS the records of a receive are opened where they lie, or into the payload that they
// belong to, and replies are sealed where they lie, some at a time: see connection_tls.cc.
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
//   kDropped    no         after DISC      no
//
// Who is gone needs no work any more: when a connection is dropped, its requests are given up
// between pieces (cow::Requester). Not after DISC, which promises that they are finished, unless
// it is End() that drops it.
//
// Not open, no request left, no operation in flight: the socket is closed and the connection gone.
// The socket is only shut down before that, since close() would cancel nothing.
//
//   connection.cc           beginning and end           connection_receive.cc   receiving
//   connection_host.cc      what connections share      connection_requests.cc  running, replying
//   connection_stall.cc     who keeps others waiting    connection_large_read.cc
//   connection_leaving.cc   whose client has left       connection_tls.cc       under TLS
#include <sys/socket.h>
#include <unistd.h>

#include <utility>

#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {
namespace {

// Should a receive or send ever be left to a thread of the ring's, it gives it back so soon.
constexpr timeval kWorkerTime{0, 1000};

/// So that no receive or send waits in a thread of the ring's, of which there are few. Urgent data
/// would wake receives that then find nothing, and those are left to such threads in the end: it
/// becomes part of the stream.
void KeepOffWorkers(int fd) {
    const int yes = 1;
    setsockopt(fd, SOL_SOCKET, SO_OOBINLINE, &yes, sizeof yes);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &kWorkerTime, sizeof kWorkerTime);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &kWorkerTime, sizeof kWorkerTime);
}

/// Lets more of a large reply leave at once: with the default of some 200 KiB, reads of 1 MiB over
/// a unix socket measured 1.4 times slower. The system caps it (net.core.wmem_max). TCP sizes its
/// buffers by itself, better than a fixed number.
void EnlargeSendBuffer(int fd) {
    const int bytes = 4 << 20;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
}

bool IsUnixSocket(int fd) {
    int domain = 0;
    socklen_t length = sizeof domain;
    return getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &length) == 0 && domain == AF_UNIX;
}

}  // namespace

void End(Connection* connection) {
    connection->Drop();
}

uint16_t TransmissionFlags(bool read_only, bool structured_replies, bool extended) {
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
    if (extended) flags |= wire::kTransmissionBlockStatusPayload;
    return flags;
}

Connection::Connection(ConnectionHost& host, int fd, TransmissionOptions options,
                       cow::Volume& volume, std::function<void()> ended)
    : shared_(*host.shared_),
      fd_(fd),
      local_(IsUnixSocket(fd)),
      number_(shared_.connections_started++),
      volume_(volume),
      bases_(std::move(options.bases)),
      layers_(std::move(options.layers)),
      counters_(std::move(options.counters)),
      ended_(std::move(ended)),
      receiving_(shared_.received),
      kept_(shared_.received) {
    rules_.structured_replies = options.structured_replies;
    rules_.extended = options.extended_headers;
    if (options.structured_replies) rules_.contexts = std::move(options.contexts);
    rules_.read_only = options.read_only || volume.read_only();
    rules_.payload_max = shared_.limits.payload_max;
    if (!counters_) counters_ = std::make_shared<ConnectionCounters>();

    hook_.connection = receive_op_.connection = payload_op_.connection = send_op_.connection = this;
    rest_op_.connection = hang_up_op_.connection = this;
    rest_op_.done = [](Op* op, int32_t) { static_cast<Resting*>(op)->connection->Wake(); };
    share_.connection = this;
    share_.wake = [](MemoryBudget::Share* s) { static_cast<Share*>(s)->connection->Wake(); };
    hook_.run = [](BatchHook* h) { static_cast<Hook*>(h)->connection->OnBatchEnd(); };
    receive_op_.done = [](Op* op, int32_t result) {
        static_cast<Receiving*>(op)->connection->OnReceived(result);
    };
    payload_op_.done = [](Op* op, int32_t result) {
        static_cast<Other*>(op)->connection->OnPayload(result);
    };
    hang_up_op_.done = [](Op* op, int32_t result) {
        static_cast<Other*>(op)->connection->OnHangUp(result);
    };
    send_op_.done = [](Op* op, int32_t result) {
        static_cast<Other*>(op)->connection->OnSent(result);
    };

    KeepOffWorkers(fd);
    if (local_) EnlargeSendBuffer(fd);
    if (!options.received.empty()) {
        Stash(options.received, options.received.size());
        paused_ = true;
    }
    if (options.tls) StartTls(std::move(options.tls), options.tls_received);
}

Connection::~Connection() {
    VARVE_CHECK(requests_ == 0 && bytes_ == 0);
    close(fd_);
}

/// Nothing more is received or sent; what runs in the volume is given up, and waited for.
void Connection::Drop() {
    disconnecting_ = false;
    Lose();
}

/// The client is gone, or what it says makes no sense.
void Connection::Lose() {
    if (!disconnecting_ && !requester_.gone()) requester_.Leave();
    if (state_ == State::kDropped) return;
    state_ = State::kDropped;
    shutdown(fd_, SHUT_RDWR);
    Wake();
}

void Connection::OnBatchEnd() {
    if (paused_) Resume();
    EndIfClosed();
    DropUnwanted();
    RunWaiting();
    SendReplies();
    Receive();
    WatchPeer();
    if (IsNextSoon()) shared_.reactor.ExpectSoon();
    if (Finished()) Finish();
}

bool Connection::Finished() const {
    return state_ != State::kOpen && requests_ == 0 && !hook_.queued() &&
           !receive_op_.in_flight() && !payload_op_.in_flight() && !send_op_.in_flight() &&
           !rest_op_.in_flight() && !hang_up_op_.in_flight();
}

void Connection::Finish() {
    std::erase(shared_.all, this);
    if (shared_.all.empty()) shared_.reactor.Cancel(shared_.watch);
    Shared& shared = shared_;
    cow::Volume& volume = volume_;
    const uint64_t seen_leaving = seen_leaving_;
    const std::function<void()> ended = std::move(ended_);
    EndTls();
    delete this;
    if (shared.all.empty()) shared.CheckNothingHeld();
    if (seen_leaving != 0) shared.LeaverEnded(volume, seen_leaving);
    if (ended) ended();
}

}  // namespace varve::nbdserver
