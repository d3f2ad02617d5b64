#include "tests/simulation/explore.h"

#include <fmt/format.h>
#include <malloc.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"

namespace varve::simulation {
namespace {

/// Whether the power can fail at a call in a way of its own.
bool CanBeCut(Call call) {
    return call != Call::kLookup && call != Call::kProvision;
}

bool CanFail(Call call) {
    return call != Call::kSubmit;
}

class Explorer {
  public:
    explicit Explorer(const ExploreOptions& options) : options_(options) {}

    /// In the run, what happens is nothing; in each life that begins here, it is a mishap.
    Mishap Try(uint64_t number, Call call) {
        if (!result_.violation.empty() || number > options_.most) return Mishap::kNone;
        if (options_.power_cuts && CanBeCut(call)) {
            ++result_.power_cuts;
            if (Lives(number, Mishap::kPowerCut)) return Mishap::kPowerCut;
        }
        if (options_.errors && CanFail(call)) {
            ++result_.errors;
            if (Lives(number, Mishap::kError)) return Mishap::kError;
        }
        return Mishap::kNone;
    }

    /// The simulation is over: a life tells what it found, and ends.
    void End(const SimulationResult& simulation) {
        if (child_) {
            if (!simulation.violation.empty()) {
                fmt::print(stderr, "{} at call {}: {}\n", Name(mishap_), number_,
                           simulation.violation);
            }
            std::fflush(nullptr);
            ::_exit(simulation.violation.empty() ? 0 : 1);
        }
        if (result_.violation.empty()) result_.violation = simulation.violation;
    }

    const ExploreResult& result() const { return result_; }

  private:
    static const char* Name(Mishap mishap) {
        return mishap == Mishap::kPowerCut ? "power cut" : "error";
    }

    /// True in the new process.
    bool Lives(uint64_t number, Mishap mishap) {
        std::fflush(nullptr);
        const pid_t pid = ::fork();
        VARVE_CHECK(pid >= 0);
        if (pid == 0) {
            SetLog(LogLevel::kNothing, LogFormat::kText);
            child_ = true;
            number_ = number;
            mishap_ = mishap;
            return true;
        }
        int status = 0;
        VARVE_CHECK(::waitpid(pid, &status, 0) == pid);
        if (status == 0 || !result_.violation.empty()) return false;
        result_.violation = fmt::format("seed {}, {} at call {}: see above",
                                        options_.simulation.seed, Name(mishap), number);
        result_.number = number;
        result_.mishap = mishap;
        return false;
    }

    const ExploreOptions& options_;
    ExploreResult result_;
    bool child_ = false;
    uint64_t number_ = 0;
    Mishap mishap_ = Mishap::kNone;
};

}  // namespace

ExploreResult Explore(const ExploreOptions& options) {
    // Memory that is used again costs a life no new pages.
    ::mallopt(M_MMAP_THRESHOLD, 64 << 20);
    ::mallopt(M_TRIM_THRESHOLD, 512 << 20);
    Explorer explorer(options);
    SimulationOptions simulation = options.simulation;
    simulation.probe = [&](uint64_t number, Call call) { return explorer.Try(number, call); };
    simulation.on_end = [&](const SimulationResult& result) { explorer.End(result); };
    Simulate(simulation);
    return explorer.result();
}

std::function<Mishap(uint64_t, Call)> At(uint64_t number, Mishap mishap) {
    return [=](uint64_t at, Call) { return at == number ? mishap : Mishap::kNone; };
}

}  // namespace varve::simulation
