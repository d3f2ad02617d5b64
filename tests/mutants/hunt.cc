#include "tests/mutants/hunt.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "base/check.h"
#include "base/log.h"
#include "tests/simulation/simulation.h"

namespace varve::simulation {
namespace {

/// The beginning of the line that a violation is told in.
constexpr char kVerdict[] = "violation: ";

struct Child {
    size_t prey = 0;
    uint64_t seed = 0;
    pid_t pid = 0;
    int output = -1;
    std::string text;
};

[[noreturn]] void RunSeed(const Prey& prey, uint64_t seed) {
    cow::present_mutant = prey.mutant;
    SimulationOptions options;
    options.seed = seed;
    options.faults = prey.faults;
    const SimulationResult result = Simulate(options);
    if (!result.violation.empty()) {
        std::fprintf(stderr, "%s%s\n", kVerdict, result.violation.c_str());
    }
    ::_exit(result.violation.empty() ? 0 : 1);
}

Child Start(const std::vector<Prey>& prey, size_t index, uint64_t seed) {
    Child child{index, seed, 0, -1, {}};
    int ends[2];
    VARVE_CHECK(::pipe2(ends, O_CLOEXEC) == 0);
    std::fflush(nullptr);
    child.pid = ::fork();
    VARVE_CHECK(child.pid >= 0);
    if (child.pid == 0) {
        ::dup2(ends[1], STDERR_FILENO);
        RunSeed(prey[index], seed);
    }
    ::close(ends[1]);
    child.output = ends[0];
    return child;
}

/// What it said last.
std::string LastLine(const std::string& text) {
    const size_t end = text.find_last_not_of('\n');
    if (end == std::string::npos) return {};
    const size_t before = text.find_last_of('\n', end);
    return text.substr(before + 1, end - before);
}

/// Empty if the simulation found nothing.
std::string Verdict(const Child& child, int status) {
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
    const std::string last = LastLine(child.text);
    if (last.starts_with(kVerdict)) return last.substr(sizeof kVerdict - 1);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) return last;
    if (WIFSIGNALED(status)) return ::strsignal(WTERMSIG(status));
    return fmt::format("exit status {}: {}", WEXITSTATUS(status), last);
}

/// Reads what is there. False at its end.
bool Listen(Child& child) {
    char buffer[4096];
    const ssize_t length = ::read(child.output, buffer, sizeof buffer);
    if (length > 0) child.text.append(buffer, static_cast<size_t>(length));
    // Only the end of it is of interest.
    if (child.text.size() > 65536) child.text.erase(0, child.text.size() - 32768);
    return length > 0;
}

class Pack {
  public:
    Pack(const std::vector<Prey>& prey, bool whole)
        : prey_(prey), whole_(whole), next_(prey.size(), 0), catches_(prey.size()) {}

    std::vector<Catch> Run(unsigned together) {
        while (Fill(together) || !children_.empty()) Wait();
        return std::move(catches_);
    }

  private:
    bool Open(size_t i) const {
        return next_[i] < prey_[i].seeds && (whole_ || catches_[i].found == 0);
    }
    /// Starts what there is room for; the next seed of the first prey that is not caught.
    bool Fill(unsigned together) {
        bool started = false;
        for (size_t i = 0; i < prey_.size(); ++i) {
            while (Open(i) && children_.size() < together) {
                children_.push_back(Start(prey_, i, prey_[i].first_seed + next_[i]++));
                started = true;
            }
        }
        return started;
    }
    void Wait() {
        std::vector<pollfd> polls;
        for (const Child& child : children_) polls.push_back({child.output, POLLIN, 0});
        VARVE_CHECK(::poll(polls.data(), polls.size(), -1) >= 0);
        for (size_t i = polls.size(); i-- > 0;) {
            if (polls[i].revents == 0 || Listen(children_[i])) continue;
            Reap(children_[i]);
            children_.erase(children_.begin() + static_cast<std::ptrdiff_t>(i));
        }
    }
    void Reap(Child& child) {
        int status = 0;
        ::close(child.output);
        VARVE_CHECK(::waitpid(child.pid, &status, 0) == child.pid);
        Catch& result = catches_[child.prey];
        ++result.seeds;
        std::string how = Verdict(child, status);
        if (how.empty()) return;
        ++result.found;
        if (result.seed != 0 && result.seed < child.seed) return;
        result.seed = child.seed;
        result.how = std::move(how);
    }

    const std::vector<Prey>& prey_;
    const bool whole_;
    std::vector<uint64_t> next_;
    std::vector<Child> children_;
    std::vector<Catch> catches_;
};

}  // namespace

std::vector<Catch> Hunt(const std::vector<Prey>& prey, unsigned together, bool whole) {
    return Pack(prey, whole).Run(together);
}

}  // namespace varve::simulation
