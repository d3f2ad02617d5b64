// The system's clock: whoever sleeps wakes, in order, and never early.
#include "base/clock.h"

#include <gtest/gtest.h>

#include <future>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "base/task.h"
#include "base/worker.h"

namespace varve {
namespace {

struct Sleeper {
    int64_t us = 0;      // asked for
    int64_t before = 0;  // its sleep began between these
    int64_t after = 0;
    int64_t woke = 0;
};

/// Sleepers that all wake on `executor`.
class Dormitory {
  public:
    Dormitory(Clock& clock, Executor& executor, size_t beds)
        : clock_(clock), executor_(executor), beds_(beds) {}

    void Begin(Sleeper& sleeper) {
        sleeper.before = clock_.NowUs();
        Spawn(SleepOnce(sleeper));
        sleeper.after = clock_.NowUs();
    }
    /// Everybody, in the order in which they woke.
    std::vector<const Sleeper*> Wait() {
        all_->get_future().wait();
        return woken_;
    }

  private:
    Task<void> SleepOnce(Sleeper& sleeper) {
        co_await Sleep(clock_, sleeper.us, executor_);
        sleeper.woke = clock_.NowUs();
        woken_.push_back(&sleeper);
        const std::shared_ptr<std::promise<void>> all = all_;  // who waits may be gone at once
        if (woken_.size() == beds_) all->set_value();
    }

    Clock& clock_;
    Executor& executor_;
    const size_t beds_;
    std::vector<const Sleeper*> woken_;  // on the executor
    std::shared_ptr<std::promise<void>> all_ = std::make_shared<std::promise<void>>();
};

TEST(SystemClockTest, SleepersWakeInTheOrderOfTheirTimes) {
    Worker worker("worker", 1);
    SystemClock clock;
    Sleeper sleepers[] = {{40'000}, {10'000}, {30'000}, {20'000}, {0}};
    Dormitory dormitory(clock, worker, std::size(sleepers));
    for (Sleeper& sleeper : sleepers) dormitory.Begin(sleeper);
    const std::vector<const Sleeper*> woken = dormitory.Wait();
    ASSERT_EQ(woken.size(), std::size(sleepers));
    for (size_t i = 0; i < woken.size(); ++i) {
        EXPECT_GE(woken[i]->woke, woken[i]->before + woken[i]->us);
        // Nobody wakes before one whose time was certainly over earlier.
        for (size_t later = i + 1; later < woken.size(); ++later) {
            EXPECT_LE(woken[i]->before + woken[i]->us, woken[later]->after + woken[later]->us);
        }
    }
}

TEST(SystemClockTest, EveryoneWakesWhoeverAsks) {
    constexpr size_t kThreads = 4;
    constexpr size_t kEach = 250;
    const unsigned seed = std::random_device()();
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Worker worker("worker", 1);
    SystemClock clock;
    std::vector<Sleeper> sleepers(kThreads * kEach);
    std::mt19937 random(seed);
    for (Sleeper& one : sleepers) one.us = std::uniform_int_distribution<>(0, 3000)(random);
    Dormitory dormitory(clock, worker, sleepers.size());
    std::vector<std::thread> threads;
    for (size_t i = 0; i < kThreads; ++i) {
        threads.emplace_back([&, i] {
            for (size_t n = 0; n < kEach; ++n) dormitory.Begin(sleepers[i * kEach + n]);
        });
    }
    EXPECT_EQ(dormitory.Wait().size(), sleepers.size());
    for (std::thread& thread : threads) thread.join();
    for (const Sleeper& one : sleepers) EXPECT_GE(one.woke, one.before + one.us);
}

}  // namespace
}  // namespace varve
