// The superblock: the first 4096 bytes of a pool's data file, which say whose data follows, and of
// which time it is. docs/format.md is the reference.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"

namespace varve::cow {

inline constexpr uint64_t kSuperblockBytes = 4096;
/// All that matters lies in the first sector, so that a power cut cannot tear it.
inline constexpr uint64_t kSuperblockSector = 512;
inline constexpr uint32_t kDataVersion = 3;

/// A pool's identity: 16 random bytes, as a version 4 UUID.
using Uuid = std::array<uint8_t, 16>;
Uuid NewUuid();
/// "xxxxxxxx-xxxx-4xxx-xxxx-xxxxxxxxxxxx"
std::string FormatUuid(const Uuid& uuid);

/// A stretch of a pool's time: data and metadata that belong together are of the same. A new one
/// begins whenever the pool is opened or closed.
struct Epoch {
    uint64_t number = 0;  // grows; 0: the pool was never opened by a server that counts
    uint64_t tag = 0;     // random, so that two copies of a pool do not count alike

    bool operator==(const Epoch&) const = default;
};
/// The one after `number`.
Epoch NewEpoch(uint64_t number);

struct Superblock {
    Uuid uuid{};
    int64_t created_ms = 0;  // since 1970
    Epoch epoch;
};

/// kSuperblockBytes bytes, of which all behind kSuperblockSector are zeros.
std::string EncodeSuperblock(const Superblock& superblock);

/// kInvalid if `bytes` are a superblock of a later version, kDamaged if they are none or broken.
/// `path` is for the message.
Result<Superblock> DecodeSuperblock(std::string_view bytes, const std::string& path);

}  // namespace varve::cow
