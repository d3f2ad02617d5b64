// RocksStore: the engine's MetadataStore over a RocksDB directory.
// Not a door to RocksDB: its headers and options stay in rocks_store.cc.
#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <string>

#include "base/result.h"
#include "cow/store/stores.h"

namespace rocksdb {
class Env;
}

namespace varve::cow {

inline constexpr unsigned kDescriptorsBesideTables = 32;

struct RocksOptions {
    bool create = false;              // an absent or empty directory becomes a new store
    uint64_t cache_bytes = 32 << 20;  // blocks of tables kept decoded
    /// One memtable; at most three exist. The logs take as much again on the file system, and
    /// compaction up to eight times as much for a while.
    uint64_t buffer_bytes = 16 << 20;
    /// Tables kept open, a descriptor each; some kDescriptorsBesideTables more are for logs, lists
    /// and what compaction writes. At least 20.
    unsigned open_files_max = 1024;
    /// The store keeps room for itself and counts what is left for rows: RocksReserve(buffer_bytes)
    /// in a file of its own, and some that is only not given to rows.
    bool reserve = false;
    /// Where files are written; null: the system. Tests cut its power. It must outlive the store.
    rocksdb::Env* env = nullptr;
    /// Allocates the room it keeps, as Ballast::Allocate does; null: the system.
    std::function<int(int, off_t, off_t)> allocate;
};

/// Bytes of the ballast, the file that holds room for a store with such memtables.
constexpr uint64_t RocksReserve(uint64_t buffer_bytes) {
    return 8 * buffer_bytes;
}

/// Opens the store in directory `path`; its parent must exist. Blocks: replays the log, at most
/// some 50 MiB of it, and starts two background threads.
/// kNotFound if there is none and `create` is false; kDamaged if a file breaks RocksDB's format or
/// a committed record is gone; kIo, kNoSpace. The store's own Commit() refuses everything after
/// its first failure. Closing (the destructor) loses nothing and waits for no flush; views and
/// cursors must be gone by then.
Result<std::unique_ptr<MetadataStore>> OpenRocksStore(const std::string& path,
                                                      const RocksOptions& options);

}  // namespace varve::cow
