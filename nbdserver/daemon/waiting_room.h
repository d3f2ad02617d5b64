// WaitingRoom: clients that have asked for an export and wait inside the server until they may have
// it: until requests of those that left the disk have ended, or a snapshot is stored.
// Not the wait itself (Clients::Attach): it watches who waits, counts them, and ends waits.
//
// A wait may last as long as the device hangs, so it takes nothing that others need: who waits
// keeps no place among those that negotiate, leaves when its peer is gone, and is one of a bounded
// number.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "base/sync.h"
#include "nbdserver/daemon/control.h"

namespace varve::nbdserver {

/// Lives on the control thread.
class WaitingRoom {
  public:
    enum class Reason { kPeerGone, kCrowded };

    /// One that waits. Lives in its owner, from Enter() to Leave().
    struct Guest {
        int fd = -1;
        std::string name;  // of the export, as it was asked for
        /// Ends the wait, soon and not from inside; called at most once.
        std::function<void(Reason)> end;

      private:
        friend class WaitingRoom;
        std::list<Guest*>::iterator place;
        unsigned looks = 0;
        bool seated = false;
        bool ended = false;
    };

    /// At most `each_max` wait for one export and `all_max` in all; `seated` is called when one
    /// that counted as negotiating does not any more. `gate` is entered as long as a coroutine runs
    /// here.
    WaitingRoom(Control& control, Gate& gate, uint64_t each_max, uint64_t all_max,
                std::function<void()> seated);

    /// A guest whose wait lasts longer than some 50 ms is seated, or ended if there is no room: in
    /// the order in which they came.
    void Enter(Guest& guest);
    void Leave(Guest& guest);

    /// Those that wait and need no place among those that negotiate.
    uint64_t seated() const { return seated_; }

  private:
    Task<void> Watch();
    void Look();
    void Seat(Guest& guest);
    static void End(Guest& guest, Reason reason);

    Gate& gate_;
    const uint64_t each_max_, all_max_;
    const std::function<void()> on_seated_;
    Timer timer_;
    bool watching_ = false;
    std::list<Guest*> guests_;  // who came first is first
    uint64_t seated_ = 0;
    std::map<std::string, uint64_t> seated_for_;  // by export
};

}  // namespace varve::nbdserver
