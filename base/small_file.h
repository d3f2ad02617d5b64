// A file of settings, read whole.
// Not for data: it is bounded, and its reading blocks.
#pragma once

#include <cstddef>
#include <string>

#include "base/result.h"

namespace varve {

/// At most `bytes_max` bytes. kInvalid, in one line that names the file, if it cannot be read or is
/// longer.
Result<std::string> ReadSmallFile(const std::string& path, size_t bytes_max);

}  // namespace varve
