// Waits: what the parts of an open pool wait for at this moment, and since when: what somebody who
// asks for the status is told when the device answers no more.
// Not a wait itself: it only remembers.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "base/clock.h"

namespace varve::cow {

/// Any thread.
class Waits {
  public:
    /// Without a clock nothing is remembered.
    explicit Waits(Clock* clock) : clock_(clock) {}
    Waits(const Waits&) = delete;

    /// Somebody waits for `what` (a literal) as long as this exists.
    class Scope {
      public:
        Scope(Waits& waits, const char* what);
        Scope(const Scope&) = delete;
        ~Scope();

      private:
        friend class Waits;
        Waits& waits_;
        const char* const what_;
        int64_t since_us_ = 0;
        Scope* previous_ = nullptr;
        Scope* next_ = nullptr;
    };

    struct Entry {
        std::string what;
        int64_t us = 0;  // so long
    };
    /// What is waited for since `us_min` or longer, each once with its longest wait, in the order
    /// in which the waits began.
    std::vector<Entry> List(int64_t us_min);

  private:
    Clock* const clock_;
    std::mutex mutex_;
    Scope* first_ = nullptr;  // the oldest
    Scope* last_ = nullptr;
};

}  // namespace varve::cow
