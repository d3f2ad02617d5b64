// Checksums of frozen blocks: damage is an I/O error, and nothing else ever is.
#include "cow/format/runs.h"
#include "cow/history/catalog.h"
#include "cow/volume/checksums.h"
#include "cow/volume/map_reader.h"
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kBlockBytes;
using cow::SumsRow;

class ChecksumTest : public EngineTest {
  protected:
    static Task<void> WaitTask(Executor* home, cow::Pool* pool, bool* done) {
        co_await Hop(*home);
        co_await pool->WaitForChecksums();
        *done = true;
    }
    bool WaitForChecksums() {
        bool done = false;
        Spawn(WaitTask(&machine->home(), &machine->pool(), &done));
        return scheduler.RunUntil([&] { return done; });
    }
    /// Where a block of a snapshot lies in the data file.
    uint64_t PlaceOf(const std::string& snapshot, uint64_t offset) {
        const auto view = machine->metadata().View();
        const auto catalog = cow::Catalog::Load(*view);
        const auto& record =
            catalog.value().snapshot(catalog.value().FindSnapshot(snapshot).value());
        const ChunkIndex chunk{offset / cow::kChunkBytes};
        const auto rows =
            cow::ReadMap(*view, catalog.value().history().LineOf(record.branch, record.generation),
                         chunk, ChunkIndex{chunk.value + 1});
        const auto block = static_cast<uint32_t>(offset % cow::kChunkBytes / kBlockBytes);
        const cow::Piece piece = cow::PieceAt(rows.value().rows.at(0).runs, block, block + 1);
        VARVE_CHECK(piece.mapped);
        return piece.place;
    }
    void Damage(const std::string& snapshot, uint64_t offset) {
        media.FlipBit(PlaceOf(snapshot, offset) * kBlockBytes / kSector + 3, 1001);
    }
    Errno ReadError(const std::string& name, uint64_t offset, uint64_t length) {
        std::string data(length, '?');
        cow::Volume& v = Volume(name);
        const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(data.data()), data.size());
        return Await(scheduler, v.executor(), v.Read(offset, bytes, nullptr));
    }
    cow::ScrubReport Scrub(std::optional<std::string> disk = std::nullopt) {
        auto report = machine->Do(pool().Scrub(std::move(disk)));
        VARVE_CHECK(report.ok());
        return std::move(report.value());
    }
    /// "disk@snapshot:offset ...", sorted.
    static std::string Named(const cow::ScrubReport& report) {
        std::set<std::string> names;
        for (const cow::ScrubDamage& damage : report.damage) {
            names.insert(damage.disk + "@" + damage.snapshot + ":" + std::to_string(damage.offset));
        }
        std::string text;
        for (const std::string& name : names) text += (text.empty() ? "" : " ") + name;
        return text;
    }
    cow::PoolStatus Figures() { return machine->Do(pool().GetStatus()).value(); }
    void ForgetChecksums() {
        auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
        std::erase_if(*rows,
                      [](const auto& row) { return row.first[0] == 'C' || row.first[0] == 'K'; });
        media.SetMetadata(std::move(rows));
    }
};

TEST_F(ChecksumTest, DamageIsAnErrorForAllThatShareTheBlockAndForNobodyElse) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    Ok(pool().CloneSnapshot("d@s", "c"));
    ASSERT_TRUE(WaitForChecksums());
    Expect("c", 0, kMiB, 'a');
    Damage("d@s", 8192);
    for (const std::string name : {"d@s", "c", "d"}) {
        EXPECT_EQ(EIO, ReadError(name, 8192, 4096)) << name;
        EXPECT_EQ(EIO, ReadError(name, 8192 + 512, 512)) << name;  // although this part is sound
        EXPECT_EQ(EIO, ReadError(name, 0, kMiB)) << name;
        EXPECT_EQ(EIO, ReadError(name, 7000, 1200)) << name;
        Expect(name, 0, 8192, 'a');
        Expect(name, 12288, kMiB - 12288, 'a');
    }
    EXPECT_EQ(4096u, Figures().damaged_bytes);
    EXPECT_EQ("c@:8192 d@:8192 d@s:8192", Named(Scrub()));
    EXPECT_EQ("c@:8192 d@:8192 d@s:8192", Named(Scrub("c")));
    EXPECT_EQ(4096u, Figures().damaged_bytes);
}

TEST_F(ChecksumTest, APartOfADamagedBlockIsNotWritten) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    ASSERT_TRUE(WaitForChecksums());
    Damage("d@s", 8192);
    EXPECT_EQ(EIO, Write("d", 8192, 100, 'b'));
    EXPECT_EQ(EIO, Write("d", 4096, 4196, 'b'));
    EXPECT_EQ(EIO, ReadError("d", 8192, 4096));
    EXPECT_EQ(0, Write("d", 8192, 4096, 'b'));
    EXPECT_EQ(0, Write("d", 8192, 100, 'c'));
    Expect("d", 8192, 100, 'c');
    Expect("d", 8292, 3996, 'b');
    EXPECT_EQ("d@s:8192", Named(Scrub()));
    Ok(pool().DeleteSnapshot("d@s", false));
    Reclaim();
    EXPECT_EQ("", Named(Scrub()));
}

TEST_F(ChecksumTest, RestoringBringsDamageBackAsAnErrorOnly) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'b'));
    ASSERT_TRUE(WaitForChecksums());
    Damage("d@s", 4096);
    Expect("d", 0, kMiB, 'b');
    Close("d");
    Ok(pool().RestoreSnapshot("d@s", "kept", false, false));
    ASSERT_TRUE(WaitForChecksums());
    EXPECT_EQ(EIO, ReadError("d", 4096, 4096));
    Expect("d", 0, 4096, 'a');
    Expect("d@kept", 0, kMiB, 'b');
    Damage("d@kept", 0);
    EXPECT_EQ(EIO, ReadError("d@kept", 0, 1));
    EXPECT_EQ("d@:4096 d@kept:0 d@s:4096", Named(Scrub("d")));
}

TEST_F(ChecksumTest, WhatNobodyWroteTwiceIsVerifiedOnce) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    for (const char fill : std::string("abc")) {
        EXPECT_EQ(0, Write("d", static_cast<uint64_t>(fill - 'a') * kMiB, kMiB, fill));
        Ok(pool().CreateSnapshots({std::string("d@") + fill}));
    }
    EXPECT_EQ(0, Write("d", 0, 4096, 'z'));  // of the present generation
    ASSERT_TRUE(WaitForChecksums());
    const cow::ScrubReport report = Scrub();
    EXPECT_TRUE(report.ok());
    EXPECT_EQ(3 * kMiB / kBlockBytes, report.verified_blocks);
    EXPECT_EQ(0u, report.unverified_blocks);
    EXPECT_EQ(3 * kMiB, Figures().checksummed_bytes);
    EXPECT_EQ(0u, Figures().checksums_pending);
    const auto missing = machine->Do(pool().Scrub("x"));
    EXPECT_EQ(ErrorKind::kNotFound, missing.error().kind);
}

TEST_F(ChecksumTest, ASnapshotThatGoesBeforeItsTurnLeavesNoGap) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@a"}));
    Ok(pool().DeleteSnapshot("d@a", false));
    EXPECT_EQ(0, Write("d", 2 * kMiB, kMiB, 'b'));
    Ok(pool().CreateSnapshots({"d@b"}));
    ASSERT_TRUE(WaitForChecksums());
    const cow::ScrubReport report = Scrub();
    EXPECT_EQ(0u, report.unverified_blocks);
    EXPECT_EQ(2 * kMiB / kBlockBytes, report.verified_blocks);
    Damage("d@b", 0);
    EXPECT_EQ(EIO, ReadError("d@b", 0, 4096));
    EXPECT_EQ(EIO, ReadError("d", 0, 4096));
}

TEST_F(ChecksumTest, PlacesThatAreUsedAgainGiveNoFalseAlarm) {
    Stop();
    cow::PoolOptions options;
    options.capacity_max = 16 * kMiB;
    Start(options);
    Ok(pool().CreateDisk("d", 5 * kMiB));
    for (unsigned i = 0; i < 40; ++i) {
        const char fill = static_cast<char>('A' + i);
        EXPECT_EQ(0, Write("d", scheduler.Draw(4) * kMiB, kMiB, fill));
        EXPECT_EQ(0, Write("d", 4 * kMiB, kMiB, fill));
        Ok(pool().CreateSnapshots({"d@s"}));
        if (scheduler.Chance(0.7)) {
            ASSERT_TRUE(WaitForChecksums());
        }
        Expect("d@s", 4 * kMiB, kMiB, fill);
        EXPECT_EQ(0, ReadError("d", 0, 5 * kMiB));
        EXPECT_TRUE(Scrub().ok());
        Close("d@s");
        Ok(pool().DeleteSnapshot("d@s", false));
        Reclaim();
    }
    EXPECT_EQ(0u, Figures().damaged_bytes);
}

TEST_F(ChecksumTest, AFreeRegionKeepsNoChecksums) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    ASSERT_TRUE(WaitForChecksums());
    const auto report = machine->Do(pool().Check());
    EXPECT_EQ(kMiB / kBlockBytes, report.value().checksums);
    Close("d");
    Ok(pool().DeleteDisk("d", true, false));
    Reclaim();
    EXPECT_EQ(0u, machine->Do(pool().Check()).value().checksums);
}

TEST_F(ChecksumTest, WhatClonesOfADeletedDiskShareIsVerifiedOnce) {
    Ok(pool().CreateDisk("golden", 10 * kMiB));
    EXPECT_EQ(0, Write("golden", 0, kMiB, 'g'));
    Ok(pool().CreateSnapshots({"golden@s"}));
    for (const char* name : {"c1", "c2", "c3"}) Ok(pool().CloneSnapshot("golden@s", name));
    ASSERT_TRUE(WaitForChecksums());
    Damage("golden@s", 8192);
    Damage("golden@s", 512 << 10);
    Close("golden");
    Ok(pool().DeleteDisk("golden", true, false));
    // One of the blocks that are damaged is seen by two of them only.
    EXPECT_EQ(0, Write("c1", 512 << 10, 4096, '1'));
    EXPECT_EQ(0, Write("c3", 4096, 4096, '3'));
    Ok(pool().CreateSnapshots({"c3@t"}));
    ASSERT_TRUE(WaitForChecksums());
    Reclaim();
    const cow::ScrubReport report = Scrub();
    EXPECT_EQ("c1@:8192 c2@:524288 c2@:8192 c3@:524288 c3@:8192 c3@t:524288 c3@t:8192",
              Named(report));
    EXPECT_EQ(2u, report.damaged_blocks);
    EXPECT_EQ(kMiB / kBlockBytes + 1, report.verified_blocks);
}

TEST_F(ChecksumTest, APoolWithoutChecksumsGetsThem) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    ASSERT_TRUE(WaitForChecksums());
    Stop();
    ForgetChecksums();
    Start();
    ASSERT_TRUE(WaitForChecksums());
    EXPECT_EQ(kMiB, Figures().checksummed_bytes);
    EXPECT_EQ(0u, Scrub().unverified_blocks);
    Stop();
    Start();
    ASSERT_TRUE(WaitForChecksums());
    EXPECT_EQ(0u, Figures().checksummed_bytes);  // nothing was left to do
    EXPECT_EQ(kMiB / kBlockBytes, Scrub().verified_blocks);
}

TEST_F(ChecksumTest, AnUnreadableRowIsReportedAndStopsNobody) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, kMiB, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    ASSERT_TRUE(WaitForChecksums());
    auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
    const auto first = rows->lower_bound("C");
    first->second.pop_back();
    const auto whole = media.metadata();
    media.SetMetadata(rows);
    Expect("d@s", 0, kMiB, 'a');
    const auto report = machine->Do(pool().Check());
    EXPECT_FALSE(report.value().ok());
    EXPECT_GT(Scrub().unverified_blocks, 0u);
    media.SetMetadata(whole);
}

TEST_F(ChecksumTest, ABlockThatCannotBeReadIsNamed) {
    Ok(pool().CreateDisk("d", 10 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 4096, 'a'));
    Ok(pool().CreateSnapshots({"d@s"}));
    ASSERT_TRUE(WaitForChecksums());
    media.faults.read_error = 1;
    const cow::ScrubReport report = Scrub();
    media.faults.read_error = 0;
    EXPECT_EQ("d@:0 d@s:0", Named(report));
    EXPECT_TRUE(report.damage.at(0).unreadable);
    EXPECT_TRUE(Scrub().ok());
}

Task<void> CloseTask(Executor* home, cow::Pool* pool, uint64_t id, bool* done) {
    co_await Hop(*home);
    co_await pool->CloseExport(id);
    *done = true;
}

/// The power fails at each storage operation of the background work in turn.
TEST(ChecksumCrashTest, AtAnyMomentItGoesOnAndEndsComplete) {
    bool through = false;
    for (uint64_t cut = 1; !through; ++cut) {
        Scheduler scheduler(cut);
        Media media(scheduler, 64 * kMiB);
        auto machine = std::make_unique<Machine>(scheduler, media, 2, cow::PoolOptions());
        ASSERT_TRUE(machine->Start().ok());
        ASSERT_TRUE(machine->Do(machine->pool().CreateDisk("d", kMiB)).ok());
        const auto opened = machine->Do(machine->pool().OpenExport("d"));
        const std::vector<std::byte> data(700'000, std::byte{'x'});
        cow::Volume& volume = *opened.value().volume;
        ASSERT_EQ(0, Await(scheduler, volume.executor(), volume.Write(0, data)));
        ASSERT_TRUE(machine->Do(machine->pool().CreateSnapshots({"d@s"})).ok());
        media.CutAfter(cut);
        scheduler.RunAll();
        through = media.power();
        if (through) media.Cut();
        bool closed = false;
        Spawn(CloseTask(&machine->home(), &machine->pool(), opened.value().id, &closed));
        ASSERT_TRUE(scheduler.RunUntil([&] { return closed; }));
        (void)machine->Stop();  // NOLINT: the power is off
        media.Restore();
        machine = std::make_unique<Machine>(scheduler, media, 2, cow::PoolOptions());
        ASSERT_TRUE(machine->Start().ok()) << cut;
        scheduler.RunAll();
        const auto report = machine->Do(machine->pool().Scrub(std::nullopt));
        ASSERT_TRUE(report.ok());
        EXPECT_TRUE(report.value().ok()) << cut;
        EXPECT_EQ(0u, report.value().unverified_blocks) << cut;
        EXPECT_EQ((data.size() + 4095) / 4096, report.value().verified_blocks) << cut;
        const auto check = machine->Do(machine->pool().Check());
        EXPECT_TRUE(check.value().ok()) << cut;
        ASSERT_TRUE(machine->Stop().ok());
        ASSERT_LT(cut, 1000u);
    }
}

TEST(SumsRowTest, SurvivesEncodingAndKnowsOnlyItsBirths) {
    SumsRow::Slots slots{};
    slots[0] = {Generation{5}, 0x01020304};
    slots[1] = {Generation{5}, 0xffffffff};
    slots[2] = {Generation{9}, 0};
    slots[63] = {Generation{1'000'000}, 7};
    const auto row = SumsRow::Decode(SumsRow(slots).Encode());
    ASSERT_TRUE(row.has_value());
    EXPECT_EQ(slots, row->Unpack());
    EXPECT_EQ(0xffffffffu, row->Find(64 * 3 + 1, Generation{5}));
    EXPECT_EQ(7u, row->Find(63, Generation{1'000'000}));
    EXPECT_EQ(std::nullopt, row->Find(1, Generation{9}));
    EXPECT_EQ(std::nullopt, row->Find(3, Generation{5}));
    EXPECT_TRUE(SumsRow::Decode(SumsRow().Encode()).has_value());
    const std::string value = SumsRow(slots).Encode();
    for (size_t length = 0; length < value.size(); ++length) {
        EXPECT_FALSE(SumsRow::Decode(value.substr(0, length)).has_value()) << length;
    }
    EXPECT_FALSE(SumsRow::Decode(value + "x").has_value());
}

TEST(SumsCacheTest, KeepsItsBoundAndForgetsWhatChanged) {
    cow::CacheBudget budget(1000, 1);
    cow::SumsCache cache(budget);
    SumsRow::Slots slots{};
    slots[0] = {Generation{5}, 1};
    for (uint64_t i = 0; i < 100; ++i) {
        cache.Put(i, SumsRow(slots), cache.version());
        EXPECT_LE(cache.used(), 1000u);
        ASSERT_NE(nullptr, cache.Find(i));
    }
    EXPECT_EQ(nullptr, cache.Find(0));
    const uint64_t version = cache.version();
    cache.Forget({99});
    EXPECT_EQ(nullptr, cache.Find(99));
    cache.Put(99, SumsRow(slots), version);  // was read before
    EXPECT_EQ(nullptr, cache.Find(99));
    ASSERT_NE(nullptr, cache.Find(98));
}

}  // namespace
}  // namespace varve
