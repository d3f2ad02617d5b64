// Fuzz target: the reader of the ring. Any bytes are survived; what was written is read again, and
// a ring that a crash cut short is never called damaged.
// Input: which, a place to cut or break, a change; then segments, or the entries of frames.
#include <cstring>

#include "cow/format/frame.h"
#include "cow/format/ring_record.h"
#include "cow/journal/ring_reader.h"
#include "tests/fuzz/fuzz.h"

namespace varve::cow {
namespace {

constexpr uint64_t kTag = 0x0102030405060708;
constexpr size_t kSegmentBytes = 8192;

struct Written {
    std::vector<std::string> segments{""};
    std::vector<MapChange> changes;
};

/// One lane's frames; each says that what came before the last one is durable if `durable`.
Written Write(fuzz::Input input, bool durable) {
    Written written;
    uint64_t before_last = 0;
    while (!input.empty()) {
        FrameWriter writer;
        FrameHeader header;
        header.tag = kTag;
        header.first = written.changes.size();
        header.durable = durable ? before_last : 0;
        before_last = header.first;
        for (unsigned entries = input.Byte() % 8; entries > 0; --entries) {
            const ChunkIndex chunk{input.Number(2)};
            const uint64_t first = input.Byte() % kChunkBlocks;
            const uint64_t count = 1 + input.Byte() % (kChunkBlocks - first);
            const MapChange change = MapChangeOf(chunk, first, count, input.Number(2));
            const std::vector<uint32_t> sums(change.place == 0 ? 0 : change.count, 7);
            writer.Add({DiskId{1}, BranchId{2}, Generation{1U + entries % 2}}, change, sums);
            written.changes.push_back(change);
        }
        const std::string_view bytes = writer.Finish(header);
        if (written.segments.back().size() + bytes.size() > kSegmentBytes) {
            written.segments.emplace_back();
        }
        written.segments.back() += bytes;
    }
    return written;
}

Status Read(const std::vector<std::string>& segments, std::vector<MapChange>* changes,
            uint64_t tag = kTag) {
    RingReader reader(tag);
    for (const std::string& segment : segments) reader.AddSegment(segment);
    return reader.ForEach([changes](const FrameEntry& entry, bool) {
        VARVE_CHECK(IsSound(entry.change));
        VARVE_CHECK(entry.sums.size() == (entry.change.place == 0 ? 0 : 4 * entry.change.count));
        changes->push_back(entry.change);
    });
}

void VerifyAny(fuzz::Input input) {
    std::vector<std::string> segments;
    const uint64_t tag = input.Number(8);
    while (!input.empty()) segments.emplace_back(input.Bytes(1 + input.Number(2)));
    std::vector<MapChange> changes;
    const Status s = Read(segments, &changes, tag);
    VARVE_CHECK(s.ok() || s.error().kind == ErrorKind::kDamaged);
    RingRecord ring, again;
    if (!segments.empty() && Decode(segments[0], &ring)) {
        VARVE_CHECK(Decode(Encode(ring), &again) && again == ring);
    }
}

/// The last segment ends early, or has changed from some byte on: whole frames before that count.
void VerifyCut(const fuzz::Input& input, size_t at, uint8_t change) {
    Written written = Write(input, true);
    std::vector<MapChange> changes;
    VARVE_CHECK(Read(written.segments, &changes).ok());
    VARVE_CHECK(changes == written.changes);
    std::string& last = written.segments.back();
    if (last.empty()) return;
    at %= last.size();
    if (change == 0) last.resize(at);
    if (change != 0) last[at] = static_cast<char>(last[at] ^ change);
    changes.clear();
    const Status s = Read(written.segments, &changes);
    VARVE_CHECK(changes.size() <= written.changes.size());
    for (size_t i = 0; i < changes.size(); ++i) VARVE_CHECK(changes[i] == written.changes[i]);
    VARVE_CHECK(s.ok() || s.error().kind == ErrorKind::kDamaged);
    // Cut off, no frame is left that knows better.
    VARVE_CHECK(change != 0 || s.ok());
}

}  // namespace
}  // namespace varve::cow

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace varve::cow;  // NOLINT: a function of C's
    varve::fuzz::Input input(data, size);
    const uint8_t which = input.Byte() % 2;
    if (which == 0) {
        VerifyAny(input);
    } else {
        const size_t at = input.Number(2);
        const uint8_t change = input.Byte();
        VerifyCut(input, at, change);
    }
    return 0;
}
