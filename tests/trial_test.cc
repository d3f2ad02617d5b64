#include "base/trial.h"

#include <gtest/gtest.h>

namespace varve {
namespace {

/// Work whose events take so long, either way. Returns how many windows of a cycle went the first.
unsigned Windows(Trial& trial, int64_t& now, int64_t first, int64_t second) {
    unsigned count = 0;
    for (unsigned window = 0; window < Trial::kCycle; ++window) {
        if (trial.first()) ++count;
        for (uint64_t i = 0; i < Trial::kWindow; ++i) {
            now += trial.first() ? first : second;
            trial.Count(1, [&] { return now; });
        }
    }
    return count;
}

TEST(Trial, GoesTheFasterWayAndAsksAgain) {
    Trial trial;
    int64_t now = 1'000'000'000;
    Windows(trial, now, 100, 90);  // the first cycle begins in its last window
    EXPECT_EQ(1u, Windows(trial, now, 100, 90));
    Windows(trial, now, 90, 100);
    EXPECT_EQ(Trial::kCycle - 1, Windows(trial, now, 90, 100));
    Windows(trial, now, 200, 20);
    EXPECT_EQ(1u, Windows(trial, now, 200, 20));
}

TEST(Trial, CountsEventsNotCalls) {
    Trial trial;
    int64_t now = 0;
    unsigned asked = 0;
    for (int i = 0; i < 100; ++i) {
        trial.Count(Trial::kWindow / 4 + 1, [&] {
            ++asked;
            return now;
        });
    }
    EXPECT_EQ(25u, asked);
}

}  // namespace
}  // namespace varve
