#include "cow/store/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

namespace varve::cow {

File& File::operator=(File&& other) noexcept {
    if (this != &other) {
        Close();
        fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
}

void File::Close() {
    if (fd_ >= 0) ::close(std::exchange(fd_, -1));
}

File OpenFile(const std::string& path, int flags, unsigned mode) {
    int fd = -1;
    do {
        fd = ::open(path.c_str(), flags | O_CLOEXEC, mode);
    } while (fd < 0 && errno == EINTR);
    return File(fd);
}

Result<std::string> ReadAt(const File& file, uint64_t offset, size_t length,
                           const std::string& path) {
    std::string bytes(length, '\0');
    size_t done = 0;
    while (done < length) {
        const ssize_t n = ::pread(file.fd(), bytes.data() + done, length - done,
                                  static_cast<off_t>(offset + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return SystemError(errno, fmt::format("cannot read {}", path));
        if (n == 0) break;
        done += static_cast<size_t>(n);
    }
    bytes.resize(done);
    return bytes;
}

Status WriteAt(const File& file, uint64_t offset, std::string_view bytes, const std::string& path) {
    while (!bytes.empty()) {
        const ssize_t n =
            ::pwrite(file.fd(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return SystemError(errno, fmt::format("cannot write {}", path));
        offset += static_cast<uint64_t>(n);
        bytes.remove_prefix(static_cast<size_t>(n));
    }
    return Status();
}

Status SyncFile(const File& file, const std::string& path) {
    if (::fsync(file.fd()) == 0) return Status();
    return SystemError(errno, fmt::format("cannot sync {}", path));
}

Status SyncDirectory(const std::string& path) {
    const File directory = OpenFile(path, O_RDONLY | O_DIRECTORY);
    if (!directory.valid()) return SystemError(errno, fmt::format("cannot open {}", path));
    return SyncFile(directory, path);
}

}  // namespace varve::cow
