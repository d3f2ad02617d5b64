// Connection: running requests, and replying.
#include <algorithm>
#include <utility>

#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kSendBytesMax = 2 << 20;  // so that a send's memory comes back soon

void Count(std::atomic<uint64_t>& counter, uint64_t amount) {
    // One writer: no need for a locked instruction.
    counter.store(counter.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
}

Task<Errno> Succeed() {
    co_return 0;
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// Running

void Connection::Run(Request* request) {
    if (request->error || (request->length == 0 && request->type != wire::kCmdFlush)) {
        return Reply(request);
    }
    if (!BeginWork(request)) return;
    Spawn(Serve(request));
}

/// Counts what `request` works on. False: it waits, in order, until others have been done.
bool Connection::BeginWork(Request* request) {
    if (request->work == 0) return true;
    const bool over = work_bytes_ + request->work > shared_.limits.work_bytes_max;
    if (waiting_ || (over && work_bytes_ > 0)) {
        request->next = nullptr;
        *waiting_tail_ = request;
        waiting_tail_ = &request->next;
        return false;
    }
    work_bytes_ += request->work;
    return true;
}

/// At the end of the turn those that wait may begin.
void Connection::EndWork(const Request& request) {
    if (request.work == 0) return;
    work_bytes_ -= request.work;
    Wake();
}

void Connection::RunWaiting() {
    while (waiting_) {
        Request* const request = waiting_;
        const bool over = work_bytes_ + request->work > shared_.limits.work_bytes_max;
        if (over && work_bytes_ > 0) return;
        waiting_ = request->next;
        if (!waiting_) waiting_tail_ = &waiting_;
        work_bytes_ += request->work;
        Spawn(Serve(request));
    }
}

Task<void> Connection::Serve(Request* request) {
    const bool in_turn = request->work > kReadSliceBytes;
    Task<Errno> executing = in_turn ? ExecuteInTurn(request) : Execute(request);
    request->error = co_await executing;
    EndWork(*request);
    const bool durable = (request->flags & wire::kFlagFua) &&
                         (request->type == wire::kCmdWrite || request->type == wire::kCmdTrim ||
                          request->type == wire::kCmdWriteZeroes);
    if (durable && !request->error && !requester_.gone()) request->error = co_await volume_.Flush();
    Reply(request);
}

/// The request's one call of the volume.
Task<Errno> Connection::Execute(Request* request) {
    const uint64_t offset = request->offset;
    const uint64_t length = request->length;
    switch (request->type) {
        case wire::kCmdRead: {
            std::vector<cow::Allocation>* map = nullptr;
            if (rules_.structured_replies) map = &request->map;
            if (length > kReadSliceBytes) return ReadInSlices(request, map);
            return volume_.Read(offset, request->payload.span(), map, &requester_);
        }
        case wire::kCmdWrite:
            return volume_.Write(offset, request->payload.span(), &requester_);
        case wire::kCmdFlush:
            return volume_.Flush();
        case wire::kCmdTrim:
            return volume_.Trim(offset, length, &requester_);
        case wire::kCmdWriteZeroes: {
            const bool allocate = (request->flags & wire::kFlagNoHole) != 0;
            return volume_.WriteZeroes(offset, length, allocate, &requester_);
        }
        case wire::kCmdBlockStatus:
            return Status(request);
        default:
            return Succeed();  // CACHE is a hint
    }
}

/// Asks for one context after the other, each for what is known of those before.
Task<Errno> Connection::Status(Request* request) {
    const uint32_t most = StatusStretchesMax(*request, rules_);
    std::vector<cow::Allocation>& map = request->map;
    uint64_t length = request->length;
    const StatusNeeds needs = NeedsOf(*request, rules_);
    if (needs.map) {
        std::shared_ptr<const cow::Layers> layers;
        if (needs.layers) {
            Task<std::shared_ptr<const cow::Layers>> getting = layers_();
            layers = co_await getting;
        }
        Task<Errno> looking =
            volume_.Status(request->offset, length, most, layers.get(), &map, &requester_);
        const Errno error = co_await looking;
        if (error) co_return error;
        length = BytesOf(map);
    }
    bool begun = needs.map;
    for (size_t base = 0; base < bases_.size(); ++base) {
        if (!(needs.bases >> base & 1)) continue;
        std::vector<cow::Delta> changes;
        Task<Errno> comparing = volume_.Changes(bases_[base].get(), request->offset, length, most,
                                                &changes, &requester_);
        const Errno error = co_await comparing;
        if (error) co_return error;
        if (std::exchange(begun, true)) {
            MergeChanges(map, changes, static_cast<uint8_t>(base), most);
        } else {
            BeginWithChanges(map, changes, static_cast<uint8_t>(base));
        }
        length = BytesOf(map);
    }
    co_return 0;
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
    if (request->error == ECANCELED) Count(counters_->given_up, 1);
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
    batch_ = shared_.free_batches.Take();
    uint64_t bytes = 0;
    Request** tail = &batch_->requests;
    size_t count = 0;
    replied_ = 0;
    while (replies_ && count + replies_->pieces.size() <= kSendPiecesMax &&
           (count == 0 || bytes + replies_->reply_bytes <= kSendBytesMax)) {
        Request* request = std::exchange(replies_, replies_->next);
        *tail = request;
        tail = &request->next;
        for (const iovec& piece : request->pieces) batch_->pieces[count++] = piece;
        bytes += request->reply_bytes;
        ++replied_;
    }
    *tail = nullptr;
    if (!replies_) replies_tail_ = &replies_;
    replied_bytes_ = bytes;
    batch_->first = 0;
    batch_->end = count;
    SendPieces();
}

/// Sends some of what is left of the batch.
void Connection::SendPieces() {
    if (tls_) return SendSealed();
    SendBatch& batch = *batch_;
    size_t end = batch.first;
    uint64_t bytes = 0;
    while (end < batch.end && bytes < kSendBytesMax) bytes += batch.pieces[end++].iov_len;
    batch.cut = bytes > kSendBytesMax ? bytes - kSendBytesMax : 0;
    batch.pieces[end - 1].iov_len -= batch.cut;
    batch.message.msg_iov = &batch.pieces[batch.first];
    batch.message.msg_iovlen = end - batch.first;
    shared_.reactor.SendSome(send_op_, fd_, batch.message);
}

/// Whether there is more of the batch behind these bytes.
bool Connection::SkipSent(uint64_t bytes) {
    if (tls_) return SkipSealed(bytes);
    SendBatch& batch = *batch_;
    batch.message.msg_iov[batch.message.msg_iovlen - 1].iov_len += std::exchange(batch.cut, 0);
    while (batch.first < batch.end && bytes >= batch.pieces[batch.first].iov_len) {
        bytes -= batch.pieces[batch.first++].iov_len;
    }
    if (batch.first == batch.end) return false;
    iovec& next = batch.pieces[batch.first];
    next = {static_cast<char*>(next.iov_base) + bytes, next.iov_len - bytes};
    return true;
}

void Connection::OnSent(int32_t result) {
    Wake();
    uint32_t sent = 0;
    if (result >= 0) {
        sent = static_cast<uint32_t>(result);
    } else if (!Reactor::WasNotIssued(result)) {
        Lose();
    }
    sent_bytes_ += sent;
    if (SkipSent(sent) && state_ != State::kDropped) return SendPieces();
    taken_.Ended();
    SendBatch* batch = std::exchange(batch_, nullptr);
    for (Request* request = batch->requests; request;) {
        Release(std::exchange(request, request->next));
    }
    shared_.free_batches.Return(batch);
}

/// Gives up what nobody will finish or read any more.
void Connection::DropUnwanted() {
    if (state_ == State::kOpen) return;
    shared_.budget.Leave(share_);
    if (filling_ && !payload_op_.in_flight()) Release(std::exchange(filling_, nullptr));
    if (state_ == State::kDraining) return;
    while (waiting_ && requester_.gone()) {
        Count(counters_->given_up, 1);
        Release(std::exchange(waiting_, waiting_->next));
    }
    if (!waiting_) waiting_tail_ = &waiting_;
    while (replies_) Release(std::exchange(replies_, replies_->next));
    replies_tail_ = &replies_;
}

void Connection::Release(Request* request) {
    --requests_;
    bytes_ -= request->charge;
    shared_.bytes -= request->charge + kRequestBytes;
    shared_.budget.GiveBack(share_, request->fund, request->charge + kRequestBytes);
    shared_.ReturnRequest(request);
    Wake();
}

}  // namespace varve::nbdserver
