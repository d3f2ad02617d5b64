#include "cow/format/format.h"

#include "base/endian.h"
#include "cow/format/codec.h"

namespace varve::cow {
namespace {

/// A run's 48 bits name no block beyond.
constexpr uint64_t kRegionsMax = (uint64_t{1} << 48) / kRegionBlocks;

// Flags of a disk.
constexpr uint8_t kTrimming = 1;
constexpr uint8_t kOffline = 2;

template <typename... Numbers>
std::string Key(char letter, Numbers... numbers) {
    std::string key;
    key.reserve(1 + sizeof...(numbers) * 8);
    key.push_back(letter);
    (AppendBig<uint64_t>(key, numbers), ...);
    return key;
}

std::string Start() {
    return std::string(1, static_cast<char>(kFormatVersion));
}

}  // namespace

std::string PoolKey() {
    return Key('P');
}
std::string DiskKey(DiskId disk) {
    return Key('D', disk.value);
}
std::string SnapshotKey(SnapshotId snapshot) {
    return Key('S', snapshot.value);
}
std::string BranchKey(BranchId branch) {
    return Key('B', branch.value);
}
std::string MapKey(BranchId branch, ChunkIndex chunk, Generation generation) {
    return Key('M', branch.value, chunk.value, ~generation.value);
}
std::string TouchedKey(BranchId branch, Generation generation, ChunkIndex chunk) {
    return Key('T', branch.value, generation.value, chunk.value);
}
std::string RegionKey(uint64_t region) {
    return Key('R', region);
}
std::string JobKey(uint64_t number) {
    return Key('J', number);
}
std::string NoteKey(BranchId branch, ChunkIndex chunk, Generation generation, uint64_t number) {
    return Key('W', branch.value, chunk.value, generation.value, number);
}
std::string JournalKey(BranchId branch, Generation generation, uint64_t number) {
    return Key('L', branch.value, generation.value, number);
}
std::string SumsKey(uint64_t piece) {
    return Key('C', piece);
}
std::string SummedKey(SnapshotId snapshot) {
    return Key('K', snapshot.value);
}
std::string BookmarkKey(SnapshotId snapshot) {
    return Key('O', snapshot.value);
}

std::string PrefixEnd(std::string prefix) {
    while (!prefix.empty()) {
        const auto last = static_cast<uint8_t>(prefix.back());
        if (last != 0xff) {
            prefix.back() = static_cast<char>(last + 1);
            return prefix;
        }
        prefix.pop_back();
    }
    return prefix;
}

std::optional<BranchId> BranchOfRow(std::string_view key) {
    if (key.empty() || (key[0] != 'M' && key[0] != 'W')) return std::nullopt;
    return BranchId{KeyNumber(key, 0)};
}

uint64_t KeyNumber(std::string_view key, unsigned index) {
    if (key.size() < 1 + 8 * (index + 1)) return ~uint64_t{0};
    return LoadBig<uint64_t>(key.data() + 1 + 8 * index);
}

unsigned KeyNumbers(std::string_view key) {
    if (key.empty() || (key.size() - 1) % 8 != 0) return 99;
    return static_cast<unsigned>((key.size() - 1) / 8);
}

std::string Encode(const PoolRecord& record) {
    std::string out = Start();
    AppendVarint(out, record.sequence);
    AppendVarint(out, record.region_count);
    AppendVarint(out, record.used_blocks);
    return out;
}

bool Decode(std::string_view value, PoolRecord* record, uint8_t* version) {
    Decoder in(value);
    *version = in.Byte();
    record->sequence = in.Varint();
    record->region_count = in.Varint();
    record->used_blocks = in.Varint();
    return in.Finished() && record->region_count <= kRegionsMax;
}

std::string Encode(const DiskRecord& record) {
    std::string out = Start();
    AppendString(out, record.name);
    AppendVarint(out, record.size);
    AppendVarint(out, record.branch.value);
    AppendVarint(out, record.generation.value);
    AppendVarint(out, record.mapped_blocks);
    AppendVarint(out, static_cast<uint64_t>(record.created_ms));
    out.push_back(
        static_cast<char>((record.trimming ? kTrimming : 0) | (record.offline ? kOffline : 0)));
    return out;
}

bool Decode(std::string_view value, DiskRecord* record) {
    Decoder in(value);
    const uint8_t version = in.Byte();
    record->name = in.String();
    record->size = in.Varint();
    record->branch.value = in.Varint();
    record->generation.value = in.Varint();
    record->mapped_blocks = in.Varint();
    record->created_ms = static_cast<int64_t>(in.Varint());
    const uint8_t flags = in.Byte();
    record->trimming = (flags & kTrimming) != 0;
    record->offline = (flags & kOffline) != 0;
    return version == kFormatVersion && in.Finished() && (flags & ~(kTrimming | kOffline)) == 0;
}

std::string Encode(const SnapshotRecord& record) {
    std::string out = Start();
    AppendVarint(out, record.disk.value);
    AppendString(out, record.name);
    AppendVarint(out, record.size);
    AppendVarint(out, record.branch.value);
    AppendVarint(out, record.generation.value);
    AppendVarint(out, record.mapped_blocks);
    AppendVarint(out, static_cast<uint64_t>(record.created_ms));
    return out;
}

bool Decode(std::string_view value, SnapshotRecord* record) {
    Decoder in(value);
    const uint8_t version = in.Byte();
    record->disk.value = in.Varint();
    record->name = in.String();
    record->size = in.Varint();
    record->branch.value = in.Varint();
    record->generation.value = in.Varint();
    record->mapped_blocks = in.Varint();
    record->created_ms = static_cast<int64_t>(in.Varint());
    return version == kFormatVersion && in.Finished();
}

std::string Encode(const BranchRecord& record) {
    std::string out = Start();
    AppendVarint(out, record.parent.value);
    AppendVarint(out, record.fork.value);
    if (record.flattening != Flattening::kNone) {
        out.push_back(static_cast<char>(record.flattening));
    }
    return out;
}

bool Decode(std::string_view value, BranchRecord* record) {
    Decoder in(value);
    const uint8_t version = in.Byte();
    record->parent.value = in.Varint();
    record->fork.value = in.Varint();
    record->flattening = Flattening::kNone;
    if (in.ok() && !in.rest().empty()) {
        const uint8_t flattening = in.Byte();
        if (flattening != 1 && flattening != 2) return false;
        record->flattening = Flattening{flattening};
    }
    return version == kFormatVersion && in.Finished();
}

std::string Encode(const JobRecord& record) {
    std::string out = Start();
    AppendVarint(out, record.branch.value);
    AppendVarint(out, record.generation.value);
    return out;
}

bool Decode(std::string_view value, JobRecord* record) {
    Decoder in(value);
    const uint8_t version = in.Byte();
    record->branch.value = in.Varint();
    record->generation.value = in.Varint();
    return version == kFormatVersion && in.Finished();
}

std::string EncodeNote(const NoteRecord& runs) {
    std::string out = Start();
    AppendVarint(out, runs.size());
    for (const Run& run : runs) {
        out.push_back(static_cast<char>(run.first));
        out.push_back(static_cast<char>(run.count));
        AppendVarint(out, run.place);
        AppendVarint(out, run.birth.value);
    }
    return out;
}

std::optional<NoteRecord> DecodeNote(std::string_view value) {
    Decoder in(value);
    if (in.Byte() != kFormatVersion) return std::nullopt;
    const uint64_t count = in.Varint();
    NoteRecord runs;
    for (uint64_t i = 0; i < count && in.ok(); ++i) {
        Run run;
        run.first = in.Byte();
        run.count = in.Byte();
        const uint64_t place = in.Varint();
        run.place = place;
        run.birth.value = in.Varint();
        const bool sound = run.count > 0 && run.end() <= kChunkBlocks;
        if (!sound || !ArePlaces(place, run.count)) return std::nullopt;
        runs.push_back(run);
    }
    if (!in.Finished()) return std::nullopt;
    return runs;
}

}  // namespace varve::cow
