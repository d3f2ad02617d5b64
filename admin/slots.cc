#include "admin/slots.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace varve::admin {

Slots::Slots(size_t places) : most_(std::max<size_t>(places - std::max<size_t>(places / 8, 1), 1)) {
    changes_.most = std::clamp<size_t>(places / 2, 1, most_);
    works_.most = std::clamp<size_t>(places / 4, 1, most_);
    changes_.room = std::max(most_ - std::max<size_t>(works_.most / 4, 1), changes_.most);
    works_.room = std::max(most_ - changes_.most, works_.most);
}

Slots::Entry Slots::Enter(Pace pace, std::function<void()> turn, Ticket* ticket) {
    if (pace == Pace::kGlance) return Entry::kBegins;
    if (begun(Pace::kChange) + begun(Pace::kWork) + waiting() >= most_) return Entry::kRefused;
    Kind& kind = KindOf(pace);
    if (kind.begun + kind.line.size() >= kind.room) return Entry::kRefused;
    if (kind.begun < kind.most) {
        ++kind.begun;
        return Entry::kBegins;
    }
    *ticket = {pace, kind.line.insert(kind.line.end(), std::move(turn))};
    return Entry::kWaits;
}

void Slots::Leave(Pace pace) {
    if (pace == Pace::kGlance) return;
    Kind& kind = KindOf(pace);
    VARVE_CHECK(kind.begun > 0);
    if (kind.line.empty()) {
        --kind.begun;
        return;
    }
    const std::function<void()> turn = std::move(kind.line.front());
    kind.line.pop_front();
    turn();
}

}  // namespace varve::admin
