#include "admin/jsonrpc.h"

#include <fmt/format.h>

#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <cmath>

namespace varve::admin {
namespace json = boost::json;
namespace {

Request Wrong(RpcCode code, ErrorKind kind, std::string message) {
    Request request;
    request.id = json::value(nullptr);
    request.error = RpcError{code, MakeError(kind, std::move(message))};
    return request;
}

Request Invalid(std::string message) {
    return Wrong(RpcCode::kInvalidRequest, ErrorKind::kInvalid, std::move(message));
}

Request ParseRequest(json::value&& value) {
    json::object* object = value.if_object();
    if (!object) return Invalid("a request is an object; see the method list in docs/admin.md");

    Request request;
    if (json::value* id = object->if_contains("id")) {
        if (!id->is_string() && !id->is_number() && !id->is_null()) {
            return Invalid("'id' must be a string, a number or null");
        }
        // Read as infinite, it could not be written into the answer.
        if (id->is_double() && !std::isfinite(id->get_double())) {
            return Invalid("'id' is too large a number; use a string");
        }
        request.id = std::move(*id);
    }
    const auto invalid = [&request](RpcCode code, std::string message) {
        // Whoever sends no valid request may have meant an answer to come: so says section 5.1.
        if (!request.id && code == RpcCode::kInvalidRequest) request.id = json::value(nullptr);
        request.error = RpcError{code, MakeError(ErrorKind::kInvalid, std::move(message))};
    };
    const json::value* version = object->if_contains("jsonrpc");
    if (!version || !version->is_string() || version->get_string() != "2.0") {
        invalid(RpcCode::kInvalidRequest, "'jsonrpc' must be \"2.0\"");
        return request;
    }
    const json::value* method = object->if_contains("method");
    if (!method || !method->is_string()) {
        invalid(RpcCode::kInvalidRequest, "'method' must be a string");
        return request;
    }
    request.method = std::string(method->get_string());
    if (json::value* params = object->if_contains("params")) {
        const json::array* array = params->if_array();
        if (json::object* named = params->if_object()) {
            request.params = std::move(*named);
        } else if (!array || !array->empty()) {
            invalid(RpcCode::kInvalidParams, "'params' must be an object: parameters have names");
        }
    }
    return request;
}

Message Single(Request request) {
    Message message;
    message.requests.push_back(std::move(request));
    return message;
}

}  // namespace

Message ParseMessage(std::string_view line, size_t batch_max) {
    boost::system::error_code failure;
    json::value value = json::parse(json::string_view(line.data(), line.size()), failure);
    if (failure) {
        return Single(Wrong(RpcCode::kParseError, ErrorKind::kInvalid,
                            fmt::format("the line is no JSON ({}); send one JSON-RPC 2.0 object "
                                        "in each line",
                                        failure.message())));
    }
    json::array* array = value.if_array();
    if (!array) return Single(ParseRequest(std::move(value)));
    if (array->empty()) return Single(Invalid("an empty batch; send at least one request"));
    if (array->size() > batch_max) {
        return Single(Wrong(RpcCode::kServerError, ErrorKind::kLimit,
                            fmt::format("a batch of {} requests; send at most {} in one line",
                                        array->size(), batch_max)));
    }
    Message message;
    message.batch = true;
    for (json::value& element : *array)
        message.requests.push_back(ParseRequest(std::move(element)));
    return message;
}

Message LineTooLong(size_t line_bytes_max) {
    return Single(Wrong(
        RpcCode::kServerError, ErrorKind::kLimit,
        fmt::format("the line is too long; send at most {} bytes in one line", line_bytes_max)));
}

std::string EncodeResult(const json::value& id, json::value result) {
    json::object answer;
    answer.emplace("jsonrpc", "2.0");
    answer.emplace("id", id);
    answer.emplace("result", std::move(result));
    return json::serialize(answer);
}

std::string EncodeError(const json::value& id, const RpcError& error) {
    json::object details;
    details.emplace("code", static_cast<int>(error.code));
    details.emplace("message", error.error.message);
    details.emplace("data", json::object({{"kind", KindName(error.error.kind)}}));
    json::object answer;
    answer.emplace("jsonrpc", "2.0");
    answer.emplace("id", id);
    answer.emplace("error", std::move(details));
    return json::serialize(answer);
}

void LineSplitter::DropConsumed() {
    if (start_ == 0) return;
    buffer_.erase(0, start_);
    scanned_ -= start_;
    start_ = 0;
    // One long line must not cost its memory for as long as the connection lives.
    constexpr size_t kKeep = size_t{64} << 10;
    if (buffer_.size() < kKeep && buffer_.capacity() > 2 * kKeep) buffer_.shrink_to_fit();
}

void LineSplitter::Append(std::string_view bytes) {
    if (dropping_) {
        const size_t newline = bytes.find('\n');
        if (newline == std::string_view::npos) return;
        bytes.remove_prefix(newline + 1);
        dropping_ = false;
    }
    DropConsumed();
    buffer_.append(bytes);
}

std::optional<LineSplitter::Line> LineSplitter::Next() {
    const size_t newline = buffer_.find('\n', scanned_);
    const bool complete = newline != std::string::npos;
    const size_t end = complete ? newline : buffer_.size();
    const size_t length = end - start_;
    if (!complete && length <= line_bytes_max_ && (!ended_ || length == 0)) {
        scanned_ = buffer_.size();
        DropConsumed();
        return std::nullopt;
    }
    const std::string_view text(buffer_.data() + start_, length);
    start_ = scanned_ = complete ? newline + 1 : end;
    if (length <= line_bytes_max_) return Line{text, false};
    dropping_ = !complete;
    return Line{{}, true};
}

}  // namespace varve::admin
