// Explore: one simulation, run again with a mishap at each of its storage calls; each such run ends
// when it has restarted and everything has been verified.
#pragma once

#include "tests/simulation/simulation.h"

namespace varve::simulation {

struct ExploreOptions {
    SimulationOptions simulation;
    bool power_cuts = true;
    bool errors = false;
    uint64_t most = ~uint64_t{0};  // calls that are explored, the first ones
};

struct ExploreResult {
    uint64_t power_cuts = 0;
    uint64_t errors = 0;
    std::string violation;  // of the run itself or of the first that ended badly; empty: none
    uint64_t number = 0;    // the call that it met; 0: none
    Mishap mishap = Mishap::kNone;
};

/// In a process of its own, so that a failed CHECK ends only that.
ExploreResult Explore(const ExploreOptions& options);

/// A probe for one mishap: replays what Explore found.
std::function<Mishap(uint64_t, Call)> At(uint64_t number, Mishap mishap);

}  // namespace varve::simulation
