#include "nbdserver/connection/memory_pot.h"

#include <algorithm>

#include "base/check.h"
#include "nbdserver/connection/memory_budget.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kGrainMax = 1 << 20;

/// A budget that is alone need not borrow ahead.
uint64_t GrainOf(uint64_t modest_bytes_max, unsigned budgets) {
    return budgets <= 1 ? 0 : std::min(kGrainMax, modest_bytes_max / (16 * budgets));
}

}  // namespace

MemoryPot::MemoryPot(uint64_t bytes_max, unsigned budgets)
    : modest_bytes_max_(bytes_max / 2),
      large_bytes_max_(bytes_max - bytes_max / 2),
      grain_(GrainOf(bytes_max / 2, budgets)),
      modest_free_(bytes_max / 2) {}

MemoryPot::~MemoryPot() {
    VARVE_CHECK(modest_free_ == modest_bytes_max_ && large_bytes_ == 0 && queue_.empty());
    VARVE_CHECK(waiting_ == 0 && waiting_modestly_ == 0 && budgets_.empty());
}

void MemoryPot::Join(MemoryBudget& budget) {
    const std::lock_guard lock(mutex_);
    budgets_.push_back(&budget);
}

void MemoryPot::Leave(MemoryBudget& budget) {
    const std::lock_guard lock(mutex_);
    std::erase(budgets_, &budget);
}

bool MemoryPot::BorrowModest(uint64_t bytes) {
    uint64_t free = modest_free_.load();
    do {
        if (free < bytes) return false;
    } while (!modest_free_.compare_exchange_weak(free, free - bytes));
    return true;
}

/// A budget that begins to wait says so before it looks once more, and here it is looked for after
/// the return: so one of the two sees the other.
void MemoryPot::ReturnModest(const MemoryBudget& budget, uint64_t bytes) {
    if (bytes == 0) return;
    modest_free_.fetch_add(bytes);
    if (!anybody_waits_modestly()) return;
    const std::lock_guard lock(mutex_);
    PokeOthers(modest_waiters_, budget);
}

bool MemoryPot::TakeLarge(MemoryBudget& budget, uint64_t bytes, bool look) {
    const std::lock_guard lock(mutex_);
    const auto place = std::find(queue_.begin(), queue_.end(), &budget);
    const bool first = queue_.empty() || queue_.front() == &budget;
    if (!first || (large_bytes_ > 0 && large_bytes_ + bytes > large_bytes_max_)) {
        if (place == queue_.end()) queue_.push_back(&budget);
        return false;
    }
    if (look) return true;
    large_bytes_ += bytes;
    if (place != queue_.end()) queue_.erase(place);  // others have their turn before its next
    PokeFirst(budget);
    return true;
}

void MemoryPot::ReturnLarge(MemoryBudget& budget, uint64_t bytes) {
    const std::lock_guard lock(mutex_);
    VARVE_CHECK(large_bytes_ >= bytes);
    large_bytes_ -= bytes;
    PokeFirst(budget);
}

void MemoryPot::PokeOthers(const Budgets& budgets, const MemoryBudget& self) {
    for (MemoryBudget* budget : budgets) {
        if (budget != &self) budget->Poke();
    }
}

void MemoryPot::PokeFirst(const MemoryBudget& self) {
    if (!queue_.empty() && queue_.front() != &self) queue_.front()->Poke();
}

void MemoryPot::BeginWaiting(MemoryBudget& budget) {
    if (waiting_.fetch_add(1) > 0) return;
    const std::lock_guard lock(mutex_);
    PokeOthers(budgets_, budget);
}

void MemoryPot::EndWaiting(MemoryBudget& budget) {
    waiting_.fetch_sub(1);
    const std::lock_guard lock(mutex_);
    queue_.remove(&budget);
    PokeFirst(budget);
}

void MemoryPot::BeginWaitingModestly(MemoryBudget& budget) {
    const std::lock_guard lock(mutex_);
    modest_waiters_.push_back(&budget);
    if (waiting_modestly_.fetch_add(1) == 0) PokeOthers(budgets_, budget);
}

void MemoryPot::EndWaitingModestly(MemoryBudget& budget) {
    const std::lock_guard lock(mutex_);
    std::erase(modest_waiters_, &budget);
    waiting_modestly_.fetch_sub(1);
}

}  // namespace varve::nbdserver
