// Making a pool, so that a creation that was interrupted anywhere can be begun again, and so that
// nothing is taken over that this creation has not made.
// Not the opening of one: pool_directory.h.
//
//   DIR/creating   the superblock that the data file gets; durable before that file is touched
//   DIR/meta.new   the metadata; renamed to DIR/meta, which ends the creation, when all is durable
#pragma once

#include <cstdint>
#include <string>

#include "base/result.h"
#include "cow/format/superblock.h"
#include "cow/store/files.h"

namespace varve::cow {

inline constexpr char kDirectoryKey[] = "Upool";

/// The row kDirectoryKey: whose metadata these are, and where the data file is.
struct DirectoryRow {
    Uuid uuid{};
    std::string data_path;  // empty: DIR/data
};
std::string EncodeDirectoryRow(const DirectoryRow& row);
/// kInvalid for another version, kDamaged. `path`, the pool's, is for the message.
Result<DirectoryRow> DecodeDirectoryRow(const std::string& bytes, const std::string& path);

enum class Content { kAbsent, kEmpty, kPool, kForeign };
/// What lies at `path`. A directory with what an interrupted creation leaves is empty.
Content Inspect(const std::string& path);

struct PoolCreation {
    std::string path;           // of the pool: absolute, and locked
    std::string elsewhere;      // path of the data file; empty: DIR/data
    uint64_t buffer_bytes = 0;  // of the metadata store
    uint64_t lock_wait_ms = 0;  // for the data file
};

/// Blocks. kExists if the data file holds something; kBusy; kIo; kNoSpace.
Status CreatePool(const PoolCreation& creation);

/// Removes what CreatePool() left if it was interrupted at its very end.
Status TidyCreation(const std::string& path);

/// Waits up to `wait_ms` until no other open file has a lock on `data`, whose path is `path`, and
/// takes a shared one: all that carries transfers has one, which lasts until the latest of them has
/// ended, though its process may not. kBusy; kIo.
Status LockData(const File& data, const std::string& path, uint64_t wait_ms);

}  // namespace varve::cow
