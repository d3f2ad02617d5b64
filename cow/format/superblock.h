// The superblock: the first 4096 bytes of a pool's data file, which say whose data follows.
// Not metadata that changes: it is written once. docs/format.md is the reference.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"

namespace varve::cow {

inline constexpr uint64_t kSuperblockBytes = 4096;
inline constexpr uint32_t kDataVersion = 1;

/// A pool's identity: 16 random bytes, as a version 4 UUID.
using Uuid = std::array<uint8_t, 16>;
Uuid NewUuid();
/// "xxxxxxxx-xxxx-4xxx-xxxx-xxxxxxxxxxxx"
std::string FormatUuid(const Uuid& uuid);

struct Superblock {
    Uuid uuid{};
    int64_t created_ms = 0;  // since 1970
};

/// kSuperblockBytes bytes.
std::string EncodeSuperblock(const Superblock& superblock);

/// kInvalid if `bytes` are a superblock of another version, kDamaged if they are none or broken.
/// `path` is for the message.
Result<Superblock> DecodeSuperblock(std::string_view bytes, const std::string& path);

}  // namespace varve::cow
