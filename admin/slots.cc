#include "admin/slots.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace varve::admin {

Slots::Slots(size_t places)
    : most_(std::max<size_t>(places - std::max<size_t>(places / 8, 1), 1)),
      changes_max_(std::clamp<size_t>(places / 2, 1, most_)),
      works_max_(std::clamp<size_t>(places / 4, 1, most_)) {}

Slots::Entry Slots::Enter(Pace pace, std::function<void()> turn, Line::iterator* ticket) {
    if (pace == Pace::kGlance) return Entry::kBegins;
    if (changes_ + works_ + line_.size() >= most_) return Entry::kRefused;
    if (pace == Pace::kWork) {
        if (works_ >= works_max_) return Entry::kRefused;
        ++works_;
        return Entry::kBegins;
    }
    if (changes_ < changes_max_) {
        ++changes_;
        return Entry::kBegins;
    }
    *ticket = line_.insert(line_.end(), std::move(turn));
    return Entry::kWaits;
}

void Slots::Leave(Pace pace) {
    if (pace == Pace::kGlance) return;
    size_t& count = pace == Pace::kWork ? works_ : changes_;
    VARVE_CHECK(count > 0);
    --count;
    if (line_.empty() || changes_ >= changes_max_) return;
    ++changes_;
    const std::function<void()> turn = std::move(line_.front());
    line_.pop_front();
    turn();
}

}  // namespace varve::admin
