// Runs the simulation for some seeds, with drawn cuts and faults. VARVE_SEEDS=n runs more;
// scripts/simulate replays, and runs campaigns.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <vector>

#include "tests/simulation/shrink.h"

namespace varve::simulation {
namespace {

SimulationOptions Seed(uint64_t seed, bool faults) {
    SimulationOptions options;
    options.seed = seed;
    options.faults = faults;
    return options;
}

void RunSeeds(bool faults, uint64_t count) {
    const char* more = std::getenv("VARVE_SEEDS");
    const uint64_t seeds = more ? std::strtoull(more, nullptr, 10) : count;
    SimulationResult sum;
    for (uint64_t seed = 1; seed <= seeds; ++seed) {
        const SimulationOptions options = Seed(seed, faults);
        const SimulationResult result = Simulate(options);
        ASSERT_TRUE(result.violation.empty()) << result.violation << "\nscripts/simulate --seed "
                                              << seed << (faults ? " --faults" : "") << "\n"
                                              << Describe(Shrink(options, JudgeRun));
        sum.crashes += result.crashes;
        sum.operations += result.operations;
        sum.requests += result.requests;
        sum.snapshots += result.snapshots;
    }
    fmt::print("{} seeds: {} requests, {} snapshots, {} crashes, {} operations\n", seeds,
               sum.requests, sum.snapshots, sum.crashes, sum.operations);
}

TEST(SimulationTest, PowerCutsLoseNothingAndMixNothing) {
    RunSeeds(false, 60);
}

TEST(SimulationTest, FaultyDevicesLoseNothingEither) {
    RunSeeds(true, 60);
}

/// Changes where the heap puts what is allocated next.
class Litter {
  public:
    explicit Litter(uint64_t seed) : dice_(seed) {
        for (int i = 0; i < 4000; ++i) kept_.emplace_back(1 + dice_.Draw(700));
        for (auto& bytes : kept_) {
            if (dice_.Chance(0.5)) std::vector<char>().swap(bytes);
        }
    }

  private:
    Dice dice_;
    std::vector<std::vector<char>> kept_;
};

/// What a seed says is what a replay says, wherever its memory lies.
TEST(SimulationTest, ASeedReplays) {
    for (const uint64_t seed : {6, 7, 31, 40}) {
        std::vector<std::string> steps[2];
        uint64_t calls[2] = {0, 0};
        for (const int run : {0, 1}) {
            const Litter litter(run);
            SimulationOptions options = Seed(seed, seed == 7);
            options.on_step = [&](uint64_t step, const std::string& text) {
                steps[run].push_back(std::to_string(step) + " " + text);
            };
            options.probe = [&](uint64_t number, Call) {
                calls[run] = number;
                return seed == 7 && number == 2000 ? Mishap::kPowerCut : Mishap::kNone;
            };
            EXPECT_EQ(Simulate(options).violation, "");
        }
        EXPECT_EQ(steps[0], steps[1]) << "seed " << seed;
        EXPECT_EQ(calls[0], calls[1]);
        if (seed == 7) {
            EXPECT_EQ(calls[0], 2000);
        }
    }
}

}  // namespace
}  // namespace varve::simulation
