#include "nbdserver/daemon/limited_log.h"

#include <fmt/format.h>

#include "base/log.h"

namespace varve::nbdserver {

void LimitedLog::Tell(const std::string& line) {
    const auto now = std::chrono::steady_clock::now();
    if (now - since_ >= std::chrono::seconds(1)) {
        if (untold_ > 0) Log(LogLevel::kInfo, fmt::format("{} more {}", untold_, what_));
        since_ = now;
        told_ = untold_ = 0;
    }
    if (told_ < kToldMax) {
        ++told_;
        Log(LogLevel::kInfo, line);
    } else {
        ++untold_;
    }
}

}  // namespace varve::nbdserver
