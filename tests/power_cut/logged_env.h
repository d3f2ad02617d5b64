// An Env for RocksDB whose file system is the real one, except that a FileLog hears of everything.
#pragma once

#include <rocksdb/env.h>

#include <memory>

#include "tests/power_cut/file_log.h"

namespace varve::power_cut {

/// All that is done to files goes to `log`, which must outlive it; they must lie in one directory.
/// Syncs are logged, but not done: this process lives on. With `lying`, they are not even logged.
std::unique_ptr<rocksdb::Env> NewLoggedEnv(FileLog& log, bool lying = false);

}  // namespace varve::power_cut
