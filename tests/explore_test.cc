// Runs the simulation with a power cut, and with an error, at every storage call of some seeds.
// VARVE_POINTS=n meets so many of each; scripts/simulate runs campaigns.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/simulation/explore.h"
#include "tests/simulation/shrink.h"

namespace varve::simulation {
namespace {

/// Explores seeds from `from` on until there were `points` mishaps.
void ExploreSeeds(uint64_t from, uint64_t points, bool power_cuts, bool errors) {
    const char* other = std::getenv("VARVE_POINTS");
    if (other) points = std::strtoull(other, nullptr, 10);
    uint64_t done = 0;
    for (uint64_t seed = from; done < points; ++seed) {
        ExploreOptions options{{}, power_cuts, errors};
        options.simulation.seed = seed;
        options.simulation.small = true;
        options.simulation.rounds = 3;
        const ExploreResult result = Explore(options);
        ASSERT_TRUE(result.violation.empty())
            << result.violation << "\n"
            << Describe(Shrink(options.simulation, JudgeEveryCall(power_cuts, errors)));
        done += result.power_cuts + result.errors;
    }
    fmt::print("seeds from {} on: {} points\n", from, done);
}

TEST(ExploreTest, APowerCutAtEveryCallLosesNothing) {
    ExploreSeeds(1001, 20'000, true, false);
}

TEST(ExploreTest, AnErrorAtEveryCallLosesNothing) {
    ExploreSeeds(2001, 4'000, false, true);
}

}  // namespace
}  // namespace varve::simulation
