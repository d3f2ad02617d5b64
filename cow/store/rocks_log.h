// Tells a log that a crash tore from one that is damaged: RocksDB's write-ahead logs, and its list
// of files (MANIFEST), which has the same format. Not a reader of rows: RocksDB replays the log, in
// a mode that follows from this verdict.
#pragma once

#include <string>
#include <string_view>

#include "base/result.h"

namespace varve::cow {

/// What is wrong with one log file, if anything.
struct LogScan {
    enum class End {
        kWhole,    // ends with a complete record, or with zeros after it
        kTorn,     // a part of its last record is missing: a crash before its sync was complete
        kDamaged,  // a record that had been written in full has changed
    };
    End end = End::kWhole;
    uint64_t offset = 0;  // bytes, of the first record that is not whole
    uint64_t first = 0;   // sequence number of the first row; 0: none
    uint64_t next = 0;    // the one after the last whole record's; 0: none
};

enum class LogRecords { kCommits, kFileChanges };

/// Scans the content of a RocksDB log file (rocksdb wiki, "Write Ahead Log File Format").
/// Relies on records coming one at a time, each synced before the next (rocks_files.h), and on file
/// systems that show zeros where something was not written, or a shorter file: then a last record
/// that is broken although no sector of it is missing was whole once.
LogScan ScanLog(std::string_view content, LogRecords records = LogRecords::kCommits);

/// Whether the logs in `directory` end in a record that a crash tore, whose commit was never
/// answered. kDamaged if a record is broken that was answered; kIo if a log cannot be
/// read. Blocks; a directory that does not exist has no logs.
Result<bool> LogsAreTorn(const std::string& directory);

/// Cuts off what a crash left of the last record of the list of files: nothing relies on it yet,
/// but RocksDB refuses to read it if one of its sectors is missing. Durable. Blocks. kDamaged if a
/// record has changed; kIo. Leaves to RocksDB to say what else is wrong with CURRENT or the list.
Status CutTornFileList(const std::string& directory);

}  // namespace varve::cow
