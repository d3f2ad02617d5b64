// The engine when something is scarce: memory for the map, space, branches, a device that works.
#include "cow/format/format.h"
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kChunkBytes;

class ScarceTest : public EngineTest {
  protected:
    void Restart(cow::PoolOptions options = {}) {
        Stop();
        Start(options);
    }
    Errno Zeroes(const std::string& name, uint64_t offset, uint64_t length) {
        cow::Volume& v = Volume(name);
        return Await(scheduler, v.executor(), v.WriteZeroes(offset, length, false));
    }
    /// Goes through the disk's map and commits changes, so that whatever may leave memory does.
    Task<void> Press(cow::Volume* volume, bool* done) {
        co_await Hop(volume->executor());
        std::vector<std::byte> block(4096);
        const std::span<std::byte> memory(block);
        for (uint64_t offset = 0; offset < volume->size(); offset += 64 * kChunkBytes) {
            const Errno flushed = co_await volume->Flush();
            const Errno read = co_await volume->Read(offset, memory, nullptr);
            EXPECT_EQ(0, flushed + read);
        }
        *done = true;
    }
    Task<void> TrimOrWrite(cow::Volume* volume, uint64_t offset, bool write, size_t* answered) {
        const std::vector<std::byte> block(4096);
        const std::span<const std::byte> bytes(block);
        for (uint64_t hops = 1 + scheduler.Draw(60); hops > 0; --hops) {
            co_await Hop(volume->executor());
        }
        Errno error = 0;
        if (write) {
            error = co_await volume->Write(offset, bytes);
        } else {
            error = co_await volume->Trim(offset + 65536, 4096);
        }
        EXPECT_EQ(0, error);
        ++*answered;
    }
    Task<void> ZeroAll(cow::Volume* volume, bool* done) {
        co_await Hop(volume->executor());
        const Errno error = co_await volume->WriteZeroes(0, volume->size(), false);
        EXPECT_EQ(0, error);
        *done = true;
    }
};

// What a load says of chunks that are not stored must not be believed once a change of one of them
// was committed and has left memory.
TEST_F(ScarceTest, ZeroesReachWhatIsCommittedAndEvictedWhileTheyRun) {
    cow::PoolOptions options;
    options.map_cache_bytes = 4096;
    Restart(options);
    constexpr uint64_t kSize = 1024 * kMiB;
    for (int round = 0; round < 40; ++round) {
        const std::string name = "d" + std::to_string(round);
        Ok(pool().CreateDisk(name, kSize));
        const uint64_t offset = (2000 + scheduler.Draw(2000)) * kChunkBytes;
        ASSERT_EQ(0, Write(name, offset, 4096, 'x'));
        bool zeroed = false, pressed = false;
        Spawn(ZeroAll(&Volume(name), &zeroed));
        Spawn(Press(&Volume(name), &pressed));
        ASSERT_TRUE(scheduler.RunUntil([&] { return zeroed && pressed; }));
        Expect(name, offset, 4096, 0);
        Close(name);
        Ok(pool().DeleteDisk(name, false, false));
    }
}

// A round that has nothing to commit ends at once: whoever waits for one must not begin to wait
// after it.
TEST_F(ScarceTest, TrimsOfHolesAreAnsweredWhileTheirLaneHoldsTooManyChanges) {
    cow::PoolOptions options;
    options.map_cache_bytes = 4096;
    Restart(options);
    std::vector<cow::Volume*> volumes;
    for (const std::string name : {"a", "b", "c", "d"}) {
        Ok(pool().CreateDisk(name, 64 * kChunkBytes));
        volumes.push_back(&Volume(name));
        for (uint64_t chunk = 0; chunk < 64; ++chunk) {
            ASSERT_EQ(0, Write(name, chunk * kChunkBytes, 4096, 'x'));
        }
        ASSERT_EQ(0, Flush(name));
    }
    for (uint64_t seed = 1; seed <= 200; ++seed) {
        scheduler.random().seed(seed);
        size_t answered = 0, sent = 0;
        for (cow::Volume* volume : volumes) {
            for (uint64_t i = 0; i < 24; ++i, ++sent) {
                const uint64_t offset = scheduler.Draw(64) * kChunkBytes + 8192;
                Spawn(TrimOrWrite(volume, offset, scheduler.Draw(4) == 0, &answered));
            }
        }
        ASSERT_TRUE(scheduler.RunUntil([&] { return answered == sent; }))
            << answered << " of " << sent << " answered, seed " << seed;
    }
}

TEST_F(ScarceTest, AFullFileSystemServesWhatTheDataFileHoldsAlready) {
    for (int life = 0; life < 3; ++life) {
        Ok(pool().CreateDisk("d", 128 * kMiB));
        uint64_t written = 0;
        while (Write("d", written, kMiB, 'w') == 0) written += kMiB;
        EXPECT_GE(written, 56 * kMiB) << "in life " << life;
        Close("d");
        Ok(pool().DeleteDisk("d", false, false));
        Reclaim();
        // Nothing says now that the data file still holds all of it.
        Restart();
    }
}

TEST_F(ScarceTest, ADeletionMakesRoomForTheNextWriteInWhateverOrderThingsHappen) {
    for (uint64_t seed = 1; seed <= 12; ++seed) {
        SCOPED_TRACE("scheduler seed " + std::to_string(seed));
        scheduler.random().seed(seed);
        Ok(pool().CreateDisk("d", 128 * kMiB));
        uint64_t written = 0;
        while (Write("d", written, 4 * kMiB, 'w') == 0) written += 4 * kMiB;
        std::vector<std::string> names{"d@s"};
        Ok(pool().CreateSnapshots(std::move(names)));
        cow::Volume& v = Volume("d");
        ASSERT_EQ(0, Await(scheduler, v.executor(), v.Trim(0, 8 * kMiB)));
        ASSERT_EQ(ENOSPC, Write("d", 0, 4 * kMiB, 'x'));
        Ok(pool().DeleteSnapshot("d@s", false));
        ASSERT_EQ(0, Write("d", 0, 4 * kMiB, 'x'));
        Expect("d", 0, 4 * kMiB, 'x');
        Close("d");
        Ok(pool().DeleteDisk("d", false, false));
        Reclaim();
    }
}

TEST_F(ScarceTest, AWriterThatWaitsForSpaceGivesUpWhenThePoolCloses) {
    Ok(pool().CreateDisk("d", 128 * kMiB));
    uint64_t written = 0;
    while (Write("d", written, kMiB, 'w') == 0) written += kMiB;
    pool().PrepareShutdown();
    EXPECT_EQ(ENOSPC, Write("d", written, kMiB, 'w'));
    Expect("d", 0, kMiB, 'w');
}

TEST_F(ScarceTest, ASnapshotWhoseCommitFailedIsNotServed) {
    Ok(pool().CreateDisk("d", kMiB));
    ASSERT_EQ(0, Write("d", 0, 4096, 'a'));
    std::vector<std::string> first{"d@good"};
    Ok(pool().CreateSnapshots(std::move(first)));
    Expect("d@good", 0, 4096, 'a');
    ASSERT_EQ(0, Write("d", 0, 4096, 'b'));
    scheduler.RunAll();  // no other commit may be the one that fails
    media.faults.commit_error = 1;
    std::vector<std::string> second{"d@bad"};
    EXPECT_EQ(ErrorKind::kIo, Fails(pool().CreateSnapshots(std::move(second))));
    media.faults = Faults{};
    const auto opened = machine->Do(pool().OpenExport("d@bad"));
    ASSERT_FALSE(opened.ok());
    EXPECT_NE(std::string::npos, opened.error().message.find("restart"));
    Expect("d@good", 0, 4096, 'a');  // whoever reads goes on
    Expect("d", 0, 4096, 'b');
    for (const auto& [name, e] : exports) Detach(e);
    exports.clear();
    EXPECT_FALSE(machine->Stop().ok());
    media.Cut();
    media.Restore();
    machine.reset();
    Start();
    Expect("d@good", 0, 4096, 'a');
}

TEST_F(ScarceTest, APoolOfAnotherVersionIsRefusedAndLeftAlone) {
    Ok(pool().CreateDisk("d", kMiB));
    ASSERT_TRUE(machine->Stop().ok());
    const auto before = media.metadata();
    std::string row = before->at(cow::PoolKey());
    row[0] = 2;
    cow::Batch batch;
    batch.Put(cow::PoolKey(), row);
    ASSERT_TRUE(machine->metadata().Commit(batch).ok());
    const auto foreign = media.metadata();
    machine = std::make_unique<Machine>(scheduler, media, 2, cow::PoolOptions{});
    const Status s = machine->Start();
    ASSERT_FALSE(s.ok());
    EXPECT_EQ(ErrorKind::kInvalid, s.error().kind);
    EXPECT_NE(std::string::npos, s.error().message.find("version 2")) << s.error().message;
    EXPECT_EQ(*foreign, *media.metadata());
    machine.reset();
    media.SetMetadata(before);
    Start();
}

}  // namespace
}  // namespace varve
