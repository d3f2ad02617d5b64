#include "base/log.h"

#include <fmt/chrono.h>
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>

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

}  // namespace

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
    const std::time_t seconds = unix_ms / 1000;
    return fmt::format("{:%Y-%m-%dT%H:%M:%S}.{:03}Z", fmt::gmtime(seconds), unix_ms % 1000);
}

void Log(LogLevel level, std::string_view message) {
    if (level < least_level) return;
    std::string line;
    if (log_format == LogFormat::kJson) {
        const auto now = std::chrono::system_clock::now().time_since_epoch();
        const int64_t ms = std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
        line = fmt::format("{{\"time\":\"{}\",\"level\":\"{}\",\"message\":\"{}\"}}\n",
                           FormatTime(ms), LevelName(level), JsonEscape(message));
    } else if (level == LogLevel::kInfo) {
        line = fmt::format("varved: {}\n", message);
    } else {
        line = fmt::format("varved: {}: {}\n", LevelName(level), message);
    }
    if (::write(STDERR_FILENO, line.data(), line.size()) < 0) return;  // nowhere left to report to
}

}  // namespace varve
