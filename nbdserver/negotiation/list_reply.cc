#include "nbdserver/negotiation/list_reply.h"

#include <utility>

#include "nbdserver/wire/wire.h"

namespace varve::nbdserver {
namespace {

constexpr size_t kPieceBytes = 64 << 10;

}  // namespace

void AppendReply(std::string& out, uint32_t option, uint32_t type, size_t length) {
    wire::OptionReply reply;
    reply.option = option;
    reply.type = type;
    reply.length = static_cast<uint32_t>(length);
    out.append(reinterpret_cast<const char*>(&reply), sizeof reply);
}

void AppendErrorReply(std::string& out, uint32_t option, uint32_t type, std::string_view message) {
    // nbd-client overwrites the last byte of a message: let it be one that does not matter.
    AppendReply(out, option, type, message.size() + 1);
    out += message;
    out += '.';
}

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
    AppendReply(piece_, wire::kOptList, wire::kRepServer, sizeof length + length);
    AppendBig(piece_, length);
    piece_ += name;
    ++reply_.exports;
    return true;
}

ListReply ListEncoder::Finish() {
    if (bytes_ > bytes_max_) {
        reply_ = ListReply();
        piece_.clear();
        AppendErrorReply(piece_, wire::kOptList, wire::kRepErrTooBig,
                         "there are too many exports to list them here");
    } else {
        AppendReply(piece_, wire::kOptList, wire::kRepAck, 0);
    }
    piece_.shrink_to_fit();
    reply_.pieces.push_back(std::move(piece_));
    return std::move(reply_);
}

}  // namespace varve::nbdserver
