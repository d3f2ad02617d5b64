#include "nbdserver/negotiation/contexts.h"

#include <algorithm>

#include "nbdserver/negotiation/negotiation.h"

namespace varve::nbdserver {
namespace {

constexpr std::string_view kAllocation = "base:allocation";
constexpr std::string_view kDepth = "qemu:allocation-depth";
constexpr std::string_view kBitmap = "qemu:dirty-bitmap:";

void AddOnce(std::vector<ContextName>& list, ContextName context) {
    if (std::find(list.begin(), list.end(), context) == list.end()) list.push_back(context);
}

/// What is shown of the export.
std::vector<ContextName> Offered(const ExportDescription& description) {
    std::vector<ContextName> offered{{ContextKind::kAllocation, ""}};
    if (!description.diff) offered.push_back({ContextKind::kDepth, ""});
    if (!description.base.empty()) offered.push_back({ContextKind::kBitmap, description.base});
    return offered;
}

/// Bitmaps that are asked for by name, in that order.
std::vector<ContextName> Bitmaps(const ExportDescription& description,
                                 const std::vector<std::string>& queries) {
    std::vector<ContextName> bitmaps;
    for (const std::string& query : queries) {
        const std::optional<std::string> base = BitmapBase(query);
        const auto& bases = description.bases;
        const bool there = base && std::find(bases.begin(), bases.end(), *base) != bases.end();
        if (there) AddOnce(bitmaps, {ContextKind::kBitmap, *base});
    }
    return bitmaps;
}

/// Whether a query of a listing asks for it: by its name, or for all of a name space.
bool Lists(const std::string& query, const ContextName& context) {
    const std::string name = context.text();
    if (query == name) return true;
    return (query == "base:" || query == "qemu:" || query == kBitmap) && name.starts_with(query);
}

}  // namespace

std::string ContextName::text() const {
    switch (kind) {
        case ContextKind::kDepth:
            return std::string(kDepth);
        case ContextKind::kBitmap:
            return std::string(kBitmap) + base;
        default:
            return std::string(kAllocation);
    }
}

std::optional<std::string> BitmapBase(std::string_view query) {
    if (!query.starts_with(kBitmap) || query == kBitmap) return std::nullopt;
    return std::string(query.substr(kBitmap.size()));
}

std::vector<ContextName> ListedContexts(const ExportDescription& description,
                                        const std::vector<std::string>& queries) {
    std::vector<ContextName> listed;
    for (const ContextName& context : Offered(description)) {
        const bool asked =
            std::any_of(queries.begin(), queries.end(),
                        [&](const std::string& query) { return Lists(query, context); });
        if (queries.empty() || asked) listed.push_back(context);
    }
    for (ContextName& bitmap : Bitmaps(description, queries)) AddOnce(listed, std::move(bitmap));
    return listed;
}

std::vector<ContextName> SelectedContexts(const ExportDescription& description,
                                          const std::vector<std::string>& queries) {
    std::vector<ContextName> selected;
    for (const ContextName& context : Offered(description)) {
        const std::string name = context.text();
        const bool named = std::find(queries.begin(), queries.end(), name) != queries.end();
        if (named && context.kind != ContextKind::kBitmap) selected.push_back(context);
    }
    for (ContextName& bitmap : Bitmaps(description, queries)) AddOnce(selected, std::move(bitmap));
    return selected;
}

}  // namespace varve::nbdserver
