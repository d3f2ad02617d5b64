// PoolDirectory: a pool as it lies on the file system. Makes a new one, locks it against a second
// server, opens its metadata and its data file, and makes sure that the two belong together.
// Not the engine: it knows nothing of disks; Pool::Open() goes on from here.
//
//   DIR/lock     flock'ed while a server has the pool; holds its process id
//   DIR/meta/    RocksDB; rows say whose data it is of, where these are, and of which time
//   DIR/data     the data file, unless it is elsewhere; begins with a superblock (superblock.h)
// A pool exists once DIR/meta does: pool_creation.h. docs/design/pool-directory.md has the reasons.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "base/result.h"
#include "cow/format/superblock.h"
#include "cow/pool/pool_creation.h"
#include "cow/space/data_space.h"
#include "cow/store/files.h"
#include "cow/store/stores.h"

namespace varve::cow {

struct PoolDirectoryOptions {
    std::string path;
    /// Data file or block device. Empty: DIR/data for a new pool, else what the pool remembers.
    /// For a pool that exists: its data file has moved here.
    std::string data;
    bool create = true;  // an absent or empty directory becomes a new pool
    bool direct = true;  // open the data file with O_DIRECT
    uint64_t metadata_cache_bytes = 32 << 20;
    unsigned metadata_files_max = 1024;  // see RocksOptions::open_files_max
    /// How long to wait for what a server that has ended left under way on the data file.
    uint64_t lock_wait_ms = 5000;
    /// Opens data and metadata of different times; disks may show wrong data then.
    bool force_epoch = false;
};

class PoolDirectory {
  public:
    /// Blocks. kBusy if another process has the pool or its data file (with its process id);
    /// kNotFound for a missing pool or data file; kExists if the directory or the data file holds
    /// something else; kInvalid for another version, for a data file of another pool, and where
    /// O_DIRECT is not supported; kDamaged, also for a data file whose end is missing or that is of
    /// another time than the metadata; kIo; kNoSpace.
    static Result<std::unique_ptr<PoolDirectory>> Open(const PoolDirectoryOptions& options);

    /// Closes everything and gives the lock up; begins another epoch first if BeginEpoch() did.
    /// REQUIRES: nobody uses what it handed out.
    ~PoolDirectory();

    /// Begins an epoch: no copy of one half from before fits the other from now on. To be called
    /// before the first change of data. Blocks; afterwards the pool must be closed if it fails.
    Status BeginEpoch();

    MetadataStore& metadata() { return *metadata_; }
    SpaceStore& space() { return *space_; }
    int data_fd() const { return data_.fd(); }

    const std::string& path() const { return path_; }  // absolute
    const std::string& data_path() const { return data_path_; }
    const Uuid& uuid() const { return uuid_; }
    bool created() const { return created_; }  // by this Open()

  private:
    PoolDirectory() = default;

    Status Lock();
    Status Create(const PoolDirectoryOptions& options);
    Status OpenMetadata(const PoolDirectoryOptions& options);
    Status OpenData(const PoolDirectoryOptions& options);
    Status OpenDataFile(const PoolDirectoryOptions& options);
    Error CannotOpen(Errno error, bool direct) const;
    Status CheckSuperblock(const PoolDirectoryOptions& options);
    Status CheckDataEnd() const;
    Status RememberData();

    std::string path_;
    std::string data_path_;
    std::string remembered_;  // data path as the pool knows it; empty: DIR/data
    Uuid uuid_{};
    Superblock superblock_;
    bool created_ = false;
    bool in_epoch_ = false;  // of its own: another is to begin at the end
    File lock_;              // before the others: released after them
    File data_;
    File plain_;  // the same, through the page cache, for the superblock
    std::unique_ptr<MetadataStore> metadata_;
    std::unique_ptr<DataSpace> space_;
};

}  // namespace varve::cow
