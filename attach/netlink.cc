#include "attach/netlink.h"

#include <fmt/format.h>
#include <linux/nbd-netlink.h>
#include <netlink/genl/ctrl.h>
#include <netlink/genl/genl.h>
#include <netlink/netlink.h>

#include <cstring>

namespace varve::attach {
namespace {

/// Netlink's errors are not the system's: it has numbers of its own.
Error NetlinkError(int code, const std::string& what) {
    if (code == -NLE_BUSY) return MakeError(ErrorKind::kBusy, what + ": it is in use");
    if (code == -NLE_PERM) {
        return MakeError(ErrorKind::kFailed, what + ": not permitted; run it as root");
    }
    return MakeError(ErrorKind::kFailed, fmt::format("{}: {}", what, nl_geterror(code)));
}

nl_sock* OpenSocket() {
    nl_sock* socket = nl_socket_alloc();
    if (socket && genl_connect(socket) < 0) {
        nl_socket_free(socket);
        socket = nullptr;
    }
    return socket;
}

nl_msg* NewMessage(int family, uint8_t command) {
    nl_msg* message = nlmsg_alloc();
    VARVE_CHECK(message);
    genlmsg_put(message, NL_AUTO_PORT, NL_AUTO_SEQ, family, 0, 0, command, NBD_GENL_VERSION);
    return message;
}

void PutSockets(nl_msg* message, const std::vector<int>& sockets) {
    nlattr* list = nla_nest_start(message, NBD_ATTR_SOCKETS);
    VARVE_CHECK(list);
    for (const int fd : sockets) {
        nlattr* item = nla_nest_start(message, NBD_SOCK_ITEM);
        VARVE_CHECK(item);
        VARVE_CHECK(nla_put_u32(message, NBD_SOCK_FD, static_cast<uint32_t>(fd)) == 0);
        nla_nest_end(message, item);
    }
    nla_nest_end(message, list);
}

std::optional<uint32_t> IndexOf(nl_msg* message) {
    nlattr* attributes[NBD_ATTR_MAX + 1];
    auto* header = nlmsg_data(nlmsg_hdr(message));
    auto* generic = static_cast<genlmsghdr*>(header);
    if (nla_parse(attributes, NBD_ATTR_MAX, genlmsg_attrdata(generic, 0),
                  genlmsg_attrlen(generic, 0), nullptr) < 0 ||
        !attributes[NBD_ATTR_INDEX]) {
        return std::nullopt;
    }
    return nla_get_u32(attributes[NBD_ATTR_INDEX]);
}

}  // namespace

Result<std::unique_ptr<NbdDriver>> NbdDriver::Open() {
    std::unique_ptr<NbdDriver> driver(new NbdDriver);
    driver->commands_ = OpenSocket();
    driver->events_ = OpenSocket();
    if (!driver->commands_ || !driver->events_) {
        return MakeError(ErrorKind::kFailed, "the kernel's generic netlink cannot be reached");
    }
    driver->family_ = genl_ctrl_resolve(driver->commands_, NBD_GENL_FAMILY_NAME);
    if (driver->family_ < 0) {
        return MakeError(ErrorKind::kNotFound,
                         "the kernel has no nbd driver loaded; run 'modprobe nbd' (a kernel "
                         "without the module cannot attach disks: use qemu-nbd or nbdfuse)");
    }
    const int group =
        genl_ctrl_resolve_grp(driver->commands_, NBD_GENL_FAMILY_NAME, NBD_GENL_MCAST_GROUP_NAME);
    if (group < 0 || nl_socket_add_membership(driver->events_, group) < 0) {
        return MakeError(ErrorKind::kFailed,
                         "the nbd driver does not tell of dead connections; "
                         "Linux 4.12 or later is needed");
    }
    nl_socket_disable_seq_check(driver->events_);
    nl_socket_set_nonblocking(driver->events_);
    return driver;
}

NbdDriver::~NbdDriver() {
    if (commands_) nl_socket_free(commands_);
    if (events_) nl_socket_free(events_);
}

/// Sends `message`, which it owns, and gives the index that the answer names, if any.
Result<std::optional<uint32_t>> NbdDriver::Call(nl_msg* message) {
    std::optional<uint32_t> index;
    const auto answered = [](nl_msg* answer, void* result) -> int {
        *static_cast<std::optional<uint32_t>*>(result) = IndexOf(answer);
        return NL_OK;
    };
    nl_socket_modify_cb(commands_, NL_CB_VALID, NL_CB_CUSTOM, answered, &index);
    const int sent = nl_send_auto(commands_, message);
    nlmsg_free(message);
    const int code = sent < 0 ? sent : nl_wait_for_ack(commands_);
    if (code < 0) return NetlinkError(code, "the nbd driver refuses");
    return index;
}

Result<uint32_t> NbdDriver::Connect(const DeviceSettings& settings) {
    nl_msg* message = NewMessage(family_, NBD_CMD_CONNECT);
    if (settings.index) nla_put_u32(message, NBD_ATTR_INDEX, *settings.index);
    nla_put_u64(message, NBD_ATTR_SIZE_BYTES, settings.size);
    nla_put_u64(message, NBD_ATTR_BLOCK_SIZE_BYTES, settings.block_size);
    nla_put_u64(message, NBD_ATTR_SERVER_FLAGS, settings.server_flags);
    nla_put_u64(message, NBD_ATTR_TIMEOUT, settings.io_timeout_s);
    nla_put_u64(message, NBD_ATTR_DEAD_CONN_TIMEOUT, settings.dead_timeout_s);
    nla_put_string(message, NBD_ATTR_BACKEND_IDENTIFIER, settings.backend.c_str());
    PutSockets(message, settings.sockets);
    const Result<std::optional<uint32_t>> index = Call(message);
    if (!index.ok() && settings.index && index.error().kind == ErrorKind::kBusy) {
        return MakeError(ErrorKind::kBusy,
                         fmt::format("/dev/nbd{} is in use; name another device, or none to take "
                                     "a free one",
                                     *settings.index));
    }
    if (!index.ok()) return index.error();
    if (!index.value()) {
        return MakeError(ErrorKind::kFailed, "the nbd driver does not say which device it took");
    }
    return *index.value();
}

Status NbdDriver::Reconnect(uint32_t index, const std::string& backend, int socket) {
    nl_msg* message = NewMessage(family_, NBD_CMD_RECONFIGURE);
    nla_put_u32(message, NBD_ATTR_INDEX, index);
    nla_put_string(message, NBD_ATTR_BACKEND_IDENTIFIER, backend.c_str());
    PutSockets(message, {socket});
    return Call(message).status();
}

Status NbdDriver::Resize(uint32_t index, const std::string& backend, uint64_t size) {
    nl_msg* message = NewMessage(family_, NBD_CMD_RECONFIGURE);
    nla_put_u32(message, NBD_ATTR_INDEX, index);
    nla_put_string(message, NBD_ATTR_BACKEND_IDENTIFIER, backend.c_str());
    nla_put_u64(message, NBD_ATTR_SIZE_BYTES, size);
    return Call(message).status();
}

Status NbdDriver::Disconnect(uint32_t index) {
    nl_msg* message = NewMessage(family_, NBD_CMD_DISCONNECT);
    nla_put_u32(message, NBD_ATTR_INDEX, index);
    return Call(message).status();
}

int NbdDriver::events_fd() const {
    return nl_socket_get_fd(events_);
}

std::vector<uint32_t> NbdDriver::TakeDeadLinks(bool* lost) {
    std::vector<uint32_t> dead;
    const auto received = [](nl_msg* event, void* result) -> int {
        auto* generic = static_cast<genlmsghdr*>(nlmsg_data(nlmsg_hdr(event)));
        const std::optional<uint32_t> index = IndexOf(event);
        if (generic->cmd == NBD_CMD_LINK_DEAD && index) {
            static_cast<std::vector<uint32_t>*>(result)->push_back(*index);
        }
        return NL_OK;
    };
    nl_socket_modify_cb(events_, NL_CB_VALID, NL_CB_CUSTOM, received, &dead);
    for (;;) {
        const int code = nl_recvmsgs_default(events_);
        if (code == 0) continue;
        *lost |= code != -NLE_AGAIN && code != -NLE_INTR;  // ENOBUFS comes as NLE_NOMEM
        return dead;
    }
}

}  // namespace varve::attach
