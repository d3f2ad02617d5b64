#include "cow/core/core.h"

#include "base/log.h"

namespace varve::cow {
namespace {

/// Damaged blocks that are remembered, and logged, one by one.
constexpr size_t kDamageMax = 10'000;

}  // namespace

void Core::Fail(const std::string& reason) {
    {
        const std::lock_guard lock(failure_mutex_);
        if (failed) return;
        failure_ = reason;
        failed = true;
    }
    if (on_failure) on_failure();
    if (!opened) return;
    Log(LogLevel::kError,
        "writes are refused from now on: " + reason + "; mend the device and restart the server");
}

std::string Core::failure() {
    const std::lock_guard lock(failure_mutex_);
    return failure_;
}

void Core::FoundDamage(uint64_t place, Generation birth, const std::string& what) {
    {
        const std::lock_guard lock(damage_mutex_);
        // Beyond the bound a block may be counted again, but not logged: there is enough to read.
        if (damage_.contains({place, birth})) return;
        ++damaged_blocks_;
        if (damage_.size() == kDamageMax) return;
        damage_.emplace(place, birth);
    }
    Log(LogLevel::kError, what);
}

uint64_t Core::damaged_blocks() {
    const std::lock_guard lock(damage_mutex_);
    return damaged_blocks_;
}

}  // namespace varve::cow
