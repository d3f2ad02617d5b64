// The allocator and its leases in pools so large that their rows are made up when they are read:
// what is read, where, and what stays in memory.
#include "cow/space/allocator.h"

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <set>

#include "cow/space/leases.h"
#include "tests/simulation/world.h"

namespace varve::cow {
namespace {

constexpr uint64_t kTiB = uint64_t{1} << 40;
constexpr uint64_t kPage = RegionStates::kPageRegions;

using MakeRow = std::function<std::optional<std::string>(uint64_t region)>;

/// A bitmap with the first `free` blocks free.
std::string RowWithFree(uint64_t free) {
    Allocator::Bits bits;
    bits.set();
    for (uint64_t i = 0; i < free; ++i) bits.reset(i);
    std::string row(1 + sizeof bits, 'B');
    std::memcpy(row.data() + 1, &bits, sizeof bits);
    return row;
}

/// Region rows as `make` says, but for those that were committed.
class MadeUpRows : public MetadataStore {
  public:
    MakeRow make;
    std::map<uint64_t, std::optional<std::string>> committed;
    uint64_t rows_read = 0;
    std::set<uint64_t> unreadable;  // no cursor gets past these
    std::function<void()> failing;  // before such a read fails

    std::unique_ptr<MetadataView> View() override { return std::make_unique<RowsView>(*this); }
    Status Commit(const Batch& batch) override {
        for (const Batch::Op& op : batch.ops()) {
            if (op.key[0] == 'R') committed[KeyNumber(op.key, 0)] = op.value;
        }
        return Status();
    }
    std::optional<std::string> Row(uint64_t region) const {
        const auto found = committed.find(region);
        return found != committed.end() ? found->second : make(region);
    }

  private:
    bool Fails(uint64_t region) const {
        const bool fails = unreadable.contains(region);
        if (fails && failing) failing();
        return fails;
    }
    static Error Unreadable() { return MakeError(ErrorKind::kIo, "a block of rows"); }

    class RegionsCursor : public Cursor {
      public:
        RegionsCursor(MadeUpRows& rows, uint64_t end) : rows_(rows), end_(end) {}
        void Seek(std::string_view key) override { Find(KeyNumber(key, 0)); }
        void Next() override { Find(region_ + 1); }
        bool valid() const override { return value_.has_value(); }
        std::string_view key() const override { return key_; }
        std::string_view value() const override { return *value_; }
        Status status() const override { return failed_ ? Status(Unreadable()) : Status(); }

      private:
        void Find(uint64_t region) {
            value_.reset();
            failed_ = false;
            for (region_ = region; region_ < end_ && !value_ && !failed_; ++region_) {
                failed_ = rows_.Fails(region_);
                if (!failed_) value_ = rows_.Row(region_);
            }
            if (!value_) return;
            key_ = RegionKey(--region_);
            ++rows_.rows_read;
        }
        MadeUpRows& rows_;
        const uint64_t end_;
        uint64_t region_ = 0;
        bool failed_ = false;
        std::string key_;
        std::optional<std::string> value_;
    };
    class RowsView : public MetadataView {
      public:
        explicit RowsView(MadeUpRows& rows) : rows_(rows) {}
        Result<std::optional<std::string>> Get(std::string_view key) override {
            ++rows_.rows_read;
            const uint64_t region = KeyNumber(key, 0);
            if (rows_.Fails(region)) return Unreadable();
            return rows_.Row(region);
        }
        std::unique_ptr<Cursor> Range(std::string_view, std::string_view upper, uint64_t) override {
            return std::make_unique<RegionsCursor>(rows_, KeyNumber(upper, 0));
        }

      private:
        MadeUpRows& rows_;
    };
};

/// Stands unless it is moved on.
class SetClock : public Clock {
  public:
    int64_t now_us = 0;
    int64_t NowUs() override { return now_us; }
    void PostAfter(int64_t us, Executor& executor, Runnable* runnable) override {
        now_us += us;
        executor.Post(runnable);
    }
};

class AnySpace : public SpaceStore {
  public:
    bool full = false;
    Status Provision(uint64_t, uint64_t) override {
        return full ? Status(MakeError(ErrorKind::kNoSpace, "full")) : Status();
    }
    void Discard(uint64_t, uint64_t) override {}
    uint64_t Capacity(uint64_t provisioned) override { return provisioned; }
};

class AllocatorTest : public testing::Test {
  protected:
    void Open(uint64_t regions, MakeRow make, uint64_t open_max = Allocator::kOpenMax) {
        store.make = std::move(make);
        pool.region_count = regions;
        Environment environment;
        environment.home = &home;
        environment.loader = &loader;
        environment.space = &space;
        environment.metadata = &store;
        environment.clock = &clock;
        core = std::make_unique<Core>(environment);
        allocator = std::make_unique<Allocator>(store, space, pool, 0, open_max);
        leases = std::make_unique<Leases>(*core, *allocator);
    }
    void TearDown() override {
        if (leases) simulation::Await(scheduler, home, Idle(leases.get()));
        EXPECT_EQ(allocator->home_reads(), 0U);
    }
    static Task<bool> Idle(Leases* leases) {
        co_await leases->Idle();
        co_return true;
    }
    std::vector<Extent> Take(uint64_t most) {
        auto extents = simulation::Await(scheduler, home, leases->Take(most));
        EXPECT_TRUE(extents.ok());
        return extents.ok() ? extents.value() : std::vector<Extent>();
    }
    static Task<bool> OpenThem(Leases* leases, std::vector<uint64_t> regions) {
        co_await leases->Open(std::move(regions));
        co_return true;
    }
    static Task<void> Note(Leases* leases, Executor* home, std::vector<uint64_t> regions,
                           bool* opened) {
        co_await Hop(*home);
        co_await leases->Open(std::move(regions));
        *opened = true;
    }
    /// As the committer does it.
    void Free(const std::vector<Extent>& extents) {
        const std::vector<uint64_t> regions = RegionsOf(extents);
        allocator->Hold(regions);
        simulation::Await(scheduler, home, OpenThem(leases.get(), regions));
        for (const Extent& extent : extents) ASSERT_TRUE(allocator->MarkFree(extent).ok());
        allocator->Unhold(regions);
        Commit();
        for (const Extent& extent : extents) allocator->Release(extent);
    }
    void Commit() {
        Batch batch;
        allocator->Encode(batch);
        ASSERT_TRUE(store.Commit(batch).ok());
        allocator->Stored();
    }

    simulation::Scheduler scheduler{1};
    Executor& home = scheduler.NewLane();
    Executor& loader = scheduler.NewLane(true);
    MadeUpRows store;
    SetClock clock;
    AnySpace space;
    PoolRecord pool;
    std::unique_ptr<Core> core;
    std::unique_ptr<Allocator> allocator;
    std::unique_ptr<Leases> leases;
};

constexpr uint64_t kRegionsOf100TiB = 100 * kTiB / kRegionBytes;

TEST_F(AllocatorTest, AFullPoolIsNotReadBeforeTheFirstLease) {
    space.full = true;
    Open(kRegionsOf100TiB, [](uint64_t) { return RowWithFree(3); });
    const std::vector<Extent> extents = Take(8);
    ASSERT_EQ(extents.size(), 1U);
    EXPECT_EQ(extents[0].count, 3U - (extents[0].place == 1 ? 1 : 0));  // not the superblock
    EXPECT_LE(store.rows_read, kPage + 1);
    EXPECT_LE(allocator->known_pages(), 1U);
    for (int i = 0; i < 100; ++i) Take(8);
    EXPECT_LE(store.rows_read, kPage + 101);
}

TEST_F(AllocatorTest, RoomAtTheEndIsFoundAtOnce) {
    space.full = true;
    const uint64_t last = kRegionsOf100TiB - 1;
    Open(kRegionsOf100TiB,
         [=](uint64_t region) { return region == last ? RowWithFree(2000) : std::string("F"); });
    const std::vector<Extent> extents = Take(8);
    ASSERT_EQ(extents.size(), 1U);
    EXPECT_EQ(extents[0], (Extent{last * kRegionBlocks, 8}));
    EXPECT_LE(store.rows_read, 2 * kPage + 1);
    EXPECT_LE(allocator->known_pages(), 2U);
}

TEST_F(AllocatorTest, RoomInTheMiddleIsFound) {
    space.full = true;
    constexpr uint64_t kRegions = 20 * kPage + 7, kPlace = 11 * kPage + 3;
    Open(kRegions, [](uint64_t region) -> std::optional<std::string> {
        if (region >= kRegions) return std::nullopt;
        return region == kPlace ? RowWithFree(1) : std::string("F");
    });
    EXPECT_EQ(Take(8), (std::vector<Extent>{{kPlace * kRegionBlocks, 1}}));
    const auto none = simulation::Await(scheduler, home, leases->Take(8));
    ASSERT_FALSE(none.ok());
    EXPECT_EQ(none.error().kind, ErrorKind::kNoSpace);
    EXPECT_LE(store.rows_read, kRegions + 3);  // each once
}

TEST_F(AllocatorTest, AForgedNumberOfRegionsTakesNoMemory) {
    Open(uint64_t{1} << 36, [](uint64_t) { return std::nullopt; });
    ASSERT_FALSE(Take(8).empty());
    EXPECT_LE(allocator->known_pages(), 1U);
}

TEST_F(AllocatorTest, OpenRegionsAreBoundedAndTheirRowsRight) {
    constexpr uint64_t kOpen = 500, kTogether = 100, kStride = kRegionsOf100TiB / 3000;
    Open(
        kRegionsOf100TiB, [](uint64_t) { return std::string("F"); }, kOpen);
    pool.used_blocks = kRegionsOf100TiB * kRegionBlocks;
    for (uint64_t i = 0; i < 3000;) {
        std::vector<Extent> extents;
        for (const uint64_t end = i + kTogether; i < end; ++i) {
            extents.push_back({(1 + i * kStride) * kRegionBlocks + i % kRegionBlocks, 1});
        }
        Free(extents);
        EXPECT_LE(allocator->open_regions(), kOpen + kTogether);
    }
    EXPECT_EQ(store.rows_read, 3000U);
    EXPECT_EQ(allocator->leased_blocks(), 0U);
    EXPECT_EQ(store.committed.size(), 3000U);
    for (uint64_t i = 0; i < 3000; ++i) {  // all of them closed and opened again
        space.full = true;
        const std::vector<Extent> extents = Take(8);
        ASSERT_EQ(extents.size(), 1U);
        ASSERT_EQ(extents[0].count, 1U);
        ASSERT_EQ(extents[0].place / kRegionBlocks % kStride, 1U);
        ASSERT_EQ(extents[0].place % kRegionBlocks,
                  extents[0].place / kRegionBlocks / kStride % kRegionBlocks);
        ASSERT_TRUE(allocator->MarkUsed(extents[0]).ok());
        if (i % kTogether == 0) Commit();
        ASSERT_LE(allocator->open_regions(), kOpen + kTogether + 1);
    }
    Commit();
    for (const auto& [region, row] : store.committed) EXPECT_EQ(row, "F");
}

// A row is on its way from the store while it is changed.
TEST_F(AllocatorTest, WhatIsHeldMissesNoChange) {
    Open(
        4, [](uint64_t) { return RowWithFree(1); }, 1);
    pool.used_blocks = 4 * kRegionBlocks - 4;
    const std::vector<uint64_t> held{2};
    for (uint64_t seed = 0; seed < 50; ++seed) {
        scheduler.random().seed(seed);
        const Extent block{2 * kRegionBlocks + 100 + seed, 1};
        allocator->Hold(held);
        bool opened = false;
        Spawn(Note(leases.get(), &home, held, &opened));
        const uint64_t before = store.rows_read;
        scheduler.RunUntil([&] { return opened || store.rows_read > before; });
        Free({block});
        scheduler.RunUntil([&] { return opened; });
        // It is free now, whatever that row said.
        bool found = false;
        for (const Extent& extent : allocator->Take(2, kRegionBlocks)) {
            found |= extent.place <= block.place && block.place < extent.place + extent.count;
            allocator->Release(extent);
        }
        EXPECT_TRUE(found) << "seed " << seed;
        EXPECT_FALSE(allocator->MarkFree(block).ok());
        allocator->Unhold(held);
        Free({{3 * kRegionBlocks + 100 + seed, 1}});  // closes the other
        EXPECT_TRUE(allocator->NeedsRow(2));
    }
}

TEST_F(AllocatorTest, ADamagedRowIsSetAside) {
    space.full = true;
    Open(2 * kPage, [](uint64_t region) {
        return region % 3 == 0 ? std::string("damaged") : RowWithFree(2000);
    });
    for (uint64_t i = 0; i < 2000; ++i) {
        const std::vector<Extent> extents = Take(1000);
        ASSERT_EQ(extents.size(), 1U);
        ASSERT_NE(extents[0].place / kRegionBlocks % 3, 0U);
    }
}

TEST_F(AllocatorTest, WhatCannotBeReadCountsAsFull) {
    for (uint64_t region = 100; region < 132; ++region) store.unreadable.insert(region);
    store.unreadable.insert(kPage - 1);
    const uint64_t unreadable = store.unreadable.size();
    Open(kPage, [](uint64_t region) -> std::optional<std::string> {
        if (region == 500) return std::nullopt;  // bare
        return region == 501 ? std::string("F") : RowWithFree(2000);
    });
    std::set<uint64_t> regions;
    for (uint64_t i = 0; i < kPage - unreadable; ++i) {
        const std::vector<Extent> extents = Take(cow::kRegionBlocks);
        ASSERT_EQ(extents.size(), 1U);
        regions.insert(extents[0].place / kRegionBlocks);
    }
    for (uint64_t region = 0; region < kPage; ++region) {
        const bool leased = !store.unreadable.contains(region) && region != 501;
        EXPECT_EQ(leased, regions.contains(region)) << region;
    }
    EXPECT_TRUE(regions.contains(kPage)) << "the file did not grow";
    EXPECT_EQ(unreadable, allocator->set_aside());
    EXPECT_LE(store.rows_read, 3 * kPage);  // not again and again
    // One that can be read after all is of use again.
    store.unreadable.clear();
    const std::vector<uint64_t> held{120};
    allocator->Hold(held);
    simulation::Await(scheduler, home, OpenThem(leases.get(), held));
    allocator->Unhold(held);
    EXPECT_EQ(unreadable - 1, allocator->set_aside());
    EXPECT_EQ(120U, Take(1)[0].place / kRegionBlocks);
}

TEST_F(AllocatorTest, ADeviceThatFailsSlowlyKeepsLeasesForSomeSecondsOnly) {
    constexpr int64_t kSecondUs = 1'000'000;
    for (uint64_t region = 100; region < 2 * kPage; ++region) store.unreadable.insert(region);
    store.failing = [this] { clock.now_us += 10 * kSecondUs; };
    Open(2 * kPage, [](uint64_t) { return std::string("F"); });
    EXPECT_EQ(2 * kPage, Take(1)[0].place / kRegionBlocks);
    EXPECT_LE(clock.now_us, 20 * kSecondUs) << "more than two reads of a page were tried";
    // Of these pages no row but the first hundred was read, and no other one was tried on its own.
    EXPECT_EQ(0U, allocator->set_aside());
    EXPECT_EQ(kPage - 100, leases->untried());
}

TEST_F(AllocatorTest, ASectorThatFailsSlowlyCostsItsRegionsOnly) {
    constexpr int64_t kSecondUs = 1'000'000;
    space.full = true;
    store.unreadable.insert(100);
    store.failing = [this] { clock.now_us += 2 * kSecondUs; };
    Open(kPage, [](uint64_t region) { return region < 90 ? std::string("F") : RowWithFree(2000); });
    std::set<uint64_t> regions;
    for (uint64_t i = 0; i < kPage - 91; ++i) {
        regions.insert(Take(kRegionBlocks)[0].place / kRegionBlocks);
    }
    EXPECT_EQ(kPage - 91, regions.size());
    EXPECT_FALSE(regions.contains(100));
    EXPECT_LE(clock.now_us, 4 * kSecondUs);
    EXPECT_EQ(1U, allocator->set_aside());
    EXPECT_EQ(0U, leases->untried());
    PageReader reader(0, kPage);
    reader.Read(*store.View(), &clock);
    EXPECT_TRUE(reader.done());
    EXPECT_EQ(0U, reader.untried());
}

// Two blocks of rows fail, each after ten seconds, and all that is free is behind them.
TEST_F(AllocatorTest, WhatWasNotTriedIsTriedWhenNothingElseIsFree) {
    constexpr int64_t kSecondUs = 1'000'000;
    space.full = true;
    for (uint64_t region = 100; region < 140; ++region) store.unreadable.insert(region);
    store.failing = [this] { clock.now_us += 10 * kSecondUs; };
    Open(kPage,
         [](uint64_t region) { return region < 500 ? std::string("F") : RowWithFree(2000); });
    const auto none = simulation::Await(scheduler, home, leases->Take(8));
    ASSERT_FALSE(none.ok());
    EXPECT_EQ(ErrorKind::kNoSpace, none.error().kind);
    EXPECT_EQ(kPage - 100, leases->untried());
    EXPECT_EQ(0U, allocator->set_aside()) << "what was not tried is called damaged";
    // Not at once again: each try keeps those who wait for ten seconds or more.
    const int64_t before_us = clock.now_us;
    EXPECT_FALSE(simulation::Await(scheduler, home, leases->Take(8)).ok());
    EXPECT_EQ(before_us, clock.now_us);
    clock.now_us += 200 * kSecondUs;
    EXPECT_LE(500U, Take(8)[0].place / kRegionBlocks);
    EXPECT_EQ(2U, allocator->set_aside());  // tried on their own
    EXPECT_EQ(138U - 100U, leases->untried());
    // When the device is well again, all are of use.
    store.unreadable.clear();
    std::set<uint64_t> regions;
    for (uint64_t i = 0; i < kPage - 500; ++i) {
        regions.insert(Take(kRegionBlocks)[0].place / kRegionBlocks);
    }
    clock.now_us += 2000 * kSecondUs;
    EXPECT_FALSE(simulation::Await(scheduler, home, leases->Take(8)).ok());
    EXPECT_EQ(0U, leases->untried());
}

}  // namespace
}  // namespace varve::cow
