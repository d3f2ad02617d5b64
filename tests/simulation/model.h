// Model: what a disk may legally contain, sector by sector, however requests and crashes
// interleave. Not an engine: it never decides, it only knows what would be wrong.
//
// Each sector has the states it was ever given and not yet lost, each with the time from which it
// was possible and the time at which a later, answered write replaced it. A read may show what was
// possible at some time between its start and its end; a crash may bring back everything that was
// possible since the start of the last flush that succeeded.
#pragma once

#include <algorithm>
#include <boost/container/small_vector.hpp>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "base/check.h"
#include "tests/simulation/content.h"

namespace varve::simulation {

using Time = uint64_t;
inline constexpr Time kForever = ~Time{0};

/// Bytes [from, from + bytes.size()) of a sector are replaced.
struct Edit {
    uint64_t id = 0;
    size_t from = 0;
    std::string bytes;

    Content Apply(Content old) const {
        char sector[kSectorBytes];
        std::memcpy(sector, old.bytes().data(), kSectorBytes);
        std::memcpy(sector + from, bytes.data(), bytes.size());
        return Content::Of(sector);
    }
};

class Sector {
  public:
    struct State {
        Content content;
        Time began = 0;
        Time ended = kForever;
        bool overwritten = false;  // durably: no crash can bring it back
    };

    /// Mostly one: it needs no memory of its own.
    using States = boost::container::small_vector<State, 1>;

    States Possible(Time from, Time to) const {
        States states;
        for (const State& state : states_) {
            if (state.ended > from && state.began <= to) states.push_back(state);
        }
        return states;
    }
    bool MayBe(Content content, Time from, Time to) const {
        for (const State& state : states_) {
            if (state.ended > from && state.began <= to && state.content == content) return true;
        }
        return false;
    }
    /// A change is sent. Gives what the sector may become. Changes that are under way together
    /// may take effect in any order, so all orders are followed.
    std::vector<Content> Begin(Time now, Edit edit) {
        if (!in_flight_.empty()) overlapped_ = true;
        in_flight_.push_back(std::move(edit));
        std::vector<Content> results;
        for (size_t i = 0; i < states_.size() && states_.size() < kStatesMax; ++i) {
            if (states_[i].ended != kForever) continue;
            for (const Edit& change : in_flight_) {
                const Content content = change.Apply(states_[i].content);
                const bool known =
                    std::any_of(states_.begin(), states_.end(), [&](const State& state) {
                        return state.ended == kForever && state.content == content;
                    });
                if (!known) states_.push_back({content, now, kForever, false});
                results.push_back(content);
            }
        }
        return results;
    }
    /// The change was answered, or failed (then nobody knows).
    void End(Time now, const Edit& edit, const std::vector<Content>& results, bool success) {
        const auto mine = std::find_if(in_flight_.begin(), in_flight_.end(),
                                       [&](const Edit& other) { return other.id == edit.id; });
        VARVE_CHECK(mine != in_flight_.end());
        in_flight_.erase(mine);
        const bool alone = !overlapped_;
        if (in_flight_.empty()) overlapped_ = false;
        if (!success || !alone) return;
        for (State& state : states_) {
            const bool possible =
                std::find(results.begin(), results.end(), state.content) != results.end();
            if (state.ended == kForever && !possible) state.ended = now;
        }
    }
    void Flushed(Time start) {
        for (State& state : states_) state.overwritten |= state.ended <= start;
    }
    /// Forgets what can be seen no more. REQUIRES: no read or cut under way.
    void Forget() {
        const auto old = [](const State& state) { return state.overwritten; };
        states_.erase(std::remove_if(states_.begin(), states_.end(), old), states_.end());
    }
    /// Now it is known.
    void Settle(Content content, Time now) {
        states_.clear();
        states_.push_back({content, now, kForever, false});
        in_flight_.clear();
        overlapped_ = false;
    }
    const States& states() const { return states_; }

  private:
    static constexpr size_t kStatesMax = 4096;
    States states_{1};
    std::vector<Edit> in_flight_;
    bool overlapped_ = false;
};

/// What each sector of an image may hold, and from when to when; one state where it is known.
using Image = std::vector<Sector::States>;

/// The moments at which a cut may have been taken: those at which all that was seen of it, on all
/// its disks, was possible at once. A state is possible from its `began` on, before its `ended`.
class Moments {
  public:
    Moments(Time from, Time to) : from_(from), possible_(to - from + 1, true) {}

    /// One of these states was seen.
    void Restrict(const std::vector<const Sector::State*>& seen) {
        const Time end = from_ + possible_.size();
        const auto always = [&](const Sector::State* s) {
            return s->began <= from_ && s->ended >= end;
        };
        if (std::any_of(seen.begin(), seen.end(), always)) return;
        for (Time t = from_; t < end; ++t) {
            const auto then = [t](const Sector::State* s) { return s->began <= t && t < s->ended; };
            if (std::none_of(seen.begin(), seen.end(), then)) possible_[t - from_] = false;
        }
    }
    bool none() const {
        return std::none_of(possible_.begin(), possible_.end(), [](bool p) { return p; });
    }

  private:
    const Time from_;
    std::vector<bool> possible_;
};

class ModelDisk {
  public:
    explicit ModelDisk(uint64_t size) : sectors_(size / kSectorBytes) {}

    uint64_t size() const { return sectors_.size() * kSectorBytes; }
    std::vector<Sector>& sectors() { return sectors_; }

    void Resize(uint64_t size) { sectors_.resize(size / kSectorBytes); }
    void Flushed(Time start) {
        for (Sector& sector : sectors_) sector.Flushed(start);
    }
    void Forget() {
        for (Sector& sector : sectors_) sector.Forget();
    }
    /// What a cut between `from` and `to` may hold.
    Image Cut(Time from, Time to) const {
        Image image;
        for (const Sector& sector : sectors_) image.push_back(sector.Possible(from, to));
        return image;
    }
    /// What a crash may leave.
    Image Remains() const {
        Image image;
        for (const Sector& sector : sectors_) {
            Sector::States states;
            for (const Sector::State& state : sector.states()) {
                if (!state.overwritten) states.push_back(state);
            }
            image.push_back(std::move(states));
        }
        return image;
    }
    void Settle(const Image& known, Time now) {
        sectors_.resize(known.size());
        for (size_t i = 0; i < known.size(); ++i) {
            VARVE_CHECK(known[i].size() == 1);
            sectors_[i].Settle(known[i][0].content, now);
        }
    }

  private:
    std::vector<Sector> sectors_;
};

/// The first sector of `data` that `image` forbids, or -1. Narrows `image` to what was seen, and
/// `moments`, if any, to when that was possible.
inline int64_t Compare(Image& image, const std::string& data, Moments* moments = nullptr) {
    if (data.size() != image.size() * kSectorBytes) return 0;
    std::vector<Content> contents;
    for (size_t i = 0; i < image.size(); ++i) {
        const Content content = Content::Of(data.data() + i * kSectorBytes);
        const auto same = [&](const Sector::State& state) { return state.content == content; };
        if (std::none_of(image[i].begin(), image[i].end(), same)) return static_cast<int64_t>(i);
        contents.push_back(content);
    }
    std::vector<const Sector::State*> seen;
    for (size_t i = 0; i < image.size(); ++i) {
        Sector::States& states = image[i];
        if (states.size() == 1 && states[0].began == 0 && states[0].ended == kForever) continue;
        seen.clear();
        for (const Sector::State& state : states) {
            if (state.content == contents[i]) seen.push_back(&state);
        }
        if (moments) moments->Restrict(seen);
        states.clear();
        states.push_back({contents[i]});
    }
    return -1;
}

}  // namespace varve::simulation
