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

/// As it lies in the file; numbers are big-endian. Zeros follow, up to the checksum. Version 1 has
/// no epoch, and its checksum at the end of the whole block.
struct Layout {
    char magic[8];
    uint8_t version[4];
    uint8_t block_bytes[4];
    uint8_t uuid[16];
    uint8_t created_ms[8];
    uint8_t epoch[8];
    uint8_t epoch_tag[8];
};
static_assert(sizeof(Layout) == 56 && alignof(Layout) == 1);

size_t ChecksumOffset(uint32_t version) {
    return (version == 1 ? kSuperblockBytes : kSuperblockSector) - sizeof(uint32_t);
}

/// CRC32C (iSCSI's polynomial) of everything before the checksum.
uint32_t Checksum(std::string_view bytes, uint32_t version) {
    auto* data = reinterpret_cast<unsigned char*>(const_cast<char*>(bytes.data()));
    return ~crc32_iscsi(data, static_cast<int>(ChecksumOffset(version)), ~0U);
}

template <typename T>
T Random() {
    T value;
    VARVE_CHECK(::getrandom(&value, sizeof value, 0) == static_cast<ssize_t>(sizeof value));
    return value;
}

}  // namespace

Uuid NewUuid() {
    Uuid uuid = Random<Uuid>();
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

Epoch NewEpoch(uint64_t number) {
    return {number + 1, Random<uint64_t>()};
}

std::string EncodeSuperblock(const Superblock& superblock) {
    Layout layout;
    std::memcpy(layout.magic, kMagic, sizeof kMagic);
    StoreBig(layout.version, kDataVersion);
    StoreBig(layout.block_bytes, static_cast<uint32_t>(kBlockBytes));
    std::copy(superblock.uuid.begin(), superblock.uuid.end(), layout.uuid);
    StoreBig(layout.created_ms, static_cast<uint64_t>(superblock.created_ms));
    StoreBig(layout.epoch, superblock.epoch.number);
    StoreBig(layout.epoch_tag, superblock.epoch.tag);
    std::string bytes(kSuperblockBytes, '\0');
    std::memcpy(bytes.data(), &layout, sizeof layout);
    StoreBig(bytes.data() + ChecksumOffset(kDataVersion), Checksum(bytes, kDataVersion));
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
    if (version < 1 || version > kDataVersion) {
        return MakeError(
            ErrorKind::kInvalid,
            fmt::format("{} has format version {}, but this varved reads versions 1 to {}; "
                        "use the varved that wrote it",
                        path, version, kDataVersion));
    }
    if (LoadBig<uint32_t>(bytes.data() + ChecksumOffset(version)) != Checksum(bytes, version) ||
        LoadBig<uint32_t>(layout.block_bytes) != kBlockBytes) {
        return MakeError(ErrorKind::kDamaged,
                         fmt::format("the superblock of {} is damaged; restore the pool from a "
                                     "backup",
                                     path));
    }
    Superblock superblock;
    std::copy(std::begin(layout.uuid), std::end(layout.uuid), superblock.uuid.begin());
    superblock.created_ms = static_cast<int64_t>(LoadBig<uint64_t>(layout.created_ms));
    if (version > 1) {
        superblock.epoch.number = LoadBig<uint64_t>(layout.epoch);
        superblock.epoch.tag = LoadBig<uint64_t>(layout.epoch_tag);
    }
    return superblock;
}

}  // namespace varve::cow
