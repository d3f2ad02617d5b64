#include "cow/format/superblock.h"

#include <fmt/format.h>
#include <isa-l/crc.h>
#include <sys/random.h>

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/endian.h"
#include "cow/format/types.h"

namespace varve::cow {
namespace {

constexpr char kMagic[8] = {'V', 'a', 'r', 'v', 'e', 'D', 'a', 't'};

/// As it lies in the file; numbers are big-endian. Zeros follow, up to the checksum.
struct Layout {
    char magic[8];
    uint8_t version[4];
    uint8_t block_bytes[4];
    uint8_t uuid[16];
    uint8_t created_ms[8];
};
static_assert(sizeof(Layout) == 40 && alignof(Layout) == 1);

constexpr size_t kChecksumOffset = kSuperblockBytes - sizeof(uint32_t);

/// CRC32C (iSCSI's polynomial) of everything before the checksum.
uint32_t Checksum(std::string_view bytes) {
    auto* data = reinterpret_cast<unsigned char*>(const_cast<char*>(bytes.data()));
    return ~crc32_iscsi(data, static_cast<int>(kChecksumOffset), ~0U);
}

}  // namespace

Uuid NewUuid() {
    Uuid uuid;
    VARVE_CHECK(::getrandom(uuid.data(), uuid.size(), 0) == static_cast<ssize_t>(uuid.size()));
    uuid[6] = static_cast<uint8_t>((uuid[6] & 0x0f) | 0x40);  // RFC 4122: version 4
    uuid[8] = static_cast<uint8_t>((uuid[8] & 0x3f) | 0x80);  // RFC 4122: variant 1
    return uuid;
}

std::string FormatUuid(const Uuid& uuid) {
    std::string text;
    for (size_t i = 0; i < uuid.size(); ++i) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
        text += fmt::format("{:02x}", uuid[i]);
    }
    return text;
}

std::string EncodeSuperblock(const Superblock& superblock) {
    Layout layout;
    std::memcpy(layout.magic, kMagic, sizeof kMagic);
    StoreBig(layout.version, kDataVersion);
    StoreBig(layout.block_bytes, static_cast<uint32_t>(kBlockBytes));
    std::copy(superblock.uuid.begin(), superblock.uuid.end(), layout.uuid);
    StoreBig(layout.created_ms, static_cast<uint64_t>(superblock.created_ms));
    std::string bytes(kSuperblockBytes, '\0');
    std::memcpy(bytes.data(), &layout, sizeof layout);
    StoreBig(bytes.data() + kChecksumOffset, Checksum(bytes));
    return bytes;
}

Result<Superblock> DecodeSuperblock(std::string_view bytes, const std::string& path) {
    Layout layout;
    if (bytes.size() < kSuperblockBytes || std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0) {
        return MakeError(ErrorKind::kDamaged,
                         fmt::format("{} does not begin with a superblock of Varve's: it is no "
                                     "pool's data file",
                                     path));
    }
    std::memcpy(&layout, bytes.data(), sizeof layout);
    const auto version = LoadBig<uint32_t>(layout.version);
    if (version != kDataVersion) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("{} has format version {}, but this varved reads version {}; "
                                     "use the varved that wrote it",
                                     path, version, kDataVersion));
    }
    if (LoadBig<uint32_t>(bytes.data() + kChecksumOffset) != Checksum(bytes) ||
        LoadBig<uint32_t>(layout.block_bytes) != kBlockBytes) {
        return MakeError(ErrorKind::kDamaged,
                         fmt::format("the superblock of {} is damaged; restore the pool from a "
                                     "backup",
                                     path));
    }
    Superblock superblock;
    std::copy(std::begin(layout.uuid), std::end(layout.uuid), superblock.uuid.begin());
    superblock.created_ms = static_cast<int64_t>(LoadBig<uint64_t>(layout.created_ms));
    return superblock;
}

}  // namespace varve::cow
