// Journal rows as versions of varved before the ring wrote them: for pools of such.
#pragma once

#include <span>
#include <string>

#include "cow/format/codec.h"
#include "cow/format/format.h"
#include "cow/format/map_change.h"

namespace varve {

/// A journal row's value; changes in the order in which they happened.
inline std::string EncodeChanges(std::span<const cow::MapChange> changes) {
    // A varint for the chunk and one for the place, two bytes for the blocks.
    constexpr size_t kChangeBytesMax = 2 * cow::kVarintBytesMax + 2;
    std::string value(1 + changes.size() * kChangeBytesMax, '\0');
    char* out = value.data();
    *out++ = static_cast<char>(cow::kFormatVersion);
    for (const cow::MapChange& change : changes) {
        out = cow::PutVarint(out, change.chunk.value);
        *out++ = static_cast<char>(change.first);
        *out++ = static_cast<char>(change.count);
        out = cow::PutVarint(out, change.place);
    }
    value.resize(static_cast<size_t>(out - value.data()));
    return value;
}

}  // namespace varve
