#include "admin/rpc_client.h"

#include <fmt/format.h>
#include <sys/socket.h>

#include <array>
#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cerrno>

namespace varve::admin {
namespace json = boost::json;
namespace {

ErrorKind KindOf(std::string_view name) {
    for (const ErrorKind kind :
         {ErrorKind::kInvalid, ErrorKind::kNotFound, ErrorKind::kExists, ErrorKind::kBusy,
          ErrorKind::kNoSpace, ErrorKind::kLimit, ErrorKind::kIo, ErrorKind::kDamaged}) {
        if (name == KindName(kind)) return kind;
    }
    return ErrorKind::kFailed;
}

Error DecodeError(const json::value& error) {
    Error decoded = MakeError(ErrorKind::kFailed, "the server reports an error without a message");
    const json::object* object = error.if_object();
    if (!object) return decoded;
    const json::value* message = object->if_contains("message");
    if (message && message->is_string()) decoded.message = std::string(message->get_string());
    const json::value* data = object->if_contains("data");
    const json::value* kind =
        data && data->is_object() ? data->get_object().if_contains("kind") : nullptr;
    if (kind && kind->is_string()) decoded.kind = KindOf(std::string(kind->get_string()));
    return decoded;
}

}  // namespace

Result<RpcClient> RpcClient::Connect(const std::string& path) {
    Result<OwnedFd> fd = ConnectUnix(path);
    if (fd.ok()) return RpcClient(std::move(fd.value()));
    const Error& error = fd.error();
    const char* advice =
        error.kind == ErrorKind::kNotFound
            ? "start varved, or name its socket with --admin PATH or $VARVE_ADMIN"
            : "run as root or as a member of the socket's group, or name another with --admin PATH";
    return MakeError(error.kind, fmt::format("{}; {}", error.message, advice));
}

Status RpcClient::Send(std::string_view text) {
    while (!text.empty()) {
        const ssize_t sent = ::send(fd_.get(), text.data(), text.size(), MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0) return SystemError(errno, "cannot send to the server");
        text.remove_prefix(static_cast<size_t>(sent));
    }
    return Status();
}

Result<std::string> RpcClient::ReceiveLine() {
    std::array<char, 65536> chunk;
    size_t scanned = 0;
    for (;;) {
        const size_t newline = received_.find('\n', scanned);
        if (newline != std::string::npos) {
            std::string line = received_.substr(0, newline);
            received_.erase(0, newline + 1);
            return line;
        }
        scanned = received_.size();
        const ssize_t count = ::recv(fd_.get(), chunk.data(), chunk.size(), 0);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return SystemError(errno, "cannot receive from the server");
        if (count == 0) return MakeError(ErrorKind::kIo, "the server closed the connection");
        received_.append(chunk.data(), static_cast<size_t>(count));
    }
}

RpcClient::Answer RpcClient::Call(const std::string& method, json::object params) {
    json::object request;
    request.emplace("jsonrpc", "2.0");
    request.emplace("id", next_id_++);
    request.emplace("method", method);
    request.emplace("params", std::move(params));

    Answer answer;
    // A server that refuses may have closed before it read: what it said comes first.
    const Status sent = Send(json::serialize(request) + "\n");
    Result<std::string> line = ReceiveLine();
    if (!line.ok()) {
        answer.lost = true;
        answer.status = MakeError(
            ErrorKind::kIo, fmt::format("{} before it answered; whether the command was carried "
                                        "out shows once it runs again",
                                        (sent.ok() ? line.error() : sent.error()).message));
        return answer;
    }
    boost::system::error_code failure;
    json::value value = json::parse(line.value(), failure);
    json::object* object = failure ? nullptr : value.if_object();
    if (json::value* result = object ? object->if_contains("result") : nullptr) {
        answer.result = std::move(*result);
    } else if (json::value* error = object ? object->if_contains("error") : nullptr) {
        answer.status = DecodeError(*error);
    } else {
        answer.status =
            MakeError(ErrorKind::kFailed, "what answers on the admin socket is no Varve server");
    }
    return answer;
}

}  // namespace varve::admin
