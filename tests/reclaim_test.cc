// How space comes back: in turns, at a bounded price for each block, around what cannot be read.
// Work is counted, in seeks and rows of the metadata store; no test looks at a clock.
#include <fmt/format.h>

#include <random>

#include "cow/format/format.h"
#include "tests/engine_fixture.h"
#include "tests/simulation/dice.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kBlockBytes;
using cow::kChunkBytes;

class ReclaimTest : public EngineTest {
  protected:
    void Restart(cow::PoolOptions options = {}) {
        Stop();
        Start(options);
    }
    size_t RowsOf(char letter) {
        const auto rows = media.metadata();
        return static_cast<size_t>(
            std::count_if(rows->begin(), rows->end(),
                          [letter](const auto& row) { return row.first[0] == letter; }));
    }
    /// A golden disk of `chunks` chunks with `clones` clones; it and its snapshot are deleted.
    void MakeClones(uint64_t chunks, unsigned clones) {
        Ok(pool().CreateDisk("golden", chunks * kChunkBytes));
        for (uint64_t c = 0; c < chunks; ++c) Write("golden", c * kChunkBytes, 8192, 'g');
        Ok(pool().CreateSnapshots({"golden@s"}));
        for (unsigned i = 0; i < clones; ++i) {
            Ok(pool().CloneSnapshot("golden@s", "c" + std::to_string(i)));
        }
        Close("golden");
        Ok(pool().DeleteDisk("golden", true, false));
        Reclaim();
    }
    /// Replaces the value of the first row whose key has that prefix. Gives what it was.
    std::pair<std::string, std::string> Damage(const std::string& prefix) {
        auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
        const auto row = rows->lower_bound(prefix);
        VARVE_CHECK(row != rows->end() && row->first.starts_with(prefix));
        const auto was = *row;
        row->second = "rubbish";
        media.SetMetadata(std::move(rows));
        return was;
    }
    void Mend(const std::pair<std::string, std::string>& row) {
        auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
        (*rows)[row.first] = row.second;
        media.SetMetadata(std::move(rows));
    }
    /// Until all that was written is in map rows; then the reclaimer stands, with notes to work
    /// off.
    void FoldAndLeaveNotes() {
        bool folded = false;
        const auto fold = [](Executor* home, cow::Pool* p, bool* done) -> Task<void> {
            co_await Hop(*home);
            co_await p->GetStatus();
            *done = true;
        };
        Spawn(fold(&machine->home(), &pool(), &folded));
        ASSERT_TRUE(scheduler.RunUntil([&] { return RowsOf('W') > 0; }));
        machine->loader().Stall(true);
        ASSERT_TRUE(scheduler.RunUntil([&] { return folded; }));
        ASSERT_GT(RowsOf('W'), 0u);
    }
    std::optional<uint64_t> UniqueOfDisk(const std::string& name) {
        return machine->Do(pool().ShowDisk(name)).value().unique;
    }
    /// Begins an estimate of a deletion. `ended` is set when it is answered.
    void BeginEstimate(const std::string& name, std::optional<Status>* ended) {
        const auto estimate = [](Executor* home, cow::Pool* p, std::string disk,
                                 std::optional<Status>* s) -> Task<void> {
            co_await Hop(*home);
            std::vector<std::string> names{std::move(disk)};
            const auto freed = co_await p->EstimateDelete(std::move(names), false);
            *s = freed.status();
        };
        Spawn(estimate(&machine->home(), &pool(), name, ended));
    }
    void StopUnchecked() {
        for (const auto& [name, e] : exports) Detach(e);
        exports.clear();
        ASSERT_TRUE(machine->Stop().ok());
        machine.reset();
    }
};

TEST_F(ReclaimTest, WhatOnlyAWaitingNoteNamesBesidesASnapshotIsItsOwn) {
    Restart({.reclaim_step_chunks = 1});
    constexpr uint64_t kChunks = 40;
    Ok(pool().CreateDisk("d", kChunks * kChunkBytes));
    for (uint64_t c = 0; c < kChunks; ++c) Write("d", c * kChunkBytes, 4096, 'd');
    Ok(pool().CreateSnapshots({"d@base"}));
    Ok(pool().CloneSnapshot("d@base", "c"));
    Ok(pool().DeleteSnapshot("d@base", false));
    Reclaim();
    Ok(pool().CreateSnapshots({"d@s"}));
    for (uint64_t c = 0; c < kChunks; ++c) {
        Write("d", c * kChunkBytes, 4096, 'e');
        Write("c", c * kChunkBytes, 4096, 'c');  // its fold leaves a note
    }
    // Not all of the notes have been worked off yet: see the work that is left afterwards.
    EXPECT_EQ(kChunks * kBlockBytes, Unique("d@s"));
    EXPECT_GT(RowsOf('W'), 0u);
    const uint64_t used = Used();
    Ok(pool().DeleteSnapshot("d@s", false));
    Reclaim();
    EXPECT_EQ(used - kChunks * kBlockBytes, Used());
}

TEST_F(ReclaimTest, NotesOfOneDiskDoNotKeepAnothersSpaceWaiting) {
    Restart({.reclaim_step_chunks = 2});
    constexpr uint64_t kChunks = 16;
    MakeClones(kChunks, 10);
    Ok(pool().CreateDisk("other", kChunks * kChunkBytes));
    for (uint64_t c = 0; c < kChunks; ++c) Write("other", c * kChunkBytes, 4096, 'o');
    Flush("other");
    Close("other");
    const uint64_t used = Used();
    for (unsigned i = 0; i < 10; ++i) {
        for (uint64_t c = 0; c < kChunks; ++c) {
            Write("c" + std::to_string(i), c * kChunkBytes, 4096, 'w');
        }
    }
    Ok(pool().DeleteDisk("other", false, false));
    // The folds of ten clones leave 160 notes; the deletion has 16 chunks to look at.
    bool folded = false;
    const auto fold = [](EngineTest*, Executor* home, cow::Pool* p, bool* done) -> Task<void> {
        co_await Hop(*home);
        co_await p->GetStatus();
        *done = true;
    };
    Spawn(fold(this, &machine->home(), &pool(), &folded));
    scheduler.RunUntil([&] { return RowsOf('J') == 0; });
    EXPECT_GT(RowsOf('W'), 80u) << "notes went first";
    scheduler.RunUntil([&] { return folded; });
    Reclaim();
    EXPECT_EQ(0u, RowsOf('W'));
    EXPECT_LT(Used(), used + 10 * kChunks * 4096);
}

TEST_F(ReclaimTest, DeletionsOfDifferentDisksTakeTurns) {
    Restart({.reclaim_step_chunks = 2});
    for (const char* name : {"large", "small"}) {
        const uint64_t chunks = name == std::string("large") ? 100 : 2;
        Ok(pool().CreateDisk(name, chunks * kChunkBytes));
        for (uint64_t c = 0; c < chunks; ++c) Write(name, c * kChunkBytes, 4096, 'x');
        Flush(name);
        Close(name);
    }
    Ok(pool().DeleteDisk("large", false, false));
    Ok(pool().DeleteDisk("small", false, false));
    scheduler.RunUntil([&] { return RowsOf('J') == 1; });
    EXPECT_GT(RowsOf('M'), 50u) << "the large one went first";
    Reclaim();
    EXPECT_EQ(0u, RowsOf('M'));
}

TEST_F(ReclaimTest, ANoteCostsTheSameHoweverManyThereAre) {
    std::vector<double> seeks;
    for (const uint64_t chunks : {32, 512}) {
        Ok(pool().CreateDisk("d", chunks * kChunkBytes));
        for (uint64_t c = 0; c < chunks; ++c) Write("d", c * kChunkBytes, 4096, 'a');
        Ok(pool().CreateSnapshots({"d@s"}));
        Flush("d");
        Reclaim();
        Ok(pool().DeleteSnapshot("d@s", false));  // nothing is superseded yet
        Reclaim();
        for (uint64_t c = 0; c < chunks; ++c) Write("d", c * kChunkBytes, 4096, 'b');
        const uint64_t before = media.seeks, steps = media.steps, freed = Used();
        Reclaim();
        EXPECT_EQ(chunks * 4096, Used());
        EXPECT_LE(freed, 2 * chunks * 4096);
        seeks.push_back(static_cast<double>(media.seeks - before + media.steps - steps) /
                        static_cast<double>(chunks));
        Close("d");
        Ok(pool().DeleteDisk("d", false, false));
        Reclaim();
    }
    EXPECT_LT(seeks[1], seeks[0] * 1.5);
    EXPECT_LT(seeks[1], 16);
}

TEST_F(ReclaimTest, ADroppedBlockCostsTheSameHoweverManyClonesThereAre) {
    std::map<unsigned, double> seeks;
    for (const unsigned clones : {8u, 32u, 128u}) {
        constexpr uint64_t kChunks = 4;
        MakeClones(kChunks, clones);
        // All but one write everything, again and again, and drop what they wrote before.
        const uint64_t before = media.seeks;
        uint64_t dropped = 0;
        for (unsigned round = 0; round < 2; ++round) {
            for (unsigned i = 0; i + 1 < clones; ++i) {
                const std::string name = "c" + std::to_string(i);
                for (uint64_t c = 0; c < kChunks; ++c) Write(name, c * kChunkBytes, 4096, 'w');
                Ok(pool().CreateSnapshots({name + "@t"}));
                Ok(pool().DeleteSnapshot(name + "@t", false));
                Close(name);
                dropped += kChunks;
            }
            Reclaim();
        }
        seeks[clones] = static_cast<double>(media.seeks - before) / static_cast<double>(dropped);
        for (unsigned i = 0; i < clones; ++i) {
            Ok(pool().DeleteDisk("c" + std::to_string(i), false, false));
        }
        Reclaim();
        EXPECT_EQ(0u, Used());
    }
    std::printf("seeks for each dropped block: %.1f, %.1f, %.1f\n", seeks[8], seeks[32],
                seeks[128]);
    EXPECT_LT(seeks[128], seeks[8] * 1.5);
}

// A store that deletes leaves something behind until it is compacted. Clones of a deleted golden
// disk used to ask for each other's notes across all that had been deleted.
TEST_F(ReclaimTest, WhatWasDeletedLatelyIsNotPassedAgainAndAgain) {
    media.remembers_deleted = true;
    std::map<uint64_t, double> work;
    for (const uint64_t chunks : {32, 256}) {
        constexpr unsigned kClones = 4;
        MakeClones(chunks, kClones);
        media.deleted_rows.clear();
        uint64_t before = media.seeks + media.steps;
        for (unsigned i = 0; i < kClones; ++i) {
            const std::string name = "c" + std::to_string(i);
            for (uint64_t c = 0; c < chunks; ++c) Write(name, c * kChunkBytes, 4096, 'w');
            Flush(name);
            Close(name);
        }
        Reclaim();
        for (unsigned i = 0; i < kClones; ++i) {
            Ok(pool().DeleteDisk("c" + std::to_string(i), false, false));
            Reclaim();
        }
        EXPECT_EQ(0u, Used());
        work[chunks] = static_cast<double>(media.seeks + media.steps - before) /
                       static_cast<double>(chunks * kClones);
    }
    std::printf("seeks and steps for each chunk: %.1f, %.1f\n", work[32], work[256]);
    EXPECT_LT(work[256], work[32] * 1.5);
}

// Each restore begins a branch. A sweep asked all branches of the region about its chunk, of the
// store.
TEST_F(ReclaimTest, AChainOfRestoresIsGivenBackAtAPriceForEach) {
    std::map<uint64_t, double> moves;
    for (const uint64_t restores : {50, 400}) {
        Ok(pool().CreateDisk("d", restores * kChunkBytes));
        for (uint64_t i = 0; i < restores; ++i) {
            const std::string snapshot = "d@" + std::to_string(i);
            Write("d", i * kChunkBytes, 4096, 'r');
            Ok(pool().CreateSnapshots({snapshot}));
            Close("d");
            Ok(pool().RestoreSnapshot(snapshot, std::nullopt, false, false));
        }
        Reclaim();
        const uint64_t before = media.seeks + media.steps;
        Ok(pool().DeleteDisk("d", true, false));
        Reclaim();
        EXPECT_EQ(0u, Used());
        moves[restores] =
            static_cast<double>(media.seeks + media.steps - before) / static_cast<double>(restores);
    }
    std::printf("seeks and steps for each restore: %.1f, %.1f\n", moves[50], moves[400]);
    EXPECT_LT(moves[400], 100);  // not in proportion to the others
}

TEST_F(ReclaimTest, ARowThatCameSinceItsBranchWasReadCounts) {
    Restart({.reclaim_read_after = 1});
    constexpr unsigned kClones = 3;
    MakeClones(2, kClones);
    const uint64_t golden = Used();
    // Each overwrites what it shares with those after it, which are asked whether they need it.
    for (unsigned i = 0; i < kClones; ++i) {
        for (uint64_t c = 0; c < 2; ++c) {
            Write("c" + std::to_string(i), c * kChunkBytes, 8192, 'w');
            Flush("c" + std::to_string(i));
            Reclaim();
        }
    }
    EXPECT_EQ(kClones * golden, Used());
}

// Those before it in the queue left to it what they shared with it.
TEST_F(ReclaimTest, ACloneWhoseMarksCannotBeReadKeepsOnlyItsOwn) {
    constexpr unsigned kClones = 8;
    MakeClones(16, kClones);
    const auto name = [](unsigned i) { return "c" + std::to_string(i); };
    for (unsigned i = 0; i < kClones; ++i) {
        Write(name(i), i * kChunkBytes, 4096, 'w');
        Flush(name(i));
        Close(name(i));
    }
    Reclaim();
    const std::string last = std::prev(media.metadata()->lower_bound("U"))->first;
    ASSERT_EQ('T', last[0]);
    const std::string branch = last.substr(0, 9);
    media.bad_page = {branch, cow::PrefixEnd(branch)};
    machine->loader().Stall(true);
    for (unsigned i = 0; i < kClones; ++i) Ok(pool().DeleteDisk(name(i), false, false));
    machine->loader().Stall(false);
    Reclaim();
    // Its own block and what else its one row names.
    EXPECT_EQ(2 * kBlockBytes, Used());
    // And the deletion before it, which meets the page at the end of its own marks.
    EXPECT_EQ(2u, machine->Do(pool().GetStatus()).value().reclaim_set_aside);
    StopUnchecked();
    media.bad_page = {};
    Start();
    Reclaim();
    EXPECT_EQ(0u, Used());
}

// All that can have died was touched on both sides: one of them is enough.
TEST_F(ReclaimTest, ADeletionNeedsTheMarksOfOneSideOnly) {
    Ok(pool().CreateDisk("d", 8 * kChunkBytes));
    for (uint64_t c = 0; c < 8; ++c) Write("d", c * kChunkBytes, 4096, 'a');
    Ok(pool().CreateSnapshots({"d@below"}));
    Write("d", 0, 4096, 'b');
    Ok(pool().CreateSnapshots({"d@above"}));
    Reclaim();
    const std::string first = media.metadata()->lower_bound("T")->first;
    ASSERT_EQ('T', first[0]);
    const std::string generation = first.substr(0, 17);
    media.bad_page = {generation, cow::PrefixEnd(generation)};
    Ok(pool().DeleteSnapshot("d@below", false));
    Reclaim();
    EXPECT_EQ(8 * kBlockBytes, Used());
    EXPECT_EQ(0u, machine->Do(pool().GetStatus()).value().reclaim_set_aside);
    EXPECT_EQ(0u, RowsOf('J'));
    media.bad_page = {};
}

TEST_F(ReclaimTest, WhatSeveralShareIsFreedByDeletingThemTogether) {
    Ok(pool().CreateDisk("d", 8 * kChunkBytes));
    Write("d", 0, kMiB, 'a');
    Ok(pool().CreateSnapshots({"d@s"}));
    Ok(pool().CreateSnapshots({"d@t"}));
    Ok(pool().CloneSnapshot("d@t", "c"));
    Write("c", 0, 8192, 'c');
    Write("d", 0, kMiB, 'b');
    const auto freed = [this](std::vector<std::string> names, bool snapshots = false) {
        return machine->Do(pool().EstimateDelete(std::move(names), snapshots));
    };
    EXPECT_EQ(0u, Unique("d@s"));
    EXPECT_EQ(0u, Unique("d@t"));
    EXPECT_EQ(0u, freed({"d@s"}).value());
    EXPECT_EQ(8192u, freed({"d@s", "d@t"}).value());
    EXPECT_EQ(8192u, freed({"c"}).value());
    EXPECT_EQ(kMiB + 8192, freed({"d@s", "d@t", "c"}).value());
    EXPECT_EQ(ErrorKind::kBusy, freed({"d"}).error().kind);
    EXPECT_EQ(ErrorKind::kBusy, freed({"d", "d@s"}).error().kind);
    EXPECT_EQ(ErrorKind::kNotFound, freed({"d@nothing"}).error().kind);
    EXPECT_EQ(kMiB + 8192, freed({"d"}, true).value());
    EXPECT_EQ(2 * kMiB + 8192, freed({"d", "c", "d@s"}, true).value());
    EXPECT_EQ(kMiB, machine->Do(pool().ShowDisk("d")).value().unique);
    EXPECT_EQ(8192u, machine->Do(pool().ShowDisk("c")).value().unique);
    // And so it is.
    const uint64_t used = Used();
    Ok(pool().DeleteSnapshot("d@s", false));
    Ok(pool().DeleteSnapshot("d@t", false));
    Reclaim();
    EXPECT_EQ(used - 8192, Used());
}

TEST_F(ReclaimTest, AnEstimateOfManySnapshotsWalksTheirHistoryOnce) {
    std::map<unsigned, double> work;
    for (const unsigned snapshots : {64u, 512u}) {  // looked at on home, and elsewhere
        Ok(pool().CreateDisk("d", 16 * kChunkBytes));
        for (unsigned i = 0; i < snapshots; ++i) {
            Write("d", i % 16 * kChunkBytes, 4096, 'x');
            Ok(pool().CreateSnapshots({"d@s" + std::to_string(i)}));
        }
        Reclaim();
        const uint64_t before = media.seeks + media.steps;
        const auto freed = machine->Do(pool().EstimateDelete({"d"}, true));
        work[snapshots] = static_cast<double>(media.seeks + media.steps - before) / snapshots;
        EXPECT_EQ(Used(), freed.value());
        Close("d");
        Ok(pool().DeleteDisk("d", true, false));
        Reclaim();
        EXPECT_EQ(0u, Used());
    }
    EXPECT_LT(work[512], work[64] * 1.5);
}

TEST_F(ReclaimTest, AnEstimateSaysWhatDeletingThoseFrees) {
    for (uint64_t seed = 0; seed < 40; ++seed) {
        Dice dice = Dice::Of(seed, 0);
        std::vector<std::string> disks{"d"}, snapshots, doomed;
        Ok(pool().CreateDisk("d", 4 * kChunkBytes));
        for (unsigned i = 0; i < 12; ++i) {
            const std::string& disk = disks[dice.Draw(disks.size())];
            for (uint64_t n = dice.Draw(4); n > 0; --n) {
                Write(disk, dice.Draw(16) * (kChunkBytes / 4), 4096, 'x');
            }
            if (exports.contains(disk)) Close(disk);
            const std::string snapshot = disk + "@s" + std::to_string(i);
            Ok(pool().CreateSnapshots({snapshot}));
            snapshots.push_back(snapshot);
            const std::string& from = snapshots[dice.Draw(snapshots.size())];
            const uint64_t kind = dice.Draw(4);
            if (kind == 0) Ok(pool().CloneSnapshot(from, "c" + std::to_string(i)));
            if (kind == 0) disks.push_back("c" + std::to_string(i));
            if (kind == 1) Ok(pool().RestoreSnapshot(from, std::nullopt, false, false));
        }
        for (const std::string& snapshot : snapshots) {
            if (dice.Chance(0.6)) doomed.push_back(snapshot);
        }
        Reclaim();
        const uint64_t used = Used();
        const auto freed = machine->Do(pool().EstimateDelete(doomed, false));
        for (const std::string& snapshot : doomed) Ok(pool().DeleteSnapshot(snapshot, false));
        Reclaim();
        EXPECT_EQ(used - freed.value(), Used()) << "seed " << seed;
        for (const std::string& disk : disks) Ok(pool().DeleteDisk(disk, true, false));
        Reclaim();
        EXPECT_EQ(0u, Used());
    }
}

TEST_F(ReclaimTest, AnEstimateEndsWhenThePoolCloses) {
    Ok(pool().CreateDisk("d", 2'000 * kChunkBytes));
    for (uint64_t c = 0; c < 2'000; ++c) Write("d", c * kChunkBytes, 4096, 'x');
    Flush("d");
    Reclaim();
    Close("d");
    std::optional<Status> ended;
    BeginEstimate("d", &ended);
    const uint64_t before = media.seeks;
    scheduler.RunUntil([&] { return media.seeks - before > 100; });
    ASSERT_FALSE(ended);
    pool().PrepareShutdown();
    scheduler.RunUntil([&] { return ended.has_value(); });
    EXPECT_FALSE(ended->ok());
    EXPECT_LT(media.seeks - before, 2'000u) << "it counted on";
    Stop();
    Start();
}

TEST_F(ReclaimTest, AnEstimateEndsWhenNobodyWaitsForItAnyMore) {
    Ok(pool().CreateDisk("d", 2'000 * kChunkBytes));
    for (uint64_t c = 0; c < 2'000; ++c) Write("d", c * kChunkBytes, 4096, 'x');
    Flush("d");
    Reclaim();
    std::optional<Status> ended;
    BeginEstimate("d", &ended);
    const uint64_t before = media.seeks + media.steps;
    scheduler.RunUntil([&] { return media.seeks + media.steps - before > 100; });
    ASSERT_FALSE(ended);
    machine->auditor().Stall(true);
    ASSERT_TRUE(scheduler.RunUntil([&] { return ended.has_value(); }));
    EXPECT_EQ(ErrorKind::kBusy, ended->error().kind);
    const uint64_t answered = media.seeks + media.steps;
    machine->auditor().Stall(false);
    const auto turns = [](Executor* auditor, unsigned count, bool* done) -> Task<void> {
        for (; count > 0; --count) co_await Hop(*auditor);
        *done = true;
    };
    bool done = false;
    Spawn(turns(&machine->auditor(), 100, &done));
    ASSERT_TRUE(scheduler.RunUntil([&] { return done; }));
    EXPECT_LE(media.seeks + media.steps - answered, 100u) << "it counted on";
    EXPECT_EQ(Used(), machine->Do(pool().EstimateDelete({"d"}, false)).value());
}

TEST_F(ReclaimTest, AFigureCostsTheSameHoweverManyClonesThereAreWhileNotesWait) {
    Restart({.reclaim_step_chunks = 1});
    constexpr uint64_t kChunks = 32;
    std::map<unsigned, double> work;
    for (const unsigned clones : {8u, 64u}) {
        MakeClones(kChunks, clones);
        for (uint64_t c = 0; c < kChunks; ++c) Write("c1", c * kChunkBytes, 4096, 'o');
        Flush("c1");
        Close("c1");
        Reclaim();
        for (uint64_t c = 0; c < kChunks; ++c) Write("c0", c * kChunkBytes, 4096, 'w');
        FoldAndLeaveNotes();
        const uint64_t before = media.seeks + media.steps;
        EXPECT_EQ(kChunks * kBlockBytes, UniqueOfDisk("c1"));
        work[clones] = static_cast<double>(media.seeks + media.steps - before) / kChunks;
        machine->loader().Stall(false);
        Reclaim();
        const uint64_t used = Used();
        Ok(pool().DeleteDisk("c1", false, false));
        Reclaim();
        EXPECT_EQ(used - kChunks * kBlockBytes, Used());
        Close("c0");
        for (unsigned i = 0; i < clones; ++i) {
            if (i != 1) Ok(pool().DeleteDisk("c" + std::to_string(i), false, false));
        }
        Reclaim();
        EXPECT_EQ(0u, Used());
    }
    EXPECT_LT(work[64], work[8] * 1.5);
}

TEST_F(ReclaimTest, WhatOnlyADeletionUnderWayNamesBesidesADiskIsItsOwn) {
    constexpr uint64_t kChunks = 8;
    MakeClones(kChunks, 3);
    for (const char* name : {"c0", "c1", "c2"}) {
        for (uint64_t c = 0; c < kChunks; ++c) Write(name, c * kChunkBytes, 4096, name[1]);
        Flush(name);
        Close(name);
    }
    Reclaim();
    EXPECT_EQ(kChunks * kBlockBytes, UniqueOfDisk("c0"));  // of each chunk one block is golden's
    machine->loader().Stall(true);
    Ok(pool().DeleteDisk("c1", false, false));
    EXPECT_EQ(kChunks * kBlockBytes, UniqueOfDisk("c0"));  // it is c2's, too
    Ok(pool().DeleteDisk("c2", false, false));
    EXPECT_EQ(2 * kChunks * kBlockBytes, UniqueOfDisk("c0"));
    EXPECT_EQ(2u, machine->Do(pool().GetStatus()).value().reclaim_pending);
    machine->loader().Stall(false);
    Reclaim();
    EXPECT_EQ(2 * kChunks * kBlockBytes, Used());
}

// Asking 100 clones in vain, for each chunk.
TEST_F(ReclaimTest, OthersGetTheAuditorHoweverMuchAChunkCosts) {
    constexpr unsigned kClones = 100, kChunks = 32;
    MakeClones(kChunks, kClones);
    for (unsigned i = 1; i < kClones; ++i) {
        const std::string name = "c" + std::to_string(i);
        for (uint64_t c = 0; c < kChunks; ++c) Write(name, c * kChunkBytes, 8192, 'w');
        Close(name);
    }
    Reclaim();
    std::optional<Status> ended;
    uint64_t before = media.seeks + media.steps, last = before, largest = 0;
    BeginEstimate("c0", &ended);
    ASSERT_TRUE(scheduler.RunUntil([&] {
        const uint64_t now = media.seeks + media.steps;
        largest = std::max(largest, now - std::exchange(last, now));
        return ended.has_value();
    }));
    EXPECT_TRUE(ended->ok());
    EXPECT_GT(last - before, 5000u);
    EXPECT_LT(largest, 2048u);
}

TEST_F(ReclaimTest, MoreDeletionsThanAreKeptOpenTakeTurns) {
    Restart({.reclaim_step_chunks = 1});
    constexpr unsigned kDisks = 70;
    constexpr uint64_t kChunks = 6;
    for (unsigned i = 0; i < kDisks; ++i) {
        const std::string name = "d" + std::to_string(i);
        Ok(pool().CreateDisk(name, kChunks * kChunkBytes));
        for (uint64_t c = 0; c < kChunks; ++c) Write(name, c * kChunkBytes, 4096, 'x');
        Flush(name);
        Close(name);
    }
    Reclaim();
    for (unsigned i = 0; i < kDisks; ++i) {
        Ok(pool().DeleteDisk("d" + std::to_string(i), false, false));
    }
    scheduler.RunUntil([&] { return RowsOf('J') < kDisks; });
    std::map<uint64_t, uint64_t> left;  // rows, by branch
    const auto rows = media.metadata();
    for (const auto& [key, value] : *rows) left[cow::KeyNumber(key, 0)] += key[0] == 'M' ? 1 : 0;
    for (const auto& [branch, count] : left) EXPECT_LT(count, kChunks) << "one has to wait";
    Reclaim();
    EXPECT_EQ(0u, Used());
    EXPECT_EQ(0u, RowsOf('J'));
}

// Deleted disks that clones still read leave branches, which are passed in steps of 64. One that a
// deletion empties behind a pass that finds nothing else must not stay.
TEST_F(ReclaimTest, ABranchThatAPassOverThemHasJustMissedIsPruned) {
    constexpr unsigned kGolden = 70;
    Ok(pool().CreateDisk("first", kMiB));
    Write("first", 0, 4096, 'x');
    Ok(pool().CreateSnapshots({"first@s"}));
    for (unsigned i = 0; i < kGolden; ++i) {
        const std::string golden = "g" + std::to_string(i);
        Ok(pool().CreateDisk(golden, kMiB));
        Write(golden, 0, 4096, 'x');
        Ok(pool().CreateSnapshots({golden + "@s"}));
        Ok(pool().CloneSnapshot(golden + "@s", "c" + std::to_string(i)));
        Close(golden);
        Ok(pool().DeleteDisk(golden, true, false));
    }
    Reclaim();
    const auto branches = [&] { return cow::CheckMetadata(machine->metadata()).value().branches; };
    EXPECT_EQ(1 + 2 * kGolden, branches());
    // The first deletion empties no branch and begins a pass; the second ends in its middle.
    machine->loader().Stall(true);
    Ok(pool().DeleteSnapshot("first@s", false));
    Ok(pool().DeleteDisk("c0", false, false));
    EXPECT_EQ(2u, RowsOf('J'));
    machine->loader().Stall(false);
    Reclaim();
    EXPECT_EQ(0u, RowsOf('J'));
    EXPECT_EQ(1 + 2 * (kGolden - 1), branches());
}

// What clones share is not walked for each of them that is deleted, and goes with the last.
TEST_F(ReclaimTest, DeletingManyClonesWalksWhatTheyShareOnce) {
    constexpr uint64_t kChunks = 50;
    constexpr unsigned kClones = 40, kDeleted = 30;
    MakeClones(kChunks, kClones);
    for (unsigned i = 0; i < kClones; ++i) {
        const std::string name = "c" + std::to_string(i);
        Write(name, i * kChunkBytes, 4096, 'w');
        Flush(name);
        Close(name);
    }
    Reclaim();
    const uint64_t used = Used();
    machine->loader().Stall(true);
    for (unsigned i = 0; i < kDeleted; ++i) {
        Ok(pool().DeleteDisk("c" + std::to_string(i), false, false));
    }
    machine->loader().Stall(false);
    const uint64_t seeks = media.seeks;
    Reclaim();
    EXPECT_LT(media.seeks - seeks, 2 * kDeleted * kChunks);
    EXPECT_EQ(used - kDeleted * kBlockBytes, Used());
    for (unsigned i = kDeleted; i < kClones; ++i) {
        Ok(pool().DeleteDisk("c" + std::to_string(i), false, false));
    }
    Reclaim();
    EXPECT_EQ(0u, Used());
    EXPECT_EQ(0u, RowsOf('M'));
    EXPECT_EQ(0u, RowsOf('T'));
}

// A snapshot's deletion ends where the view above it hides what lies below: nothing is left to it.
TEST_F(ReclaimTest, WhatClonesShareIsNotLeftToADeletionThatEndsAbove) {
    Restart({.reclaim_step_chunks = 2});
    constexpr uint64_t kChunks = 4, kOwn = 3;
    MakeClones(kChunks, 3);
    for (const std::string name : {"c1", "c2"}) {
        for (uint64_t c = 0; c < kOwn; ++c) Write(name, c * kChunkBytes, 8192, 'w');
        Ok(pool().CreateSnapshots({name + "@x"}));
        Close(name);
    }
    Reclaim();
    EXPECT_EQ((kChunks + 2 * kOwn) * 2 * kBlockBytes, Used());
    machine->loader().Stall(true);
    Ok(pool().DeleteSnapshot("c2@x", false));  // under way when the others come
    Ok(pool().DeleteDisk("c0", false, false));
    Ok(pool().DeleteSnapshot("c1@x", false));
    EXPECT_EQ(3u, RowsOf('J'));
    machine->loader().Stall(false);
    Reclaim();
    EXPECT_EQ((kChunks - kOwn + 2 * kOwn) * 2 * kBlockBytes, Used());
}

/// A tree of disks, clones and restored disks that grows at random.
class ManyDeletionsTest : public ReclaimTest {
  protected:
    static constexpr uint64_t kChunks = 6;

    explicit ManyDeletionsTest(uint32_t seed = std::random_device()()) : seed_(seed) {}
    uint32_t Below(size_t end) { return random_() % static_cast<uint32_t>(end); }
    std::string Snapshot() { return snapshots_[Below(snapshots_.size())]; }
    void Plant() {
        disks_ = {"d0"};
        snapshots_.clear();
        Ok(pool().CreateDisk("d0", kChunks * kChunkBytes));
        for (uint64_t c = 0; c < kChunks; ++c) Write("d0", c * kChunkBytes, 8192, 'g');
        for (unsigned i = 0; i < 60; ++i) Grow(i);
        for (const std::string& disk : disks_) {
            if (exports.contains(disk)) Close(disk);
        }
        Reclaim();
    }
    void Grow(unsigned step) {
        const std::string disk = disks_[Below(disks_.size())];
        const uint32_t kind = snapshots_.empty() ? 0 : Below(8);
        if (kind == 0) {
            snapshots_.push_back(fmt::format("{}@s{}", disk, step));
            Ok(pool().CreateSnapshots({snapshots_.back()}));
        } else if (kind < 4) {
            disks_.push_back(fmt::format("d{}", disks_.size()));
            Ok(pool().CloneSnapshot(Snapshot(), disks_.back()));
        } else if (kind == 4) {
            const std::string snapshot = Snapshot();
            const std::string restored = snapshot.substr(0, snapshot.find('@'));
            if (exports.contains(restored)) Close(restored);
            Ok(pool().RestoreSnapshot(snapshot, std::nullopt, false, true));
        } else {
            Write(disk, Below(kChunks) * kChunkBytes, 4096, static_cast<char>('a' + step % 26));
        }
    }
    /// All wait for the first.
    void DeleteTogether(uint32_t of_eight) {
        machine->loader().Stall(true);
        std::vector<std::string> all = disks_;
        all.insert(all.end(), snapshots_.begin(), snapshots_.end());
        std::shuffle(all.begin(), all.end(), random_);
        for (const std::string& name : all) {
            if (Below(8) >= of_eight) continue;
            if (std::erase(disks_, name) > 0) {
                Ok(pool().DeleteDisk(name, true, false));
            } else {  // unless it went with its disk
                (void)machine->Do(pool().DeleteSnapshot(name, false));
            }
        }
        machine->loader().Stall(false);
        Reclaim();
        CheckClean();
    }
    const uint32_t seed_;
    std::mt19937 random_{seed_};
    std::vector<std::string> disks_, snapshots_;
};

TEST_F(ManyDeletionsTest, GiveBackAllAndNothingElseWhateverTheyShare) {
    SCOPED_TRACE(fmt::format("seed {}", seed_));
    for (int round = 0; round < 40; ++round) {
        Restart({.reclaim_step_chunks = 1 + Below(12)});  // a job ends above or below
        Plant();
        DeleteTogether(3);
        DeleteTogether(3);
        DeleteTogether(8);
        EXPECT_EQ(0u, Used());
        EXPECT_EQ(0u, RowsOf('M') + RowsOf('T') + RowsOf('J') + RowsOf('W'));
    }
}

TEST_F(ReclaimTest, NotesOfBeforeARestartDoNotWaitForAllNewOnes) {
    constexpr uint64_t kChunks = 100;
    Restart({.reclaim_step_chunks = 1});
    Ok(pool().CreateDisk("d", kChunks * kChunkBytes));
    for (uint64_t c = 0; c < kChunks; ++c) Write("d", c * kChunkBytes, 4096, 'a');
    Ok(pool().CreateSnapshots({"d@s"}));
    Flush("d");
    Ok(pool().DeleteSnapshot("d@s", false));
    Reclaim();
    // Two loads of notes, one of before a restart.
    const auto fold = [](Executor* home, cow::Pool* p, bool* done) -> Task<void> {
        co_await Hop(*home);
        co_await p->GetStatus();
        *done = true;
    };
    const auto write = [&](uint64_t from, uint64_t to, bool* done) {
        for (uint64_t c = from; c < to; ++c) Write("d", c * kChunkBytes, 4096, 'b');
        Spawn(fold(&machine->home(), &pool(), done));
    };
    bool first = false, second = false;
    write(0, 30, &first);
    scheduler.RunUntil([&] { return RowsOf('W') >= 25; });
    Close("d");
    pool().PrepareShutdown();
    scheduler.RunUntil([&] { return first; });
    ASSERT_TRUE(machine->Stop().ok());
    machine.reset();
    ASSERT_GT(RowsOf('W'), 10u);
    std::set<std::string> old;
    const auto before = media.metadata();
    for (const auto& [key, value] : *before) {
        if (key[0] == 'W') old.insert(key);
    }
    Start({.reclaim_step_chunks = 1});
    write(30, kChunks, &second);
    scheduler.RunUntil([&] {
        const auto rows = media.metadata();
        return std::none_of(old.begin(), old.end(),
                            [&](const auto& k) { return rows->contains(k); });
    });
    EXPECT_GT(RowsOf('W'), 10u) << "new notes went first";
    scheduler.RunUntil([&] { return second; });
    Reclaim();
    EXPECT_EQ(kChunks * 4096, Used());
}

TEST_F(ReclaimTest, ClosingEndsAStepInItsMiddle) {
    Restart({.reclaim_step_chunks = 64});
    constexpr uint64_t kChunks = 64;
    Ok(pool().CreateDisk("d", kChunks * kChunkBytes));
    for (uint64_t c = 0; c < kChunks; ++c) Write("d", c * kChunkBytes, 4096, 'x');
    Flush("d");
    Close("d");
    Ok(pool().DeleteDisk("d", false, false));
    pool().PrepareShutdown();
    const uint64_t before = media.seeks;
    Stop();
    EXPECT_LT(media.seeks - before, kChunks) << "it swept on";
    Start();
    Reclaim();
    EXPECT_EQ(0u, Used());
}

TEST_F(ReclaimTest, ADamagedRowCostsItsChunkOnly) {
    Ok(pool().CreateDisk("d", 8 * kChunkBytes));
    for (uint64_t c = 0; c < 8; ++c) Write("d", c * kChunkBytes, 8192, 'x');
    Restart();
    auto key = Damage("M");
    EXPECT_EQ(0u, cow::KeyNumber(key.first, 1));
    std::string data(4096, '?');
    cow::Volume& volume = Volume("d");
    const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(data.data()), data.size());
    EXPECT_EQ(EIO, Await(scheduler, volume.executor(), volume.Read(0, bytes, nullptr)));
    for (uint64_t c = 1; c < 8; ++c) Expect("d", c * kChunkBytes, 8192, 'x');
    EXPECT_EQ(0, Write("d", kChunkBytes, 4096, 'y'));
    EXPECT_EQ(0, Flush("d"));
    Mend(key);
    Expect("d", 0, 8192, 'x');
}

TEST_F(ReclaimTest, WhatCannotBeReadIsSetAsideAndTheRestGoesOn) {
    Ok(pool().CreateDisk("d", 8 * kChunkBytes));
    for (uint64_t c = 0; c < 8; ++c) Write("d", c * kChunkBytes, 4096, 'x');
    Flush("d");
    Restart();
    const auto row = Damage("M");
    Ok(pool().DeleteDisk("d", false, false));
    Reclaim();
    const auto status = machine->Do(pool().GetStatus()).value();
    EXPECT_EQ(4096u, status.used);
    EXPECT_EQ(1u, status.reclaim_set_aside);
    EXPECT_EQ(0u, status.reclaim_pending);
    EXPECT_TRUE(status.failure.empty());
    // Another disk's space comes back all the same.
    Ok(pool().CreateDisk("e", kChunkBytes));
    Write("e", 0, 4096, 'e');
    Close("e");
    Ok(pool().DeleteDisk("e", false, false));
    Reclaim();
    EXPECT_EQ(4096u, Used());
    // The work is remembered: once the row can be read, the next start does it.
    StopUnchecked();
    Mend(row);
    Start();
    Reclaim();
    EXPECT_EQ(0u, Used());
    EXPECT_EQ(0u, machine->Do(pool().GetStatus()).value().reclaim_set_aside);
}

TEST_F(ReclaimTest, AnUnreadableNoteCostsItsChunkOnly) {
    Ok(pool().CreateDisk("d", 8 * kChunkBytes));
    for (uint64_t c = 0; c < 8; ++c) Write("d", c * kChunkBytes, 4096, 'x');
    Ok(pool().CreateSnapshots({"d@s"}));
    Ok(pool().DeleteSnapshot("d@s", false));
    Reclaim();
    for (uint64_t c = 0; c < 8; ++c) Write("d", c * kChunkBytes, 4096, 'y');
    bool folded = false;
    const auto fold = [](Executor* home, cow::Pool* p, bool* done) -> Task<void> {
        co_await Hop(*home);
        co_await p->GetStatus();
        *done = true;
    };
    Spawn(fold(&machine->home(), &pool(), &folded));
    scheduler.RunUntil([&] { return RowsOf('W') == 8; });
    ASSERT_EQ(8u, RowsOf('W'));
    const auto note = Damage("W");
    scheduler.RunUntil([&] { return folded; });
    Reclaim();
    EXPECT_EQ(1u, RowsOf('W'));
    EXPECT_LE(Used(), 9u * 4096);
    EXPECT_EQ(1u, machine->Do(pool().GetStatus()).value().reclaim_set_aside);
    StopUnchecked();
    Mend(note);
    Start();
    Reclaim();
    EXPECT_EQ(0u, RowsOf('W'));
}

}  // namespace
}  // namespace varve
