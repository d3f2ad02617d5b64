// PskTable: users and their keys, out of a file as psktool writes it.
// Not who may do what: it says who somebody is.
#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "base/result.h"
#include "nbdserver/tls/secrets.h"

namespace varve::nbdserver::tls {

inline constexpr size_t kPskFileBytesMax = 4 << 20;

using PskTable = std::map<std::string, Secret, std::less<>>;

/// Of lines USER:HEXKEY; empty ones and those that begin with # say nothing. A user has 1 to 128
/// bytes, a key 16 to 64. kInvalid, with the number of the line, which is not shown: it holds a
/// key.
Result<PskTable> ParsePskFile(std::string_view text);

}  // namespace varve::nbdserver::tls
