#include "tests/simulation/explore.h"

#include <fmt/format.h>
#include <malloc.h>

#include "tests/simulation/child.h"
#include "tests/simulation/shared.h"

namespace varve::simulation {
namespace {

/// How far the exploring process has come; in memory that its parent sees when it has died.
struct Progress {
    uint64_t power_cuts = 0;
    uint64_t errors = 0;
    uint64_t number = 0;
    Mishap mishap = Mishap::kNone;
};

/// A kill at each so-many-th call: less can go wrong than in a power cut.
constexpr size_t kKillsEach = 3;

/// Whether the power can fail at a call in a way of its own.
bool CanBeCut(Call call) {
    return call != Call::kLookup && call != Call::kProvision;
}

bool CanFail(Call call) {
    return call != Call::kSubmit;
}

class Explorer {
  public:
    Explorer(const ExploreOptions& options, Progress& progress)
        : options_(options), progress_(progress) {}

    /// The first violation, or nothing.
    std::string Run() {
        // Memory that stays is there for the next run: page faults cost half as much as all else.
        ::mallopt(M_MMAP_THRESHOLD, 64 << 20);
        ::mallopt(M_TRIM_THRESHOLD, 512 << 20);
        std::vector<Call> calls;
        std::string found = With([&](uint64_t, Call call) {
            if (calls.size() < options_.most) calls.push_back(call);
            return Mishap::kNone;
        });
        for (size_t i = 0; i < calls.size() && found.empty(); ++i) {
            progress_.number = i + 1;
            if (options_.power_cuts && CanBeCut(calls[i])) {
                ++progress_.power_cuts;
                found = Meet(Mishap::kPowerCut);
                if (i % kKillsEach == 0 && found.empty()) found = Meet(Mishap::kKill);
            }
            if (options_.errors && CanFail(calls[i]) && found.empty()) {
                ++progress_.errors;
                found = Meet(Mishap::kError);
            }
        }
        return found;
    }

  private:
    std::string Meet(Mishap mishap) {
        progress_.mishap = mishap;
        return With(At(progress_.number, mishap));
    }

    std::string With(std::function<Mishap(uint64_t, Call)> probe) {
        SimulationOptions simulation = options_.simulation;
        simulation.probe = std::move(probe);
        return Simulate(simulation).violation;
    }

    const ExploreOptions& options_;
    Progress& progress_;
};

}  // namespace

ExploreResult Explore(const ExploreOptions& options) {
    Shared<Progress> progress;
    Child child([&] { return Explorer(options, *progress).Run(); });
    ExploreResult result;
    result.violation = child.End();
    result.power_cuts = progress->power_cuts;
    result.errors = progress->errors;
    if (!result.violation.empty()) {
        result.number = progress->number;
        result.mishap = progress->mishap;
    }
    return result;
}

std::function<Mishap(uint64_t, Call)> At(uint64_t number, Mishap mishap) {
    return [=](uint64_t at, Call) { return at == number ? mishap : Mishap::kNone; };
}

}  // namespace varve::simulation
