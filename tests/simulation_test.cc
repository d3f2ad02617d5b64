// Runs the simulation for a range of seeds. VARVE_SEED=n replays one, VARVE_SEEDS=n runs more.
#include <gtest/gtest.h>

#include <cstdlib>

#include "tests/simulation/simulation.h"

namespace varve::simulation {
namespace {

uint64_t Setting(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

void RunSeeds(bool faults, uint64_t count) {
    const uint64_t only = Setting("VARVE_SEED", 0);
    const uint64_t first = only != 0 ? only : Setting("VARVE_FROM", 1);
    const uint64_t end = only != 0 ? only + 1 : first + Setting("VARVE_SEEDS", count);
    uint64_t crashes = 0, operations = 0, requests = 0, snapshots = 0;
    for (uint64_t seed = first; seed < end; ++seed) {
        SimulationOptions options;
        options.seed = seed;
        options.faults = faults;
        const SimulationResult result = Simulate(options);
        ASSERT_TRUE(result.violation.empty())
            << result.violation << "; replay with VARVE_SEED=" << seed;
        crashes += result.crashes;
        operations += result.operations;
        requests += result.requests;
        snapshots += result.snapshots;
    }
    std::printf(
        "seeds %llu to %llu: %llu requests, %llu snapshots, %llu crashes, %llu operations\n",
        static_cast<unsigned long long>(first), static_cast<unsigned long long>(end - 1),
        static_cast<unsigned long long>(requests), static_cast<unsigned long long>(snapshots),
        static_cast<unsigned long long>(crashes), static_cast<unsigned long long>(operations));
}

TEST(SimulationTest, PowerCutsLoseNothingAndMixNothing) {
    RunSeeds(false, 60);
}

TEST(SimulationTest, FaultyDevicesLoseNothingEither) {
    RunSeeds(true, 60);
}

}  // namespace
}  // namespace varve::simulation
