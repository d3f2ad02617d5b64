// Commands: the table of methods, what their parameters are, what they do to the pool, and what
// their results look like in JSON.
// Not the protocol (jsonrpc.h): knows no lines and no sockets.
#pragma once

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "admin/client_directory.h"
#include "admin/jsonrpc.h"
#include "admin/slots.h"
#include "base/task.h"
#include "cow/pool/pool.h"

namespace varve::admin {

/// What commands work on; tasks of both are started on the pool's home executor.
struct CommandTarget {
    cow::Pool* pool = nullptr;
    ClientDirectory* clients = nullptr;
};

struct Method;

/// A decoded call. Each method uses the fields of its row in the table.
struct Command {
    const Method* method = nullptr;
    std::string name;                    // of a disk
    std::string to;                      // the new name; of a comparison, "disk@snapshot"
    std::string from;                    // "disk@snapshot"
    std::string snapshot;                // "disk@snapshot"
    std::vector<std::string> snapshots;  // "disk@snapshot"
    std::vector<std::string> names;      // of disks and snapshots
    std::optional<std::string> disk;     // a filter
    std::optional<std::string> keep_as;  // a snapshot's name
    uint64_t size = 0;                   // bytes
    std::optional<uint64_t> offset;      // bytes
    bool shrink = false;
    bool delete_snapshots = false;
    bool disconnect = false;
    bool online = false;
    bool hurry = false;
    bool bookmark = false;
};

/// The method was carried out and has nothing more to tell.
struct Done {};
struct SnapshotList {
    std::string disk;
    std::vector<cow::SnapshotInfo> snapshots;
    std::vector<cow::BookmarkInfo> bookmarks;
};
struct Estimate {
    uint64_t bytes = 0;  // that a deletion would free
};
struct Disconnected {
    uint64_t clients = 0;  // how many
};
using Reply = std::variant<Done, cow::DiskInfo, std::vector<cow::DiskInfo>, cow::SnapshotInfo,
                           SnapshotList, std::vector<ClientInfo>, Disconnected, Estimate,
                           cow::PoolStatus, cow::CheckReport, cow::ScrubReport, cow::Difference>;

/// What the pool does not know about itself.
struct ServerFacts {
    std::string pool_directory;
    int64_t uptime_s = 0;
};

/// Finds the method and decodes its parameters, strictly: unknown, missing or mistyped ones are
/// kInvalidParams, with the parameter's name. Any thread.
std::variant<Command, RpcError> DecodeCommand(const Request& request);

/// Carries the command out. Started on the home executor, finishes there.
Task<Result<Reply>> RunCommand(CommandTarget target, Command command);

/// The `result` for `command`. A method that is Done answers its parameters as it understood them.
/// Any thread.
boost::json::value EncodeReply(const Command& command, const Reply& reply,
                               const ServerFacts& facts);

boost::json::object ToJson(const cow::CheckReport& report);

/// The parameters of `command` by name, defaults included.
boost::json::object EncodeParameters(const Command& command);

/// Whether the method changes anything, and so belongs into a log.
bool IsChange(const Command& command);

/// How long it may take.
Pace PaceOf(const Command& command);

/// `disk.create {"name":"disk0","size":4096}`, for a log.
std::string Describe(const Command& command);

/// Names of all methods, in the order of the documentation.
std::vector<std::string> MethodNames();

}  // namespace varve::admin
