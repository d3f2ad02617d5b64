#include "base/clock.h"

#include <pthread.h>

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "base/check.h"

namespace varve {
namespace {

using Time = std::chrono::steady_clock::time_point;

}  // namespace

struct SystemClock::State {
    struct Entry {
        Executor* executor;
        Runnable* runnable;
    };
    std::mutex mutex;
    std::condition_variable wake;
    std::multimap<Time, Entry> entries;
    bool stopping = false;
    std::thread thread;

    void Loop() {
        std::unique_lock lock(mutex);
        while (!stopping) {
            if (entries.empty()) {
                wake.wait(lock);
                continue;
            }
            const Time first = entries.begin()->first;
            if (std::chrono::steady_clock::now() < first) {
                wake.wait_until(lock, first);
                continue;
            }
            const Entry entry = entries.begin()->second;
            entries.erase(entries.begin());
            lock.unlock();
            entry.executor->Post(entry.runnable);
            lock.lock();
        }
    }
};

SystemClock::SystemClock() : state_(std::make_unique<State>()) {
    state_->thread = std::thread([state = state_.get()] { state->Loop(); });
    pthread_setname_np(state_->thread.native_handle(), "clock");
}

SystemClock::~SystemClock() {
    {
        const std::lock_guard lock(state_->mutex);
        VARVE_CHECK(state_->entries.empty());
        state_->stopping = true;
    }
    state_->wake.notify_all();
    state_->thread.join();
}

int64_t SystemClock::NowUs() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::microseconds>(now).count();
}

void SystemClock::PostAfter(int64_t us, Executor& executor, Runnable* runnable) {
    const Time when = std::chrono::steady_clock::now() + std::chrono::microseconds(us);
    bool first = false;
    {
        const std::lock_guard lock(state_->mutex);
        const auto at = state_->entries.emplace(when, State::Entry{&executor, runnable});
        first = at == state_->entries.begin();
    }
    if (first) state_->wake.notify_one();
}

}  // namespace varve
