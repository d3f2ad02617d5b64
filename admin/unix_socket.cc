#include "admin/unix_socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>

namespace varve::admin {
namespace {

/// Where a socket is, in a form that fits sockaddr_un whatever the length of its directory's name:
/// the directory is held open and named through /proc.
struct Place {
    OwnedFd directory;
    std::string file;  // last component of the path

    std::string Through(const std::string& name) const {
        return fmt::format("/proc/self/fd/{}/{}", directory.get(), name);
    }
};

Result<Place> FindPlace(const std::string& path) {
    const size_t slash = path.rfind('/');
    const std::string directory = slash == std::string::npos ? "."
                                  : slash == 0               ? "/"
                                                             : path.substr(0, slash);
    Place place;
    place.file = slash == std::string::npos ? path : path.substr(slash + 1);
    // sun_path has 108 bytes with its NUL; the prefix and the suffix of a temporary name need 40.
    if (place.file.empty() || place.file == "." || place.file == ".." || place.file.size() > 64 ||
        path.find('\0') != std::string::npos) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("'{}' cannot name a socket; give a path whose last part is a "
                                     "file name of at most 64 bytes",
                                     path));
    }
    place.directory = OwnedFd(::open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
    if (!place.directory.valid()) {
        const int error = errno;
        return MakeError(
            error == ENOENT ? ErrorKind::kNotFound : ErrorKind::kIo,
            fmt::format("cannot open directory '{}': {}", directory, std::strerror(error)));
    }
    return place;
}

sockaddr_un Address(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    VARVE_CHECK(path.size() < sizeof address.sun_path);
    std::memcpy(address.sun_path, path.c_str(), path.size());
    return address;
}

Errno Connect(int fd, const std::string& path) {
    const sockaddr_un address = Address(path);
    while (::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
        if (errno != EINTR) return errno;
    }
    return 0;
}

/// Fails unless `path` is free, or a socket left by a server that is gone.
Status MayTake(const Place& place, const std::string& path) {
    struct stat file {};
    if (::fstatat(place.directory.get(), place.file.c_str(), &file, AT_SYMLINK_NOFOLLOW) != 0) {
        if (errno == ENOENT) return Status();
        return SystemError(errno, fmt::format("cannot look at '{}'", path));
    }
    if (!S_ISSOCK(file.st_mode)) {
        return MakeError(
            ErrorKind::kExists,
            fmt::format("'{}' is not a socket; remove it or choose another path", path));
    }
    const OwnedFd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!probe.valid()) return SystemError(errno, "cannot make a socket");
    const Errno error = Connect(probe.get(), place.Through(place.file));
    // A full backlog (EAGAIN) is a listener too; ECONNREFUSED alone says that nobody is there.
    if (error == ECONNREFUSED || error == ENOENT) return Status();
    if (error == 0 || error == EAGAIN) {
        return MakeError(
            ErrorKind::kBusy,
            fmt::format("another server listens on '{}'; stop it or choose another path", path));
    }
    return SystemError(error, fmt::format("cannot tell whether '{}' is in use", path));
}

}  // namespace

OwnedFd& OwnedFd::operator=(OwnedFd&& other) noexcept {
    if (this != &other) {
        Reset();
        fd_ = other.Release();
    }
    return *this;
}

void OwnedFd::Reset() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

void ListeningSocket::RemoveFile() const {
    struct stat file {};
    if (::lstat(path.c_str(), &file) != 0) return;
    if (file.st_dev == device && file.st_ino == inode) ::unlink(path.c_str());
}

Result<ListeningSocket> ListenUnix(const std::string& path, unsigned mode) {
    Result<Place> found = FindPlace(path);
    if (!found.ok()) return found.error();
    const Place& place = found.value();
    if (Status status = MayTake(place, path); !status.ok()) return status.error();

    ListeningSocket socket;
    socket.path = path;
    socket.fd = OwnedFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket.fd.valid()) return SystemError(errno, "cannot make a socket");

    // Bound under another name and renamed when it is complete, so that no client can meet it
    // with a wider mode or before it listens. The mode set here is what bind() starts from.
    const std::string draft = fmt::format("{}.{}", place.file, ::getpid());
    ::unlinkat(place.directory.get(), draft.c_str(), 0);
    const sockaddr_un address = Address(place.Through(draft));
    struct stat file {};
    if (::fchmod(socket.fd.get(), mode) != 0 ||
        ::bind(socket.fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
        return SystemError(errno, fmt::format("cannot make the socket '{}'", path));
    }
    const int at = place.directory.get();
    if (::fchmodat(at, draft.c_str(), mode, 0) != 0 || ::listen(socket.fd.get(), SOMAXCONN) != 0 ||
        ::fstatat(at, draft.c_str(), &file, AT_SYMLINK_NOFOLLOW) != 0 ||
        ::renameat(at, draft.c_str(), at, place.file.c_str()) != 0) {
        const Errno error = errno;
        ::unlinkat(at, draft.c_str(), 0);
        return SystemError(error, fmt::format("cannot make the socket '{}'", path));
    }
    socket.device = file.st_dev;
    socket.inode = file.st_ino;
    return socket;
}

Result<OwnedFd> ConnectUnix(const std::string& path) {
    const Result<Place> found = FindPlace(path);
    if (!found.ok()) {
        return MakeError(found.error().kind,
                         fmt::format("cannot connect to '{}': {}", path, found.error().message));
    }
    OwnedFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!fd.valid()) return SystemError(errno, "cannot make a socket");
    const Errno error = Connect(fd.get(), found.value().Through(found.value().file));
    if (error == 0) return fd;
    const bool nobody = error == ENOENT || error == ECONNREFUSED;
    return MakeError(nobody ? ErrorKind::kNotFound : ErrorKind::kIo,
                     fmt::format("cannot connect to '{}': {}", path, std::strerror(error)));
}

std::string DescribePeer(int fd) {
    ucred peer{};
    socklen_t length = sizeof peer;
    if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0) return "somebody";
    return fmt::format("uid {}, pid {}", peer.uid, peer.pid);
}

}  // namespace varve::admin
