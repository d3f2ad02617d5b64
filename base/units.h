// Sizes as people write them ("512M", "10G") and as they read them.
// Not a general number parser.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"

namespace varve {

/// Bytes of `4096`, `512M`, `10G`, `2T` (binary units K, M, G, T, P; upper or lower case).
/// kInvalid with a message that shows the form, for anything else or on overflow of 63 bits.
Result<uint64_t> ParseSize(std::string_view text);

/// "10.0 GiB" for people; not parseable.
std::string FormatSize(uint64_t bytes);

/// "1 snapshot", "2 snapshots".
std::string FormatCount(uint64_t count, std::string_view thing);

}  // namespace varve
