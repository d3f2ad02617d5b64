#include "nbdserver/connection/request.h"

#include <algorithm>
#include <new>

namespace varve::nbdserver {
namespace {

// A hole costs a chunk of its own; a reply with more chunks than this sends the rest as data.
constexpr size_t kChunksMax = 256;
constexpr uint64_t kHoleBytesMin = 4096;
// In a reply of several chunks, for each: its pieces and its header.
constexpr size_t kLayoutBytes =
    2 * sizeof(iovec) + sizeof(wire::ExtendedChunk) + sizeof(wire::OffsetHole);
static_assert(kChunksMax * 2 <= kReplyPiecesMax);

uint16_t AllowedFlags(const Request& request, const RequestRules& rules) {
    const uint16_t payload = rules.extended ? wire::kFlagPayloadLength : 0;
    switch (request.type) {
        case wire::kCmdRead:
            return rules.structured_replies ? wire::kFlagFua | wire::kFlagDf : wire::kFlagFua;
        case wire::kCmdWrite:
            return wire::kFlagFua | payload;
        case wire::kCmdWriteZeroes:
            return wire::kFlagFua | wire::kFlagNoHole | wire::kFlagFastZero;
        case wire::kCmdBlockStatus:
            return wire::kFlagFua | wire::kFlagReqOne | payload;
        default:
            return wire::kFlagFua;
    }
}

bool Changes(uint16_t type) {
    return type == wire::kCmdWrite || type == wire::kCmdTrim || type == wire::kCmdWriteZeroes;
}

template <typename T>
std::byte* Append(std::byte* at, const T& structure) {
    return reinterpret_cast<std::byte*>(new (at) T(structure)) + sizeof(T);
}

size_t ChunkBytes(const Request& request) {
    return request.extended ? sizeof(wire::ExtendedChunk) : sizeof(wire::Chunk);
}

/// The header of a chunk with `length` bytes behind it.
std::byte* AppendChunk(const Request& request, std::byte* at, wire::ChunkType type, uint64_t length,
                       bool last) {
    const auto fill = [&](auto chunk) {
        chunk.flags = last ? wire::kChunkDone : uint16_t{0};
        chunk.type = type;
        chunk.cookie = request.cookie;
        return chunk;
    };
    if (!request.extended) {
        wire::Chunk chunk = fill(wire::Chunk());
        chunk.length = static_cast<uint32_t>(length);
        return Append(at, chunk);
    }
    wire::ExtendedChunk chunk = fill(wire::ExtendedChunk());
    chunk.offset = request.offset;
    chunk.length = length;
    return Append(at, chunk);
}

/// Merges stretches of the same kind, and holes too short to be worth a chunk into data.
void Simplify(std::vector<cow::Allocation>& map, uint64_t hole_bytes_min) {
    size_t kept = 0;
    for (cow::Allocation stretch : map) {
        if (stretch.length == 0) continue;
        if (stretch.length < hole_bytes_min) stretch.hole = false;
        if (kept && map[kept - 1].hole == stretch.hole) {
            map[kept - 1].length += stretch.length;
        } else {
            map[kept++] = stretch;
        }
    }
    map.resize(kept);
}

void SetHead(Request& request, const std::byte* end) {
    const size_t bytes = static_cast<size_t>(end - request.head.data());
    request.few_pieces[0] = {request.head.data(), bytes};
    request.pieces = std::span(request.few_pieces).first(1);
    request.reply_bytes = bytes;
}

void AddPayload(Request& request) {
    request.few_pieces[1] = {request.payload.data(), request.length};
    request.pieces = request.few_pieces;
    request.reply_bytes += request.length;
}

void BuildSimple(Request& request) {
    wire::SimpleReply reply;
    reply.error = WireError(request.error);
    reply.cookie = request.cookie;
    SetHead(request, Append(request.head.data(), reply));
    if (request.type == wire::kCmdRead && !request.error && request.length) AddPayload(request);
}

void BuildError(Request& request) {
    wire::ErrorBody body;
    body.error = WireError(request.error);
    std::byte* at = AppendChunk(request, request.head.data(), wire::kChunkError, sizeof body, true);
    SetHead(request, Append(at, body));
}

void BuildEmpty(Request& request) {
    SetHead(request, AppendChunk(request, request.head.data(), wire::kChunkNone, 0, true));
}

std::byte* AppendData(const Request& request, std::byte* at, uint64_t offset, uint64_t length,
                      bool last) {
    wire::OffsetData body;
    body.offset = offset;
    at = AppendChunk(request, at, wire::kChunkOffsetData, sizeof body + length, last);
    return Append(at, body);
}

std::byte* AppendHole(const Request& request, std::byte* at, uint64_t offset, uint64_t length,
                      bool last) {
    wire::OffsetHole body;
    body.offset = offset;
    body.length = static_cast<uint32_t>(length);
    at = AppendChunk(request, at, wire::kChunkOffsetHole, sizeof body, last);
    return Append(at, body);
}

/// A READ's data and holes as several chunks: headers one behind the other in `layout`, data from
/// `payload` between them.
void BuildFragments(Request& request) {
    iovec* const pieces = reinterpret_cast<iovec*>(request.layout.data());
    iovec* piece = pieces;
    std::byte* at = request.layout.data() + request.map.size() * 2 * sizeof(iovec);
    std::byte* unsent = at;  // headers not in a piece yet
    uint64_t done = 0;
    for (size_t i = 0; i < request.map.size(); ++i) {
        const cow::Allocation stretch = request.map[i];
        const bool last = i + 1 == request.map.size();
        const uint64_t offset = request.offset + done;
        if (stretch.hole) {
            at = AppendHole(request, at, offset, stretch.length, last);
        } else {
            at = AppendData(request, at, offset, stretch.length, last);
            *piece++ = {unsent, static_cast<size_t>(at - unsent)};
            *piece++ = {request.payload.data() + done, stretch.length};
            unsent = at;
        }
        done += stretch.length;
    }
    if (at != unsent) *piece++ = {unsent, static_cast<size_t>(at - unsent)};
    request.pieces = {pieces, piece};
    for (const iovec& p : request.pieces) request.reply_bytes += p.iov_len;
}

void BuildRead(Request& request, BufferPool& pool) {
    if (request.length == 0) return BuildEmpty(request);
    std::vector<cow::Allocation>& map = request.map;
    Simplify(map, kHoleBytesMin);
    if (BytesOf(map) != request.length) map.clear();
    if (map.size() == 1 && map[0].hole) {
        return SetHead(request, AppendHole(request, request.head.data(), request.offset,
                                           request.length, true));
    }
    if (map.size() > 1 && !(request.flags & wire::kFlagDf)) {
        if (map.size() > kChunksMax) {
            uint64_t before = 0;
            for (size_t i = 0; i + 1 < kChunksMax; ++i) before += map[i].length;
            map.resize(kChunksMax);
            map.back() = {request.length - before, false};
        }
        request.layout = pool.Take(map.size() * kLayoutBytes);
        if (request.layout) return BuildFragments(request);
    }
    SetHead(request,
            AppendData(request, request.head.data(), request.offset, request.length, true));
    AddPayload(request);
}

/// Of one context.
size_t StatusBytes(bool extended, size_t extents) {
    if (!extended) {
        return sizeof(wire::Chunk) + sizeof(wire::StatusHead) + extents * sizeof(wire::Extent);
    }
    return sizeof(wire::ExtendedChunk) + sizeof(wire::ExtendedStatusHead) +
           extents * sizeof(wire::ExtendedExtent);
}

/// What a context says as extents, joined where it says the same.
template <typename Extent, typename Length>
std::byte* AppendExtents(std::byte* at, const Request& request, const StatusContext& context) {
    Extent extent;
    bool first = true;
    for (const cow::Allocation& stretch : request.map) {
        const uint32_t flags = StatusFlags(context, stretch);
        if (!first && extent.flags == flags) {
            extent.length = static_cast<Length>(extent.length + stretch.length);
            at -= sizeof extent;
        } else {
            extent.length = static_cast<Length>(stretch.length);
            extent.flags = flags;
        }
        at = Append(at, extent);
        first = false;
    }
    return at;
}

/// What one context says; gives where the next one's chunk begins.
std::byte* AppendContext(std::byte* at, const Request& request, const StatusContext& context,
                         bool last) {
    std::byte* const body = at + ChunkBytes(request);
    if (!request.extended) {
        wire::StatusHead head;
        head.context_id = context.id;
        std::byte* const end =
            AppendExtents<wire::Extent, uint32_t>(Append(body, head), request, context);
        AppendChunk(request, at, wire::kChunkBlockStatus, static_cast<size_t>(end - body), last);
        return end;
    }
    wire::ExtendedStatusHead head;
    std::byte* const extents = body + sizeof head;
    std::byte* const end = AppendExtents<wire::ExtendedExtent, uint64_t>(extents, request, context);
    head.context_id = context.id;
    head.count =
        static_cast<uint32_t>(static_cast<size_t>(end - extents) / sizeof(wire::ExtendedExtent));
    Append(body, head);
    AppendChunk(request, at, wire::kChunkBlockStatusExtended, static_cast<size_t>(end - body),
                last);
    return end;
}

void BuildStatus(Request& request, const RequestRules& rules, BufferPool& pool) {
    const size_t contexts = rules.contexts.size();
    if (!request.map.empty()) {
        request.layout = pool.Take(contexts * StatusBytes(request.extended, request.map.size()));
    }
    if (!request.layout) {
        request.error = request.map.empty() ? EIO : ENOMEM;
        return BuildError(request);
    }
    std::byte* at = request.layout.data();
    for (size_t i = 0; i < contexts; ++i) {
        const bool last = request.contexts >> i == 1;
        if (request.contexts >> i & 1) at = AppendContext(at, request, rules.contexts[i], last);
    }
    request.reply_bytes = static_cast<uint64_t>(at - request.layout.data());
    request.few_pieces[0] = {request.layout.data(), request.reply_bytes};
    request.pieces = std::span(request.few_pieces).first(1);
}

// The volume reads and writes whole blocks, and at aligned addresses: what does not fit takes a
// detour through memory of its own. It reads a slice at a time, writes 32 chunks of 256 KiB at a
// time, and zeroes without holes at most the first and the last chunk in this way.
constexpr uint64_t kWriteDetourMax = 8 << 20;
constexpr uint64_t kZeroesDetourMax = 512 << 10;
constexpr uint64_t kDetourFrames = 1 << 10;  // of coroutines, measured

uint64_t DetourNeeded(const Request& request) {
    const uint64_t end = request.offset + request.length;
    if (request.length == 0 || (request.offset | end) % cow::kBlockBytes == 0) return 0;
    const uint64_t first_block = request.offset / cow::kBlockBytes;
    const uint64_t end_block = (end + cow::kBlockBytes - 1) / cow::kBlockBytes;
    const uint64_t bytes = (end_block - first_block) * cow::kBlockBytes;
    switch (request.type) {
        case wire::kCmdRead:
            return kDetourFrames + BufferPool::Rounded(std::min<uint64_t>(bytes, kReadSliceBytes));
        case wire::kCmdWrite:
            return kDetourFrames + BufferPool::Rounded(std::min(bytes, kWriteDetourMax));
        case wire::kCmdWriteZeroes:
            if (!(request.flags & wire::kFlagNoHole)) return kDetourFrames + cow::kBlockBytes;
            return kDetourFrames + BufferPool::Rounded(std::min(bytes, kZeroesDetourMax));
        default:
            return 0;
    }
}

/// With several contexts, what one of them says is merged with what those before said.
uint64_t StatusNeeded(const RequestRules& rules) {
    const size_t contexts = rules.contexts.size();
    const uint64_t each = std::max<uint64_t>(kStatusExtentsMax / contexts, 1);
    const uint64_t lists = contexts > 1                                         ? 3
                           : rules.contexts[0].kind == ContextKind::kAllocation ? 1
                                                                                : 2;
    static_assert(sizeof(cow::Delta) <= sizeof(cow::Allocation));
    return lists * each * sizeof(cow::Allocation) +
           BufferPool::Rounded(contexts * StatusBytes(rules.extended, each));
}

uint64_t StatusPayloadNeeded(const Request& request) {
    return request.payload_bytes ? BufferPool::Rounded(request.payload_bytes) : 0;
}

/// For what is sent or received, and to make the reply.
uint64_t PayloadNeeded(const Request& request, const RequestRules& rules) {
    const uint64_t length = request.length;
    switch (request.type) {
        case wire::kCmdRead: {
            if (length == 0) return 0;
            const uint64_t payload = BufferPool::Rounded(length);
            if (!rules.structured_replies || length <= kHoleBytesMin) return payload;
            const uint64_t stretches = length / cow::kBlockBytes + 2;
            const uint64_t chunks = std::min<uint64_t>(stretches, kChunksMax);
            return payload + stretches * sizeof(cow::Allocation) +
                   BufferPool::Rounded(chunks * kLayoutBytes);
        }
        case wire::kCmdWrite:
            return length ? BufferPool::Rounded(length) : 0;
        case wire::kCmdBlockStatus:
            if (request.flags & wire::kFlagReqOne) return StatusPayloadNeeded(request);
            return StatusPayloadNeeded(request) + StatusNeeded(rules);
        default:
            return 0;
    }
}

}  // namespace

uint64_t BytesOf(const std::vector<cow::Allocation>& map) {
    uint64_t bytes = 0;
    for (const cow::Allocation stretch : map) bytes += stretch.length;
    return bytes;
}

size_t HeaderBytes(const RequestRules& rules) {
    return rules.extended ? sizeof(wire::ExtendedRequest) : sizeof(wire::Request);
}

bool Decode(const std::byte* header, const RequestRules& rules, Request& request) {
    const auto take = [&request](const auto& received) {
        request.flags = received.flags;
        request.type = received.type;
        request.cookie = received.cookie;
        request.offset = received.offset;
        request.length = received.length;
        return uint32_t{received.magic};
    };
    request.extended = rules.extended;
    const uint32_t magic = rules.extended
                               ? take(*reinterpret_cast<const wire::ExtendedRequest*>(header))
                               : take(*reinterpret_cast<const wire::Request*>(header));
    // A client that forgets the flag on a WRITE sends the payload all the same.
    const bool follows = request.type == wire::kCmdWrite ||
                         (rules.extended && (request.flags & wire::kFlagPayloadLength));
    request.payload_bytes = follows ? request.length : 0;
    request.contexts = (uint32_t{1} << rules.contexts.size()) - 1;
    return magic == (rules.extended ? wire::kExtendedRequestMagic : wire::kRequestMagic);
}

bool HasStatusPayload(const Request& request, const RequestRules& rules) {
    constexpr uint64_t kId = sizeof(wire::U32);
    const bool asks = request.type == wire::kCmdBlockStatus && request.payload_bytes > 0;
    if (!asks || request.payload_bytes < sizeof(wire::StatusPayload) + kId) return false;
    const uint64_t ids = request.payload_bytes - sizeof(wire::StatusPayload);
    return ids % kId == 0 && ids / kId <= rules.contexts.size();
}

bool TakeStatusPayload(Request& request, const RequestRules& rules) {
    const std::byte* const bytes = request.payload.data();
    request.length = LoadBig<uint64_t>(bytes);
    request.contexts = 0;
    for (size_t at = sizeof(wire::StatusPayload); at < request.payload_bytes; at += 4) {
        const auto id = LoadBig<uint32_t>(bytes + at);
        const auto context = std::find_if(rules.contexts.begin(), rules.contexts.end(),
                                          [id](const StatusContext& c) { return c.id == id; });
        if (context == rules.contexts.end()) return false;
        const uint32_t bit = uint32_t{1} << (context - rules.contexts.begin());
        if (request.contexts & bit) return false;
        request.contexts |= bit;
    }
    return true;
}

Errno Validate(const Request& request, const RequestRules& rules, uint64_t size) {
    const uint16_t type = request.type;
    if (type > wire::kCmdBlockStatus) return EINVAL;
    if (request.flags & ~AllowedFlags(request, rules)) return EINVAL;
    if (type == wire::kCmdFlush) return 0;  // offset and length are reserved
    if (rules.read_only && Changes(type)) return EPERM;
    const bool payload = type == wire::kCmdRead || type == wire::kCmdWrite;
    if (payload && request.length > rules.payload_max) return EINVAL;
    if (request.offset > size || request.length > size - request.offset) {
        return type == wire::kCmdWrite || type == wire::kCmdWriteZeroes ? ENOSPC : EINVAL;
    }
    if (type == wire::kCmdBlockStatus && (rules.contexts.empty() || !request.length)) {
        return EINVAL;
    }
    // Zeroes are fast because they only unmap, which is what NO_HOLE forbids.
    const uint16_t slow = wire::kFlagFastZero | wire::kFlagNoHole;
    if ((request.flags & slow) == slow) return ENOTSUP;
    return 0;
}

uint64_t MemoryNeeded(const Request& request, const RequestRules& rules) {
    return PayloadNeeded(request, rules) + DetourNeeded(request);
}

uint32_t StatusStretchesMax(const Request& request, const RequestRules& rules) {
    if (request.flags & wire::kFlagReqOne) return 1;
    const size_t each = kStatusExtentsMax / std::max<size_t>(rules.contexts.size(), 1);
    return static_cast<uint32_t>(std::max<size_t>(each, 1));
}

StatusNeeds NeedsOf(const Request& request, const RequestRules& rules) {
    StatusNeeds needs;
    for (size_t i = 0; i < rules.contexts.size(); ++i) {
        if (!(request.contexts >> i & 1)) continue;
        const StatusContext& context = rules.contexts[i];
        const bool depth = context.kind == ContextKind::kDepth;
        needs.layers |= depth;
        if (depth || context.kind == ContextKind::kAllocation) {
            needs.map = true;
        } else {
            needs.bases |= uint32_t{1} << context.base;
        }
    }
    return needs;
}

uint64_t WorkNeeded(const Request& request) {
    switch (request.type) {
        case wire::kCmdTrim:
        case wire::kCmdWriteZeroes:
        case wire::kCmdBlockStatus:
            return request.length;
        default:
            return 0;
    }
}

wire::Error WireError(Errno error) {
    switch (error) {
        case 0:
            return wire::kErrorNone;
        case EPERM:
        case EACCES:
        case EROFS:
            return wire::kErrorPermission;
        case ENOMEM:
            return wire::kErrorMemory;
        case EINVAL:
            return wire::kErrorInvalid;
        case ENOSPC:
        case EDQUOT:
        case EFBIG:
            return wire::kErrorNoSpace;
        case EOVERFLOW:
            return wire::kErrorOverflow;
        case ENOTSUP:
            return wire::kErrorNotSupported;
        case ESHUTDOWN:
            return wire::kErrorShutdown;
        default:
            return wire::kErrorIo;
    }
}

void BuildReply(Request& request, const RequestRules& rules, BufferPool& pool) {
    request.reply_bytes = 0;
    const bool read = request.type == wire::kCmdRead;
    const bool status = request.type == wire::kCmdBlockStatus;
    if (!rules.extended && !(rules.structured_replies && (read || status))) {
        BuildSimple(request);
    } else if (request.error) {
        BuildError(request);
    } else if (read) {
        BuildRead(request, pool);
    } else if (status) {
        BuildStatus(request, rules, pool);
    } else {
        BuildEmpty(request);
    }
}

}  // namespace varve::nbdserver
