#include "admin/cli.h"

#include <fmt/format.h>
#include <unistd.h>

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>
#include <chrono>
#include <cstdio>
#include <future>
#include <optional>
#include <string_view>
#include <thread>

#include "admin/arguments.h"
#include "admin/command.h"
#include "admin/render.h"
#include "admin/rpc_client.h"
#include "base/units.h"
#include "cow/history/catalog.h"

namespace varve::admin {
namespace json = boost::json;
namespace {

/// What a verb is on the admin socket, and how its result looks.
struct Call {
    std::string method;
    json::object params;
    std::string (*render)(const json::value&) = nullptr;  // null: nothing to tell
    std::string question;                                 // asked first if not empty
};

bool IsSnapshot(const std::string& name) {
    return name.find('@') != std::string::npos;
}

/// A snapshot's new name is given without its disk, with which it stays.
Status CheckBareName(const std::string& name) {
    if (!IsSnapshot(name)) return Status();
    return Usage(fmt::format("'{}' names a disk too; give the snapshot's new name alone: {}", name,
                             name.substr(name.find('@') + 1)));
}

/// Bytes of a size as people write it. The server checks it too, but speaks of parameters.
Result<uint64_t> SizeOperand(const std::string& text) {
    const Result<uint64_t> size = ParseSize(text);
    if (!size.ok()) return size.error();
    if (size.value() == 0 || size.value() % cow::kSizeUnitBytes != 0) {
        return Usage(
            fmt::format("'{}' cannot be a disk's size; give a multiple of {} that is not 0", text,
                        cow::kSizeUnitBytes));
    }
    return size.value();
}

Result<Call> CreateCall(const Arguments& a) {
    const Result<uint64_t> size = SizeOperand(a.operands[1]);
    if (!size.ok()) return size.error();
    return Call{"disk.create", {{"name", a.operands[0]}, {"size", size.value()}}, nullptr, ""};
}

Result<Call> ListCall(const Arguments& a) {
    if (a.operands.empty()) return Call{"disk.list", {}, RenderDisks, ""};
    if (IsSnapshot(a.operands[0])) {
        return Usage(fmt::format("'{0}' is a snapshot; use varve show {0}", a.operands[0]));
    }
    return Call{"snapshot.list", {{"disk", a.operands[0]}}, RenderSnapshots, ""};
}

Result<Call> ShowCall(const Arguments& a) {
    const std::string& name = a.operands[0];
    if (IsSnapshot(name)) return Call{"snapshot.show", {{"snapshot", name}}, RenderSnapshot, ""};
    return Call{"disk.show", {{"name", name}}, RenderDisk, ""};
}

Result<Call> SnapshotCall(const Arguments& a) {
    json::array names(a.operands.begin(), a.operands.end());
    return Call{"snapshot.create", {{"snapshots", std::move(names)}}, nullptr, ""};
}

Result<Call> RestoreCall(const Arguments& a) {
    const std::string& name = a.operands[0];
    json::object params = {{"snapshot", name}, {"disconnect", a.disconnect}, {"online", a.online}};
    std::string loss = ", losing what was written since";
    if (a.keep_as) {
        if (Status bare = CheckBareName(*a.keep_as); !bare.ok()) return bare.error();
        params.emplace("keep_as", *a.keep_as);
        loss = fmt::format(", keeping the present state as '{}'", *a.keep_as);
    }
    std::string question = fmt::format("Put disk '{}' back to the state of '{}'{}?",
                                       name.substr(0, name.find('@')), name, loss);
    return Call{"snapshot.restore", std::move(params), nullptr, std::move(question)};
}

Result<Call> RenameCall(const Arguments& a) {
    const std::string& name = a.operands[0];
    if (!IsSnapshot(name)) {
        return Call{"disk.rename", {{"name", name}, {"to", a.operands[1]}}, nullptr, ""};
    }
    const std::string& to = a.operands[1];
    if (Status bare = CheckBareName(to); !bare.ok()) return bare.error();
    return Call{"snapshot.rename", {{"snapshot", name}, {"to", to}}, nullptr, ""};
}

Result<Call> ResizeCall(const Arguments& a) {
    const Result<uint64_t> size = SizeOperand(a.operands[1]);
    if (!size.ok()) return size.error();
    json::object params = {{"name", a.operands[0]},
                           {"size", size.value()},
                           {"shrink", a.shrink},
                           {"disconnect", a.disconnect}};
    std::string question;
    if (a.shrink) {
        question = fmt::format("Shrink disk '{}' to {}, losing what lies beyond?", a.operands[0],
                               a.operands[1]);
    }
    return Call{"disk.resize", std::move(params), nullptr, std::move(question)};
}

std::string RenderEstimate(const json::value& result) {
    const json::object* object = result.if_object();
    const json::value* freed = object ? object->if_contains("freed") : nullptr;
    if (!freed || !freed->is_number()) return "";
    return "would free " + FormatSize(freed->to_number<uint64_t>()) + "\n";
}

Result<Call> DeleteCall(const Arguments& a) {
    if (a.dry_run) {
        json::array names(a.operands.begin(), a.operands.end());
        return Call{"pool.estimate_delete",
                    {{"names", std::move(names)}, {"snapshots", a.snapshots}},
                    RenderEstimate,
                    ""};
    }
    if (a.operands.size() > 1) return Usage("delete takes one name; several need --dry-run");
    const std::string& name = a.operands[0];
    if (!IsSnapshot(name)) {
        if (a.bookmark) return Usage("--bookmark is for snapshots: give DISK@SNAP");
        json::object params = {
            {"name", name}, {"snapshots", a.snapshots}, {"disconnect", a.disconnect}};
        return Call{
            "disk.delete", std::move(params), nullptr,
            fmt::format("Delete disk '{}'{}?", name, a.snapshots ? " and all its snapshots" : "")};
    }
    if (a.snapshots) return Usage("--snapshots is for disks; without it, the snapshot is deleted");
    return Call{
        "snapshot.delete",
        {{"snapshot", name}, {"disconnect", a.disconnect}, {"bookmark", a.bookmark}},
        nullptr,
        fmt::format("Delete snapshot '{}'{}?", name, a.bookmark ? ", keeping a bookmark" : "")};
}

std::string RenderDisconnected(const json::value& result) {
    const json::object* object = result.if_object();
    const json::value* count = object ? object->if_contains("disconnected") : nullptr;
    if (!count) return "";
    return fmt::format("disconnected {}\n", std::string(json::serialize(*count)));
}

Result<Call> MakeCall(const Arguments& a) {
    const std::string_view verb = a.verb->name;
    const std::vector<std::string>& operands = a.operands;
    if (verb == "create") return CreateCall(a);
    if (verb == "list") return ListCall(a);
    if (verb == "show") return ShowCall(a);
    if (verb == "snapshot") return SnapshotCall(a);
    if (verb == "restore") return RestoreCall(a);
    if (verb == "clone") {
        return Call{"disk.clone", {{"snapshot", operands[0]}, {"name", operands[1]}}, nullptr, ""};
    }
    if (verb == "flatten") return Call{"disk.flatten", {{"name", operands[0]}}, nullptr, ""};
    if (verb == "rename") return RenameCall(a);
    if (verb == "resize") return ResizeCall(a);
    if (verb == "delete") return DeleteCall(a);
    if (verb == "diff") {
        json::object params = {{"from", operands[0]}, {"to", operands[1]}};
        return Call{"snapshot.diff", std::move(params), RenderDifference, ""};
    }
    if (verb == "offline") {
        json::object params = {{"name", operands[0]}, {"disconnect", a.disconnect}};
        return Call{"disk.offline", std::move(params), nullptr, ""};
    }
    if (verb == "online") return Call{"disk.online", {{"name", operands[0]}}, nullptr, ""};
    if (verb == "clients") {
        json::object params;
        if (!operands.empty()) params.emplace("disk", operands[0]);
        return Call{"client.list", std::move(params), RenderClients, ""};
    }
    if (verb == "disconnect") {
        return Call{"client.disconnect", {{"disk", operands[0]}}, RenderDisconnected, ""};
    }
    if (verb == "status") return Call{"pool.status", {}, RenderStatus, ""};
    if (verb == "scrub") {
        json::object params;
        if (!operands.empty()) params.emplace("disk", operands[0]);
        return Call{"pool.scrub", std::move(params), RenderScrub, ""};
    }
    VARVE_CHECK(verb == "check");
    return Call{"pool.check", {}, RenderCheck, ""};
}

int Fail(ExitCode code, std::string_view message) {
    const std::string line = fmt::format("varve: {}\n", OneLine(message));
    std::fwrite(line.data(), 1, line.size(), stderr);
    return code;
}

int Fail(const Error& error) {
    return Fail(ExitCodeOf(error.kind), error.message);
}

int Print(std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    if (std::fflush(stdout) == 0 && !std::ferror(stdout)) return kExitDone;
    return Fail(kExitFailed, "cannot write to standard output");
}

std::string JsonLine(const json::value& value) {
    return std::string(json::serialize(value)) + "\n";
}

/// Asks on the terminal; kInvalid if there is none.
Result<bool> Confirm(const Arguments& a, const std::string& question) {
    if (a.yes) return true;
    if (!::isatty(STDIN_FILENO)) {
        return Usage(
            fmt::format("varve {} needs --yes here: there is no terminal to ask on", a.verb->name));
    }
    std::fprintf(stderr, "%s [y/N] ", OneLine(question).c_str());
    std::fflush(stderr);
    std::string answer;
    for (int c = std::getchar(); c != EOF && c != '\n'; c = std::getchar()) {
        answer += static_cast<char>(c);
    }
    return answer == "y" || answer == "Y" || answer == "yes";
}

uint64_t NumberAt(const json::value& object, const char* key) {
    const json::value* value = object.is_object() ? object.get_object().if_contains(key) : nullptr;
    boost::system::error_code failure;
    const uint64_t number = value && value->is_number() ? value->to_number<uint64_t>(failure) : 0;
    return failure ? 0 : number;
}

bool FlagAt(const json::value& object, const char* key) {
    const json::value* value = object.is_object() ? object.get_object().if_contains(key) : nullptr;
    return value && value->is_bool() && value->get_bool();
}

int FailCall(const RpcClient::Answer& answer) {
    if (answer.lost) return Fail(kExitUnreachable, answer.status.error().message);
    return Fail(answer.status.error());
}

/// The progress line of --wait: rewritten in place on a terminal, else a line a second at most.
class Progress {
  public:
    void Show(const std::string& text) {
        const auto now = std::chrono::steady_clock::now();
        if (!terminal_ && (text == last_ || now < next_)) return;
        last_ = text;
        next_ = now + std::chrono::seconds(1);
        std::fprintf(stderr, terminal_ ? "\r\033[K%s" : "%s\n", text.c_str());
        std::fflush(stderr);
    }
    void End() {
        if (terminal_) std::fputs("\r\033[K", stderr);
    }

  private:
    const bool terminal_ = ::isatty(STDERR_FILENO) != 0;
    std::string last_;
    std::chrono::steady_clock::time_point next_;
};

/// Waits until no deletion is pending. `before`: bytes given back when the command was sent.
int WaitForReclaim(RpcClient& client, uint64_t before) {
    Progress progress;
    for (;;) {
        json::object params = {{"hurry", true}};
        const RpcClient::Answer answer = client.Call("pool.status", std::move(params));
        if (!answer.status.ok()) {
            progress.End();
            return FailCall(answer);
        }
        const uint64_t pending = NumberAt(answer.result, "reclaim_pending");
        if (pending == 0) {
            progress.End();
            return kExitDone;
        }
        if (FlagAt(answer.result, "failed")) {
            progress.End();
            return Fail(kExitFailed,
                        "deleted, but the pool has failed and gives no space back; see varve "
                        "status, restart the server");
        }
        const uint64_t now = NumberAt(answer.result, "reclaimed_bytes");
        progress.Show(fmt::format("reclaiming: {} pending, {} given back", pending,
                                  FormatSize(now > before ? now - before : 0)));
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
    }
}

int PrintCheck(const Arguments& a, const json::value& report) {
    const int printed = Print(a.json ? JsonLine(report) : RenderCheck(report));
    if (FlagAt(report, "ok")) return printed;
    return Fail(kExitDamaged, "damage found; stop writing to this pool and see docs/operations.md");
}

/// Calls pool.scrub over `client`, and shows its progress, which another connection asks for.
int RunScrub(const Arguments& a, RpcClient& client, Call call) {
    Result<RpcClient> watcher = RpcClient::Connect(a.admin);
    if (!watcher.ok()) return Fail(kExitUnreachable, watcher.error().message);
    std::future<RpcClient::Answer> answered = std::async(
        std::launch::async, [&] { return client.Call(call.method, std::move(call.params)); });
    Progress progress;
    bool watched = true;
    while (answered.wait_for(std::chrono::milliseconds(100)) != std::future_status::ready) {
        if (!watched) continue;
        const RpcClient::Answer status = watcher.value().Call("pool.status", {});
        watched = status.status.ok();
        if (!watched || !FlagAt(status.result, "scrub_running")) continue;
        progress.Show(fmt::format("scrubbing: {} verified",
                                  FormatSize(NumberAt(status.result, "scrubbed_bytes"))));
    }
    progress.End();
    const RpcClient::Answer answer = answered.get();
    if (!answer.status.ok()) return FailCall(answer);
    const int printed = Print(a.json ? JsonLine(answer.result) : RenderScrub(answer.result));
    if (FlagAt(answer.result, "ok")) return printed;
    return Fail(kExitDamaged, "damage found; see docs/operations.md");
}

/// Appends what `more` has to `all`, joining an extent that was cut between the two.
void AppendExtents(json::array& all, const json::array& more) {
    for (const json::value& extent : more) {
        json::object* const last = all.empty() ? nullptr : all.back().if_object();
        const bool joins = last &&
                           NumberAt(all.back(), "offset") + NumberAt(all.back(), "length") ==
                               NumberAt(extent, "offset") &&
                           FlagAt(all.back(), "zero") == FlagAt(extent, "zero");
        if (joins) {
            (*last)["length"] = NumberAt(all.back(), "length") + NumberAt(extent, "length");
        } else {
            all.push_back(extent);
        }
    }
}

/// The server tells what differs in parts.
int RunDiff(const Arguments& a, RpcClient& client, const Call& call) {
    json::object whole;
    json::array extents;
    for (std::optional<uint64_t> offset = 0; offset;) {
        json::object params = call.params;
        params["offset"] = *offset;
        const RpcClient::Answer answer = client.Call(call.method, std::move(params));
        if (!answer.status.ok()) return FailCall(answer);
        const json::object* part = answer.result.if_object();
        const json::value* more = part ? part->if_contains("extents") : nullptr;
        const json::value* next = part ? part->if_contains("next") : nullptr;
        if (!more || !more->is_array())
            return Fail(kExitFailed, "the server's answer is not understood");
        AppendExtents(extents, more->get_array());
        if (whole.empty()) whole = *part;
        const uint64_t from = *offset;
        offset = next && next->is_number() ? std::optional(NumberAt(answer.result, "next"))
                                           : std::nullopt;
        if (offset && *offset <= from)
            return Fail(kExitFailed, "the server's answer is not understood");
    }
    whole["extents"] = std::move(extents);
    whole.erase("next");
    return Print(a.json ? JsonLine(whole) : call.render(whole));
}

int RunOfflineCheck(const Arguments& a, const OfflineCheck& check_offline) {
    const Result<cow::CheckReport> report = check_offline(*a.pool);
    if (!report.ok()) return Fail(report.error());
    return PrintCheck(a, ToJson(report.value()));
}

int RunVerb(const Arguments& a) {
    Result<Call> made = MakeCall(a);
    if (!made.ok()) return Fail(made.error());
    Call& call = made.value();
    Result<RpcClient> connected = RpcClient::Connect(a.admin);
    if (!connected.ok()) return Fail(kExitUnreachable, connected.error().message);
    RpcClient& client = connected.value();

    if (!call.question.empty()) {
        const Result<bool> confirmed = Confirm(a, call.question);
        if (!confirmed.ok()) return Fail(confirmed.error());
        if (!confirmed.value()) return Fail(kExitFailed, "not confirmed; nothing was changed");
    }
    if (call.render == RenderDifference) return RunDiff(a, client, call);
    if (call.render == RenderScrub) return RunScrub(a, client, std::move(call));
    uint64_t reclaimed_before = 0;
    if (a.wait) {
        const RpcClient::Answer status = client.Call("pool.status", {});
        if (!status.status.ok()) return FailCall(status);
        reclaimed_before = NumberAt(status.result, "reclaimed_bytes");
    }
    const RpcClient::Answer answer = client.Call(call.method, std::move(call.params));
    if (!answer.status.ok()) return FailCall(answer);
    if (call.render == RenderCheck) return PrintCheck(a, answer.result);
    if (a.wait) {
        if (const int code = WaitForReclaim(client, reclaimed_before)) return code;
    }
    if (a.json) return Print(JsonLine(answer.result));
    return call.render ? Print(call.render(answer.result)) : kExitDone;
}

}  // namespace

ExitCode ExitCodeOf(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kFailed:
        case ErrorKind::kIo:
            return kExitFailed;
        case ErrorKind::kInvalid:
            return kExitUsage;
        case ErrorKind::kNotFound:
            return kExitNotFound;
        case ErrorKind::kExists:
            return kExitExists;
        case ErrorKind::kBusy:
            return kExitBusy;
        case ErrorKind::kNoSpace:
        case ErrorKind::kLimit:
            return kExitNoSpace;
        case ErrorKind::kDamaged:
            return kExitDamaged;
    }
    return kExitFailed;
}

int RunCli(const std::vector<std::string>& arguments, const OfflineCheck& check_offline) {
    const Result<Arguments> parsed = ParseArguments(arguments);
    if (!parsed.ok()) return Fail(parsed.error());
    const Arguments& a = parsed.value();
    if (a.version) return Print(fmt::format("varve {}\n", VARVE_VERSION));
    if (a.help) return Print(HelpText(a.verb));
    if (a.pool) return RunOfflineCheck(a, check_offline);
    return RunVerb(a);
}

}  // namespace varve::admin
