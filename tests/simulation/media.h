// Media: what a power cut leaves of the simulated disk and metadata store.
// Not the stores themselves, which are in world.h.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cow/volume/requester.h"
#include "tests/simulation/content.h"
#include "tests/simulation/scheduler.h"

namespace varve::simulation {

inline constexpr uint64_t kSector = kSectorBytes;

/// Calls of the engine at its stores.
enum class Call : uint8_t {
    kSubmit,  // of a transfer
    kAppend,  // to the ring
    kRead,    // these three complete
    kWrite,
    kSync,
    kCommit,
    kProvision,
    kLookup,  // a row of the metadata store, or the next rows from some key on
};

inline const char* NameOf(Call call) {
    static constexpr const char* kNames[] = {"submission", "append", "read",      "write",
                                             "sync",       "commit", "provision", "lookup"};
    return kNames[static_cast<size_t>(call)];
}

/// What happens at a call.
enum class Mishap : uint8_t { kNone, kPowerCut, kKill, kError };

/// How a call ends. kDark: there is no power or no process, nothing happens any more.
enum class Fate : uint8_t { kDone, kError, kDark };

/// Faults that may be injected. Probabilities are for each call.
struct Faults {
    double read_error = 0;
    double write_error = 0;
    double append_error = 0;
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

    /// Says what happens at each call while there is power. None: nothing.
    std::function<Mishap(Call call)> probe;

    /// A call of the engine's: the power may fail at it, or it may fail.
    Fate Next(Call call) {
        if (call != Call::kLookup && ++operations_ == cut_at_ && power_) End();
        const Mishap mishap = power_ && probe ? probe(call) : Mishap::kNone;
        if (mishap == Mishap::kPowerCut) Cut();
        if (mishap == Mishap::kKill) Kill();
        if (!power_) return Fate::kDark;
        const double chance = ChanceToFail(call);
        const bool fails = chance > 0 && scheduler_.Chance(chance);
        return fails || mishap == Mishap::kError ? Fate::kError : Fate::kDone;
    }

    /// The power fails at the `operations`-th operation from now, or the process is killed; lookups
    /// are none.
    void CutAfter(uint64_t operations, bool kill = false) {
        cut_at_ = operations_ + operations;
        kill_ = kill;
    }
    /// What End() does.
    void EndBy(bool kill) { kill_ = kill; }
    /// Neither has happened.
    bool power() const { return power_; }
    /// The process was killed; the machine goes on, and its page cache with it.
    bool killed() const { return killed_; }
    /// What was announced by CutAfter().
    void End() { kill_ ? Kill() : Cut(); }
    uint64_t operations() const { return operations_; }

    /// The power fails now: of what was not synced, each sector keeps any of its states.
    void Cut() {
        power_ = false;
        for (const auto& [sector, states] : unsynced_) {
            const uint64_t keep = scheduler_.Draw(states.size() + 1);
            if (keep < states.size()) durable_[sector] = states[keep].content;
        }
    }

    /// The process is killed. What is under way at the device ends as it will.
    void Kill() {
        // Where a sync failed nobody knows what the page cache is worth.
        if (failed_syncs_ != failed_syncs_before_) return Cut();
        power_ = false;
        killed_ = true;
    }

    void Restore() {
        if (!std::exchange(killed_, false)) {
            unsynced_.clear();
            still_read_.clear();
        }
        failed_syncs_before_ = failed_syncs_;
        power_ = true;
        kill_ = false;
        cut_at_ = 0;
    }

    // ---- the data file, by sectors; absent sectors hold a previous owner's rubbish
    Content ReadSector(uint64_t sector) const {
        const auto failed = still_read_.find(sector);
        if (failed != still_read_.end()) return failed->second;
        const auto written = unsynced_.find(sector);
        if (written != unsynced_.end()) return written->second.back().content;
        const auto found = durable_.find(sector);
        return found != durable_.end() ? found->second : rubbish_;
    }
    void WriteSector(uint64_t sector, Content content) {
        unsynced_[sector].push_back({++write_order_, content});
        still_read_.erase(sector);
    }
    /// A bit of a sector that was written and synced changes by itself.
    void FlipBit(uint64_t sector, uint64_t bit) {
        std::string bytes(ReadSector(sector).bytes());
        char& byte = bytes[bit / 8 % kSector];
        byte = static_cast<char>(byte ^ (1 << bit % 8));
        durable_[sector] = Content::Of(bytes.data());
    }
    /// A write that was under way when the power failed: some of its sectors arrived.
    void TearSector(uint64_t sector, Content content) {
        if (scheduler_.Chance(0.5)) return;
        if (killed_) {
            WriteSector(sector, content);
        } else {
            durable_[sector] = content;
        }
    }
    /// All that is durable, to be put back later.
    using Data = std::unordered_map<uint64_t, Content>;
    const Data& data() const { return durable_; }
    void SetData(const Data& data) {
        durable_ = data;
        unsynced_.clear();
        still_read_.clear();
    }
    uint64_t write_order() const { return write_order_; }
    /// A sync fails, as on Linux: of what was to be synced, some will never be, whatever later
    /// syncs say. The next sync of every other open file fails too.
    void FailSync(uint64_t order) {
        ++failed_syncs_;
        for (auto it = unsynced_.begin(); it != unsynced_.end();) {
            auto& states = it->second;
            still_read_.emplace(it->first, states.back().content);
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
    uint64_t drawn = 0;  // numbers that are to be unlike all others
    uint64_t seeks = 0;  // in the metadata store, point lookups included
    uint64_t steps = 0;  // from one row to the next
    uint64_t cursors = 0, cursors_most = 0;
    /// A store that has not been compacted for long: cursors meet what was deleted.
    bool remembers_deleted = false;
    std::set<std::string> deleted_rows;
    /// The rows [first, second) lie on a page of the store that cannot be read. Whoever comes to
    /// one of them gets an error, even if it is beyond what was asked for, as with RocksDB.
    std::pair<std::string, std::string> bad_page;
    bool OnBadPage(std::string_view key) const {
        return key >= bad_page.first && key < bad_page.second;
    }
    std::set<uint64_t> held;  // stretches of the data file that take space, by offset

    // ---- bounds of the metadata, and what it has now
    uint64_t metadata_capacity = 0;      // bytes of rows; 0: no bound
    uint64_t metadata_spare = 96 << 10;  // of these, what is not for new blocks
    uint64_t metadata_bytes = 0;
    std::string broken;          // the first bound that was
    uint64_t largest_batch = 0;  // bytes

    /// What a client that may go is writing, as long as this exists.
    class Payload {
      public:
        Payload(Media& media, std::span<const std::byte> bytes, const cow::Requester& requester)
            : media_(media), begin_(bytes.data()) {
            media_.payloads_[begin_] = {begin_ + bytes.size(), &requester};
        }
        Payload(const Payload&) = delete;
        ~Payload() { media_.payloads_.erase(begin_); }

      private:
        Media& media_;
        const std::byte* const begin_;
    };
    /// A write from `memory` begins.
    void LookForAbandoned(const std::byte* memory) {
        for (const auto& [begin, payload] : payloads_) {
            const bool inside = memory >= begin && memory < payload.end;
            abandoned_begun |= inside && payload.requester->gone();
        }
    }
    bool abandoned_begun = false;  // a write of a client that has gone
    std::shared_ptr<const std::map<std::string, std::string>> metadata() const { return metadata_; }
    void SetMetadata(std::shared_ptr<const std::map<std::string, std::string>> rows) {
        metadata_ = std::move(rows);
    }
    uint64_t capacity() const { return capacity_; }

  private:
    double ChanceToFail(Call call) const {
        switch (call) {
            case Call::kRead:
                return faults.read_error;
            case Call::kWrite:
                return faults.write_error;
            case Call::kAppend:
                return faults.append_error;
            case Call::kSync:
                return faults.sync_error;
            case Call::kCommit:
                return faults.commit_error;
            case Call::kProvision:
                return faults.no_space;
            default:
                return 0;
        }
    }
    struct State {
        uint64_t order;
        Content content;
    };
    struct Abandonable {
        const std::byte* end;
        const cow::Requester* requester;
    };
    std::map<const std::byte*, Abandonable> payloads_;  // by their first byte
    Scheduler& scheduler_;
    const uint64_t capacity_;
    bool power_ = true;
    bool killed_ = false;
    bool kill_ = false;  // what is to happen at cut_at_
    uint64_t operations_ = 0;
    uint64_t cut_at_ = 0;
    uint64_t write_order_ = 0;
    uint64_t failed_syncs_ = 0, failed_syncs_before_ = 0;
    const Content rubbish_ = Content::Of(std::string(kSector, '\xEE').data());
    Data durable_;
    std::map<uint64_t, std::vector<State>> unsynced_;   // the last one is what is read
    std::unordered_map<uint64_t, Content> still_read_;  // for now, although its sync failed
    std::shared_ptr<const std::map<std::string, std::string>> metadata_;
};

}  // namespace varve::simulation
