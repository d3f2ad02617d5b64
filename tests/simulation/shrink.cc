#include "tests/simulation/shrink.h"

#include <fmt/format.h>

#include <algorithm>

#include "tests/simulation/explore.h"

namespace varve::simulation {
namespace {

/// A shorter run has another order of events, in which the bug may not show: so many are tried.
constexpr uint64_t kOrders = 8;

class Shrinker {
  public:
    explicit Shrinker(const Judge& judge) : judge_(judge) {}

    Shrunk Run(const SimulationOptions& options) {
        best_.options = options;
        if (!Fails(options)) return best_;
        best_.before = best_.steps.size();
        for (size_t size = best_.steps.size() / 2; size > 0;
             size = Without(size) ? size : size / 2) {
            size = std::min(size, best_.steps.size());
        }
        return best_;
    }

  private:
    bool Fails(const SimulationOptions& options) {
        Outcome outcome = judge_(options);
        if (outcome.found.empty()) return false;
        best_.options = options;
        best_.steps = std::move(outcome.steps);
        best_.found = std::move(outcome.found);
        return true;
    }

    /// Leaves out runs of `size` steps. True if any could be.
    bool Without(size_t size) {
        bool any = false;
        for (size_t at = 0; at + size <= best_.steps.size();) {
            SimulationOptions fewer = best_.options;
            for (size_t i = at; i < at + size; ++i) fewer.skipped.insert(best_.steps[i].number);
            const size_t before = best_.steps.size();
            bool failed = false;
            for (uint64_t order = 0; order < kOrders && !failed; ++order) {
                fewer.order = (best_.options.order + order) % kOrders;
                failed = Fails(fewer);
            }
            // What was left out may have kept others away: then there are as many as before.
            any = any || (failed && best_.steps.size() < before);
            if (!failed || best_.steps.size() >= before) at += size;
        }
        return any;
    }

    const Judge& judge_;
    Shrunk best_;
};

}  // namespace

Outcome JudgeRun(const SimulationOptions& options) {
    return RunInChild(options);
}

Judge JudgeEveryCall(bool power_cuts, bool errors) {
    return [=](const SimulationOptions& options) {
        const ExploreResult result = Explore({options, power_cuts, errors});
        if (result.violation.empty()) return Outcome();
        SimulationOptions replay = options;
        if (result.number != 0) replay.probe = At(result.number, result.mishap);
        return RunInChild(replay);
    };
}

Shrunk Shrink(const SimulationOptions& options, const Judge& judge) {
    return Shrinker(judge).Run(options);
}

std::string Describe(const Shrunk& shrunk) {
    std::string text = fmt::format("{} of {} steps, seed {}, order {}:\n", shrunk.steps.size(),
                                   shrunk.before, shrunk.options.seed, shrunk.options.order);
    for (const Step& step : shrunk.steps) text += fmt::format("  {}\n", step.text);
    return text + "  " + shrunk.found + "\n";
}

}  // namespace varve::simulation
