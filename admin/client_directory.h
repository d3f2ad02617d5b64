// ClientDirectory: what the admin side needs to know about attached NBD clients, and may do to
// them. The server implements it.
// Not a fence: Pool's commands fence by themselves (Pool::SetDisconnector).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/task.h"

namespace varve::admin {

/// One attached client, as `client.list` shows it.
struct ClientInfo {
    uint64_t id = 0;          // unique while the server runs
    std::string address;      // "127.0.0.1:51234", "[::1]:51234", or "unix:uid=0,pid=12"
    std::string export_name;  // "disk" or "disk@snapshot", as of now if it was renamed
    int64_t since_ms = 0;     // wall clock, milliseconds since 1970
    uint64_t idle_s = 0;      // since its last request was answered, or it came
    bool read_only = false;
    uint64_t requests = 0;  // answered
    uint64_t bytes_read = 0;
    uint64_t bytes_written = 0;
    bool tls = false;
    std::string identity;  // who it has proved to be: "psk:alice", "certificate:backup"; or empty
};

/// Both tasks are started on the home executor and finish on it; they may hop in between.
/// Several may run at a time.
class ClientDirectory {
  public:
    virtual ~ClientDirectory() = default;

    /// Clients in transmission, in any order. Those still negotiating are not in it.
    virtual Task<std::vector<ClientInfo>> List() = 0;

    /// Closes the connections of these clients; ids that are gone are skipped. Finishes once their
    /// exports are closed, or after some seconds if they do not. Returns how many it closed.
    virtual Task<uint64_t> Disconnect(std::vector<uint64_t> ids) = 0;
};

}  // namespace varve::admin
