// MemoryBudget: how a bounded memory is shared, and that nobody is kept out of it for ever.
#include "nbdserver/connection/memory_budget.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <iostream>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "base/check.h"

namespace varve::nbdserver {
namespace {

using Fund = MemoryBudget::Fund;
constexpr uint64_t kKiB = 1 << 10, kMiB = 1 << 20;
constexpr uint64_t kBytes = 64 * kMiB;  // 32 MiB modest, 32 MiB large
constexpr uint64_t kSmall = 16 * kKiB;

struct Holder : MemoryBudget::Share {
    struct Piece {
        Fund fund;
        uint64_t bytes;
    };

    Holder() {
        wake = [](Share* share) { ++static_cast<Holder*>(share)->woken; };
    }
    uint64_t woken = 0;
    uint64_t wanted = 0;
    std::vector<Piece> pieces;
};

class MemoryBudgetTest : public testing::Test {
  protected:
    ~MemoryBudgetTest() override {
        for (Holder& holder : holders_) {
            budget_.Leave(holder);
            GiveAllBack(holder);
        }
    }
    Holder& New() { return holders_.emplace_back(); }
    Fund Take(Holder& holder, uint64_t bytes) {
        const Fund fund = budget_.Take(holder, bytes);
        if (fund != Fund::kNone) holder.pieces.push_back({fund, bytes});
        return fund;
    }
    /// Pieces of `bytes` until one has to wait; gives that up. Returns how many there were.
    uint64_t TakeAll(Holder& holder, uint64_t bytes) {
        uint64_t count = 0;
        while (Take(holder, bytes) != Fund::kNone) ++count;
        budget_.Leave(holder);
        return count;
    }
    void GiveBack(Holder& holder, size_t index = 0) {
        const Holder::Piece piece = holder.pieces[index];
        holder.pieces.erase(holder.pieces.begin() + static_cast<std::ptrdiff_t>(index));
        budget_.GiveBack(holder, piece.fund, piece.bytes);
    }
    void GiveAllBack(Holder& holder) {
        while (!holder.pieces.empty()) GiveBack(holder, holder.pieces.size() - 1);
    }

    MemoryBudget budget_{kBytes, kSmall};
    std::deque<Holder> holders_;
};

TEST_F(MemoryBudgetTest, AModestHolderIsPaidAtOnceBesideOneThatTookAllItCould) {
    TakeAll(New(), 4 * kMiB);
    EXPECT_GE(budget_.bytes(), 32 * kMiB);
    Holder& modest = New();
    EXPECT_EQ(Take(modest, 256 * kKiB), Fund::kModest);
    EXPECT_EQ(Take(modest, 256 * kKiB), Fund::kModest);
}

TEST_F(MemoryBudgetTest, ThereIsSomethingLeftForTheNextBesideManyWhoTookWhatTheyCould) {
    for (int i = 0; i < 48; ++i) TakeAll(New(), 8 * kKiB);
    EXPECT_EQ(Take(New(), 64 * kKiB), Fund::kModest);
    EXPECT_LE(budget_.bytes(), kBytes);
}

TEST_F(MemoryBudgetTest, WhoHoldsNothingIsAlwaysGrantedOneSmallPieceAndOnlyOne) {
    MemoryBudget budget(kMiB, kSmall);
    std::deque<Holder> holders(1000);
    std::vector<Fund> funds;
    for (Holder& holder : holders) {
        funds.push_back(budget.Take(holder, kSmall));
        EXPECT_NE(funds.back(), Fund::kNone);
    }
    EXPECT_EQ(funds.back(), Fund::kSmall);
    EXPECT_EQ(budget.Take(holders.back(), kSmall), Fund::kLarge);
    budget.GiveBack(holders.back(), Fund::kLarge, kSmall);
    Holder large;
    EXPECT_EQ(budget.Take(large, kMiB / 2), Fund::kLarge);
    EXPECT_EQ(budget.Take(holders.back(), kMiB / 2), Fund::kNone);
    EXPECT_LE(budget.bytes(), kMiB + 1000 * kSmall);
    budget.Leave(holders.back());
    budget.GiveBack(large, Fund::kLarge, kMiB / 2);
    for (size_t i = 0; i < holders.size(); ++i) budget.GiveBack(holders[i], funds[i], kSmall);
}

TEST_F(MemoryBudgetTest, TheBoundHoldsWhateverManyHoldersAskFor) {
    const uint32_t seed = std::random_device()();
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    for (int i = 0; i < 40; ++i) New();
    for (int step = 0; step < 100'000; ++step) {
        Holder& holder = holders_[random() % holders_.size()];
        if (!holder.pieces.empty() && random() % 2) {
            GiveBack(holder, random() % holder.pieces.size());
        } else if (!holder.waiting()) {
            Take(holder, 1 + random() % (kKiB << random() % 16));
        } else if (random() % 4 == 0) {
            budget_.Leave(holder);
        }
        ASSERT_LE(budget_.bytes(), kBytes + holders_.size() * kSmall);
    }
}

TEST_F(MemoryBudgetTest, NobodyOvertakesWhoWaitsForALargePiece) {
    Holder& first = New();
    EXPECT_EQ(Take(first, 20 * kMiB), Fund::kLarge);
    Holder& second = New();
    EXPECT_EQ(Take(second, 20 * kMiB), Fund::kNone);
    Holder& third = New();
    EXPECT_EQ(Take(third, 5 * kMiB), Fund::kNone) << "it would fit, but is not the first";
    EXPECT_TRUE(budget_.anybody_waits());
    GiveAllBack(first);
    EXPECT_EQ(second.woken, 1U);
    EXPECT_EQ(third.woken, 0U);
    EXPECT_EQ(Take(third, 5 * kMiB), Fund::kNone);
    EXPECT_EQ(Take(second, 20 * kMiB), Fund::kLarge);
    EXPECT_EQ(third.woken, 1U);
    EXPECT_EQ(Take(third, 5 * kMiB), Fund::kLarge);
    EXPECT_FALSE(budget_.anybody_waits());
}

TEST_F(MemoryBudgetTest, WhoLeavesMakesWayForTheNext) {
    Holder& first = New();
    EXPECT_EQ(Take(first, 20 * kMiB), Fund::kLarge);
    Holder& second = New();
    EXPECT_EQ(Take(second, 20 * kMiB), Fund::kNone);
    Holder& third = New();
    EXPECT_EQ(Take(third, 5 * kMiB), Fund::kNone);
    budget_.Leave(second);
    EXPECT_EQ(third.woken, 1U);
    EXPECT_EQ(Take(third, 5 * kMiB), Fund::kLarge);
}

TEST_F(MemoryBudgetTest, ModestMemoryThatComesBackWakesWhoWaitsForSome) {
    Holder& hoarder = New();
    TakeAll(hoarder, kMiB);
    for (int i = 0; i < 60; ++i) TakeAll(New(), 32 * kKiB);
    Holder& modest = New();
    ASSERT_EQ(Take(modest, 512 * kKiB), Fund::kNone);
    for (size_t i = 1; i <= 60; ++i) GiveAllBack(holders_[i]);
    EXPECT_GE(modest.woken, 1U);
    EXPECT_EQ(Take(modest, 512 * kKiB), Fund::kModest);
}

TEST_F(MemoryBudgetTest, APieceThatIsLargerThanTheFundIsGrantedAlone) {
    MemoryBudget budget(kMiB, kSmall);
    Holder one, other;
    EXPECT_EQ(budget.Take(one, 32 * kMiB), Fund::kLarge);
    EXPECT_EQ(budget.Take(other, 32 * kMiB), Fund::kNone);
    budget.GiveBack(one, Fund::kLarge, 32 * kMiB);
    EXPECT_EQ(other.woken, 1U);
    EXPECT_EQ(budget.Take(other, 32 * kMiB), Fund::kLarge);
    budget.GiveBack(other, Fund::kLarge, 32 * kMiB);
}

/// As many threads have it: each had a sixteenth of the memory once.
TEST(MemoryPotTest, WhoIsModestIsPaidAtOnceBesideManyWhoHoardOnTheSameThread) {
    auto pot = std::make_shared<MemoryPot>(kBytes, 16);
    std::deque<MemoryBudget> budgets;
    for (int i = 0; i < 16; ++i) budgets.emplace_back(pot, kSmall, nullptr);
    std::deque<Holder> hoarders(20);
    for (Holder& hoarder : hoarders) {
        const Fund fund = budgets[0].Take(hoarder, 2 * kMiB);
        if (fund != Fund::kNone) hoarder.pieces.push_back({fund, 2 * kMiB});
    }
    EXPECT_TRUE(budgets[1].anybody_waits()) << "known to all";
    Holder modest;
    EXPECT_EQ(budgets[0].Take(modest, 64 * kKiB), Fund::kModest);
    budgets[0].GiveBack(modest, Fund::kModest, 64 * kKiB);
    for (Holder& hoarder : hoarders) {
        budgets[0].Leave(hoarder);
        for (const Holder::Piece& piece : hoarder.pieces) {
            budgets[0].GiveBack(hoarder, piece.fund, piece.bytes);
        }
    }
}

TEST(MemoryPotTest, WhatAnIdleThreadHasBorrowedAheadComesBackWhenSomebodyWaits) {
    auto pot = std::make_shared<MemoryPot>(kBytes, 2);
    uint64_t pokes = 0;
    MemoryBudget idle(pot, kSmall, [&pokes] { ++pokes; });
    Holder once;
    ASSERT_EQ(idle.Take(once, 4 * kKiB), Fund::kModest);
    idle.GiveBack(once, Fund::kModest, 4 * kKiB);
    EXPECT_LT(pot->modest_bytes_free(), pot->modest_bytes_max());
    EXPECT_EQ(pokes, 0U);

    MemoryBudget busy(pot, kSmall, nullptr);
    Holder large, waits;
    ASSERT_EQ(busy.Take(large, 32 * kMiB), Fund::kLarge);
    std::deque<Holder> many(64);
    for (Holder& holder : many) {
        while (busy.Take(holder, 64 * kKiB) == Fund::kModest) {
            holder.pieces.push_back({Fund::kModest, 64 * kKiB});
        }
        busy.Leave(holder);
    }
    ASSERT_EQ(busy.Take(waits, 256 * kKiB), Fund::kNone);
    EXPECT_GT(pokes, 0U);
    const uint64_t before = pot->modest_bytes_free();
    idle.LookAgain();
    EXPECT_GT(pot->modest_bytes_free(), before);
    busy.Leave(waits);
    busy.GiveBack(large, Fund::kLarge, 32 * kMiB);
    for (Holder& holder : many) {
        for (const Holder::Piece& piece : holder.pieces) {
            busy.GiveBack(holder, piece.fund, piece.bytes);
        }
    }
}

TEST(MemoryPotTest, ThreadsTakeTurnsForLargePieces) {
    auto pot = std::make_shared<MemoryPot>(kBytes, 2);
    uint64_t pokes = 0;
    MemoryBudget crowd(pot, kSmall, nullptr), single(pot, kSmall, [&pokes] { ++pokes; });
    std::deque<Holder> many(3);
    Holder one;
    ASSERT_EQ(crowd.Take(many[0], 32 * kMiB), Fund::kLarge);
    ASSERT_EQ(crowd.Take(many[1], 32 * kMiB), Fund::kNone);
    ASSERT_EQ(crowd.Take(many[2], 32 * kMiB), Fund::kNone);
    ASSERT_EQ(single.Take(one, 32 * kMiB), Fund::kNone);
    crowd.GiveBack(many[0], Fund::kLarge, 32 * kMiB);
    ASSERT_EQ(crowd.Take(many[1], 32 * kMiB), Fund::kLarge) << "it came first";
    crowd.GiveBack(many[1], Fund::kLarge, 32 * kMiB);
    EXPECT_EQ(crowd.Take(many[2], 32 * kMiB), Fund::kNone) << "the other thread's turn";
    EXPECT_GT(pokes, 0U);
    single.LookAgain();
    EXPECT_EQ(one.woken, 1U);
    ASSERT_EQ(single.Take(one, 32 * kMiB), Fund::kLarge);
    single.GiveBack(one, Fund::kLarge, 32 * kMiB);
    ASSERT_EQ(crowd.Take(many[2], 32 * kMiB), Fund::kLarge);
    crowd.GiveBack(many[2], Fund::kLarge, 32 * kMiB);
}

/// A thread with a budget and holders that want pieces of all sizes, each many times.
class BudgetThread {
  public:
    BudgetThread(std::shared_ptr<MemoryPot> pot, uint32_t seed, std::atomic<int64_t>& held)
        : budget_(std::move(pot), kSmall, [this] { Wake(); }), random_(seed), held_(held) {}

    void Run() {
        std::deque<Holder> holders(8);
        int left = 4'000;
        while (left > 0 || HoldsAny(holders)) {
            bool moved = false;
            Holder& fickle = holders[random_() % holders.size()];
            if (fickle.waiting() && random_() % 16 == 0) budget_.Leave(fickle);
            for (Holder& holder : holders) {
                if (left > 0 && (!holder.waiting() || holder.woken > 0)) {
                    if (!holder.waiting()) holder.wanted = 4 * kKiB << random_() % 14;
                    holder.woken = 0;
                    const Fund fund = budget_.Take(holder, holder.wanted);
                    if (fund == Fund::kNone) continue;
                    Hold(static_cast<int64_t>(fund == Fund::kSmall ? 0 : holder.wanted));
                    holder.pieces.push_back({fund, holder.wanted});
                    --left;
                    moved = true;
                }
            }
            for (Holder& holder : holders) {
                if (holder.pieces.empty() || random_() % 4 == 0) continue;
                const Holder::Piece piece = holder.pieces.back();
                holder.pieces.pop_back();
                Hold(-static_cast<int64_t>(piece.fund == Fund::kSmall ? 0 : piece.bytes));
                budget_.GiveBack(holder, piece.fund, piece.bytes);
                moved = true;
            }
            if (!moved && !HoldsAny(holders)) WaitForPoke(holders);
            if (poked_.exchange(false)) budget_.LookAgain();
        }
        for (Holder& holder : holders) budget_.Leave(holder);
    }

  private:
    static bool HoldsAny(const std::deque<Holder>& holders) {
        return std::any_of(holders.begin(), holders.end(),
                           [](const Holder& holder) { return !holder.pieces.empty(); });
    }
    void Hold(int64_t bytes) {
        EXPECT_LE(held_.fetch_add(bytes) + bytes, static_cast<int64_t>(kBytes));
    }
    void Wake() {
        const std::lock_guard lock(mutex_);
        poked_ = true;
        changed_.notify_one();
    }
    void WaitForPoke(const std::deque<Holder>& holders) {
        for (const Holder& holder : holders) {
            if (holder.woken > 0) return;
        }
        std::unique_lock lock(mutex_);
        const auto most = std::chrono::seconds(60);
        VARVE_CHECK(changed_.wait_for(lock, most, [this] { return poked_.load(); }));
    }

    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<bool> poked_{false};
    MemoryBudget budget_;
    std::mt19937 random_;
    std::atomic<int64_t>& held_;
};

TEST(MemoryPotTest, NobodyStarvesOnAnyThreadAndTheBoundHolds) {
    const uint32_t seed = std::random_device()();
    const unsigned count = 2 + seed % 15;
    std::cout << "seed " << seed << ", " << count << " threads" << std::endl;
    auto pot = std::make_shared<MemoryPot>(kBytes, count);
    std::atomic<int64_t> held{0};
    std::deque<BudgetThread> budgets;
    for (unsigned i = 0; i < count; ++i) budgets.emplace_back(pot, seed + i, held);
    std::vector<std::thread> threads;
    for (BudgetThread& budget : budgets) threads.emplace_back([&budget] { budget.Run(); });
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(held, 0);
    EXPECT_FALSE(pot->anybody_waits());
}

/// Holders that ask for pieces of all sizes, finish them in any order and ask again when woken:
/// each gets all that it wants.
TEST_F(MemoryBudgetTest, NobodyStarves) {
    const uint32_t seed = std::random_device()();
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    constexpr int kHolders = 30, kPieces = 200;
    struct Wish {
        uint64_t bytes;
        int left = kPieces;
    };
    std::vector<Wish> wishes;
    for (int i = 0; i < kHolders; ++i) {
        New();
        wishes.push_back({4 * kKiB << random() % 14});  // up to 32 MiB
    }
    int unserved = kHolders * kPieces;
    for (int step = 0; unserved > 0; ++step) {
        ASSERT_LT(step, 10'000'000);
        const size_t i = random() % kHolders;
        Holder& holder = holders_[i];
        Wish& wish = wishes[i];
        if (wish.left > 0 && (!holder.waiting() || holder.woken > 0) && random() % 4 != 0) {
            holder.woken = 0;
            if (Take(holder, wish.bytes) == Fund::kNone) continue;
            --wish.left;
            --unserved;
        } else if (!holder.pieces.empty()) {
            GiveBack(holder, random() % holder.pieces.size());
            if (holder.waiting()) holder.woken = 1;  // its own memory came back: it asks again
        }
    }
}

}  // namespace
}  // namespace varve::nbdserver
