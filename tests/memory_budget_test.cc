// MemoryBudget: how a bounded memory is shared, and that nobody is kept out of it for ever.
#include "nbdserver/connection/memory_budget.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <random>
#include <vector>

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
