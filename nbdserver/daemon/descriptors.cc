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
    const uint64_t store = MetadataTables(limit) + cow::kDescriptorsBesideTables;
    DescriptorShares shares;
    shares.admin_connections =
        std::min(asked.admin_connections, std::max(limit / 8, kAdminConnectionsLeast));
    const uint64_t taken = open + store + kSpare + shares.admin_connections;
    if (limit < taken + std::min(asked.connections, kConnectionsLeast)) {
        return MakeError(ErrorKind::kFailed,
                         fmt::format("{} files may be open, which is not enough for the metadata, "
                                     "the threads and some clients; raise the limit (LimitNOFILE=, "
                                     "ulimit -n) to {} or more, or lower --threads",
                                     limit, 2 * (taken + kConnectionsLeast)));
    }
    shares.connections = std::min(asked.connections, limit - taken);
    return shares;
}

}  // namespace varve::nbdserver
