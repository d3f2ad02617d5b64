// Ballast: a file that holds room for a RocksDB store on its file system, to be given up when
// others have filled that. docs/design/metadata_space.md says how much of it is for what.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "cow/store/files.h"

namespace rocksdb {
class DB;
class Env;
class Status;
class WriteBatch;
struct WriteOptions;
}  // namespace rocksdb

namespace varve::cow {

/// Any thread. Calls block shortly.
class Ballast {
  public:
    /// Allocates a part of a file (descriptor, offset, bytes) as fallocate(2) does; 0 or an errno.
    using Allocate = std::function<int(int, off_t, off_t)>;

    /// Of `bytes`, in the file `path`, which may be there from before. Without room or without
    /// fallocate(2) it is smaller than that, or empty: see Refill(). 0: none, and no file.
    /// `allocate`: null for the system's.
    Ballast(std::string path, uint64_t bytes, Allocate allocate = nullptr);

    /// Gives up `bytes`, or what there is above `keep`. False if that is nothing.
    bool Give(uint64_t bytes, uint64_t keep);
    /// Takes back what was given up, or what of it there is room for, if `free`, the file system's
    /// free bytes, is twice as much.
    void Refill(uint64_t free);

    uint64_t bytes() const { return bytes_; }  // as wanted
    uint64_t held() const { return held_.load(std::memory_order_relaxed); }

    /// The last Refill() that tried got less than it wanted for lack of room, whatever `free` said:
    /// a quota counts more than the file system does.
    bool refused() const { return refused_.load(std::memory_order_relaxed); }

    /// Bytes of the tables that compactions are writing now.
    std::atomic<uint64_t> compacting = 0;

  private:
    const std::string path_;
    const uint64_t bytes_;
    const Allocate allocate_;
    std::mutex mutex_;
    File file_;
    std::atomic<uint64_t> held_ = 0;
    std::atomic<bool> refused_ = false;
};

/// An Env over `base` whose files grow at the cost of `ballast` where the file system is full, or
/// where a quota is used up, of which it says that it is full.
/// Compactions, which can wait, take the upper half only. Both arguments must outlive it.
std::unique_ptr<rocksdb::Env> NewBallastEnv(rocksdb::Env& base, Ballast& ballast);

/// db.Write(), which does not wait for a memtable while an error of the background stands, such as
/// a compaction for which there is no room: it refuses the write before anything of it is done.
/// This waits, kMemtableMsMax at most. `batch` may be used again after a refusal.
rocksdb::Status WriteBesideErrors(rocksdb::DB& db, const rocksdb::WriteOptions& options,
                                  rocksdb::WriteBatch& batch);
inline constexpr int64_t kMemtableMsMax = 10'000;

}  // namespace varve::cow
