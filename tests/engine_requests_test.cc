// Requests that get in each other's way: locks on blocks, turns of long work, clients that go away.
// Work is counted, in steps of the scheduler and in turns, never timed.
#include <fmt/format.h>

#include "cow/head/chunk_lock.h"
#include "cow/volume/transfers.h"
#include "cow/volume/turns.h"
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kBlockBytes;
using cow::kChunkBytes;
using cow::Turns;

// ---- turns

/// Works for `pieces` pieces of `units`.
Task<void> Labour(Turns* turns, uint64_t pieces, uint64_t units, uint64_t* done, uint64_t* ended) {
    for (uint64_t i = 0; i < pieces; ++i) {
        *done += units;
        if (turns->Spend(units)) co_await Turns::Next(*turns);
    }
    ++*ended;
}

TEST(TurnsTest, ATurnIsAsLongWithAThousandAsWithOne) {
    Scheduler scheduler(1);
    Turns turns(scheduler.NewLane());
    constexpr uint64_t kWorkers = 1000, kPieces = 100, kUnits = 64;
    uint64_t done[kWorkers] = {}, ended = 0;
    for (uint64_t& mine : done) Spawn(Labour(&turns, kPieces, kUnits, &mine, &ended));
    const auto sum = [&] {
        uint64_t all = 0;
        for (const uint64_t mine : done) all += mine;
        return all;
    };
    uint64_t before = sum(), steps = 0;
    EXPECT_LE(before, Turns::kShare + kWorkers * kUnits);
    while (scheduler.Step()) {
        ++steps;
        EXPECT_LE(sum() - before, Turns::kShare + kUnits);
        before = sum();
        // First come, first served: nobody is ahead by more than what one turn gives.
        const auto [least, most] = std::minmax_element(std::begin(done), std::end(done));
        EXPECT_LE(*most - *least, 2 * Turns::kShare + kUnits);
    }
    EXPECT_EQ(ended, kWorkers);
    EXPECT_EQ(sum(), kWorkers * kPieces * kUnits);
    EXPECT_LE(steps, 2 * sum() / Turns::kShare + 2);
}

// ---- locks

class LockTest : public testing::Test {
  protected:
    Scheduler scheduler{1};
    Scheduler::Lane& lane = scheduler.NewLane();
    cow::Chunk chunk;
    std::vector<std::string> order;  // in which they were served

    /// Takes blocks for a turn.
    static Task<void> Use(LockTest* test, std::string name, uint64_t mask,
                          cow::Requester* requester) {
        bool locked = TryLock(test->chunk, mask);
        if (!locked) {
            cow::LockWait wait(test->chunk, mask, test->lane, requester);
            locked = co_await wait;
        }
        test->order.push_back(locked ? name : "no " + name);
        if (!locked) co_return;
        co_await Hop(test->lane);
        Unlock(test->chunk, mask);
    }
    void Start(const std::string& name, uint64_t mask, cow::Requester* requester = nullptr) {
        Spawn(Use(this, name, mask, requester));
    }
    void ExpectOrder(const std::vector<std::string>& expected) {
        scheduler.RunAll();
        EXPECT_EQ(order, expected);
        EXPECT_EQ(chunk.locked, 0u);
        EXPECT_EQ(chunk.pins, 0u);
        EXPECT_EQ(chunk.line, nullptr);
    }
};

constexpr uint64_t kAll = ~uint64_t{0};

TEST_F(LockTest, AWideRequestIsNotPassedByNarrowOnes) {
    Start("a", 1);
    Start("wide", kAll);
    Start("b", 1);
    Start("c", 2);
    Start("d", 2);
    ExpectOrder({"a", "wide", "b", "c", "d"});
}

TEST_F(LockTest, DifferentBlocksGoTogether) {
    Start("a", 1);
    Start("b", 2);
    EXPECT_EQ(order.size(), 2u);
    Start("c", 3);
    Start("d", 1);
    Start("e", 2);
    ExpectOrder({"a", "b", "c", "d", "e"});
}

TEST_F(LockTest, EachIsWokenOnce) {
    constexpr uint64_t kRequests = 10'000;
    for (uint64_t i = 0; i < kRequests; ++i) Start("r", 4);
    const uint64_t before = scheduler.steps();
    scheduler.RunAll();
    EXPECT_EQ(order.size(), kRequests);
    EXPECT_LE(scheduler.steps() - before, 3 * kRequests);  // to be woken, to use it, a rest
}

TEST_F(LockTest, WhoLeavesHoldsUpNobody) {
    cow::Requester rude;
    Start("a", 1);
    Start("wide", kAll, &rude);
    Start("b", 2);
    Start("c", 2, &rude);
    EXPECT_EQ(order.size(), 1u);
    rude.Leave();
    ExpectOrder({"a", "no c", "no wide", "b"});
}

TEST_F(LockTest, WhoLeavesWhenItsTurnHasComeHasTheLock) {
    cow::Requester rude;
    Start("a", 1);
    Start("b", 1, &rude);
    while (chunk.line) scheduler.Step();  // handed over, not yet gone on
    rude.Leave();
    ExpectOrder({"a", "b"});
}

// ---- requests

/// Runs again and again on the volume's lane, and counts how often.
struct Probe : Runnable {
    Executor& lane;
    uint64_t turns = 0;
    bool stop = false;
    explicit Probe(Executor& l) : lane(l) {
        run = [](Runnable* self) {
            auto* probe = static_cast<Probe*>(self);
            ++probe->turns;
            if (!probe->stop) probe->lane.Post(probe);
        };
        lane.Post(this);
    }
};

class RequestsTest : public EngineTest {
  protected:
    struct Pending {
        std::optional<Errno> error;
        std::vector<cow::Allocation> map;
        uint64_t number = 0;  // in the order in which they ended
    };
    uint64_t ended = 0;

    static Task<void> Keep(Executor* lane, Task<Errno> task, Pending* pending, uint64_t* ended) {
        co_await Hop(*lane);
        pending->error = co_await task;
        pending->number = ++*ended;
    }
    void Start(cow::Volume& volume, Task<Errno> task, Pending* pending) {
        Spawn(Keep(&volume.executor(), std::move(task), pending, &ended));
    }
    /// Every other block of the disk is written: 65 pieces a chunk, 4096 bytes each.
    cow::Volume& Scattered(uint64_t size) {
        Ok(pool().CreateDisk("d", size));
        const std::string data(4096, 'a');
        cow::Volume& v = Volume("d");
        const auto bytes = std::as_bytes(std::span(data));
        std::vector<Pending> writes(size / 8192);
        for (uint64_t i = 0; i < writes.size(); ++i) {
            Start(v, v.Write(8192 * i, bytes), &writes[i]);
        }
        Finish(writes);
        return v;
    }
    void Finish(std::vector<Pending>& all) {
        const auto over = [&] {
            return std::all_of(all.begin(), all.end(), [](const Pending& p) { return p.error; });
        };
        ASSERT_TRUE(scheduler.RunUntil(over));
        for (const Pending& p : all) EXPECT_EQ(*p.error, 0);
    }
    /// How often others on the lane had a turn while it ran.
    uint64_t TurnsDuring(cow::Volume& v, std::vector<Pending>& all) {
        Probe probe(v.executor());
        Finish(all);
        probe.stop = true;
        scheduler.RunAll();
        return probe.turns;
    }
};

constexpr uint64_t kScattered = 32 * kMiB;
constexpr uint64_t kPieces = kScattered / kBlockBytes;  // blocks and holes

TEST_F(RequestsTest, AStatusOfAScatteredDiskLetsOthersRun) {
    cow::Volume& v = Scattered(kScattered);
    std::vector<Pending> all(20);
    for (Pending& p : all) Start(v, v.Status(0, kScattered, kPieces, &p.map), &p);
    EXPECT_GE(TurnsDuring(v, all), 19 * kPieces / Turns::kShare);
    for (const Pending& p : all) EXPECT_EQ(p.map.size(), kPieces);
}

// Where nothing is stored and little is in memory, a walk goes on at once.
TEST_F(RequestsTest, AStatusAndATrimOfNothingCostNothing) {
    constexpr uint64_t kSize = uint64_t{16} << 40;
    Ok(pool().CreateDisk("d", kSize));
    Write("d", kSize / 2, 4096, 'a');
    cow::Volume& v = Volume("d");
    for (const bool snapshot : {false, true}) {
        if (snapshot) Ok(pool().CreateSnapshots({"d@s"}));
        cow::Volume& asked = Volume(snapshot ? "d@s" : "d");
        std::vector<cow::Allocation> map;
        const uint64_t steps = scheduler.steps();
        EXPECT_EQ(0, Await(scheduler, asked.executor(), asked.Status(0, kSize, 9, &map)));
        ASSERT_EQ(map.size(), 3u);
        EXPECT_EQ(map[0].length, kSize / 2);
        EXPECT_EQ(map[1].length, 4096u);
        EXPECT_EQ(map[2].length, kSize / 2 - 4096);
        EXPECT_LE(scheduler.steps() - steps, 100u);
    }
    const uint64_t steps = scheduler.steps();
    EXPECT_EQ(0, Await(scheduler, v.executor(), v.Trim(0, kSize)));
    EXPECT_LE(scheduler.steps() - steps, 200u);
    Expect("d", kSize / 2, 4096, 0);
    Expect("d@s", kSize / 2, 4096, 'a');
}

TEST_F(RequestsTest, AStatusOfOneStretchIsCutAtABound) {
    constexpr uint64_t kTiB = uint64_t{1} << 40;
    Ok(pool().CreateDisk("d", kTiB));
    cow::Volume& v = Volume("d");
    // So much is in memory that the next chunk is not looked for among it.
    for (uint64_t group = 0; group < 80; ++group) Read("d", kTiB - (group + 1) * 4 * kMiB, 4096);
    std::vector<cow::Allocation> map;
    const uint64_t steps = scheduler.steps();
    EXPECT_EQ(0, Await(scheduler, v.executor(), v.Status(0, kTiB, 1, &map)));
    ASSERT_EQ(map.size(), 1u);
    EXPECT_TRUE(map[0].hole);
    EXPECT_GE(map[0].length, uint64_t{4} << 30);
    EXPECT_LE(map[0].length, uint64_t{32} << 30);
    EXPECT_LE(scheduler.steps() - steps, 1000u);
}

TEST_F(RequestsTest, TrimsZeroesAndReadsOfMuchLetOthersRun) {
    cow::Volume& v = Scattered(kScattered);
    std::vector<Pending> one(1);
    std::vector<std::byte> memory(kScattered);
    Start(v, v.Read(0, memory, nullptr), &one[0]);
    EXPECT_GE(TurnsDuring(v, one), kPieces / 2 * 16 / Turns::kShare);
    one[0] = {};
    Start(v, v.WriteZeroes(0, kScattered / 2, true), &one[0]);
    EXPECT_GE(TurnsDuring(v, one), kScattered / 2 / kChunkBytes * 64 / Turns::kShare);
    one[0] = {};
    Start(v, v.Trim(0, kScattered), &one[0]);
    EXPECT_GE(TurnsDuring(v, one), kScattered / kChunkBytes * 64 / Turns::kShare);
    Expect("d", 0, kScattered, 0);
}

TEST_F(RequestsTest, AWideWriteHasItsTurnAmongManyOfOneBlock) {
    Ok(pool().CreateDisk("d", kMiB));
    cow::Volume& v = Volume("d");
    const std::string narrow(4096, 'n'), wide(kChunkBytes, 'w');
    constexpr uint64_t kBefore = 500, kAfter = 1500;
    std::vector<Pending> all(kBefore + 1 + kAfter);
    EXPECT_EQ(0, Write("d", 0, kChunkBytes, 'o'));
    for (int i = 0; i < 2; ++i) EXPECT_EQ(0, Flush("d"));  // all is overwritten in place
    const uint64_t steps = scheduler.steps();
    for (uint64_t i = 0; i < all.size(); ++i) {
        const bool is_wide = i == kBefore;
        const auto bytes = std::as_bytes(std::span(is_wide ? wide : narrow));
        Start(v, v.Write(is_wide ? 0 : 8192, bytes), &all[i]);
    }
    Finish(all);
    for (uint64_t i = 0; i < all.size(); ++i) EXPECT_EQ(all[i].number, i + 1);
    // To start, to submit, to complete, to wake the next; and what the lanes rest.
    EXPECT_LE(scheduler.steps() - steps, 8 * all.size());
}

TEST_F(RequestsTest, WhatWasGivenUpLandsOnNobody) {
    Ok(pool().CreateDisk("d", 32 * kMiB));
    EXPECT_EQ(0, Write("d", 0, 32 * kMiB, 'o'));
    cow::Volume& v = Volume("d");
    const cow::AlignedBuffer memory = cow::AllocateAligned(32 * kMiB);
    const std::span<std::byte> bytes(memory.get(), 32 * kMiB);
    std::memset(bytes.data(), 'x', bytes.size());
    cow::Requester rude;
    Pending write, zeroes, trim, read, status;
    std::vector<std::byte> target(32 * kMiB);
    Start(v, v.Write(0, bytes, &rude), &write);
    Start(v, v.WriteZeroes(0, 32 * kMiB, true, &rude), &zeroes);
    Start(v, v.Trim(0, 32 * kMiB, &rude), &trim);
    Start(v, v.Read(0, target, nullptr, &rude), &read);
    for (int i = 0; i < 60; ++i) scheduler.Step();
    rude.Leave();
    Start(v, v.Status(0, 32 * kMiB, 1000, nullptr, &status.map, &rude), &status);
    const Pending* all[] = {&write, &zeroes, &trim, &read, &status};
    ASSERT_TRUE(scheduler.RunUntil([&] {
        return std::all_of(std::begin(all), std::end(all),
                           [](const Pending* p) { return p->error.has_value(); });
    }));
    for (const Pending* p : all) EXPECT_EQ(*p->error, ECANCELED);
    EXPECT_EQ(0, Write("d", kMiB, 4 * kMiB, 'n'));
    scheduler.RunAll();
    Expect("d", kMiB, 4 * kMiB, 'n');
    Expect("d", 30 * kMiB, 2 * kMiB, 'o');  // never begun
    const std::string rest = Read("d", 0, kMiB);
    for (uint64_t at = 0; at < kMiB; at += kChunkBytes) {  // each piece wholly or not
        EXPECT_EQ(rest.substr(at, kChunkBytes), std::string(kChunkBytes, rest[at]));
    }
}

}  // namespace
}  // namespace varve
