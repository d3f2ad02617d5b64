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
    ManyTest() : EngineTest(6, 1024 * kMiB) {}

    static std::string Name(uint64_t i) { return fmt::format("d{}", i); }
    void Create(uint64_t disks, uint64_t size = kMiB) {
        for (uint64_t i = 0; i < disks; ++i) Ok(pool().CreateDisk(Name(i), size));
    }
    void Commit() {
        bool done = false;
        Spawn(CommitTask(&machine->home(), &pool(), &done));
        ASSERT_TRUE(scheduler.RunUntil([&] { return done; }));
    }
    static Task<void> CommitTask(Executor* home, cow::Pool* pool, bool* done) {
        co_await Hop(*home);
        co_await pool->CommitDirty();
        *done = true;
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

constexpr uint64_t kDisks = 1200;

TEST_F(ManyTest, DisksThatWroteLittleHoldLittle) {
    Create(kDisks);
    std::map<Call, uint64_t> calls;
    media.probe = [&calls](Call call) {
        ++calls[call];
        return Mishap::kNone;
    };
    for (uint64_t i = 0; i < kDisks; ++i) ASSERT_EQ(0, Write(Name(i), 0, 4096, 'a'));
    scheduler.RunAll();
    const auto status = machine->Do(pool().GetStatus()).value();
    EXPECT_EQ(status.used, kDisks * kBlockBytes);
    EXPECT_LE(status.leased, kDisks * 8 * kBlockBytes);
    EXPECT_LE(media.held.size(), 6U);  // regions of 16 MiB, two of them ahead of demand
    EXPECT_LE(calls[Call::kProvision], 6U);
    media.probe = nullptr;
}

TEST_F(ManyTest, ADiskThatWritesMuchAsksSeldom) {
    Create(1, 256 * kMiB);
    for (uint64_t i = 0; i < 16; ++i) ASSERT_EQ(0, Write(Name(0), i * kMiB, kMiB, 'w'));
    const auto warm = machine->Do(pool().GetStatus()).value();
    EXPECT_EQ(warm.used, 16 * kMiB);
    EXPECT_GE(warm.leased, 4 * kMiB);   // it is fetched ahead by now,
    EXPECT_LE(warm.leased, 32 * kMiB);  // not more than twice what was written
}

TEST_F(ManyTest, IdleLeasesComeBack) {
    Create(300, 4 * kMiB);
    for (uint64_t i = 0; i < 300; ++i) ASSERT_EQ(0, Write(Name(i), 0, kMiB, 'a'));
    scheduler.RunAll();
    EXPECT_GE(machine->Do(pool().GetStatus()).value().leased, 300U * 64 * kBlockBytes);
    for (int tick = 0; tick < 16; ++tick) {
        ASSERT_EQ(0, Write(Name(7), 2 * kMiB + static_cast<uint64_t>(tick) * 4096, 4096, 'b'));
        Commit();
    }
    // Disk 7 goes on.
    const uint64_t leased = machine->Do(pool().GetStatus()).value().leased;
    EXPECT_GT(leased, 0U);
    EXPECT_LE(leased, 16 * kMiB);
    for (uint64_t i = 0; i < 300; ++i) ASSERT_EQ(0, Write(Name(i), kMiB, 4096, 'c'));
    for (uint64_t i = 0; i < 300; ++i) Expect(Name(i), 0, kMiB, 'a');
}

// Each region is shared by many; when there is no other, what others hold is taken back, and in the
// end every block has been written.
TEST_F(ManyTest, ManySmallLeasesFillAPoolToItsLastBlock) {
    Create(64, 64 * kMiB);
    uint64_t blocks = 0;
    Errno error = 0;
    for (uint64_t i = 0; error == 0; ++i) {
        const uint64_t length = i < 10'000 ? 31 * kBlockBytes : kBlockBytes;
        error = Write(Name(i % 64), i / 64 * 32 * kBlockBytes, length, 'x');
        if (error == 0) blocks += length / kBlockBytes;
        if (error == ENOSPC && length > kBlockBytes) {
            error = 0;
            i = std::max<uint64_t>(i, 10'000);
        }
    }
    EXPECT_EQ(error, ENOSPC);
    const uint64_t all = media.capacity() / kBlockBytes - 1;  // the superblock
    EXPECT_EQ(blocks, all);
    EXPECT_EQ(Used(), all * kBlockBytes);
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
