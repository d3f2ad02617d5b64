// Background work gives way to requests, and yet ends. docs/design/pacing.md.
#include "cow/core/pacer.h"
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kChunkBytes;
using cow::LoadMeter;
using cow::Pacer;

/// Time that passes when the test says so.
class FakeClock : public Clock {
  public:
    int64_t NowUs() override { return now_; }
    void PostAfter(int64_t us, Executor& executor, Runnable* runnable) override {
        sleepers_.insert({now_ + us, {&executor, runnable}});
    }
    void Pass(int64_t us) { now_ += us; }
    /// Passes time until the next sleeper wakes. False if nobody sleeps.
    bool WakeNext() {
        if (sleepers_.empty()) return false;
        const auto [when, sleeper] = *sleepers_.begin();
        sleepers_.erase(sleepers_.begin());
        now_ = std::max(now_, when);
        sleeper.first->Post(sleeper.second);
        return true;
    }

  private:
    int64_t now_ = 1'000'000;
    std::multimap<int64_t, std::pair<Executor*, Runnable*>> sleepers_;
};

class PacerTest : public testing::Test {
  protected:
    static constexpr auto kSpace = Pacer::Work::kSpace;
    static constexpr auto kChecksums = Pacer::Work::kChecksums;

    Scheduler scheduler{1};
    Scheduler::Lane& home = scheduler.NewLane();
    FakeClock clock;
    std::atomic<bool> closing = false;
    LoadMeter first, second;
    Pacer pacer{&clock, home, closing};

    void SetUp() override {
        pacer.Watch(first);
        pacer.Watch(second);
    }
    static void Serve(LoadMeter& meter) { const LoadMeter::Request request(meter); }

    static Task<void> RestTask(Executor* home, Pacer* pacer, Pacer::Step step, Pacer::Work work,
                               bool* done) {
        co_await Hop(*home);
        co_await pacer->Rest(step, work);
        *done = true;
    }
    void Begin(Pacer::Step step, Pacer::Work work, bool* done) {
        Spawn(RestTask(&home, &pacer, step, work, done));
        scheduler.RunAll();
    }
    /// How long a rest after `step` takes while requests go on, `busy` looks long.
    int64_t RestUs(Pacer::Step step, Pacer::Work work, int busy = 1'000'000) {
        const int64_t began = clock.NowUs();
        bool done = false;
        Begin(step, work, &done);
        while (!done) {
            if (busy-- > 0) Serve(second);
            VARVE_CHECK(clock.WakeNext());
            scheduler.RunAll();
        }
        return clock.NowUs() - began;
    }
    Pacer::Step Worked(int64_t us, bool served = true) {
        const Pacer::Step step = pacer.Begin();
        clock.Pass(us);
        if (served) Serve(first);
        return step;
    }
};

TEST_F(PacerTest, WorkTakesATwentiethBesideRequests) {
    EXPECT_EQ(19'000, RestUs(Worked(1'000), kSpace));
    EXPECT_EQ(190'000, RestUs(Worked(10'000), kChecksums));
}

TEST_F(PacerTest, WithoutRequestsNothingRests) {
    EXPECT_EQ(0, RestUs(Worked(10'000, false), kSpace));
    EXPECT_EQ(0, RestUs(Worked(1'000, false), kSpace));
}

TEST_F(PacerTest, ARequestThatIsUnderWayIsLoad) {
    const LoadMeter::Request request(first);
    EXPECT_EQ(190'000, RestUs(Worked(10'000, false), kSpace, 0));
}

TEST_F(PacerTest, TheRestEndsWhenTheRequestsDo) {
    EXPECT_EQ(15'000 + 10'000, RestUs(Worked(10'000), kSpace, 3));
    EXPECT_EQ(0, RestUs(Worked(1'000, false), kSpace, 0));
}

TEST_F(PacerTest, AClientThatIsKeptFromRunningIsNotIdle) {
    EXPECT_EQ(190'000, RestUs(Worked(10'000), kSpace));
    EXPECT_EQ(14'000, RestUs(Worked(4'000, false), kSpace, 0) + 4'000);
}

TEST_F(PacerTest, ARestIsBounded) {
    EXPECT_EQ(500'000, RestUs(Worked(3'000'000), kSpace));
}

TEST_F(PacerTest, WhatWorkersOweIsAddedUp) {
    const Pacer::Step one = Worked(10'000), other = pacer.Begin();
    bool done = false;
    Begin(one, kSpace, &done);
    clock.Pass(1'000);
    Serve(first);
    EXPECT_EQ(190'000 + 19'000 - 1'000, RestUs(other, kChecksums));
    EXPECT_TRUE(done || clock.WakeNext());  // at the same moment
    scheduler.RunAll();
    EXPECT_TRUE(done);
}

TEST_F(PacerTest, WhoWaitsIsNotKeptWaiting) {
    bool done = false;
    Begin(Worked(10'000), kSpace, &done);
    bool sums_done = false;
    Begin(Worked(10'000), kChecksums, &sums_done);
    EXPECT_FALSE(done || sums_done);
    {
        const Pacer::Hurry hurry(pacer, kSpace);
        for (int i = 0; i < 2; ++i) {
            Serve(first);
            ASSERT_TRUE(clock.WakeNext());
        }
        scheduler.RunAll();
        EXPECT_TRUE(done);
        EXPECT_FALSE(sums_done);  // nobody waits for those
        // What was done in a hurry is not owed by others.
        for (int i = 0; i < 100; ++i) EXPECT_EQ(0, RestUs(Worked(10), kSpace));
    }
    int looks = 0;
    for (; !sums_done && looks < 1000; ++looks) {
        Serve(first);
        ASSERT_TRUE(clock.WakeNext());
        scheduler.RunAll();
    }
    EXPECT_LT(looks, 150);
    EXPECT_EQ(190'000, RestUs(Worked(10'000), kSpace));
}

TEST_F(PacerTest, AHurryWithoutAnObjectEndsByItself) {
    pacer.HurryFor(kSpace, 20'000);
    EXPECT_EQ(0, RestUs(Worked(10'000), kSpace));
    EXPECT_EQ(190'000, RestUs(Worked(10'000), kSpace));
}

TEST_F(PacerTest, NothingRestsWhileThePoolCloses) {
    bool done = false;
    Begin(Worked(10'000), kSpace, &done);
    EXPECT_FALSE(done);
    closing = true;
    Serve(first);
    ASSERT_TRUE(clock.WakeNext());
    scheduler.RunAll();
    EXPECT_TRUE(done);
    EXPECT_EQ(0, RestUs(Worked(10'000), kSpace));
}

TEST_F(PacerTest, WithoutAClockNothingRests) {
    Pacer unpaced(nullptr, home, closing);
    unpaced.Watch(first);
    const Pacer::Step step = unpaced.Begin();
    Serve(first);
    bool done = false;
    Spawn(RestTask(&home, &unpaced, step, kSpace, &done));
    scheduler.RunAll();
    EXPECT_TRUE(done);
}

/// Deletions and checksums beside requests that never end.
class PacingTest : public EngineTest {
  protected:
    static constexpr uint64_t kChunks = 2000;

    bool stop_ = false;
    bool ended_ = true;
    uint64_t served_ = 0;
    uint64_t summed_ = 0;

    static Task<void> WaitTask(Executor* home, cow::Pool* pool, bool* done) {
        co_await Hop(*home);
        co_await pool->WaitForChecksums();
        *done = true;
    }
    void StartLoad() {
        stop_ = ended_ = false;
        Spawn(LoadTask(&Volume("load"), &stop_, &ended_, &served_));
    }
    void StopLoad() {
        stop_ = true;
        ASSERT_TRUE(scheduler.RunUntil([&] { return ended_; }));
    }
    static Task<void> LoadTask(cow::Volume* volume, bool* stop, bool* ended, uint64_t* served) {
        co_await Hop(volume->executor());
        std::string data(4096, '?');
        const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(data.data()), data.size());
        while (!*stop) {
            EXPECT_EQ(0, co_await volume->Read(0, bytes, nullptr));
            ++*served;
        }
        *ended = true;
    }
    /// A disk with a block in each of many chunks, each of them written again after a snapshot.
    void MakeSnapshot() {
        Ok(pool().CreateDisk("load", kMiB));
        ASSERT_EQ(0, Write("load", 0, 4096, 'l'));
        Ok(pool().CreateDisk("d", kChunks * kChunkBytes));
        for (uint64_t i = 0; i < kChunks; ++i) ASSERT_EQ(0, Write("d", i * kChunkBytes, 4096, 'a'));
        Ok(pool().CreateSnapshots({"d@s"}));
    }
    void WriteAgain() {
        for (uint64_t i = 0; i < kChunks; ++i) ASSERT_EQ(0, Write("d", i * kChunkBytes, 4096, 'b'));
    }
    cow::PoolStatus Figures() { return machine->Do(pool().GetStatus()).value(); }
    int64_t Now() { return machine->clock().NowUs(); }

    /// Until the figures say so, asked now and then; how long that took.
    template <typename F>
    int64_t Until(F&& reached) {
        const int64_t began = Now();
        while (!reached(Figures())) {
            if (Now() - began > 100'000'000) {
                ADD_FAILURE() << "it does not end";
                break;
            }
            const int64_t again = Now() + 1000;
            scheduler.RunUntil([&] { return Now() >= again; });
        }
        return Now() - began;
    }
    static bool Reclaimed(const cow::PoolStatus& s) { return s.reclaim_pending == 0; }
    static bool Summed(const cow::PoolStatus& s) { return s.checksums_pending == 0; }

    /// The time a deletion takes, with a load beside it or not.
    int64_t DeletionUs(bool load, const std::function<void()>& while_pending = nullptr) {
        MakeSnapshot();
        Until(Summed);
        WriteAgain();
        Used();  // folds
        if (load) StartLoad();
        Ok(pool().DeleteSnapshot("d@s", false));
        const int64_t began = Now();
        if (while_pending) while_pending();
        Until(Reclaimed);
        const int64_t took = Now() - began;
        if (load) StopLoad();
        EXPECT_EQ((kChunks + 1) * 4096, Used());
        for (const char* name : {"d", "load"}) {
            if (exports.contains(name)) Close(name);
            Ok(pool().DeleteDisk(name, true, false));
        }
        Reclaim();
        return took;
    }
};

TEST_F(PacingTest, ADeletionRestsBesideRequestsAndEnds) {
    const int64_t alone = DeletionUs(false);
    const int64_t beside = DeletionUs(true);
    EXPECT_GT(beside, 5 * alone);
    EXPECT_LT(beside, 50 * alone);
    EXPECT_GT(served_, 100u);
}

TEST_F(PacingTest, WhoWaitsForSpaceToBeGivenBackGetsItAtOnce) {
    const int64_t alone = DeletionUs(false);
    const int64_t waited = DeletionUs(true, [this] { Reclaim(); });
    EXPECT_LT(waited, 4 * alone);
    const int64_t asked = DeletionUs(true, [this] { pool().HurryReclaim(); });
    EXPECT_LT(asked, 4 * alone);
}

TEST_F(PacingTest, ChecksumsRestBesideRequestsAndAreMade) {
    const auto sums = [this](bool load, bool wait) {
        MakeSnapshot();
        const int64_t began = Now();
        if (load) StartLoad();
        if (wait) {
            bool done = false;
            Spawn(WaitTask(&machine->home(), &pool(), &done));
            EXPECT_TRUE(scheduler.RunUntil([&] { return done; }));
        }
        Until(Summed);
        const int64_t took = Now() - began;
        if (load) StopLoad();
        EXPECT_EQ(kChunks * 4096, Figures().checksummed_bytes - summed_);
        summed_ = Figures().checksummed_bytes;
        for (const char* name : {"d", "load"}) {
            if (exports.contains(name)) Close(name);
            Ok(pool().DeleteDisk(name, true, false));
        }
        Reclaim();
        return took;
    };
    const int64_t alone = sums(false, false);
    const int64_t beside = sums(true, false);
    EXPECT_GT(beside, 5 * alone);
    EXPECT_LT(beside, 50 * alone);
    EXPECT_LT(sums(true, true), 4 * alone);
}

}  // namespace
}  // namespace varve
