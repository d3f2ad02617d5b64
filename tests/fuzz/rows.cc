// Fuzz target: every decoder of stored values - map rows, notes, records, checksums, the
// superblock. What is accepted keeps the rules of docs/format.md and survives being encoded again.
// Input: which decoder, then (for map rows) a generation of 2 bytes, then the value.
#include <cstring>

#include "base/endian.h"
#include "cow/format/format.h"
#include "cow/format/runs.h"
#include "cow/format/superblock.h"
#include "cow/volume/checksums.h"
#include "tests/fuzz/fuzz.h"

namespace varve::cow {
namespace {

void VerifyRow(std::string_view value, Generation generation) {
    const std::optional<Runs> runs = DecodeRuns(value, generation);
    if (!runs) return;
    uint64_t at = 0;
    for (const Run& run : *runs) {
        VARVE_CHECK(run.count > 0 && run.first >= at && run.end() <= kChunkBlocks);
        VARVE_CHECK(run.place > 0 && run.place + run.count <= uint64_t{1} << 48);
        VARVE_CHECK(run.birth.value > 0 && run.birth <= generation);
        at = run.end();
    }
    // Encoding is the shortest form; a value may hold longer varints than it needs.
    const std::string again = EncodeRuns(*runs, generation);
    VARVE_CHECK(again.size() <= value.size());
    VARVE_CHECK(DecodeRuns(again, generation) == runs);
    VARVE_CHECK(again.size() < value.size() || again == value);
}

/// What is mapped after a few changes, against an array of blocks.
void VerifyChanges(fuzz::Input input) {
    Runs runs;
    uint64_t places[kChunkBlocks] = {};
    while (!input.empty()) {
        const uint8_t action = input.Byte();
        const uint32_t first = input.Byte() % kChunkBlocks;
        const uint32_t count = 1 + input.Byte() % (kChunkBlocks - first);
        Run run;
        run.first = first;
        run.count = count;
        run.place = 1 + input.Byte();
        run.birth = Generation{1U + action % 4};
        if (action & 0x80) {
            Unmap(runs, first, first + count, nullptr);
        } else {
            Map(runs, run, nullptr);
        }
        for (uint32_t i = 0; i < count; ++i) {
            places[first + i] = action & 0x80 ? 0 : run.place + i;
        }
    }
    for (uint32_t block = 0; block < kChunkBlocks; ++block) {
        const Piece piece = PieceAt(runs, block, block + 1);
        VARVE_CHECK(piece.mapped ? piece.place == places[block] : places[block] == 0);
    }
    VARVE_CHECK(DecodeRuns(EncodeRuns(runs, Generation{9}), Generation{9}) == runs);
}

void VerifyNote(std::string_view value) {
    const std::optional<NoteRecord> note = DecodeNote(value);
    if (!note) return;
    for (const Run& run : *note) {
        VARVE_CHECK(run.count > 0 && run.end() <= kChunkBlocks);
        VARVE_CHECK(run.place > 0 && run.place + run.count <= uint64_t{1} << 48);
    }
    const std::string again = EncodeNote(*note);
    VARVE_CHECK(again.size() < value.size() || again == value);
    VARVE_CHECK(DecodeNote(again) == note);
}

void VerifySums(std::string_view value) {
    const std::optional<SumsRow> row = SumsRow::Decode(value);
    if (!row) return;
    const std::string again = SumsRow(row->Unpack()).Encode();
    VARVE_CHECK(again.size() <= value.size());
    const std::optional<SumsRow> same = SumsRow::Decode(again);
    VARVE_CHECK(same && same->Unpack() == row->Unpack());
}

/// A record that was decoded is encoded to a value that decodes to the same bytes again.
template <typename Record>
void VerifyRecord(std::string_view value) {
    Record record;
    if (!Decode(value, &record)) return;
    const std::string encoded = Encode(record);
    VARVE_CHECK(encoded.size() <= value.size());
    Record again;
    VARVE_CHECK(Decode(encoded, &again));
    VARVE_CHECK(Encode(again) == encoded);
    VARVE_CHECK(!Decode(encoded + "x", &again));
    // What is cut off may be a whole record only where a field at the end may be left out.
    const std::string cut = encoded.substr(0, encoded.size() - 1);
    VARVE_CHECK(!Decode(cut, &again) || Encode(again) == cut);
}

void VerifyPool(std::string_view value) {
    PoolRecord record;
    uint8_t version = 0;
    if (!Decode(value, &record, &version)) return;
    VARVE_CHECK(version == static_cast<uint8_t>(value[0]));
    PoolRecord again;
    VARVE_CHECK(Decode(Encode(record), &again, &version) && version == kFormatVersion);
    VARVE_CHECK(again.sequence == record.sequence && again.region_count == record.region_count);
    VARVE_CHECK(again.used_blocks == record.used_blocks);
}

/// Bytes as they are, and bytes laid over a sound superblock.
void VerifySuperblock(fuzz::Input input) {
    const Result<Superblock> any = DecodeSuperblock(input.rest(), "data");
    VARVE_CHECK(any.ok() || any.error().kind != ErrorKind::kFailed);

    Superblock superblock;
    superblock.created_ms = static_cast<int64_t>(input.Number(8));
    for (uint8_t& byte : superblock.uuid) byte = input.Byte();
    superblock.epoch.number = static_cast<uint64_t>(superblock.created_ms) * 3;
    superblock.epoch.tag = ~superblock.epoch.number;
    std::string bytes = EncodeSuperblock(superblock);
    const Result<Superblock> sound = DecodeSuperblock(bytes, "data");
    VARVE_CHECK(sound.ok() && sound.value().uuid == superblock.uuid);
    VARVE_CHECK(sound.value().created_ms == superblock.created_ms);
    VARVE_CHECK(sound.value().epoch == superblock.epoch);
    const size_t at = input.Number(2) % kSuperblockSector;
    const uint8_t change = input.Byte();
    bytes[at] = static_cast<char>(bytes[at] ^ change);
    VARVE_CHECK(DecodeSuperblock(bytes, "data").ok() == (change == 0));
}

void VerifyKey(std::string_view key) {
    const unsigned numbers = KeyNumbers(key);
    for (unsigned i = 0; i < 4; ++i) {
        const uint64_t number = KeyNumber(key, i);
        VARVE_CHECK(i < numbers || numbers == 99 || number == ~uint64_t{0});
    }
    const std::string end = PrefixEnd(std::string(key));
    VARVE_CHECK(end.empty() || end > key);
    VARVE_CHECK(end.empty() || end > std::string(key) + "\xff\xff");
}

}  // namespace
}  // namespace varve::cow

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace varve::cow;  // NOLINT: a function of C's
    using varve::Generation;
    varve::fuzz::Input input(data, size);
    switch (input.Byte() % 11) {
        case 0: {
            const Generation generation{input.Number(2)};
            VerifyRow(input.rest(), generation);
            break;
        }
        case 1:
            VerifyChanges(input);
            break;
        case 2:
            VerifyNote(input.rest());
            break;
        case 3:
            VerifyPool(input.rest());
            break;
        case 4:
            VerifyRecord<DiskRecord>(input.rest());
            break;
        case 5:
            VerifyRecord<SnapshotRecord>(input.rest());
            break;
        case 6:
            VerifyRecord<BranchRecord>(input.rest());
            break;
        case 7:
            VerifyRecord<JobRecord>(input.rest());
            break;
        case 8:
            VerifySuperblock(input);
            break;
        case 9:
            VerifyKey(input.rest());
            break;
        default:
            VerifySums(input.rest());
    }
    return 0;
}
