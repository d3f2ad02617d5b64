// Shrink: from a run that fails to a short list of steps that fails.
#pragma once

#include "tests/simulation/child.h"

namespace varve::simulation {

struct Shrunk {
    uint64_t before = 0;        // steps of the whole run
    std::vector<Step> steps;    // that are left
    std::string found;          // by them
    SimulationOptions options;  // what replays them, but for a probe of the judge's
};

/// Runs a simulation and says what it found, with its steps if it found anything.
using Judge = std::function<Outcome(const SimulationOptions&)>;

/// Without mishaps, in a process of its own.
Outcome JudgeRun(const SimulationOptions& options);

/// Tries a mishap at every call.
Judge JudgeEveryCall(bool power_cuts, bool errors);

/// Leaves out what it can. Whatever is found counts: it need not be what was found at first.
/// Bounded by the steps: some thousand runs at most. No steps if nothing is found at all.
Shrunk Shrink(const SimulationOptions& options, const Judge& judge);

/// For people, with how to replay it.
std::string Describe(const Shrunk& shrunk);

}  // namespace varve::simulation
