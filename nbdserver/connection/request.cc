#include "nbdserver/connection/request.h"

#include <algorithm>
#include <new>

namespace varve::nbdserver {
namespace {

// A hole costs a chunk of its own; a reply with more chunks than this sends the rest as data.
constexpr size_t kChunksMax = 256;
constexpr uint64_t kHoleBytesMin = 4096;
// In a reply of several chunks, for each: its pieces and its header.
constexpr size_t kLayoutBytes = 2 * sizeof(iovec) + sizeof(wire::OffsetHoleChunk);
static_assert(kChunksMax * 2 <= kReplyPiecesMax);

uint16_t AllowedFlags(const Request& request, const RequestRules& rules) {
    switch (request.type) {
        case wire::kCmdRead:
            return rules.structured_replies ? wire::kFlagFua | wire::kFlagDf : wire::kFlagFua;
        case wire::kCmdWriteZeroes:
            return wire::kFlagFua | wire::kFlagNoHole | wire::kFlagFastZero;
        case wire::kCmdBlockStatus:
            return wire::kFlagFua | wire::kFlagReqOne;
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

wire::Chunk ChunkHeader(const Request& request, wire::ChunkType type, size_t length, bool last) {
    wire::Chunk chunk;
    chunk.flags = last ? wire::kChunkDone : uint16_t{0};
    chunk.type = type;
    chunk.cookie = request.cookie;
    chunk.length = static_cast<uint32_t>(length);
    return chunk;
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
    wire::ErrorChunk reply;
    reply.chunk = ChunkHeader(request, wire::kChunkError, sizeof reply - sizeof reply.chunk, true);
    reply.error = WireError(request.error);
    SetHead(request, Append(request.head.data(), reply));
}

void BuildEmpty(Request& request) {
    SetHead(request, Append(request.head.data(), ChunkHeader(request, wire::kChunkNone, 0, true)));
}

std::byte* AppendData(const Request& request, std::byte* at, uint64_t offset, uint64_t length,
                      bool last) {
    wire::OffsetDataChunk chunk;
    chunk.chunk = ChunkHeader(request, wire::kChunkOffsetData, sizeof chunk.offset + length, last);
    chunk.offset = offset;
    return Append(at, chunk);
}

std::byte* AppendHole(const Request& request, std::byte* at, uint64_t offset, uint64_t length,
                      bool last) {
    wire::OffsetHoleChunk chunk;
    chunk.chunk =
        ChunkHeader(request, wire::kChunkOffsetHole, sizeof chunk - sizeof chunk.chunk, last);
    chunk.offset = offset;
    chunk.length = static_cast<uint32_t>(length);
    return Append(at, chunk);
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

size_t StatusBytes(size_t extents) {
    return sizeof(wire::BlockStatusChunk) + extents * sizeof(wire::Extent);
}

/// What one context says; gives where the next one's chunk begins.
std::byte* AppendContext(std::byte* at, const Request& request, const StatusContext& context,
                         bool last) {
    std::byte* const extents = at + sizeof(wire::BlockStatusChunk);
    std::byte* end = extents;
    wire::Extent extent;
    for (const cow::Allocation& stretch : request.map) {
        const uint32_t flags = StatusFlags(context, stretch);
        const auto length = static_cast<uint32_t>(stretch.length);
        if (end != extents && extent.flags == flags) {
            extent.length = extent.length + length;
            end -= sizeof extent;
        } else {
            extent.length = length;
            extent.flags = flags;
        }
        end = Append(end, extent);
    }
    wire::BlockStatusChunk status;
    const size_t length = static_cast<size_t>(end - at) - sizeof status.chunk;
    status.chunk = ChunkHeader(request, wire::kChunkBlockStatus, length, last);
    status.context_id = context.id;
    Append(at, status);
    return end;
}

void BuildStatus(Request& request, const RequestRules& rules, BufferPool& pool) {
    const size_t contexts = rules.contexts.size();
    if (!request.map.empty())
        request.layout = pool.Take(contexts * StatusBytes(request.map.size()));
    if (!request.layout) {
        request.error = request.map.empty() ? EIO : ENOMEM;
        return BuildError(request);
    }
    std::byte* at = request.layout.data();
    for (size_t i = 0; i < contexts; ++i) {
        at = AppendContext(at, request, rules.contexts[i], i + 1 == contexts);
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
           BufferPool::Rounded(contexts * StatusBytes(each));
}

/// For what is sent or received, and to make the reply.
uint64_t PayloadNeeded(const Request& request, const RequestRules& rules) {
    const uint32_t length = request.length;
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
            if (request.flags & wire::kFlagReqOne) return 0;
            return StatusNeeded(rules);
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

bool Decode(const std::byte* header, Request& request) {
    const wire::Request& received = *reinterpret_cast<const wire::Request*>(header);
    request.flags = received.flags;
    request.type = received.type;
    request.cookie = received.cookie;
    request.offset = received.offset;
    request.length = received.length;
    return received.magic == wire::kRequestMagic;
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
    const bool chunks = rules.structured_replies &&
                        (request.type == wire::kCmdRead || request.type == wire::kCmdBlockStatus);
    if (!chunks) {
        BuildSimple(request);
    } else if (request.error) {
        BuildError(request);
    } else if (request.type == wire::kCmdRead) {
        BuildRead(request, pool);
    } else {
        BuildStatus(request, rules, pool);
    }
}

}  // namespace varve::nbdserver
