// Slots: how many commands are under way at a time, by what they may wait for, so that those that
// hang with the device leave room for those that tell what hangs. Not the commands and not their
// connections: it counts.
#pragma once

#include <cstddef>
#include <functional>
#include <list>

namespace varve::admin {

/// How long a command may take.
enum class Pace {
    kGlance,  // a few seconds at most, whatever hangs
    kWork,    // as long as there is much to look at or to do, whether somebody waits or not
    kChange,  // until it is stored: as long as the device hangs
};

/// Of the places, an eighth is for glances only. At most half may be taken by changes that have
/// begun, and a quarter by work; further ones wait in line. But work takes no place in which a
/// change could begin, and changes leave a quarter of its places for work: of 128, at most 104
/// changes, or 48 of work, have begun or wait in line, and 112 of both together.
class Slots {
  public:
    using Line = std::list<std::function<void()>>;
    struct Ticket {
        Pace pace = Pace::kChange;
        Line::iterator at;
    };
    enum class Entry { kBegins, kWaits, kRefused };

    /// `places`: commands under way or in line, all together; one for each connection.
    explicit Slots(size_t places);

    /// Asks for a place. kBegins: Leave() is owed. kWaits: `turn` is called once, when it is its
    /// turn, and Leave() is owed from then on; until then LeaveLine(`*ticket`) gives it up.
    Entry Enter(Pace pace, std::function<void()> turn, Ticket* ticket);
    void LeaveLine(Ticket ticket) { KindOf(ticket.pace).line.erase(ticket.at); }
    /// One that has begun is over. May call the next one's `turn`.
    void Leave(Pace pace);

    size_t begun(Pace pace) const { return pace == Pace::kWork ? works_.begun : changes_.begun; }
    size_t waiting() const { return works_.line.size() + changes_.line.size(); }

  private:
    struct Kind {
        size_t most = 1;  // that have begun
        size_t room = 1;  // and in line
        size_t begun = 0;
        Line line;
    };
    Kind& KindOf(Pace pace) { return pace == Pace::kWork ? works_ : changes_; }

    const size_t most_;
    Kind works_, changes_;
};

}  // namespace varve::admin
