#include "nbdserver/connection/block_status.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "nbdserver/wire/wire.h"

namespace varve::nbdserver {

uint32_t StatusFlags(const StatusContext& context, const cow::Allocation& stretch) {
    const bool changed = (stretch.changed >> context.base & 1) != 0;
    constexpr uint32_t kZeros = wire::kAllocationHole | wire::kAllocationZero;
    switch (context.kind) {
        case ContextKind::kAllocation:
            return stretch.hole ? kZeros : 0;
        case ContextKind::kDiffAllocation:
            if (!changed) return wire::kAllocationHole;
            return stretch.hole ? kZeros : 0;
        case ContextKind::kDepth:
            return stretch.depth;
        case ContextKind::kBitmap:
            return changed ? wire::kBitmapDirty : 0;
    }
    VARVE_CHECK(false);
}

void MergeChanges(std::vector<cow::Allocation>& map, std::span<const cow::Delta> changes,
                  uint8_t base, size_t most) {
    const std::vector<cow::Allocation> before = std::exchange(map, {});
    map.reserve(std::min(most, before.size() + changes.size()));
    auto stretch = before.begin();
    auto change = changes.begin();
    uint64_t of_stretch = 0, of_change = 0;  // bytes taken already
    while (stretch != before.end() && change != changes.end() && map.size() < most) {
        const uint64_t length = std::min(stretch->length - of_stretch, change->length - of_change);
        cow::Allocation part = *stretch;
        part.length = length;
        part.changed |= static_cast<uint16_t>(change->changed << base);
        map.push_back(part);
        of_stretch += length;
        of_change += length;
        if (of_stretch == stretch->length) ++stretch, of_stretch = 0;
        if (of_change == change->length) ++change, of_change = 0;
    }
}

void BeginWithChanges(std::vector<cow::Allocation>& map, std::span<const cow::Delta> changes,
                      uint8_t base) {
    map.clear();
    for (const cow::Delta& change : changes) {
        cow::Allocation stretch;
        stretch.length = change.length;
        stretch.hole = change.zero;
        stretch.changed = static_cast<uint16_t>(change.changed << base);
        map.push_back(stretch);
    }
}

}  // namespace varve::nbdserver
