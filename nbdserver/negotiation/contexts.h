// Contexts: the names of the metadata contexts of an export, and what clients' queries mean.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nbdserver/connection/block_status.h"

namespace varve::nbdserver {

struct ExportDescription;

/// A context by its name.
struct ContextName {
    ContextKind kind = ContextKind::kAllocation;
    std::string base;  // of kBitmap: the snapshot or bookmark

    std::string text() const;
    bool operator==(const ContextName&) const = default;
};

/// The snapshot that a query names exactly; nothing if it is no bitmap's name.
std::optional<std::string> BitmapBase(std::string_view query);

/// What LIST_META_CONTEXT answers: all that is shown without queries. Of bitmaps only one is shown,
/// for some backup tools refuse more; others of `description.bases` have to be asked for by name.
std::vector<ContextName> ListedContexts(const ExportDescription& description,
                                        const std::vector<std::string>& queries);

/// What SET_META_CONTEXT selects, each once: only what is named exactly.
std::vector<ContextName> SelectedContexts(const ExportDescription& description,
                                          const std::vector<std::string>& queries);

}  // namespace varve::nbdserver
