#include "base/worker.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace varve {

struct Worker::State {
    std::mutex mutex;
    std::condition_variable wake;
    Runnable* head = nullptr;
    Runnable** tail = &head;
    bool stopping = false;
    std::vector<std::thread> threads;

    void Loop() {
        std::unique_lock lock(mutex);
        for (;;) {
            wake.wait(lock, [this] { return head || stopping; });
            if (!head) return;
            Runnable* runnable = head;
            head = runnable->next;
            if (!head) tail = &head;
            lock.unlock();
            runnable->run(runnable);
            lock.lock();
        }
    }
};

Worker::Worker(const std::string& name, unsigned threads) : state_(std::make_unique<State>()) {
    for (unsigned i = 0; i < threads; ++i) {
        state_->threads.emplace_back([state = state_.get()] { state->Loop(); });
        pthread_setname_np(state_->threads.back().native_handle(), name.substr(0, 15).c_str());
    }
}

Worker::~Worker() {
    {
        std::lock_guard lock(state_->mutex);
        state_->stopping = true;
    }
    state_->wake.notify_all();
    for (std::thread& thread : state_->threads) thread.join();
}

void Worker::Post(Runnable* runnable) {
    {
        std::lock_guard lock(state_->mutex);
        runnable->next = nullptr;
        *state_->tail = runnable;
        state_->tail = &runnable->next;
    }
    state_->wake.notify_one();
}

}  // namespace varve
