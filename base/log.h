// Log lines on stderr, as text or JSON, one write for each line.
// Not for the data path: a line costs a system call.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"

namespace varve {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kNothing };
enum class LogFormat { kText, kJson };

/// Set once, before threads start.
void SetLog(LogLevel least, LogFormat format);
Result<LogLevel> ParseLogLevel(std::string_view text);    // debug, info, warning, error
Result<LogFormat> ParseLogFormat(std::string_view text);  // text, json

/// Writes `varved: message`, or {"time":..,"level":..,"message":..}. Any thread.
void Log(LogLevel level, std::string_view message);

/// A time as RFC 3339 in UTC with milliseconds. `unix_ms`: milliseconds since 1970.
std::string FormatTime(int64_t unix_ms);

}  // namespace varve
