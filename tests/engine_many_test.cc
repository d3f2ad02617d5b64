// Many disks in one pool, and many lanes: what they share must not depend on which disks they are.
#include <fmt/format.h>

#include <map>

#include "cow/volume/chunk_cache.h"
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
    // Regions of 16 MiB: four of the ring, two ahead of demand.
    EXPECT_LE(media.held.size(), 10U);
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
    const uint64_t ring = media.capacity() / 16 / kBlockBytes;
    const uint64_t all = media.capacity() / kBlockBytes - ring - 1;  // the superblock
    EXPECT_EQ(blocks, all);
    EXPECT_EQ(Used(), all * kBlockBytes);
}

TEST_F(ManyTest, StoppingStoresWhatManyDisksHaveChangedTogether) {
    constexpr uint64_t kWritten = 60;
    Create(kWritten);
    for (uint64_t i = 0; i < kWritten; ++i) EXPECT_EQ(0, Write(Name(i), 0, 4096, 'x'));
    uint64_t commits = 0;
    media.probe = [&](Call call) {
        commits += call == Call::kCommit;
        return Mishap::kNone;
    };
    Stop();
    media.probe = nullptr;
    EXPECT_GT(commits, 0u);
    EXPECT_LT(commits, kWritten / 2);
    Start();
    for (uint64_t i = 0; i < kWritten; ++i) Expect(Name(i), 0, 4096, 'x');
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

class SharedCacheTest : public ManyTest {
  protected:
    void Restart(uint64_t cache) {
        Stop();
        cow::PoolOptions options;
        options.map_cache_bytes = cache;
        Start(options);
    }
    /// A disk with a block in each chunk, all in map rows.
    void Fill(const std::string& name, uint64_t chunks) {
        for (uint64_t i = 0; i < chunks; ++i) {
            ASSERT_EQ(0, Write(name, i * cow::kChunkBytes, 4096, 'a'));
        }
        (void)Used();
    }
    /// Lookups in the store while all of its chunks are read once.
    uint64_t Lookups(const std::string& name, uint64_t chunks) {
        const uint64_t before = lookups_;
        for (uint64_t i = 0; i < chunks; ++i) Expect(name, i * cow::kChunkBytes, 4096, 'a');
        return lookups_ - before;
    }
    void Count() {
        media.probe = [this](Call call) {
            if (call == Call::kLookup) ++lookups_;
            if (call == Call::kCommit) ++commits_;
            return Mishap::kNone;
        };
    }
    uint64_t lookups_ = 0, commits_ = 0;
};

TEST(ChunkCacheTest, ACallLooksAtFewChunksHoweverManyThereAre) {
    cow::CacheBudget budget(1 << 20, 1);
    cow::ChunkCache cache(budget);
    std::vector<cow::Chunk> chunks(100'000);
    for (cow::Chunk& chunk : chunks) {
        chunk.pins = 1;
        cache.Add(chunk);
    }
    ASSERT_GT(cache.used(), budget.total());
    for (unsigned i = 0; i < 10; ++i) EXPECT_LE(cache.Shrink(), 256u);
    for (cow::Chunk& chunk : chunks) cache.Remove(chunk);
}

TEST_F(SharedCacheTest, ALaneHasAllThatOthersDoNotNeed) {
    Restart(128 << 10);
    Create(1, 1024 * kMiB);
    constexpr uint64_t kChunks = 300;  // 70 KB, which is four equal shares
    Fill(Name(0), kChunks);
    Count();
    (void)Lookups(Name(0), kChunks);
    EXPECT_EQ(Lookups(Name(0), kChunks), 0U);
    media.probe = nullptr;
}

TEST_F(SharedCacheTest, WhatIdleLanesHoldGoesToThoseThatWork) {
    Restart(128 << 10);
    Create(2, 1024 * kMiB);
    constexpr uint64_t kChunks = 300;
    Fill(Name(0), kChunks);
    Fill(Name(1), kChunks);
    ASSERT_NE(&Volume(Name(0)).executor(), &Volume(Name(1)).executor());
    Count();
    for (uint64_t i = 0; i < 2; ++i) {  // one after the other, and back
        for (const uint64_t disk : {0, 1}) {
            uint64_t seconds = 0;
            while (Lookups(Name(disk), kChunks) > 0 && seconds < 20) {
                Commit();
                ++seconds;
            }
            EXPECT_LT(seconds, 20U) << Name(disk);
        }
    }
    media.probe = nullptr;
}

TEST_F(SharedCacheTest, ABusyLaneLeavesOthersTheirShare) {
    Restart(128 << 10);
    Create(2, 1024 * kMiB);
    constexpr uint64_t kMuch = 1000, kModest = 170;  // more than all of it; less than half
    Fill(Name(0), kMuch);
    Fill(Name(1), kModest);
    Count();
    uint64_t seconds = 0;
    for (bool warm = false; !warm && seconds < 60; ++seconds) {
        EXPECT_GT(Lookups(Name(0), kMuch), 0U);
        warm = Lookups(Name(1), kModest) == 0;
        Commit();
        const auto status = machine->Do(pool().GetStatus()).value();
        EXPECT_LE(status.map_cache_used, status.map_cache_limit + (16 << 10));
    }
    EXPECT_LT(seconds, 60U);
    media.probe = nullptr;
}

TEST_F(SharedCacheTest, ChangesOfOneLaneMayFillTheRoomOfAll) {
    Restart(12 << 20);
    Create(6, 1024 * kMiB);
    // 576 may wait for a fold, of all lanes together; one has them all.
    Count();
    const uint64_t before = commits_;
    for (uint64_t i = 0; i < 500; ++i) {
        ASSERT_EQ(0, Write(Name(0), i * cow::kChunkBytes, 4096, 'a'));
    }
    scheduler.RunAll();
    EXPECT_EQ(commits_, before);
    for (uint64_t i = 500; i < 700; ++i) {
        ASSERT_EQ(0, Write(Name(0), i * cow::kChunkBytes, 4096, 'a'));
    }
    scheduler.RunAll();
    EXPECT_GT(commits_, before);
    media.probe = nullptr;
}

}  // namespace
}  // namespace varve
