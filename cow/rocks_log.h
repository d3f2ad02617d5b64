// Tells a write-ahead log that a crash tore from one that is damaged.
// Not a reader of its rows: RocksDB replays the log, in a mode that follows from this verdict.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"

namespace varve::cow {

/// What is wrong with one log file, if anything.
struct LogScan {
    enum class End {
        kWhole,    // ends with a complete record, or with zeros after it
        kTorn,     // its last record is incomplete: a crash before that commit was answered
        kDamaged,  // a record is broken although a later one was begun, so it had been synced
    };
    End end = End::kWhole;
    uint64_t offset = 0;  // bytes, of the broken spot
    uint64_t first = 0;   // sequence number of the first row; 0: none
    uint64_t next = 0;    // the one after the last whole record's; 0: none
};

/// Scans the content of a RocksDB log file (rocksdb wiki, "Write Ahead Log File Format").
/// Relies on commits coming one at a time, each synced before the next.
LogScan ScanLog(std::string_view content);

/// Whether the logs in `directory` end in a record that a crash tore, whose commit was never
/// answered. kDamaged if a record is broken that was answered; kIo if a log cannot be read.
/// Blocks; a directory that does not exist has no logs.
Result<bool> LogsAreTorn(const std::string& directory);

}  // namespace varve::cow
