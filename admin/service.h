// Service: the admin socket. Listens on a unix stream socket, reads JSON-RPC lines, runs them as
// commands on the pool, answers in order.
// Not the commands themselves (command.h) nor the protocol (jsonrpc.h).
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>

#include "admin/client_directory.h"
#include "base/executor.h"
#include "base/result.h"
#include "cow/pool/pool.h"

namespace boost::asio {
class io_context;
}

namespace varve::admin {

/// Limits are settings with defaults; going over gives an error object of kind "limit".
struct ServiceOptions {
    std::string path;            // of the socket; created with mode 0660
    std::string pool_directory;  // as `status` shows it
    size_t connections_max = 128;
    size_t line_bytes_max = size_t{1} << 20;
    size_t batch_max = 128;                       // requests in one line
    size_t output_bytes_max = size_t{256} << 20;  // answers waiting for clients, all together
    std::function<void(const std::string&)> log;  // optional: one line for each change, once done
};

/// What the commands work on. All of it outlives the service; its tasks are started on `home`,
/// which posts their results to `io`: end its thread before `io` goes.
struct Backend {
    Executor* home = nullptr;
    cow::Pool* pool = nullptr;
    ClientDirectory* clients = nullptr;
};

/// Lives on the one thread that runs `io`: all methods are called there, or before it runs.
/// Commands run as tasks on the backend's home executor; their results are posted back to `io`.
/// A connection runs one command at a time and is not read while it runs or while its answer has
/// not been taken, so no client makes the server buffer more than one line and one answer. When
/// all connections are taken, a new one replaces the one that has been silent longest; if all run
/// commands, it waits until one is over. Commands that may hang with the device leave some of the
/// connections to others (slots.h): they wait in line, and beyond that are refused. One that waits
/// in line is not begun if its client goes.
class Service {
  public:
    Service(boost::asio::io_context& io, Backend backend, ServiceOptions options);
    /// REQUIRES: never started, or Stop() has reported.
    ~Service();
    Service(const Service&) = delete;

    /// Listens. Replaces a socket that nobody listens on. kBusy if another server answers there,
    /// kExists if the path is something else than a socket, kInvalid or kIo otherwise.
    Status Start();

    /// Stops listening, removes the socket, lets running commands finish, and refuses all others
    /// that were sent, also on connections that were not accepted yet: up to `line_bytes_max` of
    /// what the socket of each still holds. A connection is closed when each line has its answer,
    /// or when the socket does not take them at once. What gets no answer was not begun, but for
    /// the first such line, if answers before it were not taken. Calls `stopped` on `io` when no
    /// command is running any more. REQUIRES: called at most once.
    void Stop(std::function<void()> stopped);
    /// Answers commands that are still running: whether they were carried out is not known yet. For
    /// a process that is about to end without them. REQUIRES: Stop() was called.
    void LeaveBehind();

  private:
    class Impl;
    std::shared_ptr<Impl> impl_;
};

}  // namespace varve::admin
