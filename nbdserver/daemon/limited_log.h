// LimitedLog: lines of the log that others can cause as often as they like.
// Not for what the server does of its own accord: that is always told.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace varve::nbdserver {

/// One thread at a time.
class LimitedLog {
  public:
    static constexpr uint64_t kToldMax = 10;  // in a second; of more only their number

    /// `what` they tell of, for their number: "handshakes failed".
    explicit LimitedLog(std::string what) : what_(std::move(what)) {}

    void Tell(const std::string& line);
    /// Tells how many were left out, if their second is over. To be called now and then: perhaps no
    /// other line comes.
    void TellNumber();

  private:
    bool SecondIsOver() const;

    const std::string what_;
    std::chrono::steady_clock::time_point since_;
    uint64_t told_ = 0, untold_ = 0;  // since then
};

}  // namespace varve::nbdserver
