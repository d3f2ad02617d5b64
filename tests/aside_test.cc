// Rows of the allocator, and map rows under a journal, that cannot be read: they cost what they are
// about, and nothing else.
#include "cow/format/format.h"
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kBlockBytes;
using cow::kChunkBytes;

class AsideTest : public EngineTest {
  protected:
    using Row = std::pair<std::string, std::string>;

    size_t RowsOf(char letter) {
        const auto rows = media.metadata();
        return static_cast<size_t>(
            std::count_if(rows->begin(), rows->end(),
                          [letter](const auto& row) { return row.first[0] == letter; }));
    }
    void SetRow(const std::string& key, const std::string& value) {
        auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
        (*rows)[key] = value;
        media.SetMetadata(std::move(rows));
    }
    /// Replaces the value of the first row of that letter. Gives what it was.
    Row Damage(const std::string& letter) {
        const Row was = *media.metadata()->lower_bound(letter);
        VARVE_CHECK(was.first.starts_with(letter));
        SetRow(was.first, "rubbish");
        return was;
    }
    void LeaveAll() {
        for (const auto& [name, e] : exports) Detach(e);
        exports.clear();
    }
    void StopUnchecked() {
        LeaveAll();
        ASSERT_TRUE(machine->Stop().ok());
        machine.reset();
    }
    /// The power fails.
    void Crash() {
        media.Cut();
        LeaveAll();
        (void)machine->Stop();
        machine.reset();
        media.Restore();
    }
    /// A disk of eight chunks, each with a block, in a region of its own if it is the first.
    void MakeDisk(const std::string& name, char fill) {
        Ok(pool().CreateDisk(name, 8 * kChunkBytes));
        for (uint64_t c = 0; c < 8; ++c) EXPECT_EQ(0, Write(name, c * kChunkBytes, 4096, fill));
        EXPECT_EQ(0, Flush(name));
    }
    void Restart() {
        StopUnchecked();
        Start(kRegionEach);
    }
    cow::PoolStatus Figures() { return machine->Do(pool().GetStatus()).value(); }

    static constexpr cow::PoolOptions kRegionEach{.lease_blocks_min = cow::kRegionBlocks};
};

TEST_F(AsideTest, ADeletionGoesAroundADamagedRegion) {
    Restart();
    MakeDisk("d", 'd');
    MakeDisk("e", 'e');
    Restart();
    const Row row = Damage("R");
    ASSERT_EQ(0u, cow::KeyNumber(row.first, 0));
    for (const char* name : {"d", "e"}) Ok(pool().DeleteDisk(name, false, false));
    Reclaim();
    const auto status = Figures();
    EXPECT_FALSE(status.failed);
    EXPECT_EQ(8 * kBlockBytes, status.used);
    EXPECT_EQ(1u, status.reclaim_set_aside);
    EXPECT_EQ(cow::Health::kWarning, status.health);
    const auto told =
        std::any_of(status.warnings.begin(), status.warnings.end(),
                    [](const std::string& w) { return w.find("allocator") != std::string::npos; });
    EXPECT_TRUE(told);
    const auto report = cow::CheckMetadata(machine->metadata()).value();
    ASSERT_EQ(1u, report.errors.size()) << report.errors[1];
    MakeDisk("f", 'f');
    Expect("f", 0, 4096, 'f');
    // Again after a restart; and once the row can be read, the space comes back.
    Restart();
    Reclaim();
    EXPECT_FALSE(Figures().failed);
    StopUnchecked();
    SetRow(row.first, row.second);
    Start(kRegionEach);
    Reclaim();
    EXPECT_EQ(8 * kBlockBytes, Used());
    EXPECT_EQ(0u, RowsOf('W'));
}

TEST_F(AsideTest, AHeadMayDropBlocksOfADamagedRegion) {
    Restart();
    MakeDisk("d", 'd');
    EXPECT_EQ(8 * kBlockBytes, Used());  // folded
    Restart();
    const Row row = Damage("R");
    cow::Volume& volume = Volume("d");
    EXPECT_EQ(0, Await(scheduler, volume.executor(), volume.Trim(0, 4 * kChunkBytes)));
    EXPECT_EQ(0, Flush("d"));
    Reclaim();
    EXPECT_FALSE(Figures().failed);
    Expect("d", 0, 4096, 0);
    Expect("d", 5 * kChunkBytes, 4096, 'd');
    EXPECT_EQ(0, Write("d", 0, 4096, 'n'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_EQ(4u, RowsOf('W')) << "who names the blocks?";
    StopUnchecked();
    SetRow(row.first, row.second);
    Start();
    Reclaim();
    EXPECT_EQ(0u, RowsOf('W'));
    EXPECT_EQ(5 * kBlockBytes, Used());
    Expect("d", 0, 4096, 'n');
}

TEST_F(AsideTest, RecoveryGoesAroundADamagedRegion) {
    Restart();
    MakeDisk("d", 'd');
    EXPECT_EQ(8 * kBlockBytes, Used());
    for (uint64_t c = 0; c < 4; ++c) EXPECT_EQ(0, Write("d", c * kChunkBytes + 4096, 4096, 'j'));
    EXPECT_EQ(0, Flush("d"));
    ASSERT_GT(RowsOf('L'), 0u);
    Crash();
    Damage("R");
    Start(kRegionEach);
    EXPECT_EQ(0u, RowsOf('L'));
    MakeDisk("e", 'e');
    for (uint64_t c = 0; c < 8; ++c) {
        Expect("d", c * kChunkBytes, 4096, 'd');
        if (c < 4) Expect("d", c * kChunkBytes + 4096, 4096, 'j');
    }
    Close("d");
    Ok(pool().DeleteDisk("d", false, false));
    Reclaim();
    EXPECT_FALSE(Figures().failed);
    StopUnchecked();
}

TEST_F(AsideTest, ADamagedMapRowUnderAJournalCostsItsChunkOnly) {
    MakeDisk("d", 'd');
    EXPECT_EQ(8 * kBlockBytes, Used());
    for (uint64_t c = 0; c < 4; ++c) EXPECT_EQ(0, Write("d", c * kChunkBytes + 4096, 4096, 'j'));
    EXPECT_EQ(0, Flush("d"));
    ASSERT_GT(RowsOf('L'), 0u);
    Crash();
    const Row row = Damage("M");
    ASSERT_EQ(0u, cow::KeyNumber(row.first, 1));
    Start();
    cow::Volume& volume = Volume("d");
    std::string data(8192, '?');
    const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(data.data()), data.size());
    EXPECT_EQ(EIO, Await(scheduler, volume.executor(), volume.Read(0, bytes, nullptr)));
    for (uint64_t c = 1; c < 8; ++c) {
        Expect("d", c * kChunkBytes, 4096, 'd');
        if (c < 4) Expect("d", c * kChunkBytes + 4096, 4096, 'j');
    }
    EXPECT_EQ(0, Write("d", kChunkBytes, 4096, 'n'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_FALSE(Figures().failed);
    StopUnchecked();
}

}  // namespace
}  // namespace varve
