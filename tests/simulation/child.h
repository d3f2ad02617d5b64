// Child: a simulation in a process of its own, so that a failed CHECK or a crash ends only that.
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/simulation/simulation.h"

namespace varve::simulation {

struct Step {
    uint64_t number = 0;
    std::string text;
};

class Child {
  public:
    /// `before` runs in the new process, before the simulation does.
    explicit Child(const SimulationOptions& options, const std::function<void()>& before = {});

    /// Readable when there is something to listen to.
    int output() const { return output_; }
    /// Reads what is there. False at its end.
    bool Listen();
    /// What was found: the model's or the checker's words, or how the process died; empty: nothing.
    /// Waits for its end. Once.
    std::string Reap();
    /// What began, in that order, if the options asked for it: any `on_step` will do.
    std::vector<Step> Steps() const;

  private:
    std::string Verdict(int status) const;

    pid_t pid_ = 0;
    int output_ = -1;
    std::string text_;
};

struct Outcome {
    std::string found;  // empty: nothing
    std::vector<Step> steps;
};

/// Runs one to its end.
Outcome RunInChild(SimulationOptions options, bool with_steps);

}  // namespace varve::simulation
