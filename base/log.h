// Log lines on stderr, as text or JSON, one write for each line.
// Not for the data path: a line costs an allocation and a lock.
//
// Whoever reads stderr may be slow, or never read: with StartLogThread() no other thread waits for
// it. What does not fit into the queue is dropped and counted, and the count is the next line.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/result.h"

namespace varve {

enum class LogLevel { kDebug, kInfo, kWarning, kError, kNothing };
enum class LogFormat { kText, kJson };

/// Most that waits to be written, each line with kLogLineCost.
inline constexpr size_t kLogQueueBytes = 256 << 10;
inline constexpr size_t kLogLineCost = 64;

/// Set once, before threads start.
void SetLog(LogLevel least, LogFormat format);
Result<LogLevel> ParseLogLevel(std::string_view text);    // debug, info, warning, error
Result<LogFormat> ParseLogFormat(std::string_view text);  // text, json

/// From now on a thread of its own writes the lines, until the process ends; before, Log() writes
/// them itself. Once.
void StartLogThread();
/// Waits until all lines so far are written, at most `milliseconds`. Before the process ends.
void FlushLog(int milliseconds);

/// Writes `varved: message`, or {"time":..,"level":..,"message":..}. Any thread.
void Log(LogLevel level, std::string_view message);
/// The same with level info, whatever the least level is: for what programs wait for.
void LogAlways(std::string_view message);

/// A time as RFC 3339 in UTC with milliseconds. `unix_ms`: milliseconds since 1970, or before.
std::string FormatTime(int64_t unix_ms);

}  // namespace varve
