// The journal of map changes: what its rows hold, and what a crash leaves of it.
#include "cow/head/journal.h"

#include "cow/format/format.h"
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kChunkBytes;
using cow::MapChange;

MapChange ChangeOf(uint64_t chunk, uint64_t first, uint64_t count, uint64_t place) {
    MapChange change{.chunk = ChunkIndex{chunk}};
    change.first = first;
    change.count = count;
    change.place = place;
    return change;
}

TEST(JournalRowTest, WhatIsEncodedIsDecodedInOrder) {
    const std::vector<MapChange> changes = {ChangeOf(7, 0, 64, 1), ChangeOf(0, 63, 1, 0),
                                            ChangeOf(7, 3, 2, (uint64_t{1} << 48) - 2),
                                            ChangeOf((uint64_t{1} << 40) - 1, 10, 1, 12345)};
    std::vector<MapChange> decoded;
    EXPECT_TRUE(cow::DecodeChanges(cow::EncodeChanges(changes), &decoded));
    EXPECT_EQ(changes, decoded);
}

TEST(JournalRowTest, WhatBreaksARuleIsRefused) {
    const std::string sound = cow::EncodeChanges(std::vector{ChangeOf(7, 60, 4, 100)});
    std::vector<MapChange> decoded;
    EXPECT_FALSE(cow::DecodeChanges("", &decoded));
    EXPECT_FALSE(cow::DecodeChanges(sound.substr(0, sound.size() - 1), &decoded));
    EXPECT_FALSE(cow::DecodeChanges(sound + "x", &decoded));
    for (const MapChange& bad :
         {ChangeOf(7, 61, 4, 100), ChangeOf(7, 0, 0, 100),
          ChangeOf(7, 0, 2, (uint64_t{1} << 48) - 1), ChangeOf(uint64_t{1} << 40, 0, 1, 100)}) {
        EXPECT_FALSE(cow::DecodeChanges(cow::EncodeChanges(std::vector{bad}), &decoded));
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
    /// The power fails; what was not synced is lost or not.
    void Crash() {
        media.Cut();
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
};

TEST_F(JournalTest, AFlushWritesAJournalRowAndNoMapRow) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 3 * kChunkBytes, 'a'));
    EXPECT_EQ(0u, RowsOf('L'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(1u, RowsOf('L'));
    EXPECT_EQ(0u, RowsOf('M'));
    CheckClean();
    EXPECT_EQ(3 * kChunkBytes, Used());  // figures are taken from map rows
    EXPECT_EQ(0u, RowsOf('L'));
    EXPECT_EQ(3u, RowsOf('M'));
}

/// Writes and trims the same few blocks over and over, and flushes now and then.
Task<void> Rewrite(cow::Volume* volume, uint64_t times, uint64_t each, bool* done) {
    co_await Hop(volume->executor());
    const std::vector<std::byte> block(4096);
    const std::span<const std::byte> bytes(block);
    for (uint64_t i = 0; i < times; ++i) {
        const uint64_t offset = i % 4 * 8192;
        Errno error = co_await volume->Write(offset, bytes);
        if (error == 0) error = co_await volume->Trim(offset, 4096);
        if (error == 0 && i % each == 0) error = co_await volume->Flush();
        VARVE_CHECK(error == 0);
    }
    *done = true;
}

// Chunks that change often are few chunks, so it takes more than their number to start a pass.
TEST_F(JournalTest, ChangesOfAFewChunksAreFoldedToo) {
    Stop();
    cow::PoolOptions options;
    options.map_cache_bytes = 1 << 20;
    Start(options);
    const cow::HeadLimits limits = cow::HeadLimits::Of((1 << 20) * 3 / 4, ~uint64_t{0});
    // What is under way when the bound is reached: one request, and the row of a flush.
    media.journal_max = limits.journal_hard + 2 * cow::kJournalRowWeight;
    Ok(pool().CreateDisk("d", kMiB));
    for (const uint64_t each : {1000, 1}) {  // long rows; many rows
        bool done = false;
        Spawn(Rewrite(&Volume("d"), 3 * limits.journal_hard, each, &done));
        ASSERT_TRUE(scheduler.RunUntil([&] { return done; }));
        EXPECT_EQ("", media.broken);
    }
    // The pool goes on from there after a crash, and folds what is left.
    EXPECT_EQ(0, Write("d", 0, 4096, 'x'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_LT(0u, media.journal_weight);
    Crash();
    Start(options);
    EXPECT_EQ(0u, media.journal_weight);
    Expect("d", 0, 4096, 'x');
}

TEST_F(JournalTest, WhatWasFlushedIsFoldedAfterACrash) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(0, Write("d", 4096, 4096, 'b'));
    {
        cow::Volume& volume = Volume("d");
        EXPECT_EQ(0, Await(scheduler, volume.executor(), volume.Trim(kChunkBytes, kChunkBytes)));
    }
    EXPECT_EQ(0, Flush("d"));
    EXPECT_LE(1u, RowsOf('L'));
    Crash();
    Start();
    EXPECT_EQ(0u, RowsOf('L'));
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
    Ok(pool().CreateDisk("d", 200 * kMiB));
    for (uint64_t chunk = 0; chunk < 700; ++chunk) {
        EXPECT_EQ(0, Write("d", chunk * kChunkBytes, 4096, static_cast<char>('a' + chunk % 26)));
    }
    EXPECT_EQ(0, Flush("d"));
    const uint64_t journal = RowsOf('L');
    EXPECT_LE(1u, journal);
    Crash();
    unsigned crashes = 0;
    for (;; ++crashes) {
        media.CutAfter(1 + crashes);
        machine = std::make_unique<Machine>(scheduler, media, 2, cow::PoolOptions{});
        if (machine->Start().ok()) break;
        machine.reset();
        media.Restore();
    }
    media.CutAfter(uint64_t{1} << 40);
    EXPECT_LE(2u, crashes);
    EXPECT_EQ(0u, RowsOf('L'));
    for (uint64_t chunk = 0; chunk < 700; ++chunk) {
        Expect("d", chunk * kChunkBytes, 4096, static_cast<char>('a' + chunk % 26));
    }
}

TEST_F(JournalTest, ADamagedJournalIsRefusedAndLeftAlone) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    EXPECT_EQ(0, Flush("d"));
    Crash();
    const auto before = media.metadata();
    const std::string key = before->lower_bound("L")->first, value = before->at(key);
    SetRow(key, value + "x");
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
    media.SetMetadata(before);
    Start();
    Expect("d", 0, kMiB, 'a');
}

TEST_F(JournalTest, CheckFindsABlockOfTheJournalThatHasAnotherOwner) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kChunkBytes, 'a'));
    EXPECT_EQ(kChunkBytes, Used());  // folded
    EXPECT_EQ(0, Write("d", kChunkBytes, 4096, 'b'));
    EXPECT_EQ(0, Flush("d"));
    CheckClean();
    const auto before = media.metadata();
    const std::string key = before->lower_bound("L")->first;
    std::vector<MapChange> changes;
    ASSERT_TRUE(cow::DecodeChanges(before->at(key), &changes));
    changes[0].place = changes[0].place - 1;  // the last block of the first chunk
    SetRow(key, cow::EncodeChanges(changes));
    const auto report = cow::CheckMetadata(machine->metadata());
    ASSERT_EQ(1u, report.value().errors.size());
    EXPECT_NE(std::string::npos, report.value().errors[0].find("another owner"));
    media.SetMetadata(before);
}

}  // namespace
}  // namespace varve
