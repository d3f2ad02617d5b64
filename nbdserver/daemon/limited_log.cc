#include "nbdserver/daemon/limited_log.h"

#include <fmt/format.h>

#include <utility>

#include "base/log.h"

namespace varve::nbdserver {

void LimitedLog::Tell(const std::string& line) {
    TellNumber();
    if (SecondIsOver()) {
        since_ = std::chrono::steady_clock::now();
        told_ = 0;
    }
    if (told_ < kToldMax) {
        ++told_;
        Log(LogLevel::kInfo, line);
    } else {
        ++untold_;
    }
}

void LimitedLog::TellNumber() {
    if (untold_ == 0 || !SecondIsOver()) return;
    Log(LogLevel::kInfo, fmt::format("{} more {}", std::exchange(untold_, 0), what_));
}

bool LimitedLog::SecondIsOver() const {
    return std::chrono::steady_clock::now() - since_ >= std::chrono::seconds(1);
}

}  // namespace varve::nbdserver
