// The engine when the metadata store is full: what grows is refused, the rest goes on.
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::Health;
using cow::kChunkBytes;

class MetadataTest : public EngineTest {
  protected:
    void SetUp() override {
        media.metadata_capacity = media.metadata_spare + (24 << 10);
        Start();
    }
    void TearDown() override {
        EXPECT_EQ("", media.broken);
        Stop();
    }
    cow::PoolStatus Figures() { return machine->Do(pool().GetStatus()).value(); }
    void Measure() {
        bool done = false;
        Spawn(MeasureTask(&done));
        ASSERT_TRUE(scheduler.RunUntil([&] { return done; }));
    }
    Task<void> MeasureTask(bool* done) {
        co_await Hop(machine->home());
        co_await pool().CommitDirty();
        *done = true;
    }
    Errno Trim(const std::string& name, uint64_t offset, uint64_t length) {
        cow::Volume& v = Volume(name);
        return Await(scheduler, v.executor(), v.Trim(offset, length));
    }
    Errno Zeroes(const std::string& name, uint64_t offset, uint64_t length) {
        cow::Volume& v = Volume(name);
        return Await(scheduler, v.executor(), v.WriteZeroes(offset, length, false));
    }
    static Task<void> WriteTask(cow::Volume* v, cow::Requester* requester, Errno* result) {
        co_await Hop(v->executor());
        const std::vector<std::byte> data(4096);
        *result = co_await v->Write(48 * kMiB, data, requester);
    }
    static Task<void> TrimTask(cow::Volume* v, cow::Requester* requester, Errno* result) {
        co_await Hop(v->executor());
        *result = co_await v->Trim(0, 4096, requester);
    }
    /// Every second block, with a snapshot after each chunk, until it is refused. Returns how many
    /// snapshots there are.
    unsigned FillUp() {
        Ok(pool().CreateDisk("d", 64 * kMiB));
        for (unsigned snapshots = 0;; ++snapshots) {
            const uint64_t chunk = snapshots % 8 * kChunkBytes;
            for (uint64_t at = 0; at < kChunkBytes; at += 8192) {
                const Errno error = Write("d", chunk + at, 4096, 'a');
                if (error == ENOSPC) return snapshots;
                EXPECT_EQ(0, error);
            }
            EXPECT_EQ(0, Flush("d"));
            const Status s =
                machine->Do(pool().CreateSnapshots({"d@s" + std::to_string(snapshots)}));
            if (!s.ok()) {
                EXPECT_EQ(ErrorKind::kNoSpace, s.error().kind);
                EXPECT_EQ(ENOSPC, Write("d", 32 * kMiB, 4096, 'a'));
                return snapshots;
            }
        }
    }
};

TEST_F(MetadataTest, GrowthIsRefusedAndTheRestGoesOn) {
    const unsigned snapshots = FillUp();
    ASSERT_LE(4u, snapshots);
    EXPECT_EQ(ErrorKind::kNoSpace, Fails(pool().CreateSnapshots({"d@no"})));
    EXPECT_EQ(ErrorKind::kNoSpace, Fails(pool().CreateDisk("e", kMiB)));
    EXPECT_EQ(ErrorKind::kNoSpace, Fails(pool().CloneSnapshot("d@s0", "e")));
    EXPECT_EQ(ErrorKind::kNoSpace,
              Fails(pool().RestoreSnapshot("d@s0", std::nullopt, true, false)));
    EXPECT_EQ(ENOSPC, Write("d", 48 * kMiB, 4096, 'b'));
    EXPECT_EQ(ENOSPC, Trim("d", 0, 4096));  // a hole makes the row longer
    EXPECT_EQ(ENOSPC, Zeroes("d", 0, 4096));
    EXPECT_EQ(0, Trim("d", 0, kChunkBytes));
    EXPECT_EQ(0, Flush("d"));
    Expect("d", 0, kChunkBytes, 0);
    const cow::PoolStatus status = Figures();
    EXPECT_EQ(Health::kFull, status.health);
    ASSERT_EQ(1u, status.warnings.size());
    EXPECT_NE(std::string::npos, status.warnings[0].find("metadata is full"));
    EXPECT_EQ(0u, status.free);
    EXPECT_EQ(0u, status.metadata_free);
    EXPECT_FALSE(status.failed);
    CheckClean();
}

TEST_F(MetadataTest, ItOpensWhenFullAndDeletionsMakeRoom) {
    const unsigned snapshots = FillUp();
    Stop();
    Start();
    EXPECT_EQ(ENOSPC, Write("d", 48 * kMiB, 4096, 'b'));
    for (unsigned i = 0; i < snapshots; ++i) {
        Ok(pool().DeleteSnapshot("d@s" + std::to_string(i), false));
    }
    Reclaim();
    Measure();
    EXPECT_EQ(Health::kOk, Figures().health);
    EXPECT_EQ(0, Write("d", 48 * kMiB, 4096, 'b'));
    Ok(pool().CreateSnapshots({"d@again"}));
    Expect("d", 48 * kMiB, 4096, 'b');
}

TEST_F(MetadataTest, WhatIsFilledForAMomentByOthersIsNoFailure) {
    Ok(pool().CreateDisk("d", 64 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    const uint64_t before = media.metadata_capacity;
    media.metadata_capacity = media.metadata_spare + 1;
    EXPECT_EQ(ENOSPC, Write("d", kMiB, 4096, 'b'));
    EXPECT_EQ(0, Write("d", 0, 4096, 'c'));  // its own block
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(Health::kFull, Figures().health);
    EXPECT_EQ(ErrorKind::kNoSpace, machine->Do(pool().CreateDisk("e", kMiB)).error().kind);
    media.metadata_capacity = before;
    Ok(pool().CreateDisk("e", kMiB));  // at once: a command that would be refused looks again
    Measure();
    EXPECT_EQ(0, Write("d", kMiB, 4096, 'b'));
    EXPECT_EQ(Health::kOk, Figures().health);
    Expect("d", 0, 4096, 'c');
}

// Deletions may take hours: who waits for what they give back is let go when his client is gone.
TEST_F(MetadataTest, WhoWaitsForRoomMayLeave) {
    const unsigned snapshots = FillUp();
    Stop();
    media.metadata_capacity = media.metadata_spare + 1;
    Start({.reclaim_step_chunks = 1});
    cow::Volume& v = Volume("d");
    for (unsigned i = 0; i < snapshots; ++i) {
        Ok(pool().DeleteSnapshot("d@s" + std::to_string(i), false));
    }
    cow::Requester requester;
    Errno write = -1, trim = -1;
    Spawn(WriteTask(&v, &requester, &write));
    Spawn(TrimTask(&v, &requester, &trim));
    for (unsigned step = 0; step < 20; ++step) scheduler.Step();
    ASSERT_EQ(-1, write);
    ASSERT_EQ(-1, trim);
    requester.Leave();
    for (unsigned step = 0; step < 20; ++step) scheduler.Step();
    EXPECT_EQ(ECANCELED, write);
    EXPECT_EQ(ECANCELED, trim);
    EXPECT_LT(0u, Figures().reclaim_pending);
    Reclaim();
    EXPECT_EQ(ENOSPC, Write("d", 48 * kMiB, 4096, 'b'));
}

// Sums wait for room, and are made when there is some.
TEST_F(MetadataTest, ChecksumsWaitForRoom) {
    const uint64_t before = media.metadata_capacity;
    Ok(pool().CreateDisk("d", 64 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    media.metadata_capacity = media.metadata_spare + 1;
    scheduler.RunAll();
    const uint64_t pending = Figures().checksums_pending;
    media.metadata_capacity = before;
    Measure();
    scheduler.RunAll();
    EXPECT_EQ(0u, Figures().checksums_pending);
    EXPECT_GE(1u, pending);
}

TEST_F(MetadataTest, AFullDiskCanBeShrunkAndDeleted) {
    FillUp();
    Close("d");
    Ok(pool().ResizeDisk("d", 4096 * 3, true, false));
    Ok(pool().DeleteDisk("d", true, false));
    Reclaim();
    Measure();
    Ok(pool().CreateDisk("e", kMiB));
}

}  // namespace
}  // namespace varve
