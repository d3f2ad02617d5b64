// The NBD protocol's numbers and structures, as they stand on the wire.
// Not their meaning: negotiation.cc and request.cc have that.
// Source: doc/proto.md of github.com/NetworkBlockDevice/nbd.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/endian.h"

namespace varve::nbdserver::wire {

/// A big-endian integer in a structure of the wire; no alignment, no padding.
template <typename T>
class Big {
  public:
    Big() = default;
    Big(T value) { StoreBig(bytes_, value); }          // NOLINT: conversion intended
    operator T() const { return LoadBig<T>(bytes_); }  // NOLINT: conversion intended

  private:
    std::byte bytes_[sizeof(T)] = {};
};

using U16 = Big<uint16_t>;
using U32 = Big<uint32_t>;
using U64 = Big<uint64_t>;

/// Payload of a request that every client may count on. Bytes ("Block size constraints").
inline constexpr uint32_t kPayloadMax = 32 << 20;
/// Longest string of the protocol. Bytes.
inline constexpr uint32_t kStringMax = 4096;

// ---- negotiation

inline constexpr uint64_t kGreetingMagic = 0x4e42444d41474943;  // "NBDMAGIC"
inline constexpr uint64_t kOptionMagic = 0x49484156454f5054;    // "IHAVEOPT"
inline constexpr uint64_t kOptionReplyMagic = 0x0003e889045565a9;

/// What the server says first.
struct Greeting {
    U64 magic = kGreetingMagic;
    U64 option_magic = kOptionMagic;
    U16 flags;  // kHandshake*
};
static_assert(sizeof(Greeting) == 18);

inline constexpr uint16_t kHandshakeFixedNewstyle = 1 << 0;
inline constexpr uint16_t kHandshakeNoZeroes = 1 << 1;
inline constexpr uint32_t kClientFixedNewstyle = 1 << 0;
inline constexpr uint32_t kClientNoZeroes = 1 << 1;

struct OptionHeader {
    U64 magic = kOptionMagic;
    U32 option;
    U32 length;  // of the data that follows
};
static_assert(sizeof(OptionHeader) == 16);

struct OptionReply {
    U64 magic = kOptionReplyMagic;
    U32 option;
    U32 type;
    U32 length;  // of the data that follows
};
static_assert(sizeof(OptionReply) == 20);

enum Option : uint32_t {
    kOptExportName = 1,
    kOptAbort = 2,
    kOptList = 3,
    kOptPeekExport = 4,  // withdrawn
    kOptStartTls = 5,
    kOptInfo = 6,
    kOptGo = 7,
    kOptStructuredReply = 8,
    kOptListMetaContext = 9,
    kOptSetMetaContext = 10,
    kOptExtendedHeaders = 11,
};

enum OptionReplyType : uint32_t {
    kRepAck = 1,
    kRepServer = 2,
    kRepInfo = 3,
    kRepMetaContext = 4,
    kRepErrUnsupported = 0x80000001,
    kRepErrPolicy = 0x80000002,
    kRepErrInvalid = 0x80000003,
    kRepErrPlatform = 0x80000004,
    kRepErrTlsRequired = 0x80000005,
    kRepErrUnknown = 0x80000006,
    kRepErrShutdown = 0x80000007,
    kRepErrBlockSizeRequired = 0x80000008,
    kRepErrTooBig = 0x80000009,
    kRepErrExtendedHeadersRequired = 0x8000000a,
};

enum Info : uint16_t {
    kInfoExport = 0,
    kInfoName = 1,
    kInfoDescription = 2,
    kInfoBlockSize = 3,
};

struct InfoExport {
    U16 type = kInfoExport;
    U64 size;   // bytes
    U16 flags;  // kTransmission*
};
static_assert(sizeof(InfoExport) == 12);

struct InfoBlockSize {
    U16 type = kInfoBlockSize;
    U32 minimum;    // bytes
    U32 preferred;  // bytes
    U32 maximum;    // bytes
};
static_assert(sizeof(InfoBlockSize) == 14);

/// The answer to kOptExportName; without kClientNoZeroes, kExportNameZeroes zero bytes follow.
struct ExportNameReply {
    U64 size;   // bytes
    U16 flags;  // kTransmission*
};
static_assert(sizeof(ExportNameReply) == 10);
inline constexpr size_t kExportNameZeroes = 124;

inline constexpr uint16_t kTransmissionHasFlags = 1 << 0;
inline constexpr uint16_t kTransmissionReadOnly = 1 << 1;
inline constexpr uint16_t kTransmissionSendFlush = 1 << 2;
inline constexpr uint16_t kTransmissionSendFua = 1 << 3;
inline constexpr uint16_t kTransmissionRotational = 1 << 4;
inline constexpr uint16_t kTransmissionSendTrim = 1 << 5;
inline constexpr uint16_t kTransmissionSendWriteZeroes = 1 << 6;
inline constexpr uint16_t kTransmissionSendDf = 1 << 7;
inline constexpr uint16_t kTransmissionCanMultiConn = 1 << 8;
inline constexpr uint16_t kTransmissionSendCache = 1 << 10;
inline constexpr uint16_t kTransmissionSendFastZero = 1 << 11;
inline constexpr uint16_t kTransmissionBlockStatusPayload = 1 << 12;

// ---- transmission

inline constexpr uint32_t kRequestMagic = 0x25609513;
inline constexpr uint32_t kSimpleReplyMagic = 0x67446698;
inline constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;
inline constexpr uint32_t kExtendedRequestMagic = 0x21e41c71;
inline constexpr uint32_t kExtendedReplyMagic = 0x6e8a278c;

enum Command : uint16_t {
    kCmdRead = 0,
    kCmdWrite = 1,
    kCmdDisconnect = 2,
    kCmdFlush = 3,
    kCmdTrim = 4,
    kCmdCache = 5,
    kCmdWriteZeroes = 6,
    kCmdBlockStatus = 7,
};

inline constexpr uint16_t kFlagFua = 1 << 0;
inline constexpr uint16_t kFlagNoHole = 1 << 1;    // WRITE_ZEROES
inline constexpr uint16_t kFlagDf = 1 << 2;        // READ: do not fragment
inline constexpr uint16_t kFlagReqOne = 1 << 3;    // BLOCK_STATUS
inline constexpr uint16_t kFlagFastZero = 1 << 4;  // WRITE_ZEROES
/// With extended headers: the length is that of a payload which follows.
inline constexpr uint16_t kFlagPayloadLength = 1 << 5;

struct Request {
    U32 magic = kRequestMagic;
    U16 flags;
    U16 type;    // Command
    U64 cookie;  // echoed in the reply
    U64 offset;  // bytes
    U32 length;  // bytes; those of a WRITE follow
};
static_assert(sizeof(Request) == 28);

struct ExtendedRequest {
    U32 magic = kExtendedRequestMagic;
    U16 flags;
    U16 type;    // Command
    U64 cookie;  // echoed in the reply
    U64 offset;  // bytes
    U64 length;  // bytes; of a payload that follows, if kFlagPayloadLength is set
};
static_assert(sizeof(ExtendedRequest) == 32);

/// The payload of a BLOCK_STATUS: which contexts are asked for. Their ids follow, 4 bytes each.
struct StatusPayload {
    U64 length;  // bytes, as the request's would be without a payload
};
static_assert(sizeof(StatusPayload) == 8);

struct SimpleReply {
    U32 magic = kSimpleReplyMagic;
    U32 error;  // Error
    U64 cookie;
};
static_assert(sizeof(SimpleReply) == 16);

struct Chunk {
    U32 magic = kStructuredReplyMagic;
    U16 flags;  // kChunkDone
    U16 type;   // ChunkType
    U64 cookie;
    U32 length;  // of what follows
};
static_assert(sizeof(Chunk) == 20);

/// With extended headers all replies are such chunks.
struct ExtendedChunk {
    U32 magic = kExtendedReplyMagic;
    U16 flags;  // kChunkDone
    U16 type;   // ChunkType
    U64 cookie;
    U64 offset;  // of the request
    U64 length;  // of what follows
};
static_assert(sizeof(ExtendedChunk) == 32);

inline constexpr uint16_t kChunkDone = 1 << 0;

enum ChunkType : uint16_t {
    kChunkNone = 0,
    kChunkOffsetData = 1,
    kChunkOffsetHole = 2,
    kChunkBlockStatus = 5,
    kChunkBlockStatusExtended = 6,
    kChunkError = 0x8001,
    kChunkErrorOffset = 0x8002,
};

/// The data follows.
struct OffsetData {
    U64 offset;
};
static_assert(sizeof(OffsetData) == 8);

struct OffsetHole {
    U64 offset;
    U32 length;
};
static_assert(sizeof(OffsetHole) == 12);

struct Extent {
    U32 length;  // bytes
    U32 flags;   // of the context; for base:allocation kAllocation*
};
static_assert(sizeof(Extent) == 8);

struct ExtendedExtent {
    U64 length;  // bytes
    U64 flags;
};
static_assert(sizeof(ExtendedExtent) == 16);

/// Of kChunkBlockStatus; extents follow.
struct StatusHead {
    U32 context_id;
};
static_assert(sizeof(StatusHead) == 4);

/// Of kChunkBlockStatusExtended; so many extended extents follow.
struct ExtendedStatusHead {
    U32 context_id;
    U32 count;
};
static_assert(sizeof(ExtendedStatusHead) == 8);

inline constexpr uint32_t kAllocationHole = 1 << 0;
inline constexpr uint32_t kAllocationZero = 1 << 1;
/// Of qemu:dirty-bitmap:NAME (docs/interop/nbd.rst of QEMU).
inline constexpr uint32_t kBitmapDirty = 1 << 0;

struct ErrorBody {
    U32 error;
    U16 message_length = 0;
};
static_assert(sizeof(ErrorBody) == 6);

/// The only errors that exist on the wire ("Error values").
enum Error : uint32_t {
    kErrorNone = 0,
    kErrorPermission = 1,
    kErrorIo = 5,
    kErrorMemory = 12,
    kErrorInvalid = 22,
    kErrorNoSpace = 28,
    kErrorOverflow = 75,
    kErrorNotSupported = 95,
    kErrorShutdown = 108,
};

}  // namespace varve::nbdserver::wire
