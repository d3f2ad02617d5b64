#include "cow/space/data_space.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>

#include "base/units.h"
#include "cow/format/types.h"

namespace varve::cow {

/// Bytes that may still be taken from a file system before its reserve is touched.
uint64_t DataSpace::Spare(const struct statvfs& system) const {
    const uint64_t total = uint64_t{system.f_blocks} * system.f_frsize;
    const uint64_t free = uint64_t{system.f_bavail} * system.f_frsize;
    const uint64_t reserve = std::max(reserve_min_, std::min(reserve_max_, total / 20));
    return free > reserve ? free - reserve : 0;
}

Result<DataSpace> DataSpace::Make(int fd, std::string path, std::string metadata,
                                  uint64_t reserve_max, uint64_t reserve_min) {
    DataSpace space;
    struct stat beside;
    struct stat about;
    if (::fstat(fd, &about) != 0) return SystemError(errno, fmt::format("cannot stat {}", path));
    if (S_ISBLK(about.st_mode) && ::ioctl(fd, BLKGETSIZE64, &space.device_bytes_) != 0) {
        return SystemError(errno, fmt::format("cannot ask for the size of {}", path));
    }
    space.fd_ = fd;
    space.path_ = std::move(path);
    space.metadata_ = std::move(metadata);
    space.reserve_max_ = reserve_max;
    const bool shared = ::stat(space.metadata_.c_str(), &beside) == 0 &&
                        beside.st_dev == about.st_dev && !S_ISBLK(about.st_mode);
    space.reserve_min_ = shared ? reserve_min : 0;
    return space;
}

Status DataSpace::Provision(uint64_t offset, uint64_t length) {
    struct statvfs system;
    if (::statvfs(metadata_.c_str(), &system) == 0 && Spare(system) == 0) {
        return MakeError(ErrorKind::kNoSpace,
                         fmt::format("the file system of {} is full but for its reserve; make room "
                                     "there",
                                     metadata_));
    }
    if (device_bytes_ != 0) {
        if (offset + length <= device_bytes_) return Status();
        return MakeError(ErrorKind::kNoSpace,
                         fmt::format("{} has only {}", path_, FormatSize(device_bytes_)));
    }
    struct stat before;
    if (::fstatvfs(fd_, &system) != 0 || ::fstat(fd_, &before) != 0) {
        return SystemError(errno, fmt::format("cannot stat {}", path_));
    }
    if (Spare(system) < length) {
        return MakeError(ErrorKind::kNoSpace,
                         fmt::format("the file system of {} is full but for its reserve; make room "
                                     "there or delete snapshots",
                                     path_));
    }
    int result = 0;
    do {
        result = ::fallocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(length));
    } while (result != 0 && errno == EINTR);
    if (result == 0) return Status();
    const Errno error = errno;
    // It may have got half of the way. What lay within the old size may be in use.
    struct stat after;
    if (::fstat(fd_, &after) == 0 && after.st_size > before.st_size &&
        ::ftruncate(fd_, before.st_size) != 0) {
        // Then the file stays longer, which harms nobody.
    }
    if (error == EOPNOTSUPP) {
        return MakeError(ErrorKind::kFailed,
                         fmt::format("the file system of {} cannot reserve space (fallocate); put "
                                     "the data file on ext4, XFS, btrfs or tmpfs",
                                     path_));
    }
    return SystemError(error, fmt::format("cannot extend {}", path_));
}

Status DataSpace::Extend(uint64_t end) {
    if (device_bytes_ != 0) return Status();
    struct stat about;
    if (::fstat(fd_, &about) != 0) return SystemError(errno, fmt::format("cannot stat {}", path_));
    if (static_cast<uint64_t>(about.st_size) >= end) return Status();
    if (::ftruncate(fd_, static_cast<off_t>(end)) == 0) return Status();
    return SystemError(errno, fmt::format("cannot extend {}", path_));
}

void DataSpace::Discard(uint64_t offset, uint64_t length) {
    if (device_bytes_ == 0) {
        const int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
        const int result =
            ::fallocate(fd_, mode, static_cast<off_t>(offset), static_cast<off_t>(length));
        (void)result;  // a hint
        return;
    }
    uint64_t range[2] = {offset, length};
    const int result = ::ioctl(fd_, BLKDISCARD, range);
    (void)result;  // a hint
}

uint64_t DataSpace::Capacity(uint64_t provisioned) {
    if (device_bytes_ != 0) return device_bytes_ / kBlockBytes * kBlockBytes;
    struct statvfs system;
    struct stat about;
    if (::fstatvfs(fd_, &system) != 0 || ::fstat(fd_, &about) != 0) return provisioned;
    // What was discarded since is among the spare space.
    const uint64_t held =
        std::min(provisioned, uint64_t{512} * static_cast<uint64_t>(about.st_blocks));
    return (held + Spare(system)) / kBlockBytes * kBlockBytes;
}

}  // namespace varve::cow
