#include "admin/render.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <optional>

#include "base/units.h"

namespace varve::admin {
namespace json = boost::json;
namespace {

using Rows = std::vector<std::vector<std::string>>;

const json::value* Find(const json::value& object, const char* key) {
    return object.is_object() ? object.get_object().if_contains(key) : nullptr;
}

std::string Text(const json::value& object, const char* key) {
    const json::value* value = Find(object, key);
    if (!value || !value->is_string()) return "-";
    const json::string& text = value->get_string();
    return OneLine(std::string_view(text.data(), text.size()));
}

bool Flag(const json::value& object, const char* key) {
    const json::value* value = Find(object, key);
    return value && value->is_bool() && value->get_bool();
}

std::optional<uint64_t> Number(const json::value& object, const char* key) {
    const json::value* value = Find(object, key);
    if (!value || !value->is_number()) return std::nullopt;
    boost::system::error_code failure;
    const uint64_t number = value->to_number<uint64_t>(failure);
    if (failure) return std::nullopt;
    return number;
}

std::string Count(const json::value& object, const char* key) {
    const std::optional<uint64_t> number = Number(object, key);
    return number ? fmt::format("{}", *number) : "-";
}

std::string Size(const json::value& object, const char* key) {
    const std::optional<uint64_t> number = Number(object, key);
    return number ? FormatSize(*number) : "-";
}

/// "10.0 GiB (10737418240 bytes)"
std::string ExactSize(const json::value& object, const char* key) {
    const std::optional<uint64_t> number = Number(object, key);
    return number ? fmt::format("{} ({} bytes)", FormatSize(*number), *number) : "-";
}

const json::array& Elements(const json::value& object, const char* key) {
    static const json::array none;
    const json::value* value = Find(object, key);
    return value && value->is_array() ? value->get_array() : none;
}

std::string Duration(uint64_t seconds) {
    const uint64_t days = seconds / 86400;
    const std::string clock =
        fmt::format("{:02}:{:02}:{:02}", seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    return days ? fmt::format("{} d {}", days, clock) : clock;
}

/// Characters, not bytes: names are ASCII, but addresses and messages need not be.
size_t Width(std::string_view text) {
    return static_cast<size_t>(std::count_if(text.begin(), text.end(), [](char c) {
        return (static_cast<unsigned char>(c) & 0xc0) != 0x80;
    }));
}

/// "name   value" lines.
std::string RenderPairs(const std::vector<std::pair<std::string, std::string>>& pairs) {
    size_t width = 0;
    for (const auto& [name, value] : pairs) width = std::max(width, name.size());
    std::string text;
    for (const auto& [name, value] : pairs) text += fmt::format("{:<{}}  {}\n", name, width, value);
    return text;
}

std::string Reclaim(const json::value& result) {
    const uint64_t pending = Number(result, "reclaim_pending").value_or(0);
    const std::string back = Size(result, "reclaimed_bytes");
    if (pending == 0) return fmt::format("idle, {} given back since the start", back);
    return fmt::format("{} deletion{} pending, {} given back since the start", pending,
                       pending == 1 ? "" : "s", back);
}

std::string Checksums(const json::value& result) {
    const uint64_t pending = Number(result, "checksums_pending").value_or(0);
    const std::string made = Size(result, "checksummed_bytes");
    if (pending == 0) return fmt::format("complete, of {} made since the start", made);
    return fmt::format("{} snapshot{} to do, of {} made since the start", pending,
                       pending == 1 ? "" : "s", made);
}

std::string Health(const json::value& result) {
    const std::string health = Text(result, "health");
    if (!Flag(result, "failed")) return health == "full" ? "FULL" : health;
    return fmt::format("FAILED, writes are refused: {}", Text(result, "failure"));
}

/// What is waited for; nothing, mostly.
std::string Waits(const json::value& result) {
    std::string text;
    for (const json::value& wait : Elements(result, "waiting")) {
        text += fmt::format("{}{} for {} s", text.empty() ? "" : ", ", Text(wait, "what"),
                            Count(wait, "seconds"));
    }
    if (text.empty()) return "for nothing";
    return text + (Flag(result, "approximate") ? "; figures may be old" : "");
}

/// "" or how a size from memory is marked.
std::string About(const json::value& object) {
    return Flag(object, "approximate") ? "~" : "";
}

std::string Damage(const json::value& result) {
    const uint64_t bytes = Number(result, "damaged_bytes").value_or(0);
    if (bytes == 0) return "none found since the start";
    return fmt::format("{} FOUND since the start; varve scrub says where", FormatSize(bytes));
}

}  // namespace

std::string OneLine(std::string_view text) {
    std::string line(text);
    for (char& c : line) {
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    }
    return line;
}

std::string RenderTable(const Rows& rows) {
    if (rows.empty()) return "";
    std::vector<size_t> widths(rows[0].size(), 0);
    std::vector<bool> right;
    for (const std::string& heading : rows[0]) right.push_back(heading.starts_with('>'));
    const auto cell = [&](size_t row, size_t column) {
        std::string_view text = rows[row][column];
        if (row == 0 && right[column]) text.remove_prefix(1);
        return text;
    };
    for (size_t row = 0; row < rows.size(); ++row) {
        for (size_t i = 0; i < widths.size(); ++i) {
            widths[i] = std::max(widths[i], Width(cell(row, i)));
        }
    }
    std::string text;
    for (size_t row = 0; row < rows.size(); ++row) {
        for (size_t i = 0; i < widths.size(); ++i) {
            const std::string padding(widths[i] - Width(cell(row, i)), ' ');
            if (i > 0) text += "  ";
            if (right[i]) text += padding;
            text += cell(row, i);
            if (!right[i] && i + 1 < widths.size()) text += padding;
        }
        text += '\n';
    }
    return text;
}

std::string RenderDisks(const json::value& result) {
    Rows rows = {{"NAME", ">SIZE", ">USED", ">SNAPSHOTS", ">CLIENTS", "CREATED"}};
    for (const json::value& disk : Elements(result, "disks")) {
        rows.push_back({Text(disk, "name"), Size(disk, "size"), About(disk) + Size(disk, "used"),
                        Count(disk, "snapshots"),
                        Flag(disk, "offline") ? "offline" : Count(disk, "clients"),
                        Text(disk, "created")});
    }
    return RenderTable(rows);
}

std::string RenderSnapshots(const json::value& result) {
    Rows rows = {{"NAME", "CREATED", ">SIZE", ">REFERENCED", ">UNIQUE", ">GENERATION"}};
    for (const json::value& snapshot : Elements(result, "snapshots")) {
        rows.push_back({Text(snapshot, "name"), Text(snapshot, "created"), Size(snapshot, "size"),
                        About(snapshot) + Size(snapshot, "referenced"),
                        About(snapshot) + Size(snapshot, "unique"), Count(snapshot, "generation")});
    }
    for (const json::value& bookmark : Elements(result, "bookmarks")) {
        rows.push_back({Text(bookmark, "name"), Text(bookmark, "created"), Size(bookmark, "size"),
                        "bookmark", "", Count(bookmark, "generation")});
    }
    return RenderTable(rows);
}

std::string RenderDifference(const json::value& result) {
    Rows rows = {{">OFFSET", ">LENGTH", "NOW"}};
    for (const json::value& extent : Elements(result, "extents")) {
        rows.push_back({Count(extent, "offset"), Count(extent, "length"),
                        Flag(extent, "zero") ? "zeros" : "data"});
    }
    return RenderTable(rows);
}

std::string RenderDisk(const json::value& disk) {
    return RenderPairs(
        {{"disk", Text(disk, "name")},
         {"size", ExactSize(disk, "size")},
         {"used", About(disk) + ExactSize(disk, "used")},
         {"unique", Find(disk, "unique") ? About(disk) + ExactSize(disk, "unique") : "not known"},
         {"depth", Count(disk, "depth")},
         {"snapshots", Count(disk, "snapshots")},
         {"clients", Flag(disk, "offline") ? "none: the disk is offline" : Count(disk, "clients")},
         {"created", Text(disk, "created")},
         {"generation", Count(disk, "generation")}});
}

std::string RenderSnapshot(const json::value& snapshot) {
    return RenderPairs({{"snapshot", Text(snapshot, "disk") + "@" + Text(snapshot, "name")},
                        {"size", ExactSize(snapshot, "size")},
                        {"referenced", About(snapshot) + ExactSize(snapshot, "referenced")},
                        {"unique", About(snapshot) + ExactSize(snapshot, "unique")},
                        {"created", Text(snapshot, "created")},
                        {"generation", Count(snapshot, "generation")}});
}

std::string RenderClients(const json::value& result) {
    Rows rows = {{">ID", "EXPORT", "ADDRESS", "IDENTITY", "ACCESS", "SINCE", ">IDLE", ">REQUESTS",
                  ">READ", ">WRITTEN"}};
    for (const json::value& client : Elements(result, "clients")) {
        const std::string identity = Text(client, "identity");
        const std::string anybody = Flag(client, "tls") ? "tls" : "-";
        rows.push_back({Count(client, "id"), Text(client, "export"), Text(client, "address"),
                        identity.empty() ? anybody : identity,
                        Flag(client, "read_only") ? "read-only" : "read-write",
                        Text(client, "since"), Count(client, "idle_s") + " s",
                        Count(client, "requests"), Size(client, "bytes_read"),
                        Size(client, "bytes_written")});
    }
    return RenderTable(rows);
}

std::string RenderStatus(const json::value& result) {
    std::string text =
        RenderPairs({{"pool", Text(result, "pool")},
                     {"version", Text(result, "version")},
                     {"uptime", Duration(Number(result, "uptime_s").value_or(0))},
                     {"health", Health(result)},
                     {"waiting", Waits(result)},
                     {"capacity", ExactSize(result, "capacity")},
                     {"used", ExactSize(result, "used")},
                     {"free", ExactSize(result, "free")},
                     {"metadata", fmt::format("{} used, {} free", Size(result, "metadata_used"),
                                              Size(result, "metadata_free"))},
                     {"disks", Count(result, "disks")},
                     {"snapshots", Count(result, "snapshots")},
                     {"reclaim", Reclaim(result)},
                     {"checksums", Checksums(result)},
                     {"damage", Damage(result)},
                     {"map cache", fmt::format("{} of {}", Size(result, "map_cache_used"),
                                               Size(result, "map_cache_limit"))}});
    for (const json::value& warning : Elements(result, "warnings")) {
        if (!warning.is_string()) continue;
        const json::string& line = warning.get_string();
        text += fmt::format("warning: {}\n", OneLine({line.data(), line.size()}));
    }
    return text;
}

std::string RenderCheck(const json::value& result) {
    std::string text;
    for (const json::value& error : Elements(result, "errors")) {
        if (!error.is_string()) continue;
        const json::string& line = error.get_string();
        text += OneLine(std::string_view(line.data(), line.size())) + "\n";
    }
    const uint64_t leaked = Number(result, "leaked_blocks").value_or(0);
    if (leaked) text += fmt::format("{} blocks are marked used, but nothing holds them\n", leaked);
    text += fmt::format("checked: {} disks, {} snapshots, {} map rows, {} used blocks\n",
                        Count(result, "disks"), Count(result, "snapshots"),
                        Count(result, "map_rows"), Count(result, "used_blocks"));
    if (Flag(result, "ok")) text += "no damage found\n";
    return text;
}

std::string RenderScrub(const json::value& result) {
    std::string text;
    for (const json::value& damage : Elements(result, "damage")) {
        const json::value* snapshot = Find(damage, "snapshot");
        const bool head = !snapshot || snapshot->is_null();
        text += fmt::format("{}{}: offset {}: 4096 bytes {} (block {} of the data file)\n",
                            Text(damage, "disk"), head ? "" : "@" + Text(damage, "snapshot"),
                            Count(damage, "offset"),
                            Flag(damage, "unreadable") ? "cannot be read" : "are damaged",
                            Count(damage, "data_block"));
    }
    const auto bytes = [&](const char* key) {
        return FormatSize(Number(result, key).value_or(0) * 4096);
    };
    text += fmt::format("verified: {}, damaged: {}\n", bytes("verified_blocks"),
                        bytes("damaged_blocks"));
    if (Number(result, "unverified_blocks").value_or(0) > 0) {
        text += fmt::format("not verified: {} without checksums yet\n", bytes("unverified_blocks"));
    }
    if (Flag(result, "ok")) text += "no damage found\n";
    return text;
}

}  // namespace varve::admin
