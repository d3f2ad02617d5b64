// DataSpace: the engine's SpaceStore over the data file, which grows by fallocate, or over a block
// device, which does not.
// Not the data path: nothing is read or written here.
#pragma once

#include <sys/statvfs.h>

#include <cstdint>
#include <string>

#include "base/result.h"
#include "cow/store/stores.h"

namespace varve::cow {

class DataSpace : public SpaceStore {
  public:
    /// `fd`, the data file at `path`, stays the caller's and open. `metadata`: the directory of the
    /// metadata store. Of its file system and of the data file's, `reserve_max` bytes or 5 %,
    /// whichever is less, are left free, so that commits and deletions still work when data has
    /// filled the rest; `reserve_min` at least if both share one.
    static Result<DataSpace> Make(int fd, std::string path, std::string metadata,
                                  uint64_t reserve_max = 256 << 20, uint64_t reserve_min = 0);

    Status Provision(uint64_t offset, uint64_t length) override;
    Status Extend(uint64_t end) override;
    void Discard(uint64_t offset, uint64_t length) override;
    uint64_t Capacity(uint64_t provisioned) override;

    /// Bytes of the block device; 0 for a file.
    uint64_t device_bytes() const { return device_bytes_; }

  private:
    DataSpace() = default;
    uint64_t Spare(const struct statvfs& system) const;

    int fd_ = -1;
    std::string path_;
    std::string metadata_;
    uint64_t reserve_max_ = 0, reserve_min_ = 0;
    uint64_t device_bytes_ = 0;
};

}  // namespace varve::cow
