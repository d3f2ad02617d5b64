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
    Status StartOnce() {
        machine = std::make_unique<Machine>(scheduler, media, lanes, cow::PoolOptions{});
        return machine->Start();
    }
    /// The disk's first `chunks` get a block of 'j' at `offset`, which only the journal has when
    /// the power fails.
    void CrashWithJournal(const std::string& name, uint64_t chunks, uint64_t offset) {
        const size_t rows = RowsOf('M');
        for (uint64_t c = 0; c < chunks; ++c) {
            EXPECT_EQ(0, Write(name, c * kChunkBytes + offset, 4096, 'j'));
        }
        EXPECT_EQ(0, Flush(name));
        ASSERT_EQ(rows, RowsOf('M'));
        Crash();
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
    Errno ReadError(const std::string& name, uint64_t offset) {
        cow::Volume& volume = Volume(name);
        std::string data(4096, '?');
        const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(data.data()), data.size());
        return Await(scheduler, volume.executor(), volume.Read(offset, bytes, nullptr));
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

TEST_F(AsideTest, ADiskWhoseShrinkFailedCanBeDeleted) {
    MakeDisk("d", 'd');
    Restart();
    Damage("M");
    EXPECT_EQ(ErrorKind::kIo, Fails(pool().ResizeDisk("d", 4096, true, false)));
    for (int start = 0; start < 2; ++start) {  // it fails again when the server has started
        EXPECT_EQ(ErrorKind::kBusy, Fails(pool().RenameDisk("d", "e")));
        EXPECT_EQ(ErrorKind::kBusy, Fails(pool().ResizeDisk("d", kMiB, false, false)));
        EXPECT_EQ(ErrorKind::kBusy, machine->Do(pool().OpenExport("d")).error().kind);
        EXPECT_EQ(ErrorKind::kIo, Fails(pool().ResizeDisk("d", 4096, true, false)));
        Restart();
    }
    Ok(pool().DeleteDisk("d", false, false));
    Reclaim();
    EXPECT_FALSE(Figures().failed);
    EXPECT_EQ(kBlockBytes, Used());  // of the damaged row
    EXPECT_EQ(ErrorKind::kNotFound, Fails(pool().DeleteDisk("d", false, false)));
    StopUnchecked();
}

TEST_F(AsideTest, AShrinkThatFailedCanBeRepeated) {
    MakeDisk("d", 'd');
    Restart();
    const Row row = Damage("M");
    EXPECT_EQ(ErrorKind::kIo, Fails(pool().ResizeDisk("d", 4096, true, false)));
    SetRow(row.first, row.second);
    Ok(pool().ResizeDisk("d", 4096, true, false));
    Ok(pool().ResizeDisk("d", 8 * kChunkBytes, false, false));
    Expect("d", 0, 4096, 'd');
    Expect("d", 4096, 8 * kChunkBytes - 4096, 0);
    Reclaim();
    EXPECT_EQ(kBlockBytes, Used());
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
    ASSERT_NO_FATAL_FAILURE(CrashWithJournal("d", 4, 4096));
    Damage("R");
    Start(kRegionEach);
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

// Its free blocks are lost, and that is all there is to tell.
TEST_F(AsideTest, ARegionThatRecoveryRenewedIsReadableAgain) {
    Restart();
    for (const std::string name : {"a", "b"}) MakeDisk(name, name[0]);
    EXPECT_EQ(16 * kBlockBytes, Used());
    CrashWithJournal("b", 1, 4096);
    const std::string key = cow::RegionKey(1);
    SetRow(key, "rubbish");
    Start();
    EXPECT_EQ("f", media.metadata()->at(key));
    Expect("b", 4096, 4096, 'j');
    const auto report = cow::CheckMetadata(machine->metadata()).value();
    EXPECT_EQ(0u, report.errors.size()) << report.errors[0];
    EXPECT_EQ(cow::kRegionBlocks - 9, report.leaked_blocks);
    EXPECT_EQ((8 + cow::kRegionBlocks) * kBlockBytes, Used());
    StopUnchecked();
}

// What those hold that cannot be read is not known, so it may count twice until they can.
TEST_F(AsideTest, BlocksOfRenewedRegionsCountAsUsed) {
    Restart();
    for (const std::string name : {"a", "b"}) MakeDisk(name, name[0]);
    EXPECT_EQ(16 * kBlockBytes, Used());
    CrashWithJournal("b", 1, 4096);
    const std::string readable = media.metadata()->at(cow::RegionKey(0));
    for (const uint64_t region : {0, 1}) SetRow(cow::RegionKey(region), "rubbish");
    Start();
    EXPECT_EQ("f", media.metadata()->at(cow::RegionKey(1)));
    EXPECT_EQ((16 + cow::kRegionBlocks) * kBlockBytes, Used());
    EXPECT_EQ(0, Write("a", 4096, 4096, 'j'));  // into the third
    EXPECT_EQ(0, Flush("a"));
    Crash();
    SetRow(cow::RegionKey(0), readable);
    SetRow(cow::RegionKey(2), "rubbish");
    Start();
    EXPECT_EQ("f", media.metadata()->at(cow::RegionKey(2)));
    EXPECT_EQ((8 + 2 * cow::kRegionBlocks) * kBlockBytes, Used());
    EXPECT_EQ(0u, cow::CheckMetadata(machine->metadata()).value().errors.size());
    StopUnchecked();
}

// Runs that begin in a damaged region and end in one that is well: both have to know of them. What
// is written afterwards must not get their blocks, even if the damage passes.
TEST_F(AsideTest, RecoveryMarksRunsThatReachIntoADamagedRegion) {
    MakeDisk("a", 'a');
    EXPECT_EQ(8 * kBlockBytes, Used());  // in a row of region 0
    constexpr uint64_t kChunks = cow::kRegionBlocks / cow::kChunkBlocks;
    Ok(pool().CreateDisk("d", kChunks * kChunkBytes));
    for (uint64_t c = 0; c < kChunks; ++c) {
        EXPECT_EQ(0, Write("d", c * kChunkBytes, kChunkBytes, static_cast<char>('A' + c % 26)));
    }
    EXPECT_EQ(0, Flush("d"));
    ASSERT_EQ(8u, RowsOf('M')) << "only of a";
    Crash();
    const Row row = Damage("R");
    ASSERT_EQ(0u, cow::KeyNumber(row.first, 0));
    Start();
    EXPECT_NE("rubbish", media.metadata()->at(row.first));
    Ok(pool().CreateDisk("e", kChunks * kChunkBytes));
    for (uint64_t c = 0; c < kChunks; ++c) {
        EXPECT_EQ(0, Write("e", c * kChunkBytes, kChunkBytes, 'e'));
    }
    EXPECT_EQ(0, Flush("e"));
    for (uint64_t c = 0; c < kChunks; ++c) {
        Expect("d", c * kChunkBytes, kChunkBytes, static_cast<char>('A' + c % 26));
    }
    // What was free there is lost, nothing else.
    const auto report = cow::CheckMetadata(machine->metadata()).value();
    for (const std::string& error : report.errors) {
        EXPECT_NE(std::string::npos, error.find("marked as used, ")) << error;
    }
    StopUnchecked();
}

// Recovery has claimed a part of its blocks there, and goes on after the next crash.
TEST_F(AsideTest, RecoveryThatGaveARegionANewRowMayBeInterrupted) {
    MakeDisk("a", 'a');
    EXPECT_EQ(8 * kBlockBytes, Used());
    // More than are folded in one commit, and as many as the ring takes before it asks for a fold.
    const std::map<std::string, uint64_t> chunks = {{"d", 300}, {"e", 50}};
    for (const auto& [name, count] : chunks) {
        Ok(pool().CreateDisk(name, count * kChunkBytes));
        for (uint64_t c = 0; c < count; ++c) {
            EXPECT_EQ(0, Write(name, c * kChunkBytes, 4096, name[0]));
        }
        EXPECT_EQ(0, Flush(name));
        EXPECT_EQ(0, Flush(name));  // known to be durable: recovery need not look at the blocks
    }
    ASSERT_EQ(8u, RowsOf('M')) << "only of a";
    Crash();
    ASSERT_EQ(0u, cow::KeyNumber(Damage("R").first, 0));
    const auto crashed = media.metadata();
    const auto data = media.data();
    bool whole = false;
    for (uint64_t calls = 1; !whole; ++calls) {
        media.CutAfter(calls);
        (void)StartOnce();
        whole = media.power();
        if (machine->runs()) (void)machine->Stop();
        machine.reset();
        media.Restore();
        const Status again = StartOnce();
        ASSERT_TRUE(again.ok()) << "after " << calls << " calls: " << again.error().message;
        for (const auto& [name, count] : chunks) {
            for (uint64_t c = 0; c < count; c += 47) Expect(name, c * kChunkBytes, 4096, name[0]);
        }
        StopUnchecked();
        media.SetMetadata(crashed);
        media.SetData(data);
    }
}

TEST_F(AsideTest, ADamagedMapRowUnderAJournalCostsItsChunkOnly) {
    MakeDisk("d", 'd');
    EXPECT_EQ(8 * kBlockBytes, Used());
    ASSERT_NO_FATAL_FAILURE(CrashWithJournal("d", 4, 4096));
    const Row row = Damage("M");
    ASSERT_EQ(0u, cow::KeyNumber(row.first, 1));
    Start();
    EXPECT_EQ(EIO, ReadError("d", 0));
    for (uint64_t c = 1; c < 8; ++c) {
        Expect("d", c * kChunkBytes, 4096, 'd');
        if (c < 4) Expect("d", c * kChunkBytes + 4096, 4096, 'j');
    }
    EXPECT_EQ(0, Write("d", kChunkBytes, 4096, 'n'));
    EXPECT_EQ(0, Flush("d"));
    EXPECT_FALSE(Figures().failed);
    StopUnchecked();
}

// What was flushed is lost with the row below it. If that can be read again, it is too old.
TEST_F(AsideTest, AChunkThatLostItsLastWritesStaysUnreadable) {
    MakeDisk("d", 'd');
    EXPECT_EQ(8 * kBlockBytes, Used());
    Ok(pool().CreateSnapshots({"d@1"}));
    ASSERT_NO_FATAL_FAILURE(CrashWithJournal("d", 4, 0));
    const Row row = Damage("M");
    ASSERT_EQ(0u, cow::KeyNumber(row.first, 1));
    Start();
    StopUnchecked();
    SetRow(row.first, row.second);
    Start();
    EXPECT_EQ(EIO, ReadError("d", 0));
    Expect("d@1", 0, 4096, 'd');
    for (uint64_t c = 1; c < 4; ++c) Expect("d", c * kChunkBytes, 4096, 'j');
    EXPECT_FALSE(Figures().failed);
    StopUnchecked();
}

// Whatever a start is ended by, one that is refused tells of nothing else, and the one that opens
// the pool tells of all that is lost.
TEST_F(AsideTest, LossesAreToldByTheStartThatOpensThePool) {
    for (const std::string name : {"d", "e"}) MakeDisk(name, name[0]);
    EXPECT_EQ(16 * kBlockBytes, Used());  // folded
    for (uint64_t c = 0; c < 4; ++c) EXPECT_EQ(0, Write("d", c * kChunkBytes + 4096, 4096, 'j'));
    EXPECT_EQ(0, Flush("d"));
    ASSERT_NO_FATAL_FAILURE(CrashWithJournal("e", 4, 4096));
    ASSERT_EQ(0u, cow::KeyNumber(Damage("M").first, 1));
    ASSERT_EQ(0u, cow::KeyNumber(Damage("R").first, 0));
    const auto crashed = media.metadata();
    const auto data = media.data();
    const auto start = [this](Status* status) {
        testing::internal::CaptureStderr();
        *status = StartOnce();
        return testing::internal::GetCapturedStderr();
    };
    bool opened = false;
    unsigned again = 0;
    for (uint64_t calls = 1; !opened; ++calls) {
        media.SetMetadata(crashed);
        media.SetData(data);
        media.CutAfter(calls);
        Status status;
        std::string said = start(&status);
        opened = status.ok();
        if (!opened) {
            EXPECT_EQ("", said) << calls << ": " << status.error().message;
            machine.reset();
            media.Restore();
            // Cut off as it was about to tell: the journal is empty.
            const bool over = media.metadata()->at(cow::RingKey()) != crashed->at(cow::RingKey());
            again += !over;
            said = start(&status);
            ASSERT_TRUE(status.ok()) << calls << ": " << status.error().message;
            EXPECT_TRUE(over || said.find("disk d has lost") != std::string::npos) << calls;
        } else {
            media.CutAfter(uint64_t{1} << 40);
            EXPECT_NE(std::string::npos, said.find("disk d has lost"));
            EXPECT_NE(std::string::npos, said.find("allocator region 0 is damaged"));
        }
        EXPECT_EQ(EIO, ReadError("d", 0));
        StopUnchecked();
        media.Restore();
    }
    EXPECT_LT(1u, again);
}

// A damaged page of the store holds the rows of many chunks, and meets whoever reads beside it.
TEST_F(AsideTest, ADamagedPageUnderAJournalCostsItsChunksOnly) {
    MakeDisk("d", 'd');
    EXPECT_EQ(8 * kBlockBytes, Used());
    ASSERT_NO_FATAL_FAILURE(CrashWithJournal("d", 8, 4096));
    const std::string first = media.metadata()->lower_bound("M")->first;
    const BranchId branch{cow::KeyNumber(first, 0)};
    media.bad_page = {cow::MapKey(branch, ChunkIndex{2}, cow::kHead),
                      cow::MapKey(branch, ChunkIndex{5}, cow::kHead)};
    Start();
    media.bad_page = {};
    Restart();
    for (uint64_t c = 0; c < 8; ++c) {
        const bool lost = c >= 2 && c < 5;
        EXPECT_EQ(lost ? EIO : 0, ReadError("d", c * kChunkBytes)) << c;
        if (!lost) Expect("d", c * kChunkBytes + 4096, 4096, 'j');
    }
    StopUnchecked();
}

// One block in a damaged region must not keep the other blocks of its chunk, nor its rows, for
// ever: a disk that is rewritten between snapshots would fill the pool.
TEST_F(AsideTest, ADamagedRegionKeepsItsOwnBlocksOnly) {
    Restart();
    Ok(pool().CreateDisk("d", 2 * kChunkBytes));
    EXPECT_EQ(0, Write("d", 0, 4096, 'd'));
    EXPECT_EQ(kBlockBytes, Used());
    Restart();
    const Row row = Damage("R");
    for (int cycle = 0; cycle < 10; ++cycle) {
        for (uint64_t b = 0; b < 32; ++b) EXPECT_EQ(0, Write("d", b * 4096, 4096, 'x'));
        EXPECT_EQ(0, Flush("d"));
        Ok(pool().CreateSnapshots({"d@" + std::to_string(cycle)}));
        if (cycle > 0) Ok(pool().DeleteSnapshot("d@" + std::to_string(cycle - 1), false));
        Reclaim();
    }
    EXPECT_FALSE(Figures().failed);
    EXPECT_GE(65 * kBlockBytes, Used());
    EXPECT_GE(3u, RowsOf('M'));
    EXPECT_EQ(1u, RowsOf('W')) << "who names the block?";
    Restart();
    Reclaim();  // which comes by that note
    EXPECT_EQ(1u, RowsOf('W'));
    StopUnchecked();
    SetRow(row.first, row.second);
    Start();
    Reclaim();
    EXPECT_EQ(0u, RowsOf('W'));
    EXPECT_EQ(32 * kBlockBytes, Used());
}

// Notes behind a damaged page are found all the same.
TEST_F(AsideTest, ADamagedPageOfNotesCostsItsBranchOnly) {
    Restart();
    for (const std::string name : {"a", "b", "c"}) MakeDisk(name, name[0]);
    EXPECT_EQ(24 * kBlockBytes, Used());
    Restart();
    const auto sound = media.metadata();
    for (const auto& [key, value] : *sound) {  // so that there are notes
        if (key[0] == 'R') SetRow(key, "rubbish");
    }
    for (const std::string name : {"a", "b", "c"}) {
        cow::Volume& volume = Volume(name);
        EXPECT_EQ(0, Await(scheduler, volume.executor(), volume.Trim(0, 8 * kChunkBytes)));
        EXPECT_EQ(0, Flush(name));
        EXPECT_EQ(24 * kBlockBytes, Used());  // folded
    }
    StopUnchecked();
    for (const auto& [key, value] : *sound) {
        if (key[0] == 'R') SetRow(key, value);
    }
    ASSERT_EQ(24u, RowsOf('W'));
    const std::string branch = media.metadata()->lower_bound("W")->first.substr(0, 9);
    media.bad_page = {branch, cow::PrefixEnd(branch)};
    Start();
    Reclaim();
    EXPECT_EQ(8 * kBlockBytes, Used());
    EXPECT_EQ(1u, Figures().reclaim_set_aside);
    media.bad_page = {};
    Restart();
    Reclaim();
    EXPECT_EQ(0u, Used());
}

}  // namespace
}  // namespace varve
