// The engine's behaviour, case by case, on the simulated disk.
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kBlockBytes;
using cow::kChunkBytes;

TEST_F(EngineTest, ANewDiskReadsAsZerosAndUsesNothing) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    Expect("d", 0, kMiB, 0);
    EXPECT_EQ(0u, Used());
}

TEST_F(EngineTest, WritesOfAnyAlignmentAreRead) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 3 * kMiB, 'a'));
    EXPECT_EQ(0, Write("d", 4096, 4096, 'b'));
    EXPECT_EQ(0, Write("d", 10'000, 1, 'c'));
    EXPECT_EQ(0, Write("d", 20'001, 70'000, 'd'));
    EXPECT_EQ(0, Write("d", kChunkBytes - 512, 1024, 'e'));
    Expect("d", 0, 4096, 'a');
    Expect("d", 4096, 4096, 'b');
    Expect("d", 8192, 10'000 - 8192, 'a');
    Expect("d", 10'000, 1, 'c');
    Expect("d", 10'001, 10'000, 'a');
    Expect("d", 20'001, 70'000, 'd');
    Expect("d", kChunkBytes - 512, 1024, 'e');
    Expect("d", 3 * kMiB, kMiB, 0);
    EXPECT_EQ(3 * kMiB, Used());
}

TEST_F(EngineTest, APartOfAnUnwrittenBlockLeavesTheRestZero) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 5000, 100, 'x'));
    Expect("d", 4096, 5000 - 4096, 0);
    Expect("d", 5000, 100, 'x');
    Expect("d", 5100, 8192 - 5100, 0);
}

TEST_F(EngineTest, ASnapshotKeepsItsStateAndCostsOnlyWhatChanges) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_EQ(kMiB, Used());
    EXPECT_EQ(0u, Unique("d@s"));
    EXPECT_EQ(0, Write("d", 8192, 4096, 'b'));
    EXPECT_EQ(kMiB + 4096, Used());
    EXPECT_EQ(4096u, Unique("d@s"));
    Expect("d@s", 0, kMiB, 'a');
    Expect("d", 8192, 4096, 'b');
    Expect("d", 0, 8192, 'a');
}

TEST_F(EngineTest, DeletingInAnyOrderFreesExactlyWhatUniqueSays) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    for (const char fill : std::string("abcde")) {
        EXPECT_EQ(0, Write("d", static_cast<uint64_t>(fill - 'a') * 40960, 10 * 40960, fill));
        Ok(pool().CreateSnapshots({std::string("d@") + fill}));
    }
    EXPECT_EQ(0, Write("d", 0, 4096, 'z'));
    for (const char name : std::string("cabed")) {
        const std::string snapshot = std::string("d@") + name;
        const uint64_t unique = Unique(snapshot), before = Used();
        Ok(pool().DeleteSnapshot(snapshot, false));
        Reclaim();
        EXPECT_EQ(before - unique, Used()) << snapshot;
    }
    EXPECT_EQ(14u * 40960, Used());
}

TEST_F(EngineTest, RestoreBringsAStateBackAndKeepsTheOthers) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@old"}));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'b'));
    Ok(pool().CreateSnapshots({"d@new"}));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'c'));
    EXPECT_EQ(ErrorKind::kBusy, Fails(pool().RestoreSnapshot("d@old", std::nullopt, false, false)));
    Close("d");
    Ok(pool().RestoreSnapshot("d@old", "kept", false, false));
    Expect("d", 0, kMiB, 'a');
    Expect("d@new", 0, kMiB, 'b');
    Expect("d@kept", 0, kMiB, 'c');
    EXPECT_EQ(3 * kMiB, Used());
    Close("d");
    Ok(pool().RestoreSnapshot("d@new", std::nullopt, false, false));
    Expect("d", 0, kMiB, 'b');
    Close("d@kept");
    Ok(pool().DeleteSnapshot("d@kept", false));
    Reclaim();
    EXPECT_EQ(2 * kMiB, Used());
}

TEST_F(EngineTest, ACloneLivesOnWithoutItsSource) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 2 * kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    Ok(pool().CloneSnapshot("d@s", "c"));
    Ok(pool().CloneSnapshot("d@s", "c2"));
    EXPECT_EQ(0, Write("c", 0, kMiB, 'b'));
    EXPECT_EQ(0, Write("d", kMiB, 4096, 'x'));
    EXPECT_EQ(3 * kMiB + 4096, Used());
    Close("d");
    EXPECT_EQ(ErrorKind::kBusy, Fails(pool().DeleteDisk("d", false, false)));
    Ok(pool().DeleteDisk("d", true, false));
    Reclaim();
    EXPECT_EQ(3 * kMiB, Used());
    Expect("c", 0, kMiB, 'b');
    Expect("c", kMiB, kMiB, 'a');
    Expect("c2", 0, 2 * kMiB, 'a');
    EXPECT_EQ(0, Write("c2", 0, 2 * kMiB, 'z'));
    Reclaim();
    EXPECT_EQ(4 * kMiB, Used());  // c: 1 + 1, c2: 2; the first 'a' MiB is gone
    Close("c");
    Ok(pool().DeleteDisk("c", false, false));
    Reclaim();
    EXPECT_EQ(2 * kMiB, Used());
}

TEST_F(EngineTest, DeletingTheRestoredSnapshotFreesWhatTheDiskOverwrites) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_EQ(0, Write("d", 0, kMiB / 2, 'b'));
    Close("d");
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, false, false));
    Ok(pool().DeleteSnapshot("d@s", false));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'c'));
    Reclaim();
    EXPECT_EQ(kMiB, Used());
    Expect("d", 0, kMiB, 'c');
}

TEST_F(EngineTest, DeletingADiskBesideACloneFreesWhatOnlyLowerSnapshotsHeld) {
    Ok(pool().CreateDisk("d", 64 * kMiB));
    const auto touch = [&](uint64_t chunks, char fill) {
        for (uint64_t c = 0; c < chunks; ++c) EXPECT_EQ(0, Write("d", c * kChunkBytes, 4096, fill));
    };
    touch(200, 'a');
    Ok(pool().CreateSnapshots({"d@s1"}));
    touch(100, 'b');
    Ok(pool().CreateSnapshots({"d@s2"}));
    touch(100, 'c');
    Ok(pool().CreateSnapshots({"d@s3"}));
    Ok(pool().CloneSnapshot("d@s3", "c"));
    Close("d");
    Ok(pool().RestoreSnapshot("d@s1", std::nullopt, false, false));
    Ok(pool().DeleteDisk("d", true, false));
    Reclaim();
    EXPECT_EQ(200 * kBlockBytes, Used());
    CheckClean();
    Expect("c", 0, 4096, 'c');
    Expect("c", 150 * kChunkBytes, 4096, 'a');
}

TEST_F(EngineTest, TrimAndZeroesGiveSpaceBackAndReadAsZeros) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 2 * kMiB, 'a'));
    EXPECT_EQ(2 * kMiB, Used());
    cow::Volume& v = Volume("d");
    EXPECT_EQ(0, Await(scheduler, v.executor(), v.Trim(100, kMiB)));
    EXPECT_EQ(kMiB + 4096, Used());
    Expect("d", 0, 4096, 'a');  // a part of a block stays
    Expect("d", 4096, kMiB - 4096, 0);
    Expect("d", kMiB, 4096, 'a');
    EXPECT_EQ(0, Await(scheduler, v.executor(), v.WriteZeroes(kMiB + 100, 8192, false)));
    Expect("d", kMiB, 100, 'a');
    Expect("d", kMiB + 100, 8192, 0);
    Expect("d", kMiB + 8292, 4096, 'a');
    EXPECT_EQ(0, Await(scheduler, v.executor(), v.WriteZeroes(5 * kMiB, kMiB, true)));
    Expect("d", 5 * kMiB, kMiB, 0);
    std::vector<cow::Allocation> map;
    EXPECT_EQ(0, Await(scheduler, v.executor(), v.Status(0, 10 * kMiB, 100, &map)));
    ASSERT_EQ(8u, map.size());
    const uint64_t lengths[] = {4096,        kMiB - 4096, 4096, 4096,
                                kMiB - 8192, 3 * kMiB,    kMiB, 4 * kMiB};
    for (size_t i = 0; i < map.size(); ++i) {
        EXPECT_EQ(lengths[i], map[i].length) << i;
        EXPECT_EQ(i % 2 == 1, map[i].hole) << i;
    }
}

TEST_F(EngineTest, TheLongestZeroesTrimAndStatusCoverAllTheyName) {
    constexpr uint64_t kGiB = uint64_t{1} << 30;
    constexpr uint64_t kLongest = 0xffffffff;  // bytes, what the protocol can ask for
    Ok(pool().CreateDisk("d", 6 * kGiB));
    const uint64_t places[] = {0, 64 * kMiB, 128 * kMiB, kGiB, 4 * kGiB - 4096, 5 * kGiB};
    cow::Volume& v = Volume("d");
    for (const bool trim : {false, true}) {
        for (const uint64_t place : places) EXPECT_EQ(0, Write("d", place, 4096, 'a'));
        std::vector<cow::Allocation> map;
        EXPECT_EQ(0, Await(scheduler, v.executor(), v.Status(0, kLongest, 1000, &map)));
        uint64_t bytes = 0, data = 0;
        for (const cow::Allocation part : map) {
            bytes += part.length;
            if (!part.hole) data += part.length;
        }
        EXPECT_EQ(kLongest, bytes);
        EXPECT_EQ(5 * 4096 - 1, data);
        if (trim) {
            EXPECT_EQ(0, Await(scheduler, v.executor(), v.Trim(0, kLongest)));
        } else {
            EXPECT_EQ(0, Await(scheduler, v.executor(), v.WriteZeroes(0, kLongest, false)));
        }
        for (const uint64_t place : {uint64_t{0}, 64 * kMiB, 128 * kMiB, kGiB}) {
            Expect("d", place, 4096, 0);
        }
        // The last byte of that block is not named: a trim leaves such a block as it is.
        Expect("d", 4 * kGiB - 4096, 4095, trim ? 'a' : 0);
        Expect("d", 4 * kGiB - 1, 1, 'a');
        Expect("d", 5 * kGiB, 4096, 'a');
    }
}

TEST_F(EngineTest, ResizeGrowsWithZerosAndShrinksForGood) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().ResizeDisk("d", 4 * kMiB, false, false));
    Expect("d", kMiB, kMiB, 0);
    EXPECT_EQ(0, Write("d", 3 * kMiB, kMiB, 'b'));
    Close("d");
    EXPECT_EQ(ErrorKind::kInvalid, Fails(pool().ResizeDisk("d", 8192, false, false)));
    Ok(pool().ResizeDisk("d", 8192, true, false));
    Reclaim();
    EXPECT_EQ(8192u, Used());
    Ok(pool().ResizeDisk("d", 4 * kMiB, false, false));
    Expect("d", 0, 8192, 'a');
    Expect("d", 8192, 4 * kMiB - 8192, 0);
}

TEST_F(EngineTest, NamesMayBeTimes) {
    const std::string time = "2026-11-28T17:36:28+01:00";
    Ok(pool().CreateDisk(time, kMiB));
    Ok(pool().CreateSnapshots({time + "@" + time}));
    EXPECT_EQ(kMiB, Volume(time + "@" + time).size());
    EXPECT_EQ(ErrorKind::kInvalid, Fails(pool().CreateDisk("+1", kMiB)));
}

TEST_F(EngineTest, SizesAreMultiplesOfASector) {
    const uint64_t size = 3 * 4096 + 1536;
    EXPECT_EQ(ErrorKind::kInvalid, Fails(pool().CreateDisk("d", size + 1)));
    Ok(pool().CreateDisk("d", size));
    EXPECT_EQ(size, Volume("d").size());
    EXPECT_EQ(EINVAL, Write("d", size - 512, 1024, 'x'));
    EXPECT_EQ(0, Write("d", 0, size, 'a'));
    Expect("d", 0, size, 'a');
    std::vector<cow::Allocation> map;
    cow::Volume& v = Volume("d");
    EXPECT_EQ(0, Await(scheduler, v.executor(), v.Status(4096, size - 4096, 9, &map)));
    ASSERT_EQ(1u, map.size());
    EXPECT_EQ(size - 4096, map[0].length);
    Ok(pool().CreateSnapshots({"d@s"}));
    // What the last block held beyond the end shows in nothing that grows.
    Close("d");
    Ok(pool().ResizeDisk("d", 4096 + 512, true, false));
    Ok(pool().CreateSnapshots({"d@small"}));
    Ok(pool().ResizeDisk("d", size, false, false));
    Expect("d", 0, 4608, 'a');
    Expect("d", 4608, size - 4608, 0);
    Ok(pool().CloneSnapshot("d@small", "clone"));
    Ok(pool().ResizeDisk("clone", 4096 + 1024, false, false));
    Ok(pool().ResizeDisk("clone", kMiB, false, false));
    Expect("clone", 0, 4608, 'a');
    Expect("clone", 4608, kMiB - 4608, 0);
    Expect("d@s", 0, size, 'a');
    Close("d");
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, false, false));
    Expect("d", 0, size, 'a');
    Stop();
    Start();
    EXPECT_EQ(size, Volume("d").size());
    Expect("clone", 4608, kMiB - 4608, 0);
}

TEST_F(EngineTest, AFullPoolFailsWritesAndGoesOnOnceThereIsRoom) {
    Ok(pool().CreateDisk("d", 1024 * kMiB));
    uint64_t written = 0;
    while (Write("d", written, kMiB, 'a') == 0) written += kMiB;
    EXPECT_EQ(59 * kMiB, written);  // 4 MiB are the ring, one block is the superblock
    Expect("d", written - kMiB, kMiB, 'a');
    EXPECT_EQ(0, Flush("d"));
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_EQ(ENOSPC, Write("d", 0, kMiB, 'b'));
    Expect("d", 0, kMiB, 'a');
    cow::Volume& v = Volume("d");
    EXPECT_EQ(0, Await(scheduler, v.executor(), v.Trim(0, 8 * kMiB)));
    EXPECT_EQ(ENOSPC, Write("d", 0, kMiB, 'b'));  // the snapshot holds what was trimmed
    Ok(pool().DeleteSnapshot("d@s", false));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'b'));
    Expect("d", 0, kMiB, 'b');
}

/// Only then: a flush waits for the device alone.
TEST_F(EngineTest, AFoldTellsTheLaneThatACommitIsAwaited) {
    Ok(pool().CreateDisk("d", kMiB));
    const auto expected = [&] {
        return dynamic_cast<Scheduler::Lane&>(Volume("d").executor()).posts_expected();
    };
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    EXPECT_EQ(0u, expected());
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0u, expected());
    EXPECT_EQ(4096u, Used());
    EXPECT_EQ(1u, expected());
}

TEST_F(EngineTest, EverythingIsThereAfterAReopen) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_EQ(0, Write("d", 4096, 4096, 'b'));
    Stop();
    Start();
    Expect("d", 0, 4096, 'a');
    Expect("d", 4096, 4096, 'b');
    Expect("d@s", 0, kMiB, 'a');
}

TEST_F(EngineTest, AFailedSyncPoisonsWritesButNotReads) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0, Write("d", 0, 4096, 'b'));
    media.faults.sync_error = 1;
    EXPECT_EQ(EIO, Flush("d"));
    media.faults.sync_error = 0;
    EXPECT_EQ(EIO, Flush("d"));
    EXPECT_EQ(EIO, Write("d", 8192, 4096, 'c'));
    Expect("d", 8192, 4096, 'a');
    EXPECT_EQ(ErrorKind::kIo, Fails(pool().CreateSnapshots({"d@s"})));
    Close("d");
    const Status s = machine->Stop();
    EXPECT_FALSE(s.ok());
    CheckClean();
    machine.reset();
}

TEST_F(EngineTest, NamesLimitsAndAbsentThingsAreRefused) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(ErrorKind::kExists, Fails(pool().CreateDisk("d", kMiB)));
    for (const char* name : {"", "-x", "a b", "a/b", "a@b", "\xff"}) {
        EXPECT_EQ(ErrorKind::kInvalid, Fails(pool().CreateDisk(name, kMiB))) << name;
    }
    EXPECT_EQ(ErrorKind::kInvalid, Fails(pool().CreateDisk("e", 1000)));
    EXPECT_EQ(ErrorKind::kInvalid, Fails(pool().CreateDisk("e", 0)));
    EXPECT_EQ(ErrorKind::kLimit, Fails(pool().CreateDisk("e", uint64_t{1} << 62)));
    EXPECT_EQ(ErrorKind::kNotFound, Fails(pool().CreateSnapshots({"x@s"})));
    EXPECT_EQ(ErrorKind::kInvalid, Fails(pool().CreateSnapshots({"d"})));
    EXPECT_EQ(ErrorKind::kInvalid, Fails(pool().CreateSnapshots({"d@a", "d@b"})));
    Ok(pool().CreateSnapshots({"d@a"}));
    EXPECT_EQ(ErrorKind::kExists, Fails(pool().CreateSnapshots({"d@a"})));
    EXPECT_EQ(ErrorKind::kNotFound, Fails(pool().DeleteSnapshot("d@b", false)));
    EXPECT_EQ(ErrorKind::kNotFound,
              Fails(pool().RestoreSnapshot("d@b", std::nullopt, false, false)));
    EXPECT_EQ(ErrorKind::kExists, Fails(pool().CloneSnapshot("d@a", "d")));
    Ok(pool().RenameSnapshot("d@a", "b"));
    Ok(pool().RenameDisk("d", "e"));
    Ok(pool().DeleteSnapshot("e@b", false));
}

TEST_F(EngineTest, SnapshotKeepsWhatAFailedOverwriteLeftThroughACrash) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 65536, 'a'));
    EXPECT_EQ(0, Flush("d"));
    media.faults.write_error = 1;
    EXPECT_EQ(EIO, Write("d", 0, 65536, 'b'));  // in place; some sectors arrive
    media.faults.write_error = 0;
    Ok(pool().CreateSnapshots({"d@s"}));
    const std::string kept = Read("d@s", 0, 65536);
    for (const char* name : {"d", "d@s"}) Close(name);
    media.Cut();
    (void)machine->Stop();
    media.Restore();
    Start();
    EXPECT_EQ(kept, Read("d@s", 0, 65536));
}

}  // namespace
}  // namespace varve
