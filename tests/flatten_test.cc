// Chains of clones and restores: flattened by hand and by themselves, deleted in any order.
// Work is counted, in seeks of the metadata store; no test looks at a clock.
#include "cow/format/format.h"
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kBlockBytes;
using cow::kChunkBytes;

class FlattenTest : public EngineTest {
  protected:
    static constexpr uint64_t kChunks = 6;

    void Restart(cow::PoolOptions options = {}) {
        Stop();
        Start(options);
    }
    uint64_t Depth(const std::string& disk) {
        return machine->Do(pool().ShowDisk(disk)).value().depth;
    }
    uint64_t Branches() {
        const auto rows = media.metadata();
        return static_cast<uint64_t>(std::count_if(
            rows->begin(), rows->end(), [](const auto& row) { return row.first[0] == 'B'; }));
    }
    static std::string Name(unsigned i) { return "c" + std::to_string(i); }
    /// Disks c0 to c<n>, each a clone of a snapshot of the one before, with a chunk of its own.
    void MakeChain(unsigned n) {
        Ok(pool().CreateDisk("c0", kChunks * kChunkBytes));
        for (uint64_t c = 0; c < kChunks; ++c) Write("c0", c * kChunkBytes, 8192, '0');
        for (unsigned i = 1; i <= n; ++i) {
            Ok(pool().CreateSnapshots({Name(i - 1) + "@s"}));
            Ok(pool().CloneSnapshot(Name(i - 1) + "@s", Name(i)));
            Write(Name(i), i % kChunks * kChunkBytes, 4096, static_cast<char>('a' + i));
        }
    }
    void ExpectChain(unsigned i) {
        for (uint64_t c = 0; c < kChunks; ++c) {
            unsigned last = 0;  // who wrote this chunk
            for (unsigned j = 1; j <= i; ++j) {
                if (j % kChunks == c) last = j;
            }
            Expect(Name(i), c * kChunkBytes, 4096, last == 0 ? '0' : static_cast<char>('a' + last));
            Expect(Name(i), c * kChunkBytes + 4096, 4096, '0');
        }
    }
};

TEST_F(FlattenTest, FlatteningChangesNothingButTheDepth) {
    MakeChain(9);
    EXPECT_EQ(10u, Depth("c9"));
    const uint64_t used = Used(), unique = Unique("c5@s");
    Ok(pool().FlattenDisk("c9"));
    EXPECT_EQ(1u, Depth("c9"));
    EXPECT_EQ(9u, Depth("c8"));
    Ok(pool().FlattenDisk("c9"));
    Ok(pool().FlattenDisk("c4"));
    EXPECT_EQ(5u, Depth("c8"));
    EXPECT_EQ(used, Used());
    EXPECT_EQ(unique, Unique("c5@s"));
    for (unsigned i = 0; i <= 9; ++i) ExpectChain(i);
    Restart();
    EXPECT_EQ(1u, Depth("c9"));
    for (unsigned i = 0; i <= 9; ++i) ExpectChain(i);
    EXPECT_EQ(ErrorKind::kNotFound, Fails(pool().FlattenDisk("nobody")));
}

TEST_F(FlattenTest, AFlattenedDiskIsReadWithOneSeekAGroup) {
    MakeChain(9);
    const auto cold = [this] {
        Restart();
        Reclaim();  // what a start looks up is not the read's
        Checksum();
        Volume("c9");
        const uint64_t before = media.seeks;
        Read("c9", 0, 4096);
        return media.seeks - before;
    };
    EXPECT_GE(cold(), 10u);
    Ok(pool().FlattenDisk("c9"));
    EXPECT_LE(cold(), 4u);
}

TEST_F(FlattenTest, EverythingCanBeDeletedAfterwardsInAnyOrder) {
    for (const unsigned first : {0u, 3u, 7u}) {
        MakeChain(9);
        Ok(pool().FlattenDisk("c9"));
        Ok(pool().FlattenDisk("c5"));
        Write("c5", 0, kChunks * kChunkBytes, 'z');
        Write("c9", 2 * kChunkBytes, kChunkBytes, 'y');
        for (const auto& [name, e] : exports) Detach(e);
        exports.clear();
        for (unsigned i = 0; i <= 9; ++i) {
            const unsigned victim = (first + i * 3) % 10;
            Ok(pool().DeleteDisk(Name(victim), true, false));
            Reclaim();
            CheckClean();
        }
        EXPECT_EQ(0u, Used());
        EXPECT_EQ(0u, Branches());
    }
}

TEST_F(FlattenTest, WritesBesideAFlatteningLoseNothing) {
    Restart({.reclaim_step_chunks = 1});
    MakeChain(4);
    bool done = false;
    const auto flatten = [](Executor* home, cow::Pool* p, bool* flag) -> Task<void> {
        co_await Hop(*home);
        const Status s = co_await p->FlattenDisk("c4");
        EXPECT_TRUE(s.ok());
        *flag = true;
    };
    Spawn(flatten(&machine->home(), &pool(), &done));
    for (uint64_t c = 0; c < kChunks; ++c) {
        Write("c4", c * kChunkBytes + 4096, 4096, 'w');
        Flush("c4");
    }
    scheduler.RunUntil([&] { return done; });
    EXPECT_EQ(1u, Depth("c4"));
    for (uint64_t c = 0; c < kChunks; ++c) Expect("c4", c * kChunkBytes + 4096, 4096, 'w');
    Reclaim();
    CheckClean();
    Restart();
    for (uint64_t c = 0; c < kChunks; ++c) Expect("c4", c * kChunkBytes + 4096, 4096, 'w');
}

TEST_F(FlattenTest, FlatteningsTakeTurns) {
    Restart({.reclaim_step_chunks = 1});
    for (const char* name : {"large", "small"}) {
        const uint64_t chunks = name == std::string("large") ? 200 : 3;
        const std::string base = std::string(name) + "-base";
        Ok(pool().CreateDisk(base, chunks * kChunkBytes));
        for (uint64_t c = 0; c < chunks; ++c) Write(base, c * kChunkBytes, 4096, 'x');
        Ok(pool().CreateSnapshots({base + "@s"}));
        Ok(pool().CloneSnapshot(base + "@s", name));
    }
    Reclaim();
    std::map<std::string, bool> done;
    const auto flatten = [](Executor* home, cow::Pool* p, std::string name,
                            std::map<std::string, bool>* flags) -> Task<void> {
        co_await Hop(*home);
        std::string disk = name;
        const Status s = co_await p->FlattenDisk(std::move(disk));
        EXPECT_TRUE(s.ok());
        (*flags)[name] = true;
    };
    for (const char* name : {"large", "small"}) {
        Spawn(flatten(&machine->home(), &pool(), name, &done));
    }
    scheduler.RunUntil([&] { return done["small"]; });
    EXPECT_FALSE(done["large"]) << "the large one went first";
    scheduler.RunUntil([&] { return done["large"]; });
    EXPECT_EQ(1u, Depth("large"));
    Expect("large", 199 * kChunkBytes, 4096, 'x');
}

TEST_F(FlattenTest, AnInterruptedFlatteningGoesOnAfterTheNextStart) {
    Restart({.reclaim_step_chunks = 1});
    MakeChain(4);
    for (const auto& [name, e] : exports) Detach(e);
    exports.clear();
    bool done = false;
    const auto flatten = [](Executor* home, cow::Pool* p, bool* flag) -> Task<void> {
        co_await Hop(*home);
        const Status ignored = co_await p->FlattenDisk("c4");
        (void)ignored;
        *flag = true;
    };
    const size_t rows = media.metadata()->size();
    Spawn(flatten(&machine->home(), &pool(), &done));
    scheduler.RunUntil([&] { return media.metadata()->size() >= rows + 2; });
    ASSERT_FALSE(done);
    pool().PrepareShutdown();
    scheduler.RunUntil([&] { return done; });
    Stop();
    Start();
    Reclaim();
    EXPECT_EQ(1u, Depth("c4"));
    ExpectChain(4);
}

TEST_F(FlattenTest, AChainOfRestoresNeverEnds) {
    Restart({.flatten_depth = 8});
    Ok(pool().CreateDisk("d", kChunks * kChunkBytes));
    for (uint64_t c = 0; c < kChunks; ++c) Write("d", c * kChunkBytes, 4096, 'x');
    uint64_t deepest = 0;
    for (unsigned i = 0; i < 2'000; ++i) {
        const std::string name = "d@s" + std::to_string(i);
        Write("d", i % kChunks * kChunkBytes, 512, static_cast<char>('a' + i % 26));
        Close("d");
        Ok(pool().CreateSnapshots({name}));
        Ok(pool().RestoreSnapshot(name, std::nullopt, false, false));
        if (i >= 3) Ok(pool().DeleteSnapshot("d@s" + std::to_string(i - 3), false));
        if (i % 16 == 0) deepest = std::max(deepest, Depth("d"));
    }
    EXPECT_LT(deepest, 64u);
    Expect("d", 1999 % kChunks * kChunkBytes, 512, static_cast<char>('a' + 1999 % 26));
    Reclaim();
    EXPECT_LT(Branches(), 20u);
    EXPECT_LE(Used(), (kChunks + 4) * 4096);
}

TEST_F(FlattenTest, AChainOfRestoresWhoseSnapshotsStayHasABoundedDepthToo) {
    Restart({.flatten_depth = 8});
    Ok(pool().CreateDisk("d", kChunks * kChunkBytes));
    uint64_t deepest = 0;
    for (unsigned i = 0; i < 150; ++i) {
        const std::string name = "d@s" + std::to_string(i);
        Write("d", i % kChunks * kChunkBytes, 512, static_cast<char>('a' + i % 26));
        Close("d");
        Ok(pool().CreateSnapshots({name}));
        Ok(pool().RestoreSnapshot(name, std::nullopt, false, false));
        deepest = std::max(deepest, Depth("d"));
    }
    EXPECT_LT(deepest, 64u);
    Expect("d@s100", 100 % kChunks * kChunkBytes, 512, static_cast<char>('a' + 100 % 26));
    Close("d@s100");
    Ok(pool().DeleteDisk("d", true, false));
    Reclaim();
    EXPECT_EQ(0u, Used());
    EXPECT_EQ(0u, Branches());
}

}  // namespace
}  // namespace varve
