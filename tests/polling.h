// Whether a reactor polls: it enters the kernel all the time then.
#pragma once

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <thread>

#include "base/reactor.h"

namespace varve {

/// A poll that nothing ends goes on for longer than any test.
inline constexpr int64_t kHour = int64_t{3600} * 1'000'000'000;  // nanoseconds

inline void ExpectPolling(const Reactor& reactor) {
    const uint64_t enough = reactor.enters() + 1000;
    const auto late = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    while (reactor.enters() < enough && std::chrono::steady_clock::now() < late) {
        std::this_thread::yield();
    }
    EXPECT_GE(reactor.enters(), enough);
}

}  // namespace varve
