#include "nbdserver/connection/memory_budget.h"

#include <utility>

#include "base/check.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kModestParts = 32;

}  // namespace

MemoryBudget::Share::~Share() {
    VARVE_CHECK(bytes_ == 0 && !place_);
}

MemoryBudget::MemoryBudget(std::shared_ptr<MemoryPot> pot, uint64_t small_bytes_max,
                           std::function<void()> poke)
    : pot_(std::move(pot)), small_bytes_max_(small_bytes_max), poke_(std::move(poke)) {
    pot_->Join(*this);
}

MemoryBudget::MemoryBudget(uint64_t bytes_max, uint64_t small_bytes_max)
    : MemoryBudget(std::make_shared<MemoryPot>(bytes_max, 1), small_bytes_max, nullptr) {}

MemoryBudget::~MemoryBudget() {
    VARVE_CHECK(bytes() == 0 && queue_.empty());
    pot_->Leave(*this);
    pot_->ReturnModest(*this, credit_);
}

bool MemoryBudget::ModestFits(const Share& share, uint64_t bytes) const {
    const uint64_t free = pot_->modest_bytes_free() + credit_;
    return bytes <= free && share.bytes_ + bytes <= (free - bytes) / kModestParts;
}

bool MemoryBudget::TakeModest(const Share& share, uint64_t bytes) {
    if (!ModestFits(share, bytes)) return false;
    if (credit_ < bytes) {
        const uint64_t least = bytes - credit_;
        const uint64_t more = least + GrainToKeep();
        if (pot_->BorrowModest(more)) {
            credit_ += more;
        } else if (pot_->BorrowModest(least)) {
            credit_ += least;
        } else {
            return false;
        }
    }
    credit_ -= bytes;
    modest_bytes_ += bytes;
    return true;
}

/// What is borrowed ahead: nothing while somebody waits for it.
uint64_t MemoryBudget::GrainToKeep() const {
    return pot_->anybody_waits_modestly() ? 0 : pot_->grain();
}

/// What is over goes back.
void MemoryBudget::ReturnCredit() {
    const uint64_t kept = GrainToKeep();
    if (credit_ <= 2 * kept) return;
    pot_->ReturnModest(*this, credit_ - kept);
    credit_ = kept;
}

MemoryBudget::Fund MemoryBudget::Take(Share& share, uint64_t bytes) {
    Fund fund = Fund::kNone;
    if (TakeModest(share, bytes)) {
        fund = Fund::kModest;
    } else if (share.bytes_ == 0 && bytes <= small_bytes_max_) {
        fund = Fund::kSmall;
        small_bytes_ += bytes;
    } else if ((queue_.empty() || queue_.front() == &share) && pot_->TakeLarge(*this, bytes)) {
        fund = Fund::kLarge;
        large_bytes_ += bytes;
    } else {
        Wait(share, bytes);
        // Some may have come back before that was known.
        if (!TakeModest(share, bytes)) return Fund::kNone;
        fund = Fund::kModest;
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
            credit_ += bytes;
            ReturnCredit();
            return WakeFirstModest();
        case Fund::kSmall:
            small_bytes_ -= bytes;
            return;
        case Fund::kLarge:
            large_bytes_ -= bytes;
            pot_->ReturnLarge(*this, bytes);
            return WakeFirst();
        case Fund::kNone:
            VARVE_CHECK(false);
    }
}

void MemoryBudget::Wait(Share& share, uint64_t bytes) {
    share.wanted_ = bytes;
    if (share.place_) return;
    if (queue_.empty()) pot_->BeginWaiting(*this);
    share.place_ = queue_.insert(queue_.end(), &share);
    if (share.bytes_ + bytes <= pot_->modest_bytes_max() / (2 * kModestParts)) {
        if (modest_queue_.empty()) pot_->BeginWaitingModestly(*this);
        share.modest_place_ = modest_queue_.insert(modest_queue_.end(), &share);
    }
}

void MemoryBudget::Leave(Share& share) {
    if (!share.place_) return;
    queue_.erase(*share.place_);
    share.place_.reset();
    if (share.modest_place_) {
        modest_queue_.erase(*share.modest_place_);
        share.modest_place_.reset();
        if (modest_queue_.empty()) pot_->EndWaitingModestly(*this);
    }
    if (queue_.empty()) pot_->EndWaiting(*this);
    LookAgain();
}

void MemoryBudget::LookAgain() {
    ReturnCredit();
    WakeFirst();
    WakeFirstModest();
}

void MemoryBudget::WakeFirst() {
    if (queue_.empty()) return;
    Share* const first = queue_.front();
    if (pot_->TakeLarge(*this, first->wanted_, true)) first->wake(first);
}

void MemoryBudget::WakeFirstModest() {
    if (modest_queue_.empty()) return;
    Share* const first = modest_queue_.front();
    if (ModestFits(*first, first->wanted_)) first->wake(first);
}

}  // namespace varve::nbdserver
