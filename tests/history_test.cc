// The tree of generations: what changes when many views go at once, and what that costs.
#include "cow/history/history.h"

#include <gtest/gtest.h>

#include "cow/history/losses.h"
#include "tests/simulation/dice.h"

namespace varve::cow {
namespace {

constexpr BranchId kRoot{1};

/// A branch with snapshots at even generations from 2 on, and a head.
History MakeLine(uint64_t snapshots) {
    History history;
    history.AddBranch(kRoot, BranchId{0}, Generation{0});
    history.SetHead(kRoot, true);
    for (uint64_t i = 1; i <= snapshots; ++i) history.AddSnapshot(kRoot, Generation{2 * i});
    return history;
}

/// Whether a scan that walks either of the two to its end comes upon `generation` of `branch`.
bool Passes(const Line& line, BranchId branch, Generation generation) {
    return std::any_of(line.begin(), line.end(), [&](const Stretch& s) {
        return s.branch == branch && s.after < generation && generation <= s.to;
    });
}

// With a walk over all others for each of them this would take half an hour.
TEST(HistoryTest, AHundredThousandSnapshotsThatGoTogetherAreOneWalk) {
    constexpr uint64_t kMany = 100'000;
    const History history = MakeLine(kMany);
    std::vector<ViewAt> all{{kRoot, kHead}}, every_other;
    for (uint64_t i = 1; i <= kMany; ++i) {
        all.push_back({kRoot, Generation{2 * i}});
        if (i % 2 == 0) every_other.push_back({kRoot, Generation{2 * i}});
    }
    const std::vector<Loss> losses = FindLosses(history, all);
    ASSERT_EQ(1U, losses.size());
    EXPECT_EQ(kMany + 1, losses[0].with.gone.size());
    EXPECT_EQ(1U, losses[0].without.segments.size());
    EXPECT_EQ(1U, losses[0].below.size());
    EXPECT_TRUE(losses[0].above.empty());
    EXPECT_EQ(kMany / 2, FindLosses(history, every_other).size());
}

TEST(HistoryTest, ARunOfSnapshotsIsFoundFromBelowItAndFromAboveItsLowest) {
    const History history = MakeLine(9);
    const std::vector<Loss> losses = FindLosses(
        history, {{kRoot, Generation{8}}, {kRoot, Generation{10}}, {kRoot, Generation{12}}});
    ASSERT_EQ(1U, losses.size());
    ASSERT_EQ(1U, losses[0].below.size());
    EXPECT_EQ(Generation{6}, losses[0].below[0].after);
    EXPECT_EQ(Generation{12}, losses[0].below[0].to);
    ASSERT_EQ(1U, losses[0].above.size());
    EXPECT_EQ(Generation{8}, losses[0].above[0].after);
    EXPECT_EQ(Generation{14}, losses[0].above[0].to);
}

/// A tree of branches with some snapshots and heads, and the views on it.
History MakeTree(simulation::Dice& dice, std::vector<ViewAt>* views) {
    History history;
    std::vector<ViewAt> places;  // where a branch may start
    uint64_t sequence = 1;
    for (uint64_t branches = 1 + dice.Draw(6); branches > 0; --branches) {
        const BranchId id{sequence++};
        ViewAt from{BranchId{0}, Generation{0}};
        if (!places.empty()) from = places[dice.Draw(places.size())];
        history.AddBranch(id, from.branch, from.generation);
        for (uint64_t i = dice.Draw(4); i > 0; --i) {
            const Generation generation{sequence++};
            places.push_back({id, generation});
            if (dice.Chance(0.3)) continue;  // its snapshot was deleted
            history.AddSnapshot(id, generation);
            views->push_back(places.back());
        }
        const bool head = dice.Chance(0.7);
        history.SetHead(id, head);
        if (head) views->push_back({id, kHead});
    }
    return history;
}

/// The row that a view resolves a chunk to.
ViewAt Resolve(const History& history, ViewAt view, const std::vector<ViewAt>& rows) {
    for (const Stretch& stretch : history.LineOf(view.branch, view.generation)) {
        ViewAt found{BranchId{0}, Generation{0}};
        for (const ViewAt& row : rows) {
            const bool newer = row.branch == stretch.branch && row.generation > stretch.after &&
                               row.generation <= stretch.to && row.generation > found.generation;
            if (newer) found = row;
        }
        if (found.generation.value != 0) return found;
    }
    return {BranchId{0}, Generation{0}};
}

// A chunk of which only views that go read a row must be touched on both sides of a scan.
TEST(HistoryTest, NothingThatDiesIsMissed) {
    uint64_t deaths = 0;
    for (uint64_t seed = 0; seed < 20'000; ++seed) {
        simulation::Dice dice = simulation::Dice::Of(seed, 0);
        std::vector<ViewAt> views, rows, gone;
        const History history = MakeTree(dice, &views);
        for (const auto& [id, branch] : history.branches()) {
            for (uint64_t g = branch.fork.value + 1; g < 40; ++g) {
                if (dice.Chance(0.2)) rows.push_back({id, Generation{g}});
            }
        }
        std::set<std::pair<BranchId, Generation>> stay;
        for (const ViewAt& view : views) {
            if (dice.Chance(0.5)) {
                gone.push_back(view);
            } else {
                const ViewAt row = Resolve(history, view, rows);
                stay.emplace(row.branch, row.generation);
            }
        }
        const std::vector<Loss> losses = FindLosses(history, gone);
        const auto touched = [&rows](const Line& line) {
            return std::any_of(rows.begin(), rows.end(), [&line](const ViewAt& row) {
                return Passes(line, row.branch, row.generation);
            });
        };
        for (const ViewAt& view : gone) {
            const ViewAt row = Resolve(history, view, rows);
            if (row.generation.value == 0 || stay.contains({row.branch, row.generation})) continue;
            ++deaths;
            const auto loss = std::find_if(losses.begin(), losses.end(), [&view](const Loss& l) {
                return std::any_of(l.with.gone.begin(), l.with.gone.end(), [&](int index) {
                    const Segment& s = l.with.segments[static_cast<size_t>(index)];
                    return s.branch == view.branch && s.to == view.generation;
                });
            });
            ASSERT_NE(losses.end(), loss) << "seed " << seed;
            EXPECT_TRUE(Passes(loss->below, row.branch, row.generation)) << "seed " << seed;
            EXPECT_TRUE(loss->above.empty() || touched(loss->above)) << "seed " << seed;
        }
    }
    EXPECT_GT(deaths, 1000U);
}

TEST(HistoryTest, WhatCouldBeRemovedIsKnown) {
    History history = MakeLine(1);
    EXPECT_TRUE(history.bare().empty());
    history.AddBranch(BranchId{10}, kRoot, Generation{2});
    history.AddBranch(BranchId{11}, kRoot, Generation{2});
    EXPECT_EQ(2U, history.bare().size());
    history.SetHead(BranchId{10}, true);
    history.SetHead(BranchId{11}, true);
    history.SetHead(kRoot, false);
    history.RemoveSnapshot(kRoot, Generation{2});
    EXPECT_TRUE(history.bare().empty()) << "it tells that two may share blocks";
    history.SetHead(BranchId{11}, false);
    EXPECT_EQ(std::set<BranchId>{BranchId{11}}, history.bare());
    history.RemoveBranch(BranchId{11});
    EXPECT_EQ(std::set<BranchId>{kRoot}, history.bare());
    history.RemoveBranch(kRoot);
    EXPECT_TRUE(history.bare().empty());
    EXPECT_EQ(0U, history.Get(BranchId{10}).parent.value);
}

// Each is asked for the way to the next one that is known already.
TEST(HistoryTest, RootsOfAChainAreKept) {
    History history;
    for (uint64_t id = 1; id <= 20'000; ++id) {
        history.AddBranch(BranchId{id}, BranchId{id - 1}, Generation{id});
    }
    history.AddBranch(BranchId{20'001}, BranchId{0}, Generation{0});
    History::Roots roots;
    EXPECT_EQ(BranchId{1}, history.Root(BranchId{10'000}, &roots));
    EXPECT_EQ(10'000u, roots.size());
    EXPECT_EQ(BranchId{1}, history.Root(BranchId{20'000}, &roots));
    EXPECT_EQ(20'000u, roots.size());
    for (const auto& [id, root] : roots) EXPECT_EQ(BranchId{1}, root);
    EXPECT_EQ(BranchId{20'001}, history.Root(BranchId{20'001}, &roots));
    EXPECT_EQ(BranchId{20'001}, history.After(BranchId{20'000}));
    EXPECT_FALSE(history.After(BranchId{20'001}));
}

}  // namespace
}  // namespace varve::cow
