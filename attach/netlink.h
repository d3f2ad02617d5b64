// NbdDriver: the kernel's nbd driver, over its netlink family: devices are set up, get new
// sockets, change their size and go.
// Not the protocol's client (remote.h): the sockets it hands over have been through negotiation.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"

struct nl_msg;
struct nl_sock;

namespace varve::attach {

/// What a device is set up with.
struct DeviceSettings {
    std::optional<uint32_t> index;  // of /dev/nbdN; nothing: the kernel takes a free one
    uint64_t size = 0;              // bytes
    uint32_t block_size = 4096;     // bytes: the device's sectors
    uint64_t server_flags = 0;      // the protocol's transmission flags
    uint64_t io_timeout_s = 0;      // a request without an answer goes to another connection
    uint64_t dead_timeout_s = 0;    // requests wait so long for a connection before they fail
    std::string backend;            // who may give it new sockets: RECONFIGURE must say the same
    std::vector<int> sockets;       // the kernel takes references of its own
};

/// One thread. Calls wait for the kernel's answer, which comes at once.
class NbdDriver {
  public:
    /// kNotFound if the kernel has no nbd driver, with what to do.
    static Result<std::unique_ptr<NbdDriver>> Open();
    ~NbdDriver();
    NbdDriver(const NbdDriver&) = delete;

    /// The index of the device. kBusy if it is in use.
    Result<uint32_t> Connect(const DeviceSettings& settings);
    /// Gives `socket` to one of the device's dead connections; without one it is not used.
    Status Reconnect(uint32_t index, const std::string& backend, int socket);
    Status Resize(uint32_t index, const std::string& backend, uint64_t size);
    /// Requests that wait for a connection fail. kNotFound if nothing is connected.
    Status Disconnect(uint32_t index);

    /// Readable when TakeDeadLinks() has something.
    int events_fd() const;
    /// The devices of which a connection died since the last call, once for each. `lost` is set if
    /// there were more than the kernel could keep: then it may be any.
    std::vector<uint32_t> TakeDeadLinks(bool* lost);

  private:
    NbdDriver() = default;
    Result<std::optional<uint32_t>> Call(nl_msg* message);

    nl_sock* commands_ = nullptr;
    nl_sock* events_ = nullptr;
    int family_ = 0;
};

}  // namespace varve::attach
