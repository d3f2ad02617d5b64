#include "cow/store/rocks_log.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <isa-l/crc.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>

#include "cow/store/files.h"

namespace varve::cow {
namespace {

// A log is a row of blocks; a record is cut into fragments so that none crosses a block's end.
constexpr uint64_t kLogBlock = 32768;
constexpr uint64_t kSector = 512;      // what a device writes as a whole
constexpr uint64_t kHeader = 7;        // crc (4), length (2), type (1), little-endian
constexpr uint64_t kBatchHeader = 12;  // of a record: sequence (8), count of rows (4)

enum Type : uint8_t { kZero = 0, kFull = 1, kFirst = 2, kMiddle = 3, kLast = 4 };

struct Fragment {
    uint8_t type = kZero;
    std::string_view payload;
};

template <typename T>
T LoadLittle(const char* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

uint64_t BlockEnd(uint64_t at) {
    return (at / kLogBlock + 1) * kLogBlock;
}

uint64_t SectorEnd(uint64_t at) {
    return (at / kSector + 1) * kSector;
}

/// Whether the checksum of the fragment at `at` is right if its payload has `length` bytes.
bool ChecksumFits(std::string_view log, uint64_t at, uint64_t length) {
    const char* header = log.data() + at;
    auto* covered = reinterpret_cast<unsigned char*>(const_cast<char*>(header + 6));
    const uint32_t crc = ~crc32_iscsi(covered, static_cast<int>(1 + length), ~0U);
    const uint32_t masked = ((crc >> 15) | (crc << 17)) + 0xa282ead8U;
    return masked == LoadLittle<uint32_t>(header);
}

/// The fragment at `at`, if there is a whole one.
std::optional<Fragment> ReadFragment(std::string_view log, uint64_t at) {
    const uint64_t end = std::min<uint64_t>(log.size(), BlockEnd(at));
    if (end - at < kHeader) return std::nullopt;
    const char* header = log.data() + at;
    const auto length = LoadLittle<uint16_t>(header + 4);
    const auto type = static_cast<uint8_t>(header[6]);
    if (type < kFull || type > kLast || length > end - at - kHeader) return std::nullopt;
    if (!ChecksumFits(log, at, length)) return std::nullopt;
    return Fragment{type, log.substr(at + kHeader, length)};
}

/// Whether a record that is not older than `next` begins anywhere at or after `at`.
bool LaterRecordBegins(std::string_view log, uint64_t at, uint64_t next) {
    for (; at + kHeader <= log.size(); ++at) {
        const auto type = static_cast<uint8_t>(log[at + 6]);
        if (type != kFull && type != kFirst) continue;
        const std::optional<Fragment> fragment = ReadFragment(log, at);
        if (!fragment) continue;
        // The file may have been given blocks of a deleted log: those records are older.
        if (fragment->payload.size() < sizeof(uint64_t)) return true;
        if (LoadLittle<uint64_t>(fragment->payload.data()) >= next) return true;
    }
    return false;
}

bool AllZero(std::string_view bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](char c) { return c == 0; });
}

/// Whether the fragment at `at`, which is not whole, would be if its payload ended elsewhere: where
/// all that follows in the block is zeros. Its length has changed, then.
bool OnlyItsLengthIsWrong(std::string_view log, uint64_t at) {
    const uint64_t payload = at + kHeader;
    const uint64_t limit = std::min<uint64_t>(log.size(), BlockEnd(at));
    const uint64_t used = log.substr(0, limit).find_last_not_of('\0') + 1;
    // Zeros may be its own; more than a sector of them is not worth the search.
    const uint64_t first = std::max(used, payload);
    for (uint64_t end = first; end <= std::min(limit, first + kSector); ++end) {
        if (ChecksumFits(log, at, end - payload)) return true;
    }
    return false;
}

/// Whether a part of the fragment at `at`, which is not whole, was never written: the file ends
/// before it does, or one of its sectors reads as zeros, from where a write may have begun.
bool LacksPart(std::string_view log, uint64_t at) {
    if (log.size() - at < kHeader) return true;
    const uint64_t payload = at + kHeader;
    const uint64_t end = payload + LoadLittle<uint16_t>(log.data() + at + 4);
    const auto type = static_cast<uint8_t>(log[at + 6]);
    const bool plausible = type >= kFull && type <= kLast && end <= BlockEnd(at);
    if (plausible && OnlyItsLengthIsWrong(log, at)) return false;
    if (plausible && end > log.size()) return true;
    // A header that makes no sense has changed, unless a sector of its own is missing.
    const uint64_t limit = plausible ? end : std::min<uint64_t>(log.size(), SectorEnd(payload - 1));
    const auto missing = [&](uint64_t from) {
        return AllZero(log.substr(from, std::min(limit, SectorEnd(from)) - from));
    };
    for (uint64_t from = at; from < limit; from = SectorEnd(from)) {
        if (missing(from)) return true;
    }
    return plausible && payload < limit && missing(payload);
}

/// Follows whole records from the start on; returns where the first that is not whole begins, and
/// in `broken` the first fragment that is not as it should be.
uint64_t FollowRecords(std::string_view log, LogRecords records, LogScan& scan, uint64_t& broken) {
    uint64_t& at = broken = 0;
    uint64_t record_begin = 0;
    std::string head;  // first bytes of the record being put together
    bool inside = false;
    while (at < log.size()) {
        if (BlockEnd(at) - at < kHeader) {  // too short for a header: filled with zeros
            at = std::min<uint64_t>(BlockEnd(at), log.size());
            continue;
        }
        const std::optional<Fragment> fragment = ReadFragment(log, at);
        const bool begins = fragment && (fragment->type == kFull || fragment->type == kFirst);
        if (!fragment || begins == inside) return inside ? record_begin : at;
        if (begins) {
            record_begin = at;
            head.clear();
        }
        if (head.size() < kBatchHeader) {
            head += fragment->payload.substr(0, kBatchHeader - head.size());
        }
        at += kHeader + fragment->payload.size();
        inside = fragment->type == kFirst || fragment->type == kMiddle;
        if (inside || records == LogRecords::kFileChanges) continue;
        if (head.size() < kBatchHeader) return broken = record_begin;
        const auto sequence = LoadLittle<uint64_t>(head.data());
        if (scan.first == 0) scan.first = sequence;
        scan.next = sequence + LoadLittle<uint32_t>(head.data() + sizeof(uint64_t));
    }
    return inside ? record_begin : at;
}

/// Paths of the log files by their number, which only grows.
std::map<uint64_t, std::string> ListLogs(const std::string& directory) {
    std::map<uint64_t, std::string> logs;
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
        const std::string stem = entry.path().stem().string();
        const bool number = !stem.empty() && stem.size() < 19 &&
                            stem.find_first_not_of("0123456789") == std::string::npos;
        if (number && entry.path().extension() == ".log") {
            logs.emplace(std::stoull(stem), entry.path().string());
        }
    }
    return logs;
}

Result<std::string> ReadFile(const std::string& path) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(path, error)) {
        return MakeError(ErrorKind::kNotFound, fmt::format("{} is no file", path));
    }
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    std::string content;
    if (file) {
        content.resize(static_cast<size_t>(file.tellg()));
        file.seekg(0);
        file.read(content.data(), static_cast<std::streamsize>(content.size()));
    }
    if (!file) return SystemError(errno, fmt::format("cannot read {}", path));
    return content;
}

}  // namespace

LogScan ScanLog(std::string_view content, LogRecords records) {
    LogScan scan;
    uint64_t broken = 0;
    scan.offset = FollowRecords(content, records, scan, broken);
    if (AllZero(content.substr(scan.offset))) return scan;
    // Skip the broken record's own beginning: only a later one tells.
    const bool later = LaterRecordBegins(content, scan.offset + 1, scan.next);
    const bool torn = !later && LacksPart(content, broken);
    scan.end = torn ? LogScan::End::kTorn : LogScan::End::kDamaged;
    return scan;
}

Result<bool> LogsAreTorn(const std::string& directory) {
    bool torn = false;
    uint64_t next = 0;  // set after a torn log: where the following one must go on
    for (const auto& [number, path] : ListLogs(directory)) {
        const Result<std::string> content = ReadFile(path);
        if (!content.ok()) return content.error();
        const LogScan scan = ScanLog(content.value());
        const bool gap = next != 0 && scan.first != 0 && scan.first != next;
        if (scan.end == LogScan::End::kDamaged || gap) {
            return MakeError(ErrorKind::kDamaged,
                             fmt::format("{} is damaged at byte {}: commits that were answered are "
                                         "gone; restore the pool from a backup",
                                         path, gap ? 0 : scan.offset));
        }
        // A log torn by an earlier crash may still lie there: what came after it follows on.
        // Between others there may be gaps: a crash may bring back any of those that were deleted.
        const bool this_torn = scan.end == LogScan::End::kTorn;
        torn = torn || this_torn;
        next = this_torn ? scan.next : 0;
    }
    return torn;
}

Status CutTornFileList(const std::string& directory) {
    Result<std::string> current = ReadFile(directory + "/CURRENT");
    if (!current.ok()) return Status();
    std::string& name = current.value();
    if (name.ends_with('\n')) name.pop_back();
    // Anything else is for RocksDB to refuse.
    if (!name.starts_with("MANIFEST-") || name.find('/') != std::string::npos) return Status();
    const std::string path = directory + "/" + name;
    const Result<std::string> content = ReadFile(path);
    if (!content.ok()) return Status();
    const LogScan scan = ScanLog(content.value(), LogRecords::kFileChanges);
    if (scan.end == LogScan::End::kDamaged) {
        return MakeError(ErrorKind::kDamaged,
                         fmt::format("{} is damaged at byte {}; restore the pool from a backup",
                                     path, scan.offset));
    }
    if (scan.end == LogScan::End::kWhole) return Status();
    const File file = OpenFile(path, O_WRONLY);
    if (!file.valid() || ::ftruncate(file.fd(), static_cast<off_t>(scan.offset)) != 0) {
        return SystemError(errno, fmt::format("cannot cut {}", path));
    }
    return SyncFile(file, path);
}

}  // namespace varve::cow
