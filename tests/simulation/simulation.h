// Simulation: clients, commands and crashes, drawn from a seed, against the engine; after every
// step the model decides whether what is seen was legal. docs/design/simulation.md.
// Not a benchmark; a run takes milliseconds.
#pragma once

#include <cstdint>
#include <functional>
#include <set>
#include <string>

#include "tests/simulation/media.h"

namespace varve::simulation {

struct SimulationOptions {
    uint64_t seed = 1;
    unsigned rounds = 12;        // each: clients at work, commands beside them, then quiet commands
    bool small = false;          // disks of two chunks at most, few clients: cheap to verify
    double crash = 0.5;          // probability that a round ends in a power cut
    bool faults = false;         // I/O errors, failed commits, no space: drawn
    uint64_t order = 0;          // of what completes when: other numbers give other orders
    std::set<uint64_t> skipped;  // steps that are left out

    /// Says what happens at the `number`-th call, counted from 1. After the first mishap nobody is
    /// asked any more, and the run ends when it has restarted and everything has been verified.
    std::function<Mishap(uint64_t number, Call call)> probe;

    /// Hears of every step when it is begun: a request, a command, a drawn cut.
    std::function<void(uint64_t step, const std::string& text)> on_step;
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
