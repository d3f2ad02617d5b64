// Runs the simulation for some seeds: with drawn cuts and faults, and with one at every storage
// call. VARVE_SEEDS=n runs more; scripts/simulate replays, and runs campaigns.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/simulation/explore.h"
#include "tests/simulation/shrink.h"

namespace varve::simulation {
namespace {

uint64_t Setting(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

SimulationOptions Seed(uint64_t seed, bool faults) {
    SimulationOptions options;
    options.seed = seed;
    options.faults = faults;
    return options;
}

void RunSeeds(bool faults, uint64_t count) {
    const uint64_t seeds = Setting("VARVE_SEEDS", count);
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

/// Explores seeds from `from` on until there were `points` mishaps.
void ExploreSeeds(uint64_t from, uint64_t points, bool power_cuts, bool errors) {
    uint64_t done = 0;
    for (uint64_t seed = from; done < points; ++seed) {
        ExploreOptions options{Seed(seed, false), power_cuts, errors};
        options.simulation.small = true;
        options.simulation.rounds = 5;
        const ExploreResult result = Explore(options);
        ASSERT_TRUE(result.violation.empty())
            << result.violation << "\n"
            << Describe(Shrink(options.simulation, JudgeEveryCall(power_cuts, errors)));
        done += result.power_cuts + result.errors;
    }
    fmt::print("seeds from {} on: {} points\n", from, done);
}

TEST(SimulationTest, PowerCutsLoseNothingAndMixNothing) {
    RunSeeds(false, 25);
}

TEST(SimulationTest, FaultyDevicesLoseNothingEither) {
    RunSeeds(true, 25);
}

TEST(SimulationTest, APowerCutAtEveryCallLosesNothing) {
    ExploreSeeds(1001, Setting("VARVE_POINTS", 20'000), true, false);
}

TEST(SimulationTest, AnErrorAtEveryCallLosesNothing) {
    ExploreSeeds(2001, Setting("VARVE_POINTS", 4'000), false, true);
}

/// What a seed says is what a replay says.
TEST(SimulationTest, ASeedReplays) {
    std::vector<std::string> steps[2];
    uint64_t calls[2] = {0, 0};
    for (const int run : {0, 1}) {
        SimulationOptions options = Seed(7, true);
        options.on_step = [&](uint64_t step, const std::string& text) {
            steps[run].push_back(std::to_string(step) + " " + text);
        };
        options.probe = [&](uint64_t number, Call) {
            calls[run] = number;
            return number == 2000 ? Mishap::kPowerCut : Mishap::kNone;
        };
        EXPECT_EQ(Simulate(options).violation, "");
    }
    EXPECT_EQ(steps[0], steps[1]);
    EXPECT_EQ(calls[0], 2000);
    EXPECT_EQ(calls[1], 2000);
}

}  // namespace
}  // namespace varve::simulation
