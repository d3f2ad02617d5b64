// Results of commands as JSON. The keys are a contract: add to them, never change them.
// Not the decoding of parameters: that is command.cc.
#include <boost/json/array.hpp>

#include "admin/command.h"
#include "base/log.h"

namespace varve::admin {
namespace json = boost::json;
namespace {

/// Figures that are exact do not say so.
json::object Marked(json::object object, bool approximate) {
    if (approximate) object.emplace("approximate", true);
    return object;
}

json::object ToJson(const cow::DiskInfo& disk) {
    json::object object = {{"name", disk.name},
                           {"size", disk.size},
                           {"used", disk.used},
                           {"snapshots", disk.snapshots},
                           {"clients", disk.clients},
                           {"created", FormatTime(disk.created_ms)},
                           {"generation", disk.generation},
                           {"depth", disk.depth},
                           {"offline", disk.offline}};
    if (disk.unique) object.emplace("unique", *disk.unique);
    return Marked(std::move(object), disk.approximate);
}

json::object ToJson(const cow::SnapshotInfo& snapshot) {
    json::object object = {
        {"name", snapshot.name},     {"created", FormatTime(snapshot.created_ms)},
        {"size", snapshot.size},     {"generation", snapshot.generation},
        {"unique", snapshot.unique}, {"referenced", snapshot.referenced}};
    return Marked(std::move(object), snapshot.approximate);
}

json::object ToJson(const ClientInfo& client) {
    return {{"id", client.id},
            {"address", client.address},
            {"export", client.export_name},
            {"read_only", client.read_only},
            {"since", FormatTime(client.since_ms)},
            {"idle_s", client.idle_s},
            {"requests", client.requests},
            {"bytes_read", client.bytes_read},
            {"bytes_written", client.bytes_written},
            {"tls", client.tls},
            {"identity", client.identity}};
}

json::object ToJson(const cow::PoolStatus& status, const ServerFacts& facts) {
    const json::array warnings(status.warnings.begin(), status.warnings.end());
    json::array waiting;
    for (const cow::Waiting& wait : status.waiting) {
        waiting.push_back(json::object({{"what", wait.what}, {"seconds", wait.seconds}}));
    }
    json::object object = {{"version", VARVE_VERSION},
                           {"pool", facts.pool_directory},
                           {"health", cow::NameOf(status.health)},
                           {"warnings", warnings},
                           {"capacity", status.capacity},
                           {"used", status.used},
                           {"free", status.free},
                           {"metadata_capacity", status.metadata_capacity},
                           {"metadata_used", status.metadata_used},
                           {"metadata_free", status.metadata_free},
                           {"disks", status.disks},
                           {"snapshots", status.snapshots},
                           {"reclaim_pending", status.reclaim_pending},
                           {"reclaim_set_aside", status.reclaim_set_aside},
                           {"reclaimed_chunks", status.reclaimed_chunks},
                           {"reclaimed_bytes", status.reclaimed_bytes},
                           {"commits", status.commits},
                           {"leased", status.leased},
                           {"map_cache_used", status.map_cache_used},
                           {"map_cache_limit", status.map_cache_limit},
                           {"checksums_pending", status.checksums_pending},
                           {"checksummed_bytes", status.checksummed_bytes},
                           {"scrub_running", status.scrub_running},
                           {"scrubbed_bytes", status.scrubbed_bytes},
                           {"damaged_bytes", status.damaged_bytes},
                           {"failed", status.failed},
                           {"failure", status.failure},
                           {"waiting", std::move(waiting)},
                           {"uptime_s", facts.uptime_s}};
    return Marked(std::move(object), status.approximate);
}

json::object ToJson(const cow::ScrubDamage& damage) {
    json::value snapshot = nullptr;
    if (!damage.snapshot.empty()) snapshot = damage.snapshot;
    return {{"disk", damage.disk},        {"snapshot", std::move(snapshot)},
            {"offset", damage.offset},    {"length", cow::kBlockBytes},
            {"data_block", damage.place}, {"unreadable", damage.unreadable}};
}

json::object ToJson(const cow::BookmarkInfo& bookmark) {
    return {{"name", bookmark.name},
            {"created", FormatTime(bookmark.created_ms)},
            {"size", bookmark.size},
            {"generation", bookmark.generation}};
}

json::object ToJson(const cow::Difference::Extent& extent) {
    return {{"offset", extent.offset}, {"length", extent.length}, {"zero", extent.zero}};
}

template <typename T>
json::array ToArray(const std::vector<T>& elements) {
    json::array array;
    array.reserve(elements.size());
    for (const T& element : elements) array.push_back(ToJson(element));
    return array;
}

struct Encoder {
    const Command& command;
    const ServerFacts& facts;

    json::value operator()(const Done&) const { return EncodeParameters(command); }
    json::value operator()(const cow::DiskInfo& disk) const { return ToJson(disk); }
    json::value operator()(const std::vector<cow::DiskInfo>& disks) const {
        return json::object({{"disks", ToArray(disks)}});
    }
    json::value operator()(const cow::SnapshotInfo& snapshot) const {
        json::object object = {{"disk", snapshot.disk}};
        for (auto& [key, value] : ToJson(snapshot)) object.emplace(key, std::move(value));
        return object;
    }
    json::value operator()(const SnapshotList& list) const {
        return json::object({{"disk", list.disk},
                             {"snapshots", ToArray(list.snapshots)},
                             {"bookmarks", ToArray(list.bookmarks)}});
    }
    json::value operator()(const std::vector<ClientInfo>& clients) const {
        return json::object({{"clients", ToArray(clients)}});
    }
    json::value operator()(const Estimate& estimate) const {
        json::object object = EncodeParameters(command);
        object.emplace("freed", estimate.bytes);
        return object;
    }
    json::value operator()(const Disconnected& disconnected) const {
        json::object object = EncodeParameters(command);
        object.emplace("disconnected", disconnected.clients);
        return object;
    }
    json::value operator()(const cow::Difference& difference) const {
        const size_t at = command.from.find('@');
        json::value next = nullptr;
        if (difference.next) next = *difference.next;
        return json::object({{"disk", command.from.substr(0, at)},
                             {"from", command.from.substr(at + 1)},
                             {"to", command.to.substr(command.to.find('@') + 1)},
                             {"extents", ToArray(difference.extents)},
                             {"next", std::move(next)}});
    }
    json::value operator()(const cow::PoolStatus& status) const { return ToJson(status, facts); }
    json::value operator()(const cow::CheckReport& report) const { return admin::ToJson(report); }
    json::value operator()(const cow::ScrubReport& report) const {
        return json::object({{"ok", report.ok()},
                             {"damage", ToArray(report.damage)},
                             {"damaged_blocks", report.damaged_blocks},
                             {"verified_blocks", report.verified_blocks},
                             {"unverified_blocks", report.unverified_blocks}});
    }
};

}  // namespace

json::object ToJson(const cow::CheckReport& report) {
    return {{"ok", report.ok()},
            {"errors", json::array(report.errors.begin(), report.errors.end())},
            {"leaked_blocks", report.leaked_blocks},
            {"used_blocks", report.used_blocks},
            {"reclaim_blocks", report.reclaim_blocks},
            {"checksums", report.checksums},
            {"map_rows", report.map_rows},
            {"branches", report.branches},
            {"disks", report.disks},
            {"snapshots", report.snapshots}};
}

json::value EncodeReply(const Command& command, const Reply& reply, const ServerFacts& facts) {
    return std::visit(Encoder{command, facts}, reply);
}

}  // namespace varve::admin
