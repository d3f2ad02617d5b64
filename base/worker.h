// Worker: an executor of its own threads for calls that block (RocksDB, file system).
// Not for the data path: each post wakes a thread.
#pragma once

#include <memory>
#include <string>

#include "base/executor.h"

namespace varve {

class Worker : public Executor {
  public:
    /// Starts `threads` threads named `name` (15 characters are shown by the system). With one
    /// thread, what runs here needs no lock; with more, posted work runs in parallel.
    Worker(const std::string& name, unsigned threads);
    /// Runs what is still posted, then joins the threads. REQUIRES: every Post() has returned; what
    /// it posted may have run before that.
    ~Worker() override;

    void Post(Runnable* runnable) override;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace varve
