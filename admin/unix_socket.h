// Unix stream sockets by path: listening with a mode, replacing what a dead server left, and
// connecting. Plain descriptors, for the service and for the command line.
// Not a transport: knows nothing of what is said over the socket.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "base/result.h"

namespace varve::admin {

/// A file descriptor that closes itself.
class OwnedFd {
  public:
    OwnedFd() = default;
    explicit OwnedFd(int fd) : fd_(fd) {}
    OwnedFd(OwnedFd&& other) noexcept : fd_(other.Release()) {}
    OwnedFd& operator=(OwnedFd&& other) noexcept;
    ~OwnedFd() { Reset(); }

    int get() const { return fd_; }
    bool valid() const { return fd_ >= 0; }
    int Release() { return std::exchange(fd_, -1); }
    void Reset();

  private:
    int fd_ = -1;
};

/// A listening socket and the file that names it.
struct ListeningSocket {
    OwnedFd fd;  // non-blocking, close-on-exec
    std::string path;
    uint64_t device = 0, inode = 0;  // of the file

    /// Deletes the file, unless another server has replaced it.
    void RemoveFile() const;
};

/// Listens at `path`, however long its directory's name is. The file appears complete: with
/// `mode`, and accepting connections. A socket file that nobody listens on is replaced.
/// kBusy if somebody does listen, kExists if the path is no socket, kInvalid for a path that
/// cannot name a socket, else kIo.
Result<ListeningSocket> ListenUnix(const std::string& path, unsigned mode);

/// Connects to `path`; blocking, close-on-exec. kNotFound if there is no such socket or nobody
/// listens on it, else kIo (permissions).
Result<OwnedFd> ConnectUnix(const std::string& path);

/// Who connected the unix socket `fd`, as the kernel knows it: "uid 1000, pid 4711".
std::string DescribePeer(int fd);

}  // namespace varve::admin
