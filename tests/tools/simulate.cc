// simulate: campaigns of the engine's simulation; what fails is replayed and shrunk.
// docs/design/simulation.md. scripts/simulate builds and runs it.
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <boost/program_options.hpp>
#include <chrono>
#include <iostream>

#include "base/check.h"
#include "base/log.h"
#include "tests/simulation/explore.h"
#include "tests/simulation/shared.h"
#include "tests/simulation/shrink.h"

namespace {

using namespace varve;
using namespace varve::simulation;
namespace po = boost::program_options;

struct Arguments {
    uint64_t from = 1, seeds = 1000, jobs = 2, most = 0, call = 0;
    unsigned rounds = 12;
    bool crash_points = false, errors = false, faults = false, error = false;
    bool small = false, shrink = false, steps = false;

    bool explores() const { return crash_points || errors; }
};

/// What all jobs have done so far; in memory that they share.
struct Totals {
    std::atomic<uint64_t> seeds{0}, requests{0}, snapshots{0}, crashes{0}, operations{0};
    std::atomic<uint64_t> power_cuts{0}, errors{0};
    std::atomic<bool> failed{false};

    void Print(const char* state) const {
        fmt::print(
            "{}: {} seeds, {} requests, {} snapshots, {} crashes, {} operations; {} crash "
            "points, {} injected errors\n",
            state, seeds.load(), requests.load(), snapshots.load(), crashes.load(),
            operations.load(), power_cuts.load(), errors.load());
        std::fflush(stdout);
    }
};

SimulationOptions OptionsOf(const Arguments& arguments, uint64_t seed) {
    SimulationOptions options;
    options.seed = seed;
    options.rounds = arguments.rounds;
    options.faults = arguments.faults;
    options.small = arguments.small;
    return options;
}

/// Tells how to replay a failure, and its shortest form.
void Report(const Arguments& arguments, uint64_t seed, uint64_t call, Mishap mishap,
            const std::string& violation) {
    fmt::print(
        stderr, "{}\nreplay: scripts/simulate --seed {} --rounds {}{}{}{}\n", violation, seed,
        arguments.rounds, arguments.faults ? " --faults" : "", arguments.small ? " --small" : "",
        call == 0 ? ""
                  : fmt::format(" --call {}{}", call, mishap == Mishap::kError ? " --error" : ""));
    if (!arguments.shrink) return;
    const bool cut = mishap == Mishap::kPowerCut;
    const Judge judge = call == 0 ? Judge(JudgeRun) : JudgeEveryCall(cut, !cut);
    fmt::print(stderr, "shrinking it...\n{}", Describe(Shrink(OptionsOf(arguments, seed), judge)));
}

bool Explored(const Arguments& arguments, uint64_t seed, Totals& totals) {
    ExploreOptions options{OptionsOf(arguments, seed), arguments.crash_points, arguments.errors};
    if (arguments.most != 0) options.most = arguments.most;
    const ExploreResult result = Explore(options);
    totals.power_cuts += result.power_cuts;
    totals.errors += result.errors;
    if (result.violation.empty()) return true;
    Report(arguments, seed, result.number, result.mishap, result.violation);
    return false;
}

bool Simulated(const Arguments& arguments, uint64_t seed, Totals& totals) {
    SimulationOptions options = OptionsOf(arguments, seed);
    const Mishap mishap = arguments.error ? Mishap::kError : Mishap::kPowerCut;
    if (arguments.call != 0) options.probe = At(arguments.call, mishap);
    if (arguments.steps) {
        options.on_step = [](uint64_t, const std::string& text) { fmt::print("{}\n", text); };
    }
    const SimulationResult result = Simulate(options);
    totals.requests += result.requests;
    totals.snapshots += result.snapshots;
    totals.crashes += result.crashes;
    totals.operations += result.operations;
    if (result.violation.empty()) return true;
    Report(arguments, seed, arguments.call, mishap, result.violation);
    return false;
}

void Work(const Arguments& arguments, uint64_t job, Totals& totals) {
    using Clock = std::chrono::steady_clock;
    Clock::time_point told = Clock::now();
    for (uint64_t i = job; i < arguments.seeds && !totals.failed; i += arguments.jobs) {
        const uint64_t seed = arguments.from + i;
        const bool fine = arguments.explores() ? Explored(arguments, seed, totals)
                                               : Simulated(arguments, seed, totals);
        if (!fine) totals.failed = true;
        ++totals.seeds;
        if (job != 0 || Clock::now() - told < std::chrono::seconds(10)) continue;
        told = Clock::now();
        totals.Print("so far");
    }
}

int Campaign(const Arguments& arguments) {
    Shared<Totals> totals;
    for (uint64_t job = 0; job < arguments.jobs; ++job) {
        std::fflush(nullptr);
        const pid_t pid = ::fork();
        VARVE_CHECK(pid >= 0);
        if (pid != 0) continue;
        Work(arguments, job, *totals);
        std::fflush(nullptr);
        ::_exit(0);
    }
    int status = 0;
    bool failed = false;
    // A failed CHECK in a run without mishaps ends its job.
    while (::wait(&status) > 0) failed |= status != 0;
    totals->Print("in all");
    return failed || totals->failed ? 1 : 0;
}

}  // namespace

int main(int argc, char** argv) {
    Arguments arguments;
    po::options_description options("Simulates the engine with power cuts; see docs/testing.md");
    options.add_options()("help", "show this")                                                   //
        ("from", po::value(&arguments.from), "first seed (1)")                                   //
        ("seeds", po::value(&arguments.seeds), "how many (1000)")                                //
        ("seed", po::value<uint64_t>(), "only this one")                                         //
        ("jobs", po::value(&arguments.jobs), "processes (2)")                                    //
        ("rounds", po::value(&arguments.rounds), "length of a run (12)")                         //
        ("faults", po::bool_switch(&arguments.faults), "devices fail too, drawn")                //
        ("small", po::bool_switch(&arguments.small), "small disks: fast exploring")              //
        ("steps", po::bool_switch(&arguments.steps), "print each step when it begins")           //
        ("shrink", po::bool_switch(&arguments.shrink), "what fails is made short")               //
        ("crash-points", po::bool_switch(&arguments.crash_points), "a power cut at every call")  //
        ("errors", po::bool_switch(&arguments.errors), "an error at every call")                 //
        ("most", po::value(&arguments.most), "explore only the first N calls of a seed")         //
        ("call", po::value(&arguments.call), "replay: a power cut at the N-th call")             //
        ("error", po::bool_switch(&arguments.error), "an error there instead");
    try {
        po::variables_map given;
        po::store(po::parse_command_line(argc, argv, options), given);
        po::notify(given);
        if (given.contains("help")) {
            std::cout << options;
            return 0;
        }
        if (given.contains("seed")) {
            arguments.from = given["seed"].as<uint64_t>();
            arguments.seeds = arguments.jobs = 1;
        }
        if (arguments.jobs == 0) throw po::error("--jobs must be at least 1");
    } catch (const po::error& error) {
        std::cerr << "simulate: " << error.what() << "; see --help\n";
        return 2;
    }
    SetLog(LogLevel::kNothing, LogFormat::kText);
    return Campaign(arguments);
}
