#include "base/log.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>

namespace varve {
namespace {

LogLevel least_level = LogLevel::kInfo;
LogFormat log_format = LogFormat::kText;

const char* LevelName(LogLevel level) {
    static constexpr const char* kNames[] = {"debug", "info", "warning", "error"};
    return kNames[static_cast<int>(level)];
}

std::string JsonEscape(std::string_view text) {
    std::string out;
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
            out += c;
        } else if (static_cast<unsigned char>(c) < 0x20) {
            out += fmt::format("\\u{:04x}", static_cast<int>(c));
        } else {
            out += c;
        }
    }
    return out;
}

/// `line` with its prefix or as a JSON object.
std::string Format(LogLevel level, std::string_view message) {
    if (log_format == LogFormat::kJson) {
        const auto now = std::chrono::system_clock::now().time_since_epoch();
        const int64_t ms = std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
        return fmt::format("{{\"time\":\"{}\",\"level\":\"{}\",\"message\":\"{}\"}}\n",
                           FormatTime(ms), LevelName(level), JsonEscape(message));
    }
    if (level == LogLevel::kInfo) return fmt::format("varved: {}\n", message);
    return fmt::format("varved: {}: {}\n", LevelName(level), message);
}

/// Waits for whoever reads, also where stderr is non-blocking; gives up where nobody can.
void WriteLine(std::string_view line) {
    while (!line.empty()) {
        const ssize_t n = ::write(STDERR_FILENO, line.data(), line.size());
        if (n >= 0) {
            line.remove_prefix(static_cast<size_t>(n));
        } else if (errno == EAGAIN) {
            pollfd writable{STDERR_FILENO, POLLOUT, 0};
            ::poll(&writable, 1, -1);
        } else if (errno != EINTR) {
            return;  // nowhere left to report to
        }
    }
}

/// Never destroyed: its thread may hang in a write for ever, and the process ends all the same.
class Queue {
  public:
    Queue() {
        std::thread writer([this] { Loop(); });
        pthread_setname_np(writer.native_handle(), "log");
        writer.detach();
    }

    void Push(std::string line) {
        const std::lock_guard lock(mutex_);
        const size_t cost = line.size() + kLogLineCost;
        if (dropped_ > 0 || cost > kLogQueueBytes - bytes_) {
            ++dropped_;
            return;
        }
        bytes_ += cost;
        lines_.push_back(std::move(line));
        wake_.notify_one();
    }

    void Flush(int milliseconds) {
        std::unique_lock lock(mutex_);
        idle_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                       [this] { return lines_.empty() && dropped_ == 0; });
    }

  private:
    [[noreturn]] void Loop() {
        std::unique_lock lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return !lines_.empty() || dropped_ > 0; });
            // What came while lines were dropped is dropped as well, so that the count stands where
            // they are missing.
            const bool counts = lines_.empty();
            const uint64_t dropped = dropped_;
            const std::string line =
                counts ? Format(LogLevel::kWarning,
                                fmt::format("{} lines are missing here: stderr was not read in "
                                            "time",
                                            dropped))
                       : lines_.front();
            lock.unlock();
            WriteLine(line);
            lock.lock();
            if (counts) {
                dropped_ -= dropped;
            } else {
                bytes_ -= line.size() + kLogLineCost;
                lines_.pop_front();
            }
            if (lines_.empty() && dropped_ == 0) idle_.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, idle_;
    std::deque<std::string> lines_;  // the first one is being written
    size_t bytes_ = 0;
    uint64_t dropped_ = 0;  // after lines_
};

Queue* queue = nullptr;

void Write(std::string line) {
    if (queue) {
        queue->Push(std::move(line));
    } else {
        WriteLine(line);
    }
}

}  // namespace

void StartLogThread() {
    VARVE_CHECK(!queue);
    queue = new Queue;
}

void FlushLog(int milliseconds) {
    if (queue) queue->Flush(milliseconds);
}

void SetLog(LogLevel least, LogFormat format) {
    least_level = least;
    log_format = format;
}

Result<LogLevel> ParseLogLevel(std::string_view text) {
    for (const LogLevel level :
         {LogLevel::kDebug, LogLevel::kInfo, LogLevel::kWarning, LogLevel::kError}) {
        if (text == LevelName(level)) return level;
    }
    return MakeError(
        ErrorKind::kInvalid,
        fmt::format("'{}' is not a log level; use debug, info, warning or error", text));
}

Result<LogFormat> ParseLogFormat(std::string_view text) {
    if (text == "text") return LogFormat::kText;
    if (text == "json") return LogFormat::kJson;
    return MakeError(ErrorKind::kInvalid,
                     fmt::format("'{}' is not a log format; use text or json", text));
}

std::string FormatTime(int64_t unix_ms) {
    const auto time = std::chrono::floor<std::chrono::seconds>(
        std::chrono::sys_time<std::chrono::milliseconds>(std::chrono::milliseconds(unix_ms)));
    const std::time_t seconds = time.time_since_epoch().count();
    return fmt::format("{:%Y-%m-%dT%H:%M:%S}.{:03}Z", fmt::gmtime(seconds),
                       unix_ms - seconds * 1000);
}

void Log(LogLevel level, std::string_view message) {
    if (level >= least_level) Write(Format(level, message));
}

void LogAlways(std::string_view message) {
    Write(Format(LogLevel::kInfo, message));
}

}  // namespace varve
