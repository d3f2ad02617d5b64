// RpcClient: calls methods over the admin socket, one at a time, blocking.
// Not for the server: see service.h.
#pragma once

#include <boost/json/object.hpp>
#include <boost/json/value.hpp>
#include <string>

#include "admin/unix_socket.h"
#include "base/result.h"

namespace varve::admin {

class RpcClient {
  public:
    /// Fails with one line that says how to reach a server.
    static Result<RpcClient> Connect(const std::string& path);

    /// What came of a call: a result, an error the server sent, or no answer at all.
    struct Answer {
        boost::json::value result;
        Status status;
        bool lost = false;  // the connection broke: nobody knows whether the call was carried out
    };
    Answer Call(const std::string& method, boost::json::object params);

  private:
    explicit RpcClient(OwnedFd fd) : fd_(std::move(fd)) {}
    Status Send(std::string_view text);
    Result<std::string> ReceiveLine();

    OwnedFd fd_;
    std::string received_;
    uint64_t next_id_ = 1;
};

}  // namespace varve::admin
