// Backoff: leaves out chances to try something while trying keeps failing: 1, 3, 7... in a row.
// Not a timer: it counts chances. One thread.
#pragma once

#include <algorithm>

namespace varve {

class Backoff {
  public:
    /// `most`: chances that are left out after a failure at most.
    explicit Backoff(unsigned most) : most_(most) {}

    /// Whether this chance is to be left out.
    bool Skip() {
        if (left_ == 0) return false;
        --left_;
        return true;
    }
    void Failed() { left_ = pause_ = std::min(pause_ * 2 + 1, most_); }
    void Succeeded() { pause_ = 0; }

  private:
    const unsigned most_;
    unsigned pause_ = 0;  // after the last try
    unsigned left_ = 0;   // of it
};

}  // namespace varve
