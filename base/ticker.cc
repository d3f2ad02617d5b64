#include "base/ticker.h"

namespace varve {
namespace {

constexpr int64_t kTickUs = 20'000;

}  // namespace

Task<bool> Ticker::Wait(WaitList& list, int64_t us, std::function<bool(int64_t*)> done) {
    int64_t until_us = NowUs() + us;
    bool is_done = done(&until_us);
    if (is_done) co_return true;
    lists_.insert(&list);
    if (clock_ && !running_) {
        running_ = true;
        Spawn(Run());
    }
    while (!is_done && (!clock_ || NowUs() < until_us)) {
        co_await list.Wait();
        is_done = done(&until_us);
    }
    lists_.erase(lists_.find(&list));
    co_return is_done;
}

Task<void> Ticker::Run() {
    while (!lists_.empty()) {
        co_await Sleep(*clock_, kTickUs, executor_);
        for (auto list = lists_.begin(); list != lists_.end(); list = lists_.upper_bound(*list)) {
            (*list)->WakeAll();
        }
    }
    running_ = false;
}

Task<void> Ticker::Idle() {
    while (running_) co_await Sleep(*clock_, kTickUs, executor_);
}

}  // namespace varve
