#include "cow/core/waits.h"

#include <algorithm>

namespace varve::cow {

Waits::Scope::Scope(Waits& waits, const char* what) : waits_(waits), what_(what) {
    if (!waits_.clock_) return;
    const std::lock_guard lock(waits_.mutex_);
    since_us_ = waits_.clock_->NowUs();
    previous_ = waits_.last_;
    (previous_ ? previous_->next_ : waits_.first_) = this;
    waits_.last_ = this;
}

Waits::Scope::~Scope() {
    if (!waits_.clock_) return;
    const std::lock_guard lock(waits_.mutex_);
    (previous_ ? previous_->next_ : waits_.first_) = next_;
    (next_ ? next_->previous_ : waits_.last_) = previous_;
}

std::vector<Waits::Entry> Waits::List(int64_t us_min) {
    std::vector<Entry> entries;
    if (!clock_) return entries;
    const std::lock_guard lock(mutex_);
    const int64_t now = clock_->NowUs();
    for (const Scope* scope = first_; scope; scope = scope->next_) {
        const int64_t us = now - scope->since_us_;
        if (us < us_min) break;
        const bool told = std::any_of(entries.begin(), entries.end(),
                                      [scope](const Entry& e) { return e.what == scope->what_; });
        if (!told) entries.push_back({scope->what_, us});
    }
    return entries;
}

}  // namespace varve::cow
