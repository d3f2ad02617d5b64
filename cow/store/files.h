// Files as the pool directory needs them: descriptors that close themselves, whole reads and
// writes, and syncs of directories.
// Not for the data path: these calls block.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "base/result.h"

namespace varve::cow {

/// A file descriptor that closes itself.
class File {
  public:
    File() = default;
    explicit File(int fd) : fd_(fd) {}
    File(File&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    File& operator=(File&& other) noexcept;
    ~File() { Close(); }

    int fd() const { return fd_; }
    bool valid() const { return fd_ >= 0; }
    void Close();

  private:
    int fd_ = -1;
};

/// `flags` and `mode` as of open(2); close-on-exec. On failure the File is not valid and errno
/// tells why.
File OpenFile(const std::string& path, int flags, unsigned mode = 0640);

/// Up to `length` bytes from `offset` on; fewer only at the end of the file.
Result<std::string> ReadAt(const File& file, uint64_t offset, size_t length,
                           const std::string& path);
Status WriteAt(const File& file, uint64_t offset, std::string_view bytes, const std::string& path);

/// Makes the file's content and size durable.
Status SyncFile(const File& file, const std::string& path);
/// Makes the names in the directory durable.
Status SyncDirectory(const std::string& path);

}  // namespace varve::cow
