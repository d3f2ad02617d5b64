// Many disks in one pool, and many lanes: what they share must not depend on which disks they are.
#include <fmt/format.h>

#include <map>

#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kBlockBytes;

class ManyTest : public EngineTest {
  protected:
    ManyTest() { lanes = 6; }

    static std::string Name(uint64_t i) { return fmt::format("d{}", i); }
    void Create(uint64_t disks, uint64_t size = kMiB) {
        for (uint64_t i = 0; i < disks; ++i) Ok(pool().CreateDisk(Name(i), size));
    }
    /// How many of the disks from `begin` to `end`, by `step`, each lane has.
    std::map<Executor*, uint64_t> OnLanes(uint64_t begin, uint64_t end, uint64_t step = 1) {
        std::map<Executor*, uint64_t> counts;
        for (uint64_t i = begin; i < end; i += step) ++counts[&Volume(Name(i)).executor()];
        return counts;
    }
    void ExpectEqual(const std::map<Executor*, uint64_t>& counts, uint64_t each) {
        EXPECT_EQ(counts.size(), lanes);
        for (const auto& [lane, count] : counts) EXPECT_EQ(count, each);
    }
};

TEST_F(ManyTest, DisksFallOnAllLanesEqually) {
    Create(24);
    ExpectEqual(OnLanes(0, 24), 4);
    Stop();
    Start();
    ExpectEqual(OnLanes(0, 24), 4);
    // Those that are made go where some were deleted.
    Executor* const lane = &Volume(Name(0)).executor();
    for (uint64_t i = 0; i < 24; ++i) {
        if (&Volume(Name(i)).executor() != lane) continue;
        Close(Name(i));
        Ok(pool().DeleteDisk(Name(i), false, false));
        Ok(pool().CreateDisk(Name(i), kMiB));
    }
    ExpectEqual(OnLanes(0, 24), 4);
}

TEST_F(ManyTest, SnapshotsLiveWhereTheirDiskDoes) {
    Create(12);
    for (uint64_t i = 0; i < 12; ++i) {
        ASSERT_EQ(0, Write(Name(i), 0, 4096, 'a'));
        const std::string snapshot = Name(i) + "@s";
        std::vector<std::string> names{snapshot};
        Ok(pool().CreateSnapshots(std::move(names)));
        EXPECT_EQ(&Volume(snapshot).executor(), &Volume(Name(i)).executor());
        Expect(snapshot, 0, 4096, 'a');
    }
}

}  // namespace
}  // namespace varve
