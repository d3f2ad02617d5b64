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
    /// Runs in the new process, and says what it found; nothing: all is well. The calling process
    /// must have one thread.
    using Work = std::function<std::string()>;
    explicit Child(const Work& work);

    /// Readable when there is something to listen to.
    int output() const { return output_; }
    /// Reads what is there. False at its end.
    bool Listen();
    /// What was found, or how the process died; empty: nothing. Waits for its end. Once.
    std::string Reap();
    /// Listens to its end, and reaps it.
    std::string End();
    /// What began, in that order, if the work told it (TellStep).
    std::vector<Step> Steps() const;

  private:
    std::string Verdict(int status) const;

    pid_t pid_ = 0;
    int output_ = -1;
    std::string text_;
};

/// For SimulationOptions::on_step of a child's work.
void TellStep(uint64_t step, const std::string& text);

struct Outcome {
    std::string found;  // empty: nothing
    std::vector<Step> steps;
};

/// Runs one to its end, in a child that tells its steps.
Outcome RunInChild(SimulationOptions options);

}  // namespace varve::simulation
