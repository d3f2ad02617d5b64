// CacheBudget: memory that the caches of all lanes share. Each lane has a part that it keeps, and
// takes more as it needs it, as long as there is some; what others hold without need comes back to
// the budget when Lanes::Balance (lane.h) asks them for it.
// Not a cache: those are chunk_cache.h and checksums.h.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace varve::cow {

/// Any thread.
class CacheBudget {
  public:
    /// `total` bytes for `parts` lanes.
    CacheBudget(uint64_t total, uint64_t parts)
        : total_(total),
          kept_(total / parts / 8),
          slab_(std::max<uint64_t>(1, total / 64)),
          free_(total - parts * kept_),
          cap_(total) {}

    uint64_t total() const { return total_; }
    /// What each lane keeps, whatever the others need: an eighth of an equal share.
    uint64_t kept() const { return kept_; }
    /// What is taken at once.
    uint64_t slab() const { return slab_; }

    /// At most `slab()` bytes; 0 if nothing is left.
    uint64_t Take() {
        uint64_t left = free_.load(std::memory_order_relaxed);
        while (left > 0) {
            const uint64_t some = std::min(left, slab_);
            if (free_.compare_exchange_weak(left, left - some)) return some;
        }
        return 0;
    }
    void Give(uint64_t bytes) { free_.fetch_add(bytes); }

    /// Who has more may take no more.
    uint64_t cap() const { return cap_.load(std::memory_order_relaxed); }
    void SetCap(uint64_t bytes) { cap_.store(bytes, std::memory_order_relaxed); }

  private:
    const uint64_t total_, kept_, slab_;
    std::atomic<uint64_t> free_, cap_;
};

/// What one cache may hold. Belongs to its lane, but for what says otherwise.
class CacheShare {
  public:
    explicit CacheShare(CacheBudget& budget) : budget_(budget), limit_(budget.kept()) {}

    /// Whether a cache of `used` bytes keeps its bound; takes more from the budget if it can.
    bool Fits(uint64_t used) {
        used_.store(used, std::memory_order_relaxed);
        while (used > limit()) {
            const uint64_t more = limit() < budget_.cap() ? budget_.Take() : 0;
            if (more == 0) {
                hungry_.store(true, std::memory_order_relaxed);
                return false;
            }
            limit_.store(limit() + more, std::memory_order_relaxed);
        }
        return true;
    }
    /// Gives back what is beyond `most`, and not used.
    void Lower(uint64_t most, uint64_t used) {
        used_.store(used, std::memory_order_relaxed);
        const uint64_t before = limit(), now = std::max(most, used);
        if (now >= before) return;
        limit_.store(now, std::memory_order_relaxed);
        budget_.Give(before - now);
    }

    // ---- any thread
    uint64_t limit() const { return limit_.load(std::memory_order_relaxed); }
    uint64_t used() const { return used_.load(std::memory_order_relaxed); }
    CacheBudget& budget() const { return budget_; }
    /// Whether it had to drop something for want of memory since it was asked last.
    bool TakeHungry() { return hungry_.exchange(false, std::memory_order_relaxed); }

  private:
    CacheBudget& budget_;
    std::atomic<uint64_t> limit_;
    std::atomic<uint64_t> used_ = 0;  // when it was looked at last
    std::atomic<bool> hungry_ = false;
};

}  // namespace varve::cow
