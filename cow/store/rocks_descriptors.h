// Descriptors that are kept for RocksDB, so that clients cannot take the last one from it: a table
// that it cannot open when it has been written ends all commits until a restart.
#pragma once

#include <rocksdb/env.h>

#include <cstddef>
#include <memory>

namespace varve::cow {

/// A memtable and a compaction that end together open a file each, and a log and a directory.
inline constexpr size_t kSpareDescriptors = 8;

/// An Env on `base`'s file system, which must outlive it. It keeps `spare` descriptors; where the
/// system has none left to open a file (EMFILE, ENFILE), one of them is given up and the file is
/// opened again. They are taken back when files are opened later and there are some again.
std::unique_ptr<rocksdb::Env> NewSpareDescriptorsEnv(rocksdb::Env& base,
                                                     size_t spare = kSpareDescriptors);

}  // namespace varve::cow
