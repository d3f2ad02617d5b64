// Operations on the runs of a chunk, against a plain array of 64 blocks.
#include "cow/format/runs.h"

#include <gtest/gtest.h>

#include <array>
#include <random>

#include "cow/format/format.h"

namespace varve::cow {
namespace {

struct Block {
    uint64_t place = 0;  // 0: not mapped
    uint64_t birth = 0;
    friend bool operator==(const Block&, const Block&) = default;
};
using Blocks = std::array<Block, kChunkBlocks>;

Blocks Expand(const Runs& runs) {
    Blocks blocks{};
    uint64_t at = 0;
    for (const Run& run : runs) {
        EXPECT_GE(run.first, at) << "runs overlap or are out of order";
        for (uint64_t i = 0; i < run.count; ++i) {
            blocks.at(run.first + i) = Block{run.place + i, run.birth.value};
        }
        at = run.end();
    }
    return blocks;
}

using MapRun = Run;  // testing::Test has a Run(), too

class RunsTest : public testing::TestWithParam<uint64_t> {
  protected:
    std::mt19937_64 random_{GetParam()};
    uint64_t Draw(uint64_t below) { return random_() % below; }

    /// A random change of `runs` and of `blocks` alike.
    void Change(Runs& runs, Blocks& blocks, Runs* removed) {
        const auto first = static_cast<uint32_t>(Draw(kChunkBlocks));
        const auto count =
            static_cast<uint32_t>(1 + Draw(std::min<uint64_t>(kChunkBlocks - first, 9)));
        if (Draw(3) == 0) {
            Unmap(runs, first, first + count, removed);
            for (uint32_t i = first; i < first + count; ++i) blocks.at(i) = Block{};
            return;
        }
        MapRun run;
        run.place = 1 + Draw(Draw(2) == 0 ? 40 : uint64_t{1} << 40);
        run.first = first;
        run.count = count;
        run.birth = Generation{1 + Draw(3)};
        Map(runs, run, removed);
        for (uint32_t i = 0; i < count; ++i)
            blocks.at(first + i) = Block{run.place + i, run.birth.value};
    }
};

TEST_P(RunsTest, MapAndUnmapDoWhatAnArrayDoes) {
    Runs runs;
    Blocks blocks{};
    for (int i = 0; i < 300; ++i) {
        const Blocks before = blocks;
        Runs removed;
        Change(runs, blocks, &removed);
        ASSERT_EQ(Expand(runs), blocks);
        for (const MapRun& run : removed) {
            for (uint64_t k = 0; k < run.count; ++k) {
                const Block was{run.place + k, run.birth.value};
                ASSERT_EQ(before.at(run.first + k), was);
            }
        }
        const auto first = static_cast<uint32_t>(Draw(kChunkBlocks));
        const Piece piece = PieceAt(runs, first, kChunkBlocks);
        ASSERT_EQ(piece.mapped, blocks.at(first).place != 0);
        for (uint32_t k = 0; k < piece.count; ++k) {
            ASSERT_EQ(piece.mapped ? piece.place + k : 0, blocks.at(first + k).place);
        }
    }
}

TEST_P(RunsTest, SubtractGivesWhatTheOtherDoesNotMapToTheSamePlace) {
    Runs one, other;
    Blocks ones{}, others{};
    for (int i = 0; i < 60; ++i) {
        Change(one, ones, nullptr);
        Change(other, others, nullptr);
        if (i % 20 == 19) other = one, others = ones;  // much in common
        Blocks expected{};
        for (size_t k = 0; k < kChunkBlocks; ++k) {
            if (ones.at(k).place != others.at(k).place) expected.at(k) = ones.at(k);
        }
        ASSERT_EQ(Expand(Subtract(one, other)), expected);
    }
    EXPECT_TRUE(Subtract(one, one).empty());
}

TEST_P(RunsTest, WhatIsEncodedIsDecoded) {
    Runs runs;
    Blocks blocks{};
    for (int i = 0; i < 100; ++i) {
        Change(runs, blocks, nullptr);
        const Generation generation{3 + Draw(2) * (uint64_t{1} << 60)};
        const std::string row = EncodeRuns(runs, generation);
        const std::optional<Runs> decoded = DecodeRuns(row, generation);
        ASSERT_TRUE(decoded.has_value());
        ASSERT_EQ(*decoded, runs);
        ASSERT_FALSE(DecodeRuns(row.substr(0, row.size() - 1), generation).has_value());
        ASSERT_FALSE(DecodeRuns(row + 'x', generation).has_value());
    }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RunsTest, testing::Range<uint64_t>(1, 21));

TEST(RunsTest, PlacesBeyondTheirBitsAreNoRow) {
    const Generation generation{9};
    const uint64_t last = (uint64_t{1} << 48) - 1;
    for (const uint64_t count : {1, 2, 64}) {
        cow::Run run;
        run.place = last;
        run.first = 0;
        run.count = count;
        run.birth = generation;
        // Its second block would be at place 0, the superblock.
        EXPECT_EQ(DecodeRuns(EncodeRuns({run}, generation), generation).has_value(), count == 1);
        EXPECT_EQ(DecodeNote(EncodeNote({run})).has_value(), count == 1);
        run.place = last - count + 1;
        EXPECT_TRUE(DecodeRuns(EncodeRuns({run}, generation), generation).has_value());
        EXPECT_TRUE(DecodeNote(EncodeNote({run})).has_value());
    }
}

}  // namespace
}  // namespace varve::cow
