#include "nbdserver/daemon/descriptors.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <filesystem>
#include <string>

#include "cow/store/rocks_store.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kLimitMost = 1 << 20;  // where there is none
constexpr uint64_t kConnectionsLeast = 8;
constexpr uint64_t kSpare = 16;  // files that are open for a moment

uint64_t AdminConnections(uint64_t limit, uint64_t asked) {
    return std::min(asked, std::max(limit / 8, kAdminConnectionsLeast));
}

/// All that is not for NBD clients, where `limit` files may be open.
uint64_t Taken(uint64_t limit, uint64_t open, DescriptorShares asked) {
    const uint64_t store = MetadataTables(limit) + cow::kDescriptorsBesideTables;
    return open + store + kSpare + AdminConnections(limit, asked.admin_connections);
}

bool Suffices(uint64_t limit, uint64_t open, DescriptorShares asked) {
    return limit >= Taken(limit, open, asked) + std::min(asked.connections, kConnectionsLeast);
}

/// From which on all suffice. The shares grow with the limit: each eighth takes two with it.
uint64_t LeastLimit(uint64_t open, DescriptorShares asked) {
    uint64_t limit = open;
    while (!Suffices(limit, open, asked) || !Suffices(limit + 1, open, asked)) ++limit;
    return limit;
}

}  // namespace

uint64_t RaiseDescriptorLimit() {
    rlimit limit{};
    if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return kLimitMost;
    const rlim_t before = limit.rlim_cur;
    limit.rlim_cur = limit.rlim_max;
    if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) limit.rlim_cur = before;
    return std::min<uint64_t>(limit.rlim_cur, kLimitMost);
}

unsigned MetadataTables(uint64_t limit) {
    return static_cast<unsigned>(std::clamp<uint64_t>(limit / 4, 32, 1024));
}

uint64_t CountDescriptors() {
    namespace fs = std::filesystem;
    uint64_t count = 0;
    std::error_code error;
    for (const fs::directory_entry& entry : fs::directory_iterator("/proc/self/fd", error)) {
        const fs::path target = fs::read_symlink(entry.path(), error);
        count += !error && target.extension() != ".sst";
    }
    return count;
}

Result<DescriptorShares> ShareDescriptors(uint64_t limit, uint64_t open, DescriptorShares asked) {
    if (!Suffices(limit, open, asked)) {
        return MakeError(ErrorKind::kFailed,
                         fmt::format("{} files may be open, which is not enough for the metadata, "
                                     "the threads and some clients; raise the limit (LimitNOFILE=, "
                                     "ulimit -n) to {} or more, or lower --threads",
                                     limit, LeastLimit(open, asked)));
    }
    DescriptorShares shares;
    shares.admin_connections = AdminConnections(limit, asked.admin_connections);
    shares.connections = std::min(asked.connections, limit - Taken(limit, open, asked));
    return shares;
}

}  // namespace varve::nbdserver
