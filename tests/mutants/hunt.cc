#include "tests/mutants/hunt.h"

#include <poll.h>

#include "base/check.h"
#include "tests/simulation/child.h"

namespace varve::simulation {
namespace {

struct Chase {
    size_t prey = 0;
    uint64_t seed = 0;
    Child child;
};

Chase Start(const std::vector<Prey>& prey, size_t index, uint64_t seed) {
    SimulationOptions options;
    options.seed = seed;
    options.faults = prey[index].faults;
    const cow::Mutant mutant = prey[index].mutant;
    return {index, seed, Child([&] {
                cow::present_mutant = mutant;
                return Simulate(options).violation;
            })};
}

class Pack {
  public:
    Pack(const std::vector<Prey>& prey, bool whole)
        : prey_(prey), whole_(whole), next_(prey.size(), 0), catches_(prey.size()) {}

    std::vector<Catch> Run(unsigned together) {
        while (Fill(together) || !chases_.empty()) Wait();
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
            while (Open(i) && chases_.size() < together) {
                chases_.push_back(Start(prey_, i, prey_[i].first_seed + next_[i]++));
                started = true;
            }
        }
        return started;
    }
    void Wait() {
        std::vector<pollfd> polls;
        for (const Chase& chase : chases_) polls.push_back({chase.child.output(), POLLIN, 0});
        VARVE_CHECK(::poll(polls.data(), polls.size(), -1) >= 0);
        for (size_t i = polls.size(); i-- > 0;) {
            if (polls[i].revents == 0 || chases_[i].child.Listen()) continue;
            Reap(chases_[i]);
            chases_.erase(chases_.begin() + static_cast<std::ptrdiff_t>(i));
        }
    }
    void Reap(Chase& chase) {
        Catch& result = catches_[chase.prey];
        ++result.seeds;
        std::string how = chase.child.Reap();
        if (how.empty()) return;
        ++result.found;
        if (result.seed != 0 && result.seed < chase.seed) return;
        result.seed = chase.seed;
        result.how = std::move(how);
    }

    const std::vector<Prey>& prey_;
    const bool whole_;
    std::vector<uint64_t> next_;
    std::vector<Chase> chases_;
    std::vector<Catch> catches_;
};

}  // namespace

std::vector<Catch> Hunt(const std::vector<Prey>& prey, unsigned together, bool whole) {
    return Pack(prey, whole).Run(together);
}

}  // namespace varve::simulation
