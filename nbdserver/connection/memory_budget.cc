#include "nbdserver/connection/memory_budget.h"

#include <algorithm>

#include "base/check.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kModestParts = 32;

}  // namespace

MemoryBudget::Share::~Share() {
    VARVE_CHECK(bytes_ == 0 && !place_);
}

MemoryBudget::MemoryBudget(uint64_t bytes_max, uint64_t small_bytes_max)
    : modest_bytes_max_(bytes_max / 2),
      large_bytes_max_(bytes_max - bytes_max / 2),
      small_bytes_max_(small_bytes_max) {}

MemoryBudget::~MemoryBudget() {
    VARVE_CHECK(bytes() == 0 && queue_.empty());
}

bool MemoryBudget::ModestFits(const Share& share, uint64_t bytes) const {
    if (modest_bytes_ + bytes > modest_bytes_max_) return false;
    const uint64_t left = modest_bytes_max_ - modest_bytes_ - bytes;
    return share.bytes_ + bytes <= left / kModestParts;
}

bool MemoryBudget::LargeFits(uint64_t bytes) const {
    return large_bytes_ == 0 || large_bytes_ + bytes <= large_bytes_max_;
}

MemoryBudget::Fund MemoryBudget::Take(Share& share, uint64_t bytes) {
    Fund fund = Fund::kNone;
    if (ModestFits(share, bytes)) {
        fund = Fund::kModest;
        modest_bytes_ += bytes;
    } else if (share.bytes_ == 0 && bytes <= small_bytes_max_) {
        fund = Fund::kSmall;
        small_bytes_ += bytes;
    } else if ((queue_.empty() || queue_.front() == &share) && LargeFits(bytes)) {
        fund = Fund::kLarge;
        large_bytes_ += bytes;
    } else {
        Wait(share, bytes);
        return Fund::kNone;
    }
    share.bytes_ += bytes;
    Leave(share);
    return fund;
}

void MemoryBudget::GiveBack(Share& share, Fund fund, uint64_t bytes) {
    VARVE_CHECK(share.bytes_ >= bytes);
    share.bytes_ -= bytes;
    switch (fund) {
        case Fund::kModest:
            modest_bytes_ -= bytes;
            return WakeFirstModest();
        case Fund::kSmall:
            small_bytes_ -= bytes;
            return;
        case Fund::kLarge:
            large_bytes_ -= bytes;
            return WakeFirst();
        case Fund::kNone:
            VARVE_CHECK(false);
    }
}

void MemoryBudget::Wait(Share& share, uint64_t bytes) {
    share.wanted_ = bytes;
    if (share.place_) return;
    share.place_ = queue_.insert(queue_.end(), &share);
    if (share.bytes_ + bytes <= modest_bytes_max_ / (2 * kModestParts)) {
        share.modest_place_ = modest_queue_.insert(modest_queue_.end(), &share);
    }
}

void MemoryBudget::Leave(Share& share) {
    if (!share.place_) return;
    queue_.erase(*share.place_);
    share.place_.reset();
    if (share.modest_place_) modest_queue_.erase(*share.modest_place_);
    share.modest_place_.reset();
    WakeFirst();
    WakeFirstModest();
}

void MemoryBudget::WakeFirst() {
    if (queue_.empty()) return;
    Share* const first = queue_.front();
    if (LargeFits(first->wanted_)) first->wake(first);
}

void MemoryBudget::WakeFirstModest() {
    if (modest_queue_.empty()) return;
    Share* const first = modest_queue_.front();
    if (ModestFits(*first, first->wanted_)) first->wake(first);
}

}  // namespace varve::nbdserver
