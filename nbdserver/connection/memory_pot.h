// MemoryPot: a bounded memory that the budgets of several threads pay from, so that no thread is
// short of it while another has more than it needs.
// Not a budget: it knows no holders. Any thread may call it.
//
// The modest half is lent to budgets a grain at a time, so that the hot path touches nothing that
// is shared; what they have borrowed and not handed out is at most two grains each, an eighth of it
// in all. The large half is granted to whoever comes first, under a lock: large requests are few.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <mutex>
#include <vector>

namespace varve::nbdserver {

class MemoryBudget;

class MemoryPot {
  public:
    /// `budgets`: how many will share it.
    MemoryPot(uint64_t bytes_max, unsigned budgets);
    /// REQUIRES: nothing is lent.
    ~MemoryPot();
    MemoryPot(const MemoryPot&) = delete;

    uint64_t modest_bytes_max() const { return modest_bytes_max_; }
    uint64_t modest_bytes_free() const { return modest_free_.load(); }
    uint64_t grain() const { return grain_; }

    /// Whether a request of some budget waits; and one that the modest half could pay.
    bool anybody_waits() const { return waiting_.load() > 0; }
    bool anybody_waits_modestly() const { return waiting_modestly_.load() > 0; }

    // ---- for budgets, each on its thread
    void Join(MemoryBudget& budget);
    void Leave(MemoryBudget& budget);

    /// Whether `bytes` of the modest half were free; then they are the caller's.
    bool BorrowModest(uint64_t bytes);
    /// Pokes who waits for some.
    void ReturnModest(const MemoryBudget& budget, uint64_t bytes);

    /// Grants `bytes`, if no budget that came before waits and there is enough. Else `budget` is
    /// in the queue from now on, until it is granted some or leaves it, and is poked when it may
    /// ask again. With `look` it would be granted.
    bool TakeLarge(MemoryBudget& budget, uint64_t bytes, bool look = false);
    void ReturnLarge(MemoryBudget& budget, uint64_t bytes);

    /// A first request of `budget` waits, or the last one does no more. All are poked when
    /// somebody waits, so that they watch who holds memory.
    void BeginWaiting(MemoryBudget& budget);
    void EndWaiting(MemoryBudget& budget);
    /// Likewise one that the modest half could pay; all are poked so that they return what they
    /// have borrowed ahead.
    void BeginWaitingModestly(MemoryBudget& budget);
    void EndWaitingModestly(MemoryBudget& budget);

    /// What was received but not begun, of all threads: each tells it in steps, and tells at most
    /// half a grain more than it has.
    std::atomic<uint64_t> received_bytes{0};

  private:
    using Budgets = std::vector<MemoryBudget*>;
    static void PokeOthers(const Budgets& budgets, const MemoryBudget& self);
    void PokeFirst(const MemoryBudget& self);

    const uint64_t modest_bytes_max_;
    const uint64_t large_bytes_max_;
    const uint64_t grain_;

    alignas(64) std::atomic<uint64_t> modest_free_;
    alignas(64) std::atomic<unsigned> waiting_{0};  // budgets
    std::atomic<unsigned> waiting_modestly_{0};

    std::mutex mutex_;  // of what follows
    uint64_t large_bytes_ = 0;
    std::list<MemoryBudget*> queue_;  // that wait for large pieces
    Budgets modest_waiters_;
    Budgets budgets_;
};

}  // namespace varve::nbdserver
