// Block status: what the contexts that a client selected say of a stretch of an export, and how
// their answers are cut at the same bytes.
// Not the contexts' names, which negotiation.cc has, and not how it is found out, which is
// cow::Volume's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cow/format/types.h"

namespace varve::nbdserver {

enum class ContextKind : uint8_t {
    kAllocation,      // base:allocation
    kDiffAllocation,  // the same of a diff export: what is not changed is a hole
    kDepth,           // qemu:allocation-depth
    kBitmap,          // qemu:dirty-bitmap:SNAP
};

/// One that a client selected.
struct StatusContext {
    uint32_t id = 0;  // as told to the client
    ContextKind kind = ContextKind::kAllocation;
    uint8_t base = 0;  // of kDiffAllocation and kBitmap: a bit of cow::Allocation::changed
};

/// What the context says of a stretch.
uint32_t StatusFlags(const StatusContext& context, const cow::Allocation& stretch);

/// Cuts `map` to where `changes` end as well, and to `most` stretches, at all borders of both, and
/// sets bit `base` where something changed.
void MergeChanges(std::vector<cow::Allocation>& map, std::span<const cow::Delta> changes,
                  uint8_t base, size_t most);

/// The same where nothing else was asked for: holes are known where something changed.
void BeginWithChanges(std::vector<cow::Allocation>& map, std::span<const cow::Delta> changes,
                      uint8_t base);

}  // namespace varve::nbdserver
