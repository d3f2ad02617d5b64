// JSON-RPC 2.0 as the admin socket speaks it: bytes to lines, lines to requests, answers to text.
// Not the methods (command.h) and not the socket (service.h): pure functions of bytes.
#pragma once

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace varve::admin {

/// Error codes; JSON-RPC 2.0, section 5.1. What the methods themselves report is kServerError.
enum class RpcCode {
    kParseError = -32700,
    kInvalidRequest = -32600,
    kMethodNotFound = -32601,
    kInvalidParams = -32602,
    kServerError = -32000,
};

struct RpcError {
    RpcCode code = RpcCode::kServerError;
    Error error;  // its kind becomes error.data.kind
};

/// One call, or what to answer to something that is none.
struct Request {
    std::optional<boost::json::value> id;  // none: a notification, which gets no answer
    std::string method;
    boost::json::object params;
    std::optional<RpcError> error;  // set: no valid request, answer this
};

/// One line: a request, or a batch of them.
struct Message {
    bool batch = false;
    std::vector<Request> requests;
};

/// What a line says. Never fails: what is wrong becomes a request with an `error`. Batches with
/// more than `batch_max` requests are refused as a whole; nesting deeper than 32 is no JSON.
Message ParseMessage(std::string_view line, size_t batch_max);

/// The message that answers a line over the limit.
Message LineTooLong(size_t line_bytes_max);

/// Answer objects, in one line, without the newline. `id` null if it could not be read.
std::string EncodeResult(const boost::json::value& id, boost::json::value result);
std::string EncodeError(const boost::json::value& id, const RpcError& error);

/// Cuts a stream of bytes into lines. Holds at most one line over the limit plus what was appended
/// last.
class LineSplitter {
  public:
    explicit LineSplitter(size_t line_bytes_max) : line_bytes_max_(line_bytes_max) {}

    struct Line {
        std::string_view text;  // without its newline; valid until the next call
        bool too_long = false;  // then `text` is empty; the rest of the line will be dropped
    };

    void Append(std::string_view bytes);
    /// No more bytes will come: what is left counts as a line.
    void End() { ended_ = true; }
    /// The next complete line, if there is one.
    std::optional<Line> Next();
    size_t buffered() const { return buffer_.size() - start_; }

  private:
    void DropConsumed();

    const size_t line_bytes_max_;
    std::string buffer_;
    size_t start_ = 0;       // of the first byte not handed out
    size_t scanned_ = 0;     // no newline in [start_, scanned_)
    bool dropping_ = false;  // inside a line that was too long
    bool ended_ = false;
};

}  // namespace varve::admin
