// Fuzz target: the verdict on a write-ahead log. Any bytes are survived; a sound log that a crash
// cut is never called damaged, and one that is broken before its last record always is.
// Input: which, a place to cut or break, a change; then the log, or the lengths of its records.
#include <isa-l/crc.h>

#include <cstring>

#include "cow/store/rocks_log.h"
#include "tests/fuzz/fuzz.h"

namespace varve::cow {
namespace {

constexpr size_t kLogBlock = 32768;
constexpr size_t kHeader = 7;
constexpr size_t kSector = 512;

struct Log {
    std::string bytes;
    std::vector<size_t> begins;  // of records
    uint64_t next = 0;           // sequence number
};

template <typename T>
void AppendLittle(std::string& out, T value) {
    out.append(reinterpret_cast<const char*>(&value), sizeof value);
}

void AppendFragment(std::string& log, uint8_t type, std::string_view payload) {
    std::string covered(1, static_cast<char>(type));
    covered += payload;
    auto* data = reinterpret_cast<unsigned char*>(covered.data());
    const uint32_t crc = ~crc32_iscsi(data, static_cast<int>(covered.size()), ~0U);
    AppendLittle<uint32_t>(log, ((crc >> 15) | (crc << 17)) + 0xa282ead8U);
    AppendLittle(log, static_cast<uint16_t>(payload.size()));
    log += covered;
}

/// As RocksDB writes it: no fragment crosses a block's end.
void AppendRecord(Log& log, std::string_view record) {
    bool first = true;
    do {
        const size_t left = kLogBlock - log.bytes.size() % kLogBlock;
        if (left < kHeader) {
            log.bytes.append(left, '\0');
            continue;
        }
        if (first) log.begins.push_back(log.bytes.size());
        const std::string_view part = record.substr(0, left - kHeader);
        record.remove_prefix(part.size());
        const bool last = record.empty();
        const int type = first ? (last ? 1 : 2) : (last ? 4 : 3);
        AppendFragment(log.bytes, static_cast<uint8_t>(type), part);
        first = false;
    } while (first || !record.empty());
}

Log MakeLog(fuzz::Input input) {
    Log log;
    log.next = 1 + input.Byte();
    while (!input.empty() && log.bytes.size() < 6 * kLogBlock) {
        const auto rows = static_cast<uint32_t>(1 + input.Byte() % 16);
        std::string record;
        AppendLittle(record, log.next);
        AppendLittle(record, rows);
        record.append(input.Number(2), static_cast<char>(rows));
        AppendRecord(log, record);
        log.next += rows;
    }
    return log;
}

void VerifyAny(std::string_view bytes) {
    const LogScan scan = ScanLog(bytes);
    VARVE_CHECK(scan.offset <= bytes.size());
    VARVE_CHECK((scan.first == 0) <= (scan.next <= UINT32_MAX));
    // What was followed is a whole log of its own.
    const LogScan before = ScanLog(bytes.substr(0, scan.offset));
    VARVE_CHECK(before.end == LogScan::End::kWhole && before.next == scan.next);
}

void VerifyCut(const Log& log, size_t at) {
    const LogScan whole = ScanLog(log.bytes);
    VARVE_CHECK(whole.end == LogScan::End::kWhole && whole.offset == log.bytes.size());
    VARVE_CHECK(log.begins.empty() || whole.next == log.next);
    // A crash leaves a beginning, or lacks sectors.
    at %= log.bytes.size() + 1;
    VARVE_CHECK(ScanLog(log.bytes.substr(0, at)).end != LogScan::End::kDamaged);
    for (const size_t ahead : {size_t{100}, 2 * kLogBlock}) {
        std::string zeros = log.bytes.substr(0, at / kSector * kSector);
        zeros.resize(std::max(at, zeros.size()) + ahead, '\0');
        VARVE_CHECK(ScanLog(zeros).end != LogScan::End::kDamaged);
    }
}

void VerifyBroken(Log log, size_t at, uint8_t change) {
    if (log.begins.empty() || change == 0) return;
    at %= log.bytes.size();
    // The zeros at a block's end are not read.
    size_t begin = 0;
    for (const size_t record : log.begins) {
        if (record <= at) begin = record;
    }
    const size_t block_left = kLogBlock - at % kLogBlock;
    if (block_left < kHeader) return;
    log.bytes[at] = static_cast<char>(log.bytes[at] ^ change);
    // In the last record, a sequence number's zeros may look like a missing sector.
    const bool last = begin == log.begins.back();
    for (const size_t ahead : {size_t{0}, 2 * kLogBlock}) {
        const LogScan scan = ScanLog(log.bytes.append(ahead, '\0'));
        const bool torn = scan.end == LogScan::End::kTorn;
        VARVE_CHECK(scan.end == LogScan::End::kDamaged || (last && torn));
        VARVE_CHECK(scan.offset == begin);
    }
}

}  // namespace
}  // namespace varve::cow

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace varve::cow;  // NOLINT: a function of C's
    varve::fuzz::Input input(data, size);
    const uint8_t which = input.Byte() % 3;
    const size_t at = input.Number(3);
    const uint8_t change = input.Byte();
    if (which == 0) VerifyAny(input.rest());
    if (which == 1) VerifyCut(MakeLog(input), at);
    if (which == 2) VerifyBroken(MakeLog(input), at, change);
    return 0;
}
