// What does not wait for what: a device that hangs, or a client that does not go, stops those who
// need it, and nobody else.
// Not how fast anything is: the simulation's clock runs ahead when nothing else happens.
#include "tests/engine_fixture.h"

namespace varve::simulation {
namespace {

/// Runs `task` on home beside others; nothing until it has ended.
template <typename T>
struct Beside {
    Beside(Executor& home, Task<T> task) { Spawn(Collect<T>(&home, std::move(task), &result)); }
    std::optional<T> result;
};

class EngineWaitingTest : public EngineTest {
  protected:
    void RunOut(const std::function<bool()>& done) { ASSERT_TRUE(scheduler.RunUntil(done)); }
    cow::DiskInfo Show(const std::string& disk) {
        return machine->Do(pool().ShowDisk(disk)).value();
    }
};

TEST_F(EngineWaitingTest, AFlushOfFirstWritesDoesNotPassHome) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0, Write("d", 4096, 4096, 'b'));
    machine->home().Stall(true);
    EXPECT_EQ(0, Flush("d"));
    machine->home().Stall(false);
}

TEST_F(EngineWaitingTest, WhoObservesDoesNotWaitForACommit) {
    Ok(pool().CreateDisk("d", kMiB));
    Ok(pool().CreateDisk("other", kMiB));
    EXPECT_EQ(0, Write("d", 0, 8192, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_EQ(8192U, Show("d").used);
    EXPECT_FALSE(Show("d").approximate);
    EXPECT_EQ(0U, Unique("d@s"));

    machine->committer().Stall(true);
    EXPECT_EQ(0, Write("d", 0, 4096, 'b'));
    EXPECT_EQ(0, Write("d", 65536, 4096, 'b'));
    cow::Volume& volume = Volume("d");
    Beside<Status> creation(machine->home(), pool().CreateDisk("late", kMiB));
    const auto status = machine->Do(pool().GetStatus());
    EXPECT_TRUE(status.value().approximate);
    EXPECT_EQ(2 * 4096U, status.value().used);
    EXPECT_TRUE(Show("d").approximate);
    EXPECT_FALSE(Show("other").approximate);
    EXPECT_EQ(3U, machine->Do(pool().ListDisks()).value().size());
    EXPECT_TRUE(machine->Do(pool().ListSnapshots("d")).value().at(0).approximate);
    EXPECT_EQ(4U, machine->Do(pool().ListExports())->size());
    Expect("other", 0, 4096, '\0');
    EXPECT_FALSE(creation.result.has_value());

    machine->committer().Stall(false);
    EXPECT_EQ(0, Await(scheduler, volume.executor(), volume.Flush()));
    RunOut([&] { return creation.result.has_value(); });
    EXPECT_TRUE(creation.result->ok());
    EXPECT_FALSE(machine->Do(pool().GetStatus()).value().approximate);
    EXPECT_EQ(3 * 4096U, Show("d").used);
    EXPECT_EQ(4096U, Unique("d@s"));
}

TEST_F(EngineWaitingTest, AnOlderSnapshotOpensWhileANewOneIsStuck) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    Ok(pool().CreateSnapshots({"d@old"}));
    EXPECT_FALSE(Show("d").approximate);  // all of it is in map rows
    EXPECT_EQ(0, Write("d", 0, 4096, 'b'));
    machine->committer().Stall(true);
    Beside<Status> creation(machine->home(), pool().CreateSnapshots({"d@new"}));
    RunOut([&] { return pool().FindExport("d@new").ok(); });
    Expect("d@old", 0, 4096, 'a');
    EXPECT_EQ(ErrorKind::kBusy, machine->Do(pool().OpenExport("d@new")).error().kind);
    EXPECT_FALSE(creation.result.has_value());
    machine->committer().Stall(false);
    RunOut([&] { return creation.result.has_value(); });
    EXPECT_TRUE(creation.result->ok());
    Expect("d@new", 0, 4096, 'b');
}

TEST_F(EngineWaitingTest, WhoObservesDoesNotWaitForTheAuditor) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 8192, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    Ok(pool().CloneSnapshot("d@s", "clone"));
    EXPECT_EQ(0, Write("clone", 0, 4096, 'b'));
    EXPECT_EQ(4096U, Show("clone").unique);

    machine->auditor().Stall(true);  // a check that takes long
    for (int i = 0; i < 3; ++i) {
        EXPECT_TRUE(Show("clone").approximate);
        EXPECT_FALSE(Show("clone").unique.has_value());
        EXPECT_EQ(8192U, Show("clone").used);
        EXPECT_TRUE(machine->Do(pool().ShowSnapshot("d@s")).value().approximate);
        EXPECT_EQ(ErrorKind::kBusy,
                  machine->Do(pool().EstimateDelete({"clone"}, false)).error().kind);
    }
    machine->auditor().Stall(false);
    EXPECT_EQ(4096U, Show("clone").unique);
    EXPECT_FALSE(Show("clone").approximate);
    EXPECT_EQ(4096U, machine->Do(pool().EstimateDelete({"clone"}, false)).value());
}

TEST_F(EngineWaitingTest, ManyWhoObserveShareOneRefresh) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    machine->committer().Stall(true);
    for (int i = 0; i < 20; ++i) EXPECT_TRUE(machine->Do(pool().GetStatus()).value().approximate);
    machine->committer().Stall(false);
    const uint64_t before = machine->Do(pool().GetStatus()).value().commits;
    EXPECT_LE(before, 5U);
}

TEST_F(EngineWaitingTest, AClientThatDoesNotGoKeepsOnlyItsDisk) {
    Ok(pool().CreateDisk("stuck", kMiB));
    Ok(pool().CreateDisk("d", kMiB));
    Volume("stuck");
    Ok(pool().CreateSnapshots({"stuck@s"}));
    pool().SetDisconnector([](const std::vector<uint64_t>&) {});  // it never ends
    Beside<Status> deletion(machine->home(), pool().DeleteDisk("stuck", true, true));
    Beside<Status> both(machine->home(), pool().CreateSnapshots({"d@both", "stuck@both"}));
    Ok(pool().CreateSnapshots({"d@s"}));
    Ok(pool().RenameDisk("d", "e"));
    EXPECT_FALSE(deletion.result.has_value());
    RunOut([&] { return deletion.result.has_value() && both.result.has_value(); });
    EXPECT_EQ(ErrorKind::kBusy, deletion.result->error().kind);
    EXPECT_NE(std::string::npos, deletion.result->error().message.find("nothing was changed"));
    EXPECT_EQ(ErrorKind::kNotFound, both.result->error().kind);  // since the renaming
    Volume("stuck@s");                                           // may be opened again
    EXPECT_EQ(0, Write("stuck", 0, 4096, 'w'));
}

TEST_F(EngineWaitingTest, ACommandThatIsStuckIsNamed) {
    Ok(pool().CreateDisk("d", kMiB));
    machine->committer().Stall(true);
    Beside<Status> renaming(machine->home(), pool().RenameDisk("d", "e"));
    scheduler.RunUntil([&] { return machine->Do(pool().ShowDisk("e")).ok(); });
    const Status busy = machine->Do(pool().ResizeDisk("e", 2 * kMiB, false, false));
    ASSERT_FALSE(busy.ok());
    EXPECT_EQ(ErrorKind::kBusy, busy.error().kind);
    EXPECT_NE(std::string::npos, busy.error().message.find("a renaming has been at work"));
    machine->committer().Stall(false);
    RunOut([&] { return renaming.result.has_value(); });
    EXPECT_TRUE(renaming.result->ok());
}

TEST_F(EngineWaitingTest, CommandsWaitWhileAShrunkDiskIsTrimmed) {
    constexpr uint64_t kSize = 32 * cow::kChunkBytes;
    Ok(pool().CreateDisk("d", kSize));
    for (uint64_t c = 0; c < 32; ++c) EXPECT_EQ(0, Write("d", c * cow::kChunkBytes, 4096, 'a'));
    Close("d");
    Beside<Status> shrinking(machine->home(), pool().ResizeDisk("d", kMiB, true, false));
    scheduler.RunUntil([&] { return pool().DescribeExport("d").value().size == kMiB; });
    EXPECT_FALSE(shrinking.result.has_value());
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_TRUE(shrinking.result.has_value());
    Expect("d@s", 0, 4096, 'a');
}

TEST_F(EngineWaitingTest, AShrinkThatMeetsAStopIsDoneAndTrimmedByTheNextStart) {
    constexpr uint64_t kSize = 32 * cow::kChunkBytes;
    Ok(pool().CreateDisk("d", kSize));
    for (uint64_t c = 0; c < 32; ++c) EXPECT_EQ(0, Write("d", c * cow::kChunkBytes, 4096, 'a'));
    Stop();
    Start();  // nothing of its map is in memory
    machine->loader().Stall(true);
    Beside<Status> shrinking(machine->home(), pool().ResizeDisk("d", kMiB, true, false));
    RunOut([&] { return pool().DescribeExport("d").value().size == kMiB; });
    pool().PrepareShutdown();
    EXPECT_FALSE(shrinking.result.has_value());
    machine->loader().Stall(false);
    RunOut([&] { return shrinking.result.has_value(); });
    EXPECT_TRUE(shrinking.result->ok()) << shrinking.result->error().message;
    Stop();
    Start();
    RunOut([&] { return Show("d").used == kMiB / cow::kChunkBytes * 4096; });
    Ok(pool().ResizeDisk("d", kSize, false, false));
    Expect("d", 0, 4096, 'a');
    Expect("d", kMiB, kSize - kMiB, '\0');
}

TEST_F(EngineWaitingTest, SnapshotsAreDeletedWhileTheirShrunkDiskIsTrimmed) {
    constexpr uint64_t kChunks = 32, kSize = kChunks * cow::kChunkBytes;
    Ok(pool().CreateDisk("d", kSize));
    for (const char fill : {'a', 'b', 'c'}) {
        for (uint64_t c = 0; c < kChunks; ++c) Write("d", c * cow::kChunkBytes, 4096, fill);
        Ok(pool().CreateSnapshots({std::string("d@") + fill}));
    }
    Stop();
    Start();  // nothing of its map is in memory
    machine->loader().Stall(true);
    Beside<Status> shrinking(machine->home(), pool().ResizeDisk("d", kMiB, true, false));
    RunOut([&] { return pool().DescribeExport("d").value().size == kMiB; });
    Ok(pool().DeleteSnapshot("d@b", false));
    Ok(pool().DeleteSnapshot("d@c", false));
    EXPECT_FALSE(shrinking.result.has_value());
    machine->loader().Stall(false);
    RunOut([&] { return shrinking.result.has_value(); });
    EXPECT_TRUE(shrinking.result->ok());
    Reclaim();
    constexpr uint64_t kLeft = kMiB / cow::kChunkBytes;
    EXPECT_EQ((kChunks + kLeft) * 4096, Used());
    for (uint64_t c = 0; c < kChunks; ++c) Expect("d@a", c * cow::kChunkBytes, 4096, 'a');
    for (uint64_t c = 0; c < kLeft; ++c) Expect("d", c * cow::kChunkBytes, 4096, 'c');
}

TEST_F(EngineWaitingTest, OfTwoWithOneNameOneIsRefused) {
    Beside<Status> first(machine->home(), pool().CreateDisk("d", kMiB));
    Beside<Status> second(machine->home(), pool().CreateDisk("d", 2 * kMiB));
    RunOut([&] { return first.result.has_value() && second.result.has_value(); });
    EXPECT_NE(first.result->ok(), second.result->ok());
    const Status& refused = first.result->ok() ? *second.result : *first.result;
    EXPECT_EQ(ErrorKind::kExists, refused.error().kind);
}

TEST_F(EngineWaitingTest, AnOfflineDiskHasNoClientsAlsoAfterARestart) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_EQ(ErrorKind::kBusy, Fails(pool().SetOffline("d", true, false)));
    Close("d");
    Ok(pool().SetOffline("d", true, false));
    EXPECT_EQ(ErrorKind::kBusy, machine->Do(pool().OpenExport("d")).error().kind);
    EXPECT_EQ(kMiB, pool().DescribeExport("d").value().size);
    Stop();
    Start();
    EXPECT_TRUE(Show("d").offline);
    EXPECT_EQ(ErrorKind::kBusy, machine->Do(pool().OpenExport("d")).error().kind);
    Expect("d@s", 0, 4096, 'a');
    Ok(pool().SetOffline("d", false, false));
    Expect("d", 0, 4096, 'a');
}

TEST_F(EngineWaitingTest, ARestoreThatCutsClientsOffLeavesTheDiskOffline) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    pool().SetDisconnector([this](const std::vector<uint64_t>& ids) {
        static bool done;
        for (const uint64_t id : ids) {
            Spawn(DetachTask(&machine->home(), &machine->pool(), id, &done));
        }
        exports.erase("d");
    });
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, true, false));
    EXPECT_TRUE(Show("d").offline);
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, true, true));
    EXPECT_FALSE(Show("d").offline);
    Volume("d");
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, true, true));
    EXPECT_FALSE(Show("d").offline);
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, true, false));  // there was nobody to cut off
    EXPECT_FALSE(Show("d").offline);
}

TEST_F(EngineWaitingTest, TheListOfExportsIsMadeOnceForEachState) {
    Ok(pool().CreateDisk("d", kMiB));
    const auto first = machine->Do(pool().ListExports());
    EXPECT_EQ(1U, first->size());
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    EXPECT_EQ(4096U, Show("d").used);  // its record has changed
    EXPECT_EQ(first, machine->Do(pool().ListExports()));
    Ok(pool().CreateSnapshots({"d@s"}));
    const auto second = machine->Do(pool().ListExports());
    ASSERT_EQ(2U, second->size());
    EXPECT_EQ("d@s", second->at(1).name);
    Ok(pool().RenameDisk("d", "e"));
    EXPECT_EQ("e@s", machine->Do(pool().ListExports())->at(1).name);
}

}  // namespace
}  // namespace varve::simulation
