// Simulation: clients, commands and crashes, drawn from a seed, against the engine; after every
// step the model decides whether what is seen was legal.
// Not a benchmark; a run takes milliseconds.
#pragma once

#include <cstdint>
#include <string>

namespace varve::simulation {

struct SimulationOptions {
    uint64_t seed = 1;
    unsigned rounds = 12;  // each: clients at work, commands beside them, then quiet commands
    double crash = 0.5;    // probability that a round ends in a power cut
    bool faults = false;   // I/O errors, failed commits, no space
};

struct SimulationResult {
    std::string violation;  // empty: none
    uint64_t crashes = 0;
    uint64_t operations = 0;  // storage operations: places at which the power could fail
    uint64_t requests = 0;
    uint64_t snapshots = 0;
};

SimulationResult Simulate(const SimulationOptions& options);

}  // namespace varve::simulation
