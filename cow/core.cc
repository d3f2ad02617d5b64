#include "cow/core.h"

#include "base/log.h"

namespace varve::cow {

void Core::Fail(const std::string& reason) {
    {
        const std::lock_guard lock(failure_mutex_);
        if (failed) return;
        failure_ = reason;
        failed = true;
    }
    Log(LogLevel::kError,
        "writes are refused from now on: " + reason + "; mend the device and restart the server");
}

std::string Core::failure() {
    const std::lock_guard lock(failure_mutex_);
    return failure_;
}

}  // namespace varve::cow
