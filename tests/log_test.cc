// Log: times, and that nobody waits for whoever reads stderr.
#include "base/log.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace varve {
namespace {

TEST(FormatTimeTest, CountsFromBothSidesOf1970) {
    EXPECT_EQ(FormatTime(0), "1970-01-01T00:00:00.000Z");
    EXPECT_EQ(FormatTime(1), "1970-01-01T00:00:00.001Z");
    EXPECT_EQ(FormatTime(-1), "1969-12-31T23:59:59.999Z");
    EXPECT_EQ(FormatTime(-627), "1969-12-31T23:59:59.373Z");
    EXPECT_EQ(FormatTime(-1000), "1969-12-31T23:59:59.000Z");
    EXPECT_EQ(FormatTime(-86'400'000), "1969-12-31T00:00:00.000Z");
    EXPECT_EQ(FormatTime(1'795'820'400'123), "2026-11-27T23:00:00.123Z");
}

/// A pipe in the place of stderr, while it lives.
class StderrPipe {
  public:
    StderrPipe() : saved_(::dup(STDERR_FILENO)) {
        int ends[2];
        EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
        ::dup2(ends[1], STDERR_FILENO);
        ::close(ends[1]);
        read_ = ends[0];
    }
    ~StderrPipe() {
        Restore();
        ::close(read_);
    }
    /// Ends the stream that Read() sees.
    void Restore() {
        if (saved_ < 0) return;
        ::dup2(saved_, STDERR_FILENO);
        ::close(std::exchange(saved_, -1));
    }
    /// All until the end of the stream.
    std::string Read() {
        std::string text;
        char bytes[65536];
        for (ssize_t n = 0; (n = ::read(read_, bytes, sizeof bytes)) > 0;) {
            text.append(bytes, static_cast<size_t>(n));
        }
        return text;
    }

  private:
    int saved_;
    int read_;
};

std::vector<std::string> Lines(const std::string& text) {
    std::vector<std::string> lines;
    for (size_t at = 0, end = 0; (end = text.find('\n', at)) != std::string::npos; at = end + 1) {
        lines.push_back(text.substr(at, end - at));
    }
    return lines;
}

// A pipe holds 64 KiB: a writer that waited for the reader would never come to read.
TEST(LogTest, LinesThatNobodyReadsAreCountedAndHoldNobodyUp) {
    StartLogThread();
    constexpr int kThreads = 4, kEach = 10'000;
    StderrPipe pipe;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([t] {
            for (int i = 0; i < kEach; ++i) {
                Log(LogLevel::kInfo, "line " + std::to_string(i) + " of " + std::to_string(t));
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    FlushLog(1);  // does not wait for the reader either

    std::thread ender([&] {
        FlushLog(60'000);
        Log(LogLevel::kInfo, "the last");
        FlushLog(60'000);
        pipe.Restore();
    });
    const std::vector<std::string> lines = Lines(pipe.Read());
    ender.join();
    int written = 0, missing = 0;
    size_t bytes = 0;
    for (const std::string& line : lines) {
        bytes += line.size() + 1;
        if (line.rfind("varved: line ", 0) == 0) ++written;
        if (line.find(" lines are missing here") == std::string::npos) continue;
        missing += std::atoi(line.c_str() + std::string("varved: warning: ").size());
    }
    EXPECT_EQ(written + missing, kThreads * kEach) << "each line is written or counted";
    EXPECT_GT(missing, 0);
    EXPECT_LE(bytes, kLogQueueBytes + (128 << 10)) << "the queue, and what the pipe holds";
    ASSERT_FALSE(lines.empty());
    EXPECT_EQ(lines.back(), "varved: the last") << "it goes on";
}

}  // namespace
}  // namespace varve
