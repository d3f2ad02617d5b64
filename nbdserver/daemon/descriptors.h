// Who may have how many of the process's file descriptors. The metadata come first: a RocksDB that
// cannot open a file fails, and the pool with it; a client that is refused comes again.
// Not the accepting: server.h and admin/service.h keep to their shares.
#pragma once

#include <cstdint>

#include "base/result.h"

namespace varve::nbdserver {

/// Raises the soft limit on open files to the hard one. What it is then, at most 2^20.
uint64_t RaiseDescriptorLimit();

/// Tables that the metadata may keep open.
unsigned MetadataTables(uint64_t limit);

/// How many descriptors are open now, the metadata's tables aside.
uint64_t CountDescriptors();

struct DescriptorShares {
    uint64_t connections = 0;        // of NBD clients, negotiating or attached
    uint64_t admin_connections = 0;  // never less than kAdminConnectionsLeast, unless asked for
};
inline constexpr uint64_t kAdminConnectionsLeast = 4;

/// What is left of `limit` for those who connect, at most `asked`, when `open` descriptors are
/// taken for good and the metadata has its MetadataTables(). kFailed, saying which limit would do,
/// if that is nothing.
Result<DescriptorShares> ShareDescriptors(uint64_t limit, uint64_t open, DescriptorShares asked);

}  // namespace varve::nbdserver
