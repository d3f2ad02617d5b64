// Connection: under TLS. Records are opened where they were received, or straight into the payload
// that they are a part of; replies are sealed where they lie. Both are the client's bytes in this
// server's memory, and nobody else's: sealing a reply spoils it for all but the send.
//
//   receive --> whole records --> Open --> payload, or Parse() --> stash, while paused
//                  '-- the beginning of one: gathered until it is whole
//   batch of replies --> SealBatch(): records of some of it --> send --> the next records ...
//
// A pause (connection_receive.cc) keeps data, not records: all whole records of a receive are
// opened at once, so what waits in the stash is what it would be without TLS.
#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {
namespace {

// Of data, sealed together: the client can begin with it while more is sealed.
constexpr uint64_t kSealBytesMax = 256 << 10;
// Records with less than this, many of them in one receive, are opened at a higher price than it
// takes to make them: then the next receive brings few.
constexpr size_t kSmallRecordBytes = 128;
constexpr size_t kManySmall = 256;

}  // namespace

void Connection::StartTls(std::unique_ptr<tls::Records> records, std::string_view received) {
    tls_ = std::make_unique<Tls>(std::move(records), shared_.received);
    if (received.empty()) return;
    std::vector<std::byte> copy(received.size());
    std::memcpy(copy.data(), received.data(), received.size());
    Gather(copy);
}

// ---------------------------------------------------------------------------------------------
// Receiving

void Connection::TakeSealed(std::span<std::byte> bytes) {
    if (state_ != State::kOpen) return;  // dropped while it was received
    tls::Records& records = *tls_->records;
    records.BeginReceive();
    const size_t all = bytes.size();
    size_t count = 0;
    if (tls_->gathered_bytes > 0) bytes = Gather(bytes);
    while (state_ == State::kOpen) {
        const size_t record = records.Measure(bytes);
        if (record == 0 || record > bytes.size()) break;
        OpenRecord(bytes.first(record), bytes.size() - record);
        bytes = bytes.subspan(record);
        ++count;
    }
    tls_->small_records = count > kManySmall && all / count < kSmallRecordBytes;
    if (state_ == State::kOpen && !bytes.empty()) Gather(bytes);
    EndIfClosed();
}

/// Adds to a record that arrives in pieces, and opens it once it is whole. Returns what is left.
std::span<std::byte> Connection::Gather(std::span<std::byte> bytes) {
    Tls& tls = *tls_;
    const auto take = [&](std::byte* to, size_t most) {
        const size_t taken = std::min(most, bytes.size());
        std::memcpy(to, bytes.data(), taken);
        bytes = bytes.subspan(taken);
        tls.gathered_bytes += taken;
    };
    if (tls.gathered_bytes < tls.header.size()) {
        take(&tls.header[tls.gathered_bytes], tls.header.size() - tls.gathered_bytes);
    }
    if (tls.gathered_bytes < tls.header.size()) return {};
    if (!tls.gathered) {
        const size_t record = tls.records->Measure(tls.header);
        if (record == 0) return {};
        tls.gathered = shared_.pool.Take(record);
        if (!tls.gathered) {
            Drop();
            return {};
        }
        shared_.Hold(record);
        tls.gathered_part.Set(BufferPool::Rounded(record));
        std::memcpy(tls.gathered.data(), tls.header.data(), tls.header.size());
    }
    take(tls.gathered.data() + tls.gathered_bytes, tls.gathered.size() - tls.gathered_bytes);
    if (tls.gathered_bytes < tls.gathered.size()) return {};
    OpenRecord(tls.gathered.span(), bytes.size());
    ReleaseGathered();
    return bytes;
}

void Connection::ReleaseGathered() {
    shared_.bytes -= tls_->gathered.size();
    tls_->gathered_part.Set(0);
    tls_->gathered.Release();
    tls_->gathered_bytes = 0;
}

/// `behind`: bytes of this receive that follow, and that may have to be kept with it.
void Connection::OpenRecord(std::span<std::byte> record, size_t behind) {
    const size_t most = record.size() + behind;
    std::span<std::byte> direct;
    if (filling_ && !paused_) direct = filling_->payload.span().subspan(filled_);
    const std::span<std::byte> data = tls_->records->Open(record, direct);
    if (data.empty()) return;
    if (!direct.empty() && data.data() == direct.data()) return CountPayload(data.size());
    const std::span<const std::byte> rest = Parse(data);  // all of it, while paused
    if (!rest.empty() && state_ == State::kOpen) Stash(rest, most);
}

/// The client has said that it sends no more, and what came before has begun.
void Connection::EndIfClosed() {
    if (!tls_ || state_ != State::kOpen) return;
    if (tls_->records->broken()) return BreakTls(*tls_->records->broken());
    if (tls_->records->closed() && !paused_) OnStreamEnd(0);
}

/// The client is told why, if that can still be said.
void Connection::BreakTls(tls::Alert alert) {
    if (state_ == State::kDropped) return;
    if (!tls_->sealed) {
        const std::string record = tls_->records->SealAlert(alert);
        send(fd_, record.data(), record.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
    }
    Lose();
}

/// The socket is about to be closed.
void Connection::EndTls() {
    if (!tls_) return;
    if (state_ == State::kDraining) {
        const std::string record = tls_->records->SealAlert(tls::Alert::kCloseNotify);
        send(fd_, record.data(), record.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
        // What the client said behind its last request is not missed. If it stayed unread, the
        // system would break the connection off, and replies that are under way with it.
        std::array<std::byte, 1024> unread;
        recv(fd_, unread.data(), unread.size(), MSG_DONTWAIT);
    }
    ReleaseGathered();
}

// ---------------------------------------------------------------------------------------------
// Sending

void Connection::SendSealed() {
    if (!tls_->sealed) {
        tls_->sealed = shared_.free_sealed.Take();
        SealBatch();
    }
    SealedBatch& sealed = *tls_->sealed;
    batch_->message.msg_iov = &sealed.pieces[sealed.first];
    batch_->message.msg_iovlen = sealed.end - sealed.first;
    shared_.reactor.SendSome(send_op_, fd_, batch_->message);
}

/// Whether there is more of the batch behind these bytes.
bool Connection::SkipSealed(uint64_t bytes) {
    SealedBatch& sealed = *tls_->sealed;
    while (sealed.first < sealed.end && bytes >= sealed.pieces[sealed.first].iov_len) {
        bytes -= sealed.pieces[sealed.first++].iov_len;
    }
    if (sealed.first < sealed.end) {
        iovec& next = sealed.pieces[sealed.first];
        next = {static_cast<char*>(next.iov_base) + bytes, next.iov_len - bytes};
        if (state_ != State::kDropped) return true;
    }
    shared_.free_sealed.Return(std::exchange(tls_->sealed, nullptr));
    return batch_->first < batch_->end;
}

/// Seals some of what is left of the batch, which has some left.
void Connection::SealBatch() {
    SealedBatch& sealed = *tls_->sealed;
    sealed.first = sealed.end = 0;
    sealed.added_bytes = 0;
    tls::Records& records = *tls_->records;
    if (records.KeyUpdateDue()) {
        const auto update = records.SealKeyUpdate();
        std::memcpy(sealed.added.data(), update.data(), update.size());
        sealed.pieces[sealed.end++] = {sealed.added.data(), update.size()};
        sealed.added_bytes = update.size();
    }
    const size_t records_max =
        std::min<uint64_t>(SealedBatch::kRecordsMax, kSealBytesMax / records.fragment_max());
    // Room for a piece in front of the data, one of data, and one behind.
    for (size_t count = 0; count < records_max; ++count) {
        if (batch_->first == batch_->end || sealed.end + 3 > kSendPiecesMax) return;
        if (records.KeyUpdateDue()) return;
        SealRecord();
    }
}

/// One more record. What is added behind one record and before the next is one piece.
void Connection::SealRecord() {
    SealedBatch& sealed = *tls_->sealed;
    SendBatch& batch = *batch_;
    tls::Records& records = *tls_->records;
    std::byte* const head = &sealed.added[sealed.added_bytes];
    if (sealed.end == 0) sealed.pieces[sealed.end++] = {head, 0};
    sealed.pieces[sealed.end - 1].iov_len += records.head_bytes();
    const size_t begin = sealed.end;
    size_t room = records.fragment_max();
    while (room > 0 && batch.first < batch.end && sealed.end + 1 < kSendPiecesMax) {
        iovec& piece = batch.pieces[batch.first];
        const size_t bytes = std::min(room, piece.iov_len);
        sealed.pieces[sealed.end++] = {piece.iov_base, bytes};
        room -= bytes;
        if (bytes == piece.iov_len) {
            ++batch.first;
        } else {
            piece = {static_cast<char*>(piece.iov_base) + bytes, piece.iov_len - bytes};
        }
    }
    std::byte* const tail = head + records.head_bytes();
    records.Seal(std::span(sealed.pieces).subspan(begin, sealed.end - begin), head, tail);
    sealed.pieces[sealed.end++] = {tail, records.tail_bytes()};
    sealed.added_bytes += records.head_bytes() + records.tail_bytes();
}

}  // namespace varve::nbdserver
