#include "base/processors.h"

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <thread>

namespace varve {
namespace {

namespace fs = std::filesystem;

constexpr int kProcessorsMax = 1 << 16;

unsigned AllowedByAffinity() {
    for (int most = CPU_SETSIZE; most <= kProcessorsMax; most *= 2) {
        cpu_set_t* set = CPU_ALLOC(most);
        const size_t size = CPU_ALLOC_SIZE(most);
        const bool fits = ::sched_getaffinity(0, size, set) == 0;
        const int count = fits ? CPU_COUNT_S(size, set) : 0;
        CPU_FREE(set);
        if (count > 0) return static_cast<unsigned>(count);
    }
    return std::max(1U, std::thread::hardware_concurrency());
}

std::optional<int64_t> NumberIn(const fs::path& file) {
    std::ifstream in(file);
    int64_t number = 0;
    if (in >> number) return number;
    return std::nullopt;
}

/// Processors that `quota` of each `period` amounts to; nothing if that is no limit.
std::optional<unsigned> Processors(int64_t quota, int64_t period) {
    if (quota <= 0 || period <= 0) return std::nullopt;
    const int64_t whole = std::min<int64_t>(quota / period, kProcessorsMax);
    return static_cast<unsigned>(whole + (quota % period != 0 ? 1 : 0));
}

/// Of a group's directory, in either version.
std::optional<unsigned> QuotaOf(const fs::path& group) {
    std::ifstream in(group / "cpu.max");
    int64_t quota = 0, period = 0;
    if (in >> quota >> period) return Processors(quota, period);
    const std::optional<int64_t> old_quota = NumberIn(group / "cpu.cfs_quota_us");
    const std::optional<int64_t> old_period = NumberIn(group / "cpu.cfs_period_us");
    if (!old_quota || !old_period) return std::nullopt;
    return Processors(*old_quota, *old_period);
}

/// The least quota of `group` and those above it. In a container the name may be one that is not
/// seen there: then what is mounted counts.
unsigned LeastQuota(const fs::path& mounted, fs::path group, unsigned most) {
    for (;;) {
        most = std::min(most, QuotaOf(mounted / group).value_or(most));
        if (group.empty()) return most;
        group = group.parent_path();
    }
}

bool IsAmong(const std::string& name, const std::string& names) {
    std::istringstream in(names);
    for (std::string one; std::getline(in, one, ',');) {
        if (one == name) return true;
    }
    return false;
}

}  // namespace

unsigned AvailableProcessors(const std::string& root) {
    unsigned most = AllowedByAffinity();
    const fs::path mounted = root + "/sys/fs/cgroup";
    std::ifstream groups(root + "/proc/self/cgroup");
    for (std::string line; std::getline(groups, line);) {  // hierarchy:controllers:/group
        const size_t first = line.find(':');
        const size_t second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        const std::string controllers = line.substr(first + 1, second - first - 1);
        const fs::path group = fs::path(line.substr(second + 1)).relative_path();
        if (controllers.empty()) {
            most = LeastQuota(mounted, group, most);
            most = LeastQuota(mounted / "unified", group, most);
        } else if (IsAmong("cpu", controllers)) {
            most = LeastQuota(mounted / controllers, group, most);
            most = LeastQuota(mounted / "cpu", group, most);
        }
    }
    return std::max(1U, most);
}

}  // namespace varve
