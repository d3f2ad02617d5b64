#include "nbdserver/negotiation/list_reply.h"

#include <utility>

#include "nbdserver/wire/wire.h"

namespace varve::nbdserver {
namespace {

constexpr size_t kPieceBytes = 64 << 10;

void Append(std::string& out, uint32_t type, uint32_t length) {
    wire::OptionReply reply;
    reply.option = uint32_t{wire::kOptList};
    reply.type = type;
    reply.length = length;
    out.append(reinterpret_cast<const char*>(&reply), sizeof reply);
}

}  // namespace

ListEncoder::ListEncoder(uint64_t bytes_max) : bytes_max_(bytes_max) {
    piece_.reserve(kPieceBytes);
}

bool ListEncoder::Add(std::string_view name) {
    const auto length = static_cast<uint32_t>(name.size());
    const size_t bytes = sizeof(wire::OptionReply) + sizeof length + length;
    bytes_ += bytes;
    if (bytes_ > bytes_max_) return false;
    if (piece_.size() + bytes > kPieceBytes) {
        reply_.pieces.push_back(std::exchange(piece_, std::string()));
        piece_.reserve(kPieceBytes);
    }
    Append(piece_, wire::kRepServer, static_cast<uint32_t>(sizeof length) + length);
    AppendBig(piece_, length);
    piece_ += name;
    ++reply_.exports;
    return true;
}

ListReply ListEncoder::Finish() {
    if (bytes_ > bytes_max_) {
        // nbd-client overwrites the last byte of a message.
        const std::string_view message = "there are too many exports to list them here.";
        reply_ = ListReply();
        piece_.clear();
        Append(piece_, wire::kRepErrTooBig, static_cast<uint32_t>(message.size()));
        piece_ += message;
    } else {
        Append(piece_, wire::kRepAck, 0);
    }
    piece_.shrink_to_fit();
    reply_.pieces.push_back(std::move(piece_));
    return std::move(reply_);
}

}  // namespace varve::nbdserver
