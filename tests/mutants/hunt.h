// Hunt: runs simulations with a mutant switched on, each in a process of its own, until one of
// them finds it. Not a judge: what counts as found is written here, how soon it must be is the
// table's business (mutants_test.cc).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cow/mutants.h"

namespace varve::simulation {

struct Prey {
    cow::Mutant mutant = cow::Mutant::kNone;
    bool faults = false;  // needs devices that fail
    uint64_t first_seed = 1;
    uint64_t seeds = 1;  // at most
};

struct Catch {
    uint64_t seed = 0;  // the first that found it; 0: none did
    std::string how;    // the model's or the checker's words, or how the process died
    uint64_t seeds = 0;
    uint64_t found = 0;  // seeds that found it
};

/// One for each prey, in their order. A violation that the simulation reports counts as found, and
/// so does a failed CHECK or a crash. `together`: processes at a time. `whole`: goes on after the
/// first that found it, to see how many do.
std::vector<Catch> Hunt(const std::vector<Prey>& prey, unsigned together, bool whole);

}  // namespace varve::simulation
