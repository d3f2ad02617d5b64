// Media: what a power cut leaves of the simulated disk and metadata store.
// Not the stores themselves, which are in world.h.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "tests/simulation/scheduler.h"

namespace varve::simulation {

inline constexpr uint64_t kSector = 512;

/// Faults that may be injected. Probabilities are for each call.
struct Faults {
    double read_error = 0;
    double write_error = 0;
    double sync_error = 0;
    double commit_error = 0;
    double no_space = 0;
};

/// What survives: shared by the stores, carried from one life of the engine to the next.
class Media {
  public:
    explicit Media(Scheduler& scheduler, uint64_t capacity)
        : scheduler_(scheduler),
          capacity_(capacity),
          metadata_(std::make_shared<std::map<std::string, std::string>>()) {}

    /// Counts an operation; the power may fail at it. False if the power is off.
    bool Tick() {
        ++operations_;
        if (power_ && operations_ == cut_at_) Cut();
        return power_;
    }

    /// The power fails at the `operations`-th operation from now.
    void CutAfter(uint64_t operations) { cut_at_ = operations_ + operations; }
    bool power() const { return power_; }
    uint64_t operations() const { return operations_; }

    /// The power fails now: of what was not synced, each sector keeps any of its states.
    void Cut() {
        power_ = false;
        for (const auto& [sector, states] : unsynced_) {
            const uint64_t keep = scheduler_.Draw(states.size() + 1);
            if (keep < states.size()) durable_[sector] = states[keep].content;
        }
    }

    void Restore() {
        power_ = true;
        cut_at_ = 0;
        unsynced_.clear();
        current_ = durable_;
    }

    // ---- the data file, by sectors; absent sectors hold a previous owner's rubbish
    std::string ReadSector(uint64_t sector) const {
        const auto found = current_.find(sector);
        return found != current_.end() ? found->second : std::string(kSector, '\xEE');
    }
    void WriteSector(uint64_t sector, std::string content) {
        unsynced_[sector].push_back({++write_order_, content});
        current_[sector] = std::move(content);
    }
    /// A bit of a sector that was written and synced changes by itself.
    void FlipBit(uint64_t sector, uint64_t bit) {
        std::string content = ReadSector(sector);
        char& byte = content[bit / 8 % kSector];
        byte = static_cast<char>(byte ^ (1 << bit % 8));
        durable_[sector] = content;
        current_[sector] = std::move(content);
    }
    /// A write that was under way when the power failed: some of its sectors arrived.
    void TearSector(uint64_t sector, std::string content) {
        if (scheduler_.Chance(0.5)) durable_[sector] = std::move(content);
    }
    uint64_t write_order() const { return write_order_; }
    /// A sync fails, as on Linux: of what was to be synced, some will never be, whatever later
    /// syncs say. Those under way fail with it.
    void FailSync(uint64_t order) {
        ++failed_syncs_;
        for (auto it = unsynced_.begin(); it != unsynced_.end();) {
            auto& states = it->second;
            std::erase_if(states, [&](const State& state) {
                return state.order <= order && scheduler_.Chance(0.5);
            });
            it = states.empty() ? unsynced_.erase(it) : std::next(it);
        }
    }
    uint64_t failed_syncs() const { return failed_syncs_; }
    void SyncUpTo(uint64_t order) {
        for (auto it = unsynced_.begin(); it != unsynced_.end();) {
            auto& states = it->second;
            size_t synced = 0;
            while (synced < states.size() && states[synced].order <= order) ++synced;
            if (synced > 0) durable_[it->first] = states[synced - 1].content;
            states.erase(states.begin(), states.begin() + static_cast<std::ptrdiff_t>(synced));
            it = states.empty() ? unsynced_.erase(it) : std::next(it);
        }
    }

    Scheduler& scheduler() { return scheduler_; }
    Faults faults;
    std::set<uint64_t> held;  // stretches of the data file that take space, by offset
    std::shared_ptr<const std::map<std::string, std::string>> metadata() const { return metadata_; }
    void SetMetadata(std::shared_ptr<const std::map<std::string, std::string>> rows) {
        metadata_ = std::move(rows);
    }
    uint64_t capacity() const { return capacity_; }
    bool Fails(double probability) { return probability > 0 && scheduler_.Chance(probability); }

  private:
    struct State {
        uint64_t order;
        std::string content;
    };
    Scheduler& scheduler_;
    const uint64_t capacity_;
    bool power_ = true;
    uint64_t operations_ = 0;
    uint64_t cut_at_ = 0;
    uint64_t write_order_ = 0;
    uint64_t failed_syncs_ = 0;
    std::unordered_map<uint64_t, std::string> current_, durable_;
    std::map<uint64_t, std::vector<State>> unsynced_;
    std::shared_ptr<const std::map<std::string, std::string>> metadata_;
};

}  // namespace varve::simulation
