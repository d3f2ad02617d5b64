#include "admin/command.h"

#include <fmt/format.h>

#include <algorithm>
#include <boost/json/serialize.hpp>
#include <type_traits>

#include "base/units.h"
#include "cow/history/catalog.h"

namespace varve::admin {
namespace json = boost::json;

namespace {

using cow::SnapshotInfo;

// ---- what the methods do

Result<Reply> DoneOr(Status status) {
    if (!status.ok()) return status.error();
    return Reply(Done());
}

template <typename T>
Result<Reply> ReplyOr(Result<T> result) {
    if (!result.ok()) return result.error();
    return Reply(std::move(result.value()));
}

Task<Result<Reply>> DiskCreate(CommandTarget target, Command command) {
    co_return DoneOr(co_await target.pool->CreateDisk(std::move(command.name), command.size));
}

Task<Result<Reply>> DiskList(CommandTarget target, Command) {
    co_return ReplyOr(co_await target.pool->ListDisks());
}

Task<Result<Reply>> DiskShow(CommandTarget target, Command command) {
    co_return ReplyOr(co_await target.pool->ShowDisk(std::move(command.name)));
}

Task<Result<Reply>> DiskResize(CommandTarget target, Command command) {
    co_return DoneOr(co_await target.pool->ResizeDisk(std::move(command.name), command.size,
                                                      command.shrink, command.disconnect));
}

Task<Result<Reply>> DiskRename(CommandTarget target, Command command) {
    co_return DoneOr(
        co_await target.pool->RenameDisk(std::move(command.name), std::move(command.to)));
}

Task<Result<Reply>> DiskClone(CommandTarget target, Command command) {
    co_return DoneOr(
        co_await target.pool->CloneSnapshot(std::move(command.snapshot), std::move(command.name)));
}

Task<Result<Reply>> DiskFlatten(CommandTarget target, Command command) {
    co_return DoneOr(co_await target.pool->FlattenDisk(std::move(command.name)));
}

Task<Result<Reply>> DiskDelete(CommandTarget target, Command command) {
    co_return DoneOr(co_await target.pool->DeleteDisk(
        std::move(command.name), command.delete_snapshots, command.disconnect));
}

Task<Result<Reply>> PoolEstimateDelete(CommandTarget target, Command command) {
    std::vector<std::string> names = command.names;
    const Result<uint64_t> bytes =
        co_await target.pool->EstimateDelete(std::move(names), command.delete_snapshots);
    if (!bytes.ok()) co_return bytes.error();
    Estimate estimate;
    estimate.bytes = bytes.value();
    co_return Reply(estimate);
}

Task<Result<Reply>> DiskOffline(CommandTarget target, Command command) {
    co_return DoneOr(
        co_await target.pool->SetOffline(std::move(command.name), true, command.disconnect));
}

Task<Result<Reply>> DiskOnline(CommandTarget target, Command command) {
    co_return DoneOr(co_await target.pool->SetOffline(std::move(command.name), false, false));
}

Task<Result<Reply>> SnapshotCreate(CommandTarget target, Command command) {
    co_return DoneOr(co_await target.pool->CreateSnapshots(std::move(command.snapshots)));
}

Task<Result<Reply>> SnapshotListAll(CommandTarget target, Command command) {
    std::string disk = command.name;
    Result<std::vector<SnapshotInfo>> snapshots =
        co_await target.pool->ListSnapshots(std::move(disk));
    if (!snapshots.ok()) co_return snapshots.error();
    Result<std::vector<cow::BookmarkInfo>> bookmarks = target.pool->ListBookmarks(command.name);
    if (!bookmarks.ok()) co_return bookmarks.error();
    SnapshotList list;
    list.disk = std::move(command.name);
    list.snapshots = std::move(snapshots.value());
    list.bookmarks = std::move(bookmarks.value());
    co_return Reply(std::move(list));
}

Task<Result<Reply>> SnapshotShow(CommandTarget target, Command command) {
    co_return ReplyOr(co_await target.pool->ShowSnapshot(std::move(command.snapshot)));
}

Task<Result<Reply>> SnapshotRestore(CommandTarget target, Command command) {
    co_return DoneOr(co_await target.pool->RestoreSnapshot(std::move(command.snapshot),
                                                           std::move(command.keep_as),
                                                           command.disconnect, command.online));
}

Task<Result<Reply>> SnapshotRename(CommandTarget target, Command command) {
    co_return DoneOr(
        co_await target.pool->RenameSnapshot(std::move(command.snapshot), std::move(command.to)));
}

Task<Result<Reply>> SnapshotDelete(CommandTarget target, Command command) {
    co_return DoneOr(co_await target.pool->DeleteSnapshot(std::move(command.snapshot),
                                                          command.disconnect, command.bookmark));
}

Task<Result<Reply>> SnapshotDiff(CommandTarget target, Command command) {
    co_return ReplyOr(co_await target.pool->Diff(std::move(command.from), std::move(command.to),
                                                 command.offset.value_or(0)));
}

/// Whether an export is `name`, or, if that is a disk, one of its snapshots; or what differs in
/// one.
bool Belongs(std::string_view export_name, std::string_view name) {
    if (!export_name.starts_with(name)) return false;
    if (export_name.size() == name.size()) return true;
    return export_name[name.size()] == '@' || export_name[name.size()] == '~';
}

/// Clients of `name`, a disk (with its snapshots) or one snapshot; of all if it is none.
Task<Result<std::vector<ClientInfo>>> FindClients(CommandTarget target,
                                                  std::optional<std::string> name) {
    if (name) {
        const Status known = target.pool->FindExport(*name);
        if (!known.ok()) co_return known.error();
    }
    std::vector<ClientInfo> clients = co_await target.clients->List();
    if (name) {
        std::erase_if(clients, [&](const ClientInfo& c) { return !Belongs(c.export_name, *name); });
    }
    std::sort(clients.begin(), clients.end(),
              [](const ClientInfo& a, const ClientInfo& b) { return a.id < b.id; });
    co_return std::move(clients);
}

Task<Result<Reply>> ClientList(CommandTarget target, Command command) {
    co_return ReplyOr(co_await FindClients(target, std::move(command.disk)));
}

Task<Result<Reply>> ClientDisconnect(CommandTarget target, Command command) {
    std::optional<std::string> name = std::move(command.name);
    Result<std::vector<ClientInfo>> clients = co_await FindClients(target, std::move(name));
    if (!clients.ok()) co_return clients.error();
    std::vector<uint64_t> ids;
    for (const ClientInfo& client : clients.value()) ids.push_back(client.id);
    Disconnected reply;
    reply.clients = co_await target.clients->Disconnect(std::move(ids));
    co_return Reply(reply);
}

Task<Result<Reply>> PoolGetStatus(CommandTarget target, Command command) {
    if (command.hurry) target.pool->HurryReclaim();
    co_return ReplyOr(co_await target.pool->GetStatus());
}

Task<Result<Reply>> PoolCheck(CommandTarget target, Command) {
    co_return ReplyOr(co_await target.pool->Check());
}

Task<Result<Reply>> PoolScrub(CommandTarget target, Command command) {
    co_return ReplyOr(co_await target.pool->Scrub(std::move(command.disk)));
}

// ---- the table

/// Where a parameter goes. Its type is the field's; optional ones and flags may be left out.
using Field = std::variant<std::string Command::*, std::vector<std::string> Command::*,
                           uint64_t Command::*, std::optional<std::string> Command::*,
                           std::optional<uint64_t> Command::*, bool Command::*>;
struct Parameter {
    const char* name;
    Field field;
};

}  // namespace

struct Method {
    const char* name;
    bool change;  // whether it changes the pool or its clients
    Pace pace;
    Task<Result<Reply>> (*run)(CommandTarget, Command);
    std::vector<Parameter> parameters;
};

namespace {

const std::vector<Method>& Methods() {
    using C = Command;
    static const std::vector<Method> methods = {
        {"disk.create", true, Pace::kChange, DiskCreate, {{"name", &C::name}, {"size", &C::size}}},
        {"disk.list", false, Pace::kGlance, DiskList, {}},
        {"disk.show", false, Pace::kGlance, DiskShow, {{"name", &C::name}}},
        {"disk.resize",
         true,
         Pace::kChange,
         DiskResize,
         {{"name", &C::name},
          {"size", &C::size},
          {"shrink", &C::shrink},
          {"disconnect", &C::disconnect}}},
        {"disk.rename", true, Pace::kChange, DiskRename, {{"name", &C::name}, {"to", &C::to}}},
        {"disk.clone",
         true,
         Pace::kChange,
         DiskClone,
         {{"snapshot", &C::snapshot}, {"name", &C::name}}},
        {"disk.flatten", true, Pace::kWork, DiskFlatten, {{"name", &C::name}}},
        {"disk.delete",
         true,
         Pace::kChange,
         DiskDelete,
         {{"name", &C::name}, {"snapshots", &C::delete_snapshots}, {"disconnect", &C::disconnect}}},
        {"disk.offline",
         true,
         Pace::kChange,
         DiskOffline,
         {{"name", &C::name}, {"disconnect", &C::disconnect}}},
        {"disk.online", true, Pace::kChange, DiskOnline, {{"name", &C::name}}},
        {"snapshot.create", true, Pace::kChange, SnapshotCreate, {{"snapshots", &C::snapshots}}},
        {"snapshot.list", false, Pace::kWork, SnapshotListAll, {{"disk", &C::name}}},
        {"snapshot.show", false, Pace::kGlance, SnapshotShow, {{"snapshot", &C::snapshot}}},
        {"snapshot.restore",
         true,
         Pace::kChange,
         SnapshotRestore,
         {{"snapshot", &C::snapshot},
          {"keep_as", &C::keep_as},
          {"disconnect", &C::disconnect},
          {"online", &C::online}}},
        {"snapshot.rename",
         true,
         Pace::kChange,
         SnapshotRename,
         {{"snapshot", &C::snapshot}, {"to", &C::to}}},
        {"snapshot.delete",
         true,
         Pace::kChange,
         SnapshotDelete,
         {{"snapshot", &C::snapshot}, {"disconnect", &C::disconnect}, {"bookmark", &C::bookmark}}},
        {"snapshot.diff",
         false,
         Pace::kWork,
         SnapshotDiff,
         {{"from", &C::from}, {"to", &C::to}, {"offset", &C::offset}}},
        {"client.list", false, Pace::kGlance, ClientList, {{"disk", &C::disk}}},
        {"client.disconnect", true, Pace::kGlance, ClientDisconnect, {{"disk", &C::name}}},
        {"pool.status", false, Pace::kGlance, PoolGetStatus, {{"hurry", &C::hurry}}},
        {"pool.check", false, Pace::kWork, PoolCheck, {}},
        {"pool.estimate_delete",
         false,
         Pace::kWork,
         PoolEstimateDelete,
         {{"names", &C::names}, {"snapshots", &C::delete_snapshots}}},
        {"pool.scrub", false, Pace::kWork, PoolScrub, {{"disk", &C::disk}}},
    };
    return methods;
}

// ---- decoding

Error WrongType(const char* name, std::string_view expected) {
    return MakeError(ErrorKind::kInvalid, fmt::format("parameter '{}' must be {}", name, expected));
}

Result<std::string> DecodeName(const char* name, const json::value& value) {
    // Names have at most 128 characters, "disk@snapshot" 257: the pool says what is wrong with
    // them, but need not repeat a megabyte.
    constexpr size_t kNameBytesMax = 257;
    const json::string* text = value.if_string();
    if (!text) return WrongType(name, "a string");
    if (text->size() > kNameBytesMax) {
        return WrongType(name, "a name, of at most 128 characters");
    }
    return std::string(*text);
}

Result<uint64_t> DecodeSize(const char* name, const json::value& value) {
    uint64_t size = 0;
    if (const json::string* text = value.if_string()) {
        constexpr size_t kSizeBytesMax = 32;
        if (text->size() > kSizeBytesMax) return WrongType(name, "a size, as in \"10G\"");
        Result<uint64_t> parsed = ParseSize(std::string(*text));
        if (!parsed.ok()) {
            return MakeError(parsed.error().kind,
                             fmt::format("parameter '{}': {}", name, parsed.error().message));
        }
        size = parsed.value();
    } else if (value.is_uint64()) {
        size = value.get_uint64();
    } else if (value.is_int64() && value.get_int64() >= 0) {
        size = static_cast<uint64_t>(value.get_int64());
    } else {
        return WrongType(name, "a whole number of bytes, or a string as in \"10G\"");
    }
    if (size == 0 || size % cow::kSizeUnitBytes != 0) {
        return WrongType(name, fmt::format("a multiple of {} and not 0", cow::kSizeUnitBytes));
    }
    return size;
}

/// Stores parameter values in a command; one overload for each type of field.
struct Decoder {
    Command& command;
    const char* name;
    const json::value* value;  // null if it was left out

    Status operator()(std::string Command::*field) const {
        if (!value) return Missing();
        Result<std::string> decoded = DecodeName(name, *value);
        if (!decoded.ok()) return decoded.error();
        command.*field = std::move(decoded.value());
        return Status();
    }
    Status operator()(std::optional<std::string> Command::*field) const {
        if (!value || value->is_null()) return Status();
        Result<std::string> decoded = DecodeName(name, *value);
        if (!decoded.ok()) return decoded.error();
        command.*field = std::move(decoded.value());
        return Status();
    }
    Status operator()(std::vector<std::string> Command::*field) const {
        if (!value) return Missing();
        const json::array* array = value->if_array();
        if (!array || array->empty()) return WrongType(name, "a list of at least one name");
        for (const json::value& element : *array) {
            Result<std::string> decoded = DecodeName(name, element);
            if (!decoded.ok()) return WrongType(name, "a list of names: strings");
            (command.*field).push_back(std::move(decoded.value()));
        }
        return Status();
    }
    Status operator()(uint64_t Command::*field) const {
        if (!value) return Missing();
        const Result<uint64_t> decoded = DecodeSize(name, *value);
        if (!decoded.ok()) return decoded.error();
        command.*field = decoded.value();
        return Status();
    }
    Status operator()(std::optional<uint64_t> Command::*field) const {
        if (!value || value->is_null()) return Status();
        const bool whole = value->is_uint64() || (value->is_int64() && value->get_int64() >= 0);
        if (!whole) return WrongType(name, "a whole number of bytes");
        command.*field = value->to_number<uint64_t>();
        return Status();
    }
    Status operator()(bool Command::*field) const {
        if (!value) return Status();
        if (!value->is_bool()) return WrongType(name, "true or false");
        command.*field = value->get_bool();
        return Status();
    }

  private:
    Status Missing() const {
        return MakeError(ErrorKind::kInvalid, fmt::format("parameter '{}' is missing", name));
    }
};

/// At most the first `kShown` bytes of a text from outside, for a message about it.
std::string Shown(std::string_view text) {
    constexpr size_t kShown = 64;
    if (text.size() <= kShown) return std::string(text);
    // Not in the middle of a character of UTF-8.
    size_t end = kShown;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;
    return std::string(text.substr(0, end)) + "...";
}

RpcError InvalidParams(std::string message) {
    return {RpcCode::kInvalidParams, MakeError(ErrorKind::kInvalid, std::move(message))};
}

}  // namespace

std::variant<Command, RpcError> DecodeCommand(const Request& request) {
    const std::vector<Method>& methods = Methods();
    const auto method = std::find_if(methods.begin(), methods.end(),
                                     [&](const Method& m) { return m.name == request.method; });
    if (method == methods.end()) {
        return RpcError{
            RpcCode::kMethodNotFound,
            MakeError(ErrorKind::kInvalid, fmt::format("there is no method '{}'; see docs/admin.md",
                                                       Shown(request.method)))};
    }
    for (const auto& given : request.params) {
        const auto& known = method->parameters;
        if (std::none_of(known.begin(), known.end(),
                         [&](const Parameter& p) { return given.key() == p.name; })) {
            const std::string key(given.key());
            return InvalidParams(fmt::format("{} has no parameter '{}'", method->name, Shown(key)));
        }
    }
    Command command;
    command.method = &*method;
    for (const Parameter& parameter : method->parameters) {
        const Decoder decoder{command, parameter.name, request.params.if_contains(parameter.name)};
        if (Status status = std::visit(decoder, parameter.field); !status.ok()) {
            return InvalidParams(fmt::format("{}: {}", method->name, status.error().message));
        }
    }
    return command;
}

Task<Result<Reply>> RunCommand(CommandTarget target, Command command) {
    return command.method->run(target, std::move(command));
}

bool IsChange(const Command& command) {
    return command.method->change;
}

Pace PaceOf(const Command& command) {
    return command.method->pace;
}

json::object EncodeParameters(const Command& command) {
    json::object values;
    for (const Parameter& parameter : command.method->parameters) {
        const auto encode = [&](auto field) {
            const auto& value = command.*field;
            using T = std::decay_t<decltype(value)>;
            if constexpr (std::is_same_v<T, std::optional<std::string>> ||
                          std::is_same_v<T, std::optional<uint64_t>>) {
                if (value) values.emplace(parameter.name, *value);
            } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
                values.emplace(parameter.name, json::array(value.begin(), value.end()));
            } else {
                values.emplace(parameter.name, value);
            }
        };
        std::visit(encode, parameter.field);
    }
    return values;
}

std::string Describe(const Command& command) {
    return fmt::format("{} {}", command.method->name,
                       std::string(json::serialize(EncodeParameters(command))));
}

std::vector<std::string> MethodNames() {
    std::vector<std::string> names;
    for (const Method& method : Methods()) names.emplace_back(method.name);
    return names;
}

}  // namespace varve::admin
