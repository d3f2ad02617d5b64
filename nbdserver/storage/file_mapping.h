// FileMapping: a file of a file system in memory, readable without system calls.
// Not for files on a device: a fault there would block the thread that reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace varve::nbdserver {

/// Any number of threads may use it at once. They must not block SIGBUS.
class FileMapping {
  public:
    /// Maps `fd` up to the size that its file system may grow to, whatever the file's size is now.
    /// Null if that cannot be done. The first mapping sets the process's handler for SIGBUS.
    static std::shared_ptr<FileMapping> Map(int fd);
    ~FileMapping();
    FileMapping(const FileMapping&) = delete;

    /// Copies `length` bytes from `offset` on. False if that is not possible: behind the end of the
    /// file or of the mapping, or because the system has no memory; read(2) tells why.
    bool Read(uint64_t offset, void* memory, size_t length) const;

  private:
    FileMapping(const std::byte* data, uint64_t bytes) : data_(data), bytes_(bytes) {}

    const std::byte* const data_;
    const uint64_t bytes_;
};

}  // namespace varve::nbdserver
