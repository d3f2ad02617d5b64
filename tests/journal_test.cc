// The journal of map changes: what its rows hold, and what a crash leaves of it.
#include "cow/head/journal.h"

#include "cow/format/format.h"
#include "cow/format/ring_record.h"
#include "cow/format/runs.h"
#include "cow/journal/ring.h"
#include "tests/engine_fixture.h"
#include "tests/old_journal.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kChunkBytes;
using cow::MapChange;

MapChange ChangeOf(uint64_t chunk, uint64_t first, uint64_t count, uint64_t place) {
    return cow::MapChangeOf(ChunkIndex{chunk}, first, count, place);
}

TEST(JournalRowTest, WhatIsEncodedIsDecodedInOrder) {
    const std::vector<MapChange> changes = {ChangeOf(7, 0, 64, 1), ChangeOf(0, 63, 1, 0),
                                            ChangeOf(7, 3, 2, (uint64_t{1} << 48) - 2),
                                            ChangeOf((uint64_t{1} << 40) - 1, 10, 1, 12345)};
    std::vector<MapChange> decoded;
    EXPECT_TRUE(cow::DecodeChanges(EncodeChanges(changes), &decoded));
    EXPECT_EQ(changes, decoded);
}

TEST(JournalRowTest, WhatBreaksARuleIsRefused) {
    const std::string sound = EncodeChanges(std::vector{ChangeOf(7, 60, 4, 100)});
    std::vector<MapChange> decoded;
    EXPECT_FALSE(cow::DecodeChanges("", &decoded));
    EXPECT_FALSE(cow::DecodeChanges(sound.substr(0, sound.size() - 1), &decoded));
    EXPECT_FALSE(cow::DecodeChanges(sound + "x", &decoded));
    for (const MapChange& bad :
         {ChangeOf(7, 61, 4, 100), ChangeOf(7, 0, 0, 100),
          ChangeOf(7, 0, 2, (uint64_t{1} << 48) - 1), ChangeOf(uint64_t{1} << 40, 0, 1, 100)}) {
        EXPECT_FALSE(cow::DecodeChanges(EncodeChanges(std::vector{bad}), &decoded));
    }
    std::string version = sound;
    version[0] = 99;
    EXPECT_FALSE(cow::DecodeChanges(version, &decoded));
}

class JournalTest : public EngineTest {
  protected:
    uint64_t RowsOf(char letter) {
        const auto rows = media.metadata();
        const std::string lower(1, letter);
        return static_cast<uint64_t>(
            std::distance(rows->lower_bound(lower), rows->lower_bound(cow::PrefixEnd(lower))));
    }
    /// The process is killed, or the power fails: then what was not synced is lost or not.
    void Crash(bool kill = false) {
        kill ? media.Kill() : media.Cut();
        for (const auto& [name, e] : exports) Detach(e);
        exports.clear();
        (void)machine->Stop();
        machine.reset();
        media.Restore();
    }
    void SetRow(const std::string& key, const std::string& value) {
        auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
        (*rows)[key] = value;
        media.SetMetadata(std::move(rows));
    }
    Errno Trim(const std::string& name, uint64_t offset, uint64_t length) {
        cow::Volume& volume = Volume(name);
        return Await(scheduler, volume.executor(), volume.Trim(offset, length));
    }
    /// Calls of each kind from now on.
    std::map<Call, uint64_t>& Count() {
        counts.clear();
        media.probe = [this](Call call) {
            ++counts[call];
            return Mishap::kNone;
        };
        return counts;
    }
    void Tick() {
        bool done = false;
        Spawn(TickTask(&machine->home(), &machine->pool(), &done));
        ASSERT_TRUE(scheduler.RunUntil([&] { return done; }));
    }
    static Task<void> TickTask(Executor* home, cow::Pool* pool, bool* done) {
        co_await Hop(*home);
        co_await pool->CommitDirty();
        *done = true;
    }
    /// The next write to the data file fails, though some or all of it may be done.
    void FailNextWrite() {
        media.probe = [this](Call call) {
            if (call != Call::kWrite) return Mishap::kNone;
            media.probe = nullptr;
            return Mishap::kError;
        };
    }
    /// On the disk's lane.
    void Begin(const std::string& name, Task<Errno> task) {
        Spawn(BeginTask(&Volume(name).executor(), std::move(task)));
    }
    static Task<void> BeginTask(Executor* executor, Task<Errno> task) {
        co_await Hop(*executor);
        const Errno ignored = co_await std::move(task);
        (void)ignored;
    }
    std::map<Call, uint64_t> counts;
};

TEST_F(JournalTest, AFirstWriteAndItsFlushAreOneFrameAndOneSync) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));  // it takes a lease
    EXPECT_EQ(0, Flush("d"));
    std::map<Call, uint64_t>& calls = Count();
    EXPECT_EQ(0, Write("d", 4096, 4096, 'b'));
    EXPECT_EQ(1u, calls[Call::kWrite]);
    EXPECT_EQ(1u, calls[Call::kAppend]);
    EXPECT_EQ(0u, calls[Call::kSync]);
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(1u, calls[Call::kSync]);
    EXPECT_EQ(1u, calls[Call::kAppend]);
    EXPECT_EQ(0u, calls[Call::kCommit]);
    EXPECT_EQ(0, Flush("d"));  // what the first one covered is told once more
    EXPECT_EQ(0, Flush("d"));
    Count();
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0u, calls[Call::kSync]);
    media.probe = nullptr;
    EXPECT_EQ(0u, RowsOf('M'));
    EXPECT_EQ(8192u, Used());  // figures are taken from map rows
    EXPECT_EQ(1u, RowsOf('M'));
    EXPECT_EQ(0u, RowsOf('L'));
}

TEST_F(JournalTest, AKilledProcessLosesNothingThatWasAnswered) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    Ok(pool().CreateDisk("e", kMiB));
    for (unsigned round = 0; round < 4; ++round) {
        const char fill = static_cast<char>('a' + round);
        EXPECT_EQ(0, Write("d", 0, 3 * kChunkBytes, fill));
        EXPECT_EQ(0, Write("d", 100, 1000, '.'));
        EXPECT_EQ(0, Trim("d", kChunkBytes, 8192));
        EXPECT_EQ(0, Write("e", 0, 4096, fill));
        if (round == 2) Ok(pool().CreateSnapshots({"d@s"}));
        if (round == 2) {
            EXPECT_EQ(0, Write("d", 2 * kChunkBytes, 4096, 'n'));
        }
        Crash(true);
        Start();
        Expect("d", 0, 100, fill);
        Expect("d", 100, 1000, '.');
        Expect("d", 1100, 4096, fill);
        Expect("d", kChunkBytes, 8192, 0);
        Expect("d", 2 * kChunkBytes, 4096, round == 2 ? 'n' : fill);
        Expect("e", 0, 4096, fill);
        CheckClean();
    }
    Expect("d@s", 2 * kChunkBytes, 4096, 'c');
}

// A block is overwritten in place once a durable frame says that its map change is durable.
TEST_F(JournalTest, ABlockGoesToAnotherPlaceUntilItsChangeIsSettled) {
    Ok(pool().CreateDisk("d", kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    std::map<Call, uint64_t>& calls = Count();
    EXPECT_EQ(0, Write("d", 0, 4096, 'b'));
    EXPECT_EQ(1u, calls[Call::kAppend]);
    EXPECT_EQ(0, Write("d", 10, 5, 'c'));  // a part of it as well
    EXPECT_EQ(2u, calls[Call::kAppend]);
    EXPECT_EQ(0, Flush("d"));
    Count();
    EXPECT_EQ(0, Write("d", 0, 512, 'd'));
    EXPECT_EQ(1u, calls[Call::kAppend]);
    Tick();
    Tick();
    Count();
    EXPECT_EQ(0, Write("d", 512, 512, 'e'));
    EXPECT_EQ(0u, calls[Call::kAppend]);
    media.probe = nullptr;
    Expect("d", 0, 512, 'd');
    Expect("d", 512, 512, 'e');
    Expect("d", 1024, 3072, 'b');
    // What it left behind is free again.
    EXPECT_EQ(4096u, Used());
    Tick();
    EXPECT_GT(8u * 4096, machine->Do(pool().GetStatus()).value().leased);
}

/// Writes and trims the same few blocks over and over, and flushes now and then.
Task<void> Rewrite(cow::Volume* volume, uint64_t times, uint64_t each, bool trim, bool* done) {
    co_await Hop(volume->executor());
    const std::vector<std::byte> block(4096);
    const std::span<const std::byte> bytes(block);
    for (uint64_t i = 0; i < times; ++i) {
        const uint64_t offset = i % 4 * 8192;
        Errno error = co_await volume->Write(offset, bytes);
        if (error == 0 && trim) error = co_await volume->Trim(offset, 4096);
        if (error == 0 && i % each == 0) error = co_await volume->Flush();
        VARVE_CHECK(error == 0);
    }
    *done = true;
}

// Chunks that change often are few chunks, so it takes more than their number to start a pass: the
// ring is small here, and goes round some dozen times.
TEST_F(JournalTest, AFullRingIsFoldedAndGoesRound) {
    Stop();
    cow::PoolOptions options;
    options.ring_bytes = 0;
    Start(options);
    Ok(pool().CreateDisk("d", kMiB));
    Ok(pool().CreateDisk("quiet", kMiB));  // on the other lane
    EXPECT_EQ(0, Write("quiet", 0, 4096, 'q'));
    for (const bool trim : {true, false}) {
        for (const uint64_t each : {1000, 1}) {
            bool done = false;
            Spawn(Rewrite(&Volume("d"), 10'000, each, trim, &done));
            ASSERT_TRUE(scheduler.RunUntil([&] { return done; }));
        }
    }
    Tick();
    Tick();
    const cow::PoolStatus status = machine->Do(pool().GetStatus()).value();
    EXPECT_EQ(5 * 4096u, status.used);
    EXPECT_GE(4u, media.held.size());  // regions: a lease and the next one for each disk
    // The pool goes on from there after a crash, and folds what is left.
    EXPECT_EQ(0, Write("d", 0, 4096, 'x'));
    EXPECT_EQ(0, Flush("d"));
    Crash();
    Start(options);
    Expect("d", 0, 4096, 'x');
    Expect("quiet", 0, 4096, 'q');
}

TEST_F(JournalTest, ARingGrowsWithItsSettingAndStaysSo) {
    const auto blocks = [this] {
        cow::RingRecord ring;
        VARVE_CHECK(Decode(media.metadata()->at(cow::RingKey()), &ring));
        uint64_t sum = 0;
        for (const cow::Extent& extent : ring.extents) sum += extent.count;
        return sum;
    };
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(4 * kMiB, blocks() * 4096) << "a sixteenth of the pool";
    Stop();
    media.SetMetadata(std::make_shared<std::map<std::string, std::string>>());  // a new pool
    media.held.clear();
    uint64_t before = 0;
    for (const uint64_t kib : {256, 1024, 256}) {
        cow::PoolOptions options;
        options.ring_bytes = kib << 10;
        Start(options);
        EXPECT_EQ(std::max(before, kib << 10), blocks() * 4096);
        before = blocks() * 4096;
        Stop();
    }
    Start();
}

TEST_F(JournalTest, WhatWasFlushedIsFoldedAfterACrash) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0, Write("d", 4096, 4096, 'b'));
    EXPECT_EQ(0, Trim("d", kChunkBytes, kChunkBytes));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0u, RowsOf('M'));
    Crash();
    Start();
    EXPECT_EQ(3u, RowsOf('M'));
    Expect("d", 0, 4096, 'a');
    Expect("d", 4096, 4096, 'b');
    Expect("d", kChunkBytes, kChunkBytes, 0);
    Expect("d", 2 * kChunkBytes, 2 * kChunkBytes, 'a');
    EXPECT_EQ(3 * kChunkBytes, Used());
}

TEST_F(JournalTest, ASnapshotIsThereAfterACrashThoughNothingWasFolded) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_EQ(0u, RowsOf('M'));
    EXPECT_EQ(0, Write("d", 0, 4096, 'b'));
    Crash();
    Start();
    Expect("d@s", 0, kMiB, 'a');
    EXPECT_EQ(kMiB, machine->Do(pool().ShowSnapshot("d@s")).value().referenced);
    Expect("d", 4096, kMiB - 4096, 'a');
}

TEST_F(JournalTest, ACrashDuringRecoveryChangesNothing) {
    constexpr uint64_t kChunks = 400;  // a commit folds 256; with more the ring asks for a fold
    Ok(pool().CreateDisk("d", 200 * kMiB));
    for (uint64_t chunk = 0; chunk < kChunks; ++chunk) {
        EXPECT_EQ(0, Write("d", chunk * kChunkBytes, 4096, static_cast<char>('a' + chunk % 26)));
    }
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0u, RowsOf('M'));
    Crash();
    unsigned crashes = 0;
    for (;; ++crashes) {
        media.CutAfter(1 + crashes * 40, crashes % 3 == 0);
        machine = std::make_unique<Machine>(scheduler, media, 2, cow::PoolOptions{});
        if (machine->Start().ok()) break;
        machine.reset();
        media.Restore();
    }
    media.CutAfter(uint64_t{1} << 40);
    EXPECT_LE(2u, crashes);
    EXPECT_EQ(kChunks, RowsOf('M'));
    for (uint64_t chunk = 0; chunk < kChunks; ++chunk) {
        Expect("d", chunk * kChunkBytes, 4096, static_cast<char>('a' + chunk % 26));
    }
}

// Its entry was synced with all others, and somebody else has the place when the journal is read.
TEST_F(JournalTest, AFailedWriteIsTakenBackBeforeItsPlaceIsUsedAgain) {
    for (const std::string name : {"d", "e"}) Ok(pool().CreateDisk(name, 60 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));  // it stays to be folded, so the journal is kept
    FailNextWrite();
    EXPECT_EQ(EIO, Write("d", kChunkBytes, kChunkBytes, 'b'));
    for (unsigned i = 0; i < 3; ++i) {
        EXPECT_EQ(0, Flush("d"));
        Tick();
    }
    constexpr uint64_t kFilled =
        54 * kMiB;  // nearly all there is; nothing is folded for want of it
    for (uint64_t at = 0; at < kFilled; at += kMiB) EXPECT_EQ(0, Write("e", at, kMiB, 'e'));
    EXPECT_EQ(0, Flush("e"));
    EXPECT_EQ(0u, RowsOf('M'));
    for (const bool kill : {true, false}) {
        Crash(kill);
        Start();
        Expect("d", 0, 4096, 'a');
        Expect("d", 4096, 2 * kChunkBytes - 4096, '\0');
        for (uint64_t at = 0; at < kFilled; at += kMiB) Expect("e", at, kMiB, 'e');
    }
}

// The sync that covers its entry may begin before that is taken back.
TEST_F(JournalTest, AFailedWriteIsNotDurableWhateverIsCut) {
    constexpr uint64_t kBytes = 4 * 4096;
    unsigned landed = 0;
    for (unsigned run = 0; run < 400; ++run) {
        const std::string name = "d" + std::to_string(run);
        Ok(pool().CreateDisk(name, kMiB));
        EXPECT_EQ(0, Write(name, 0, kBytes, 'a'));
        Ok(pool().CreateSnapshots({name + "@s"}));
        media.CutAfter(1 + run % 80);
        FailNextWrite();
        const std::string b(kBytes, 'b'), c(4096, 'c');
        cow::Volume& disk = Volume(name);
        Begin(name, disk.Write(0, std::as_bytes(std::span(b)), nullptr));
        for (unsigned i = 0; i < 4; ++i) {
            const std::span<const std::byte> bytes = std::as_bytes(std::span(c));
            Begin(name, disk.Write(kBytes + i * c.size(), bytes, nullptr));
            Begin(name, disk.Flush());
        }
        scheduler.RunAll();
        media.probe = nullptr;
        Crash();
        Start();
        const std::string now = Read(name, 0, kBytes);
        for (uint64_t at = 0; at < kBytes; at += 4096) {
            const bool whole = now.find_first_not_of(now[at], at) >= at + 4096;
            ASSERT_TRUE(whole && (now[at] == 'a' || now[at] == 'b')) << run;
        }
        landed += now[0] == 'b';
    }
    EXPECT_LT(0u, landed);  // it was not answered
}

/// A pool as it was before there was a ring: its last changes are in journal rows.
class OldJournalTest : public JournalTest {
  protected:
    static constexpr uint64_t kPlace = 3000;
    std::string key, value;

    void SetUp() override {
        JournalTest::SetUp();
        Ok(pool().CreateDisk("d", 10 * kMiB));
        EXPECT_EQ(0, Write("d", 0, kChunkBytes, 'a'));
        Stop();
        auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
        rows->erase(cow::RingKey());
        cow::DiskRecord disk;
        ASSERT_TRUE(cow::Decode(rows->lower_bound("D")->second, &disk));
        key = cow::JournalKey(disk.branch, disk.generation, 0);
        value = EncodeChanges(std::vector{ChangeOf(0, 3, 2, kPlace), ChangeOf(0, 4, 1, 0)});
        media.SetMetadata(std::move(rows));
        for (uint64_t s = 0; s < 8; ++s) {
            const std::string old(kSector, 'o');
            media.WriteSector(kPlace * 8 + s, Content::Of(old.data()));
        }
        media.SyncUpTo(media.write_order());
        SetRow(key, value);
    }
};

TEST_F(OldJournalTest, ItIsFoldedAndARingIsMade) {
    Start();
    EXPECT_EQ(0u, RowsOf('L'));
    EXPECT_EQ(1u, RowsOf('G'));
    Expect("d", 0, 3 * 4096, 'a');
    Expect("d", 3 * 4096, 4096, 'o');
    Expect("d", 4 * 4096, 4096, 0);
    Expect("d", 5 * 4096, 4096, 'a');
    EXPECT_EQ(63u * 4096, Used());
    CheckClean();
}

TEST_F(OldJournalTest, ADamagedOneIsRefusedAndLeftAlone) {
    for (const std::string& damaged : {key, cow::JournalKey(BranchId{1}, Generation{99}, 0)}) {
        SetRow(damaged, damaged == key ? value + "x" : value);
        const auto rows = media.metadata();
        machine = std::make_unique<Machine>(scheduler, media, 2, cow::PoolOptions{});
        const Status s = machine->Start();
        ASSERT_FALSE(s.ok());
        EXPECT_EQ(ErrorKind::kDamaged, s.error().kind);
        EXPECT_FALSE(cow::CheckMetadata(machine->metadata()).value().ok());
        EXPECT_EQ(*rows, *media.metadata());
        machine.reset();
        SetRow(key, value);
    }
}

TEST_F(OldJournalTest, CheckFindsABlockThatHasAnotherOwner) {
    SimMetadata metadata(media);
    EXPECT_TRUE(cow::CheckMetadata(metadata).value().ok());
    const auto row = media.metadata()->lower_bound("M");
    const auto runs = cow::DecodeRuns(row->second, Generation{~cow::KeyNumber(row->first, 2)});
    ASSERT_TRUE(runs.has_value());
    SetRow(key, EncodeChanges(std::vector{ChangeOf(1, 0, 1, (*runs)[0].place)}));
    const auto report = cow::CheckMetadata(metadata);
    ASSERT_EQ(1u, report.value().errors.size());
    EXPECT_NE(std::string::npos, report.value().errors[0].find("another owner"));
}

TEST_F(JournalTest, DurableEntriesThatAreGoneAreDamage) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    for (unsigned i = 0; i < 3; ++i) EXPECT_EQ(0, Flush("d"));  // the lane's slot knows of it
    Crash();
    cow::RingRecord record;
    ASSERT_TRUE(cow::Decode(media.metadata()->at(cow::RingKey()), &record));
    const cow::Ring ring(record, 2);
    const auto rows = media.metadata();
    for (size_t i = 0; i < 2; ++i) media.FlipBit(ring.offset(i) / kSector, 50 * 8);
    machine = std::make_unique<Machine>(scheduler, media, 2, cow::PoolOptions{});
    const Status s = machine->Start();
    ASSERT_FALSE(s.ok());
    EXPECT_EQ(ErrorKind::kDamaged, s.error().kind);
    EXPECT_EQ(*rows, *media.metadata());
    machine.reset();
}

// A disk has nothing in the journal when it is restored, whatever others are writing.
TEST_F(JournalTest, ADiskIsRestoredWhileOthersOfItsLaneWrite) {
    for (const char* name : {"a", "b", "c"}) Ok(pool().CreateDisk(name, 64 * kMiB));
    EXPECT_EQ(0, Write("c", 0, 4096, 'c'));
    Ok(pool().CreateSnapshots({"c@s"}));
    const std::string data(4096, 'a');
    const auto bytes = std::as_bytes(std::span(data));
    for (uint64_t round = 0; round < 50; ++round) {
        EXPECT_EQ(0, Write("c", 4096, 4096, 'd'));
        Close("c");
        cow::Volume& other = Volume("a");  // of the same lane
        for (uint64_t i = 0; i < 8; ++i) {
            Begin("a", other.Write((round * 8 + i) * 4096, bytes, nullptr));
        }
        Ok(pool().RestoreSnapshot("c@s", std::nullopt, false, false));
        Expect("c", 4096, 4096, '\0');
    }
}

}  // namespace
}  // namespace varve
