// Request: one NBD request from its header to its reply - decoding, the rules it must keep, the
// bytes of the answer.
// Not I/O: connection*.cc receive, run and send.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/buffers.h"
#include "base/result.h"
#include "cow/format/types.h"
#include "nbdserver/connection/block_status.h"
#include "nbdserver/connection/memory_budget.h"
#include "nbdserver/wire/wire.h"

namespace varve::nbdserver {

class Connection;

/// What a client may ask of its export, fixed by negotiation and the limits.
struct RequestRules {
    bool structured_replies = false;
    bool extended = false;  // headers; then replies are structured, too
    bool read_only = false;
    std::vector<StatusContext> contexts;       // of BLOCK_STATUS; none: it is refused
    uint32_t payload_max = wire::kPayloadMax;  // bytes of a READ or WRITE
};

/// A larger READ is served in slices of this many bytes.
inline constexpr uint32_t kReadSliceBytes = 1 << 20;

/// Most extents that one BLOCK_STATUS is answered with, in all contexts together. The protocol
/// allows less than asked for.
inline constexpr uint32_t kStatusExtentsMax = 8192;

/// Lives from its header's arrival until its reply has left; recycled, so that its vectors keep
/// their memory.
struct Request {
    Connection* connection = nullptr;
    Request* next = nullptr;  // in the one list that holds it

    // As received.
    uint64_t cookie = 0;
    uint64_t offset = 0;  // bytes
    uint64_t length = 0;  // bytes
    uint16_t flags = 0;
    uint16_t type = 0;
    bool extended = false;       // its header, and so its reply
    uint64_t payload_bytes = 0;  // that follow it
    uint32_t contexts = 0;       // of a BLOCK_STATUS: those asked for, a bit each

    Errno error = 0;
    uint64_t charge = 0;  // bytes of memory it counts for, besides itself
    uint64_t work = 0;    // bytes it touches, if it has no payload
    MemoryBudget::Fund fund = MemoryBudget::Fund::kNone;  // which pays for them
    Buffer payload;                                       // of a WRITE, or what a READ answers
    std::vector<cow::Allocation> map;

    // The reply as sent: `pieces` point into `head`, `payload` and `layout`.
    std::array<std::byte, 64> head;
    std::array<iovec, 2> few_pieces;
    Buffer layout;  // pieces and headers of a reply that has many
    std::span<iovec> pieces;
    uint64_t reply_bytes = 0;
};

/// Bytes of a header.
size_t HeaderBytes(const RequestRules& rules);
/// The larger of the two.
inline constexpr size_t kHeaderBytesMax = sizeof(wire::ExtendedRequest);

/// Fills the fields as received. False if the magic number is wrong: the stream is lost.
bool Decode(const std::byte* header, const RequestRules& rules, Request& request);

/// Whether a payload that is not written tells which contexts a BLOCK_STATUS is about. Before it
/// has arrived, the rest of the request is not known.
bool HasStatusPayload(const Request& request, const RequestRules& rules);
/// Takes it, from `request.payload`. False if it names contexts that were not selected, or one of
/// them twice.
bool TakeStatusPayload(Request& request, const RequestRules& rules);

/// Whether `request` may be run on an export of `size` bytes: 0, or the error to answer with.
Errno Validate(const Request& request, const RequestRules& rules, uint64_t size);

/// Bytes of memory that running and answering a valid `request` takes.
uint64_t MemoryNeeded(const Request& request, const RequestRules& rules);

/// Stretches that a valid BLOCK_STATUS may have in each context.
uint32_t StatusStretchesMax(const Request& request, const RequestRules& rules);

/// What the contexts that a valid BLOCK_STATUS asks for have to be told from.
struct StatusNeeds {
    bool map = false;
    bool layers = false;
    uint32_t bases = 0;  // a bit each
};
StatusNeeds NeedsOf(const Request& request, const RequestRules& rules);

/// Bytes of all stretches together.
uint64_t BytesOf(const std::vector<cow::Allocation>& map);

/// Bytes of the export that a valid `request` without payload works on: it costs time by these,
/// however little is sent. 0 for one with a payload, whose memory bounds it.
uint64_t WorkNeeded(const Request& request);

/// An errno value as one of the protocol's errors; what it does not have becomes kErrorIo.
wire::Error WireError(Errno error);

/// Makes `request.pieces`, at most kReplyPiecesMax, from the error, payload and map. `pool` gives
/// memory for long layouts; where it has none the reply becomes an error.
void BuildReply(Request& request, const RequestRules& rules, BufferPool& pool);
inline constexpr size_t kReplyPiecesMax = 520;

}  // namespace varve::nbdserver
