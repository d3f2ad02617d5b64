// How many data threads there are by default: files as the kernel shows them, and real affinity.
#include "base/processors.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>

namespace varve {
namespace {

namespace fs = std::filesystem;

class ProcessorsTest : public testing::Test {
  protected:
    ProcessorsTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-processors-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
    }
    ~ProcessorsTest() override { fs::remove_all(root_); }

    void File(const std::string& path, const std::string& content) {
        fs::create_directories((root_ / path).parent_path());
        std::ofstream(root_ / path) << content;
    }
    unsigned Available() const { return AvailableProcessors(root_.string()); }

    fs::path root_;
    const unsigned all_ = AvailableProcessors("/nowhere");
};

TEST_F(ProcessorsTest, AQuotaCountsRoundedUp) {
    File("proc/self/cgroup", "0::/system.slice/varved.service\n");
    const std::string limit = "sys/fs/cgroup/system.slice/varved.service/cpu.max";
    File(limit, "50000 100000\n");
    EXPECT_EQ(Available(), 1U);
    File(limit, "150000 100000\n");
    EXPECT_EQ(Available(), std::min(all_, 2U));
    File(limit, "max 100000\n");
    EXPECT_EQ(Available(), all_);
    File(limit, "900000000 1000\n");
    EXPECT_EQ(Available(), all_);
}

TEST_F(ProcessorsTest, AQuotaOfAGroupAboveCounts) {
    File("proc/self/cgroup", "0::/a/b/c\n");
    File("sys/fs/cgroup/a/cpu.max", "100000 100000\n");
    File("sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n");
    EXPECT_EQ(Available(), 1U);
}

TEST_F(ProcessorsTest, InAContainerTheGroupsNameMayNotBeSeen) {
    File("proc/self/cgroup", "0::/docker/0123\n");
    File("sys/fs/cgroup/cpu.max", "100000 100000\n");
    EXPECT_EQ(Available(), 1U);
    File("proc/self/cgroup", "0::/../../elsewhere\n");
    EXPECT_EQ(Available(), 1U);
}

TEST_F(ProcessorsTest, TheFirstVersionOfGroupsCountsToo) {
    File("proc/self/cgroup", "11:memory:/m\n4:cpu,cpuacct:/lxc/x\n3:cpuset:/s\n0::/\n");
    File("sys/fs/cgroup/cpu,cpuacct/lxc/x/cpu.cfs_quota_us", "-1\n");
    File("sys/fs/cgroup/cpu,cpuacct/lxc/x/cpu.cfs_period_us", "100000\n");
    EXPECT_EQ(Available(), all_);
    File("sys/fs/cgroup/cpu,cpuacct/lxc/x/cpu.cfs_quota_us", "80000\n");
    EXPECT_EQ(Available(), 1U);
    File("proc/self/cgroup", "11:memory:/lxc/x\n3:cpuset:/lxc/x\n");  // not those of processors
    EXPECT_EQ(Available(), all_);
}

TEST_F(ProcessorsTest, WhatMakesNoSenseIsNoLimit) {
    for (const std::string line : {"", "::", "0:", "0::/x", "nonsense"}) {
        File("proc/self/cgroup", line + "\n");
        for (const std::string quota : {"", "0 0", "-5 100000", "x y", "100000"}) {
            File("sys/fs/cgroup/x/cpu.max", quota);
            EXPECT_EQ(Available(), all_) << line << " with " << quota;
        }
    }
}

TEST_F(ProcessorsTest, AffinityCounts) {
    cpu_set_t before, one;
    ASSERT_EQ(0, ::sched_getaffinity(0, sizeof before, &before));
    EXPECT_EQ(all_, static_cast<unsigned>(CPU_COUNT(&before)));
    CPU_ZERO(&one);
    for (int i = 0; i < CPU_SETSIZE && CPU_COUNT(&one) == 0; ++i) {
        if (CPU_ISSET(i, &before)) CPU_SET(i, &one);
    }
    ASSERT_EQ(0, ::sched_setaffinity(0, sizeof one, &one));
    EXPECT_EQ(1U, Available());
    ASSERT_EQ(0, ::sched_setaffinity(0, sizeof before, &before));
}

}  // namespace
}  // namespace varve
