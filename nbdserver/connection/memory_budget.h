// MemoryBudget: who of many may hold how much of a bounded memory, so that nobody who hoards it
// keeps others from being served.
// Not an allocator: it only counts. It belongs to one thread; what it counts in is a MemoryPot,
// which the budgets of all threads share.
//
// Three funds pay. What a holder asks for is tried in this order:
//
//   modest   half of the memory. Granted if the holder then has, of all funds, at most 1/32 of what
//            is left of it: each holder that takes what it can leaves 32/33 of it to the others.
//   small    beyond the bound: one small piece for each holder that has nothing.
//   large    the other half. Granted in the order of asking; the first waits until there is
//            enough. Nobody overtakes, so large pieces do not starve. The budgets of several
//            threads take turns.
//
// Who waits can be paid by the large fund only when those before him have been, and by the modest
// fund as soon as he asks again.
#pragma once

#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <optional>

#include "nbdserver/connection/memory_pot.h"

namespace varve::nbdserver {

class MemoryBudget {
  public:
    enum class Fund : uint8_t { kNone, kModest, kSmall, kLarge };

    /// What one holder has. Lives in its owner. REQUIRES at destruction: nothing held, not waiting.
    class Share {
      public:
        Share() = default;
        Share(const Share&) = delete;
        Share& operator=(const Share&) = delete;
        ~Share();

        /// Called when a Take() that found nothing may find something now. It must not call the
        /// budget: ask again later in the same turn.
        void (*wake)(Share*) = nullptr;

        uint64_t bytes() const { return bytes_; }  // held
        bool waiting() const { return place_.has_value(); }

      private:
        friend class MemoryBudget;
        using Queue = std::list<Share*>;

        uint64_t bytes_ = 0;
        uint64_t wanted_ = 0;  // while waiting
        std::optional<Queue::iterator> place_;
        std::optional<Queue::iterator> modest_place_;
    };

    /// At most what `pot` has is held, by all its budgets, and besides `small_bytes_max` for each
    /// holder. A piece that is larger than the large fund is granted alone. `poke` is called, by
    /// any thread, when LookAgain() shall be called on this budget's.
    MemoryBudget(std::shared_ptr<MemoryPot> pot, uint64_t small_bytes_max,
                 std::function<void()> poke);
    /// Alone with a pot of its own.
    MemoryBudget(uint64_t bytes_max, uint64_t small_bytes_max);
    /// REQUIRES: nobody holds anything.
    ~MemoryBudget();
    MemoryBudget(const MemoryBudget&) = delete;

    /// Which fund pays `bytes` > 0; they are held until GiveBack(). kNone: not now; `share` waits
    /// and is woken. It asks for the same again, or Leave()s.
    Fund Take(Share& share, uint64_t bytes);
    void GiveBack(Share& share, Fund fund, uint64_t bytes);

    /// `share` wants nothing any more.
    void Leave(Share& share);

    /// Any thread: LookAgain() is wanted, since another budget waits or has given some back.
    void Poke() {
        if (poke_) poke_();
    }
    /// Returns what others want, and wakes who may find something now.
    void LookAgain();

    /// Of any budget.
    bool anybody_waits() const { return pot_->anybody_waits(); }
    uint64_t bytes() const { return modest_bytes_ + small_bytes_ + large_bytes_; }

  private:
    bool ModestFits(const Share& share, uint64_t bytes) const;
    bool TakeModest(const Share& share, uint64_t bytes);
    uint64_t GrainToKeep() const;
    void ReturnCredit();
    void Wait(Share& share, uint64_t bytes);
    void WakeFirst();
    void WakeFirstModest();

    const std::shared_ptr<MemoryPot> pot_;
    const uint64_t small_bytes_max_;  // of one piece
    const std::function<void()> poke_;
    uint64_t credit_ = 0;  // borrowed of the modest half, not held by anybody
    uint64_t modest_bytes_ = 0;
    uint64_t small_bytes_ = 0;
    uint64_t large_bytes_ = 0;
    Share::Queue queue_;         // all who wait, in order
    Share::Queue modest_queue_;  // those whom the modest fund could pay if half of it were left
};

}  // namespace varve::nbdserver
