#include "cow/format/frame.h"

#include <isa-l/crc.h>

#include "base/check.h"
#include "base/endian.h"
#include "cow/format/codec.h"

namespace varve::cow {
namespace {

/// Numbers are big-endian.
struct FrameLayout {
    uint8_t sum[4];  // CRC32C of all that follows
    uint8_t bytes[4];
    uint8_t tag[8];
    uint8_t first[8];
    uint8_t durable[8];
    uint8_t oldest[8];
    uint8_t lane[4];
    uint8_t count[4];
};
static_assert(sizeof(FrameLayout) == kFrameHeaderBytes && alignof(FrameLayout) == 1);

/// The first byte of an entry. Others are for later versions.
enum Kind : char {
    kOwner = 1,  // of the entries that follow, in this frame
    kMap = 2,
    kUnmap = 3,
    kVoid = 4,
};

constexpr size_t kSumBytes = sizeof(uint32_t);

uint32_t SumOf(std::string_view frame) {
    const std::string_view rest = frame.substr(sizeof(FrameLayout::sum));
    auto* data = reinterpret_cast<unsigned char*>(const_cast<char*>(rest.data()));
    return ~crc32_iscsi(data, static_cast<int>(rest.size()), ~0U);
}

/// The entry's own bytes, after its kind.
bool DecodeEntry(Decoder& in, uint8_t kind, FrameEntry* entry) {
    entry->void_first = entry->void_count = 0;
    if (kind == kVoid) {
        entry->change = MapChange();
        entry->sums = {};
        entry->void_first = in.Varint();
        entry->void_count = in.Byte();
        const bool before = entry->void_count <= entry->number &&
                            entry->void_first <= entry->number - entry->void_count;
        return in.ok() && entry->void_count > 0 && before;
    }
    entry->change.chunk.value = in.Varint();
    const uint64_t from = in.Byte(), blocks = in.Byte();
    entry->change.first = from;
    entry->change.count = blocks;
    const uint64_t place = kind == kMap ? in.Varint() : 0;
    if (kind == kMap && !ArePlaces(place, blocks)) return false;
    entry->change.place = place;
    entry->sums = in.Take(kind == kMap ? blocks * kSumBytes : 0);
    return in.ok() && IsSound(entry->change);
}

}  // namespace

uint32_t FrameEntry::sum(uint64_t block) const {
    return LoadBig<uint32_t>(sums.data() + block * kSumBytes);
}

/// Room for an entry, behind its owner.
char* FrameWriter::Begin(const MapOwner& owner) {
    const size_t before = bytes_.size();
    bytes_.resize(before + kEntryBytesMax);
    char* out = bytes_.data() + before;
    if (count_ == 0 || !(owner == owner_)) {
        *out++ = kOwner;
        out = PutVarint(out, owner.disk.value);
        out = PutVarint(out, owner.branch.value);
        out = PutVarint(out, owner.generation.value);
        owner_ = owner;
    }
    return out;
}

void FrameWriter::End(const char* out) {
    bytes_.resize(static_cast<size_t>(out - bytes_.data()));
    ++count_;
}

void FrameWriter::Add(const MapOwner& owner, const MapChange& change,
                      std::span<const uint32_t> sums) {
    VARVE_CHECK(sums.size() == (change.place == 0 ? 0 : change.count));
    char* out = Begin(owner);
    *out++ = change.place == 0 ? kUnmap : kMap;
    out = PutVarint(out, change.chunk.value);
    *out++ = static_cast<char>(change.first);
    *out++ = static_cast<char>(change.count);
    if (change.place != 0) out = PutVarint(out, change.place);
    for (const uint32_t sum : sums) {
        StoreBig(out, sum);
        out += kSumBytes;
    }
    End(out);
}

void FrameWriter::AddVoid(const MapOwner& owner, uint64_t first, uint64_t count) {
    char* out = Begin(owner);
    *out++ = kVoid;
    out = PutVarint(out, first);
    *out++ = static_cast<char>(count);
    End(out);
}

std::string_view FrameWriter::Finish(FrameHeader header, size_t unit) {
    bytes_.resize((bytes_.size() + unit - 1) / unit * unit);
    auto* layout = reinterpret_cast<FrameLayout*>(bytes_.data());
    StoreBig(layout->bytes, static_cast<uint32_t>(bytes_.size()));
    StoreBig(layout->tag, header.tag);
    StoreBig(layout->first, header.first);
    StoreBig(layout->durable, header.durable);
    StoreBig(layout->oldest, header.oldest);
    StoreBig(layout->lane, header.lane);
    StoreBig(layout->count, count_);
    StoreBig(layout->sum, SumOf(bytes_));
    return bytes_;
}

void FrameWriter::Clear() {
    bytes_.resize(kFrameHeaderBytes);
    count_ = 0;
}

std::optional<FrameHeader> ReadFrame(std::string_view bytes, uint64_t tag) {
    if (bytes.size() < kFrameHeaderBytes) return std::nullopt;
    const auto* layout = reinterpret_cast<const FrameLayout*>(bytes.data());
    FrameHeader header;
    header.bytes = LoadBig<uint32_t>(layout->bytes);
    header.tag = LoadBig<uint64_t>(layout->tag);
    header.first = LoadBig<uint64_t>(layout->first);
    header.durable = LoadBig<uint64_t>(layout->durable);
    header.oldest = LoadBig<uint64_t>(layout->oldest);
    header.lane = LoadBig<uint32_t>(layout->lane);
    header.count = LoadBig<uint32_t>(layout->count);
    const bool fits = header.bytes >= kFrameHeaderBytes && header.bytes <= bytes.size();
    if (header.tag != tag || !fits) return std::nullopt;
    if (LoadBig<uint32_t>(layout->sum) != SumOf(bytes.substr(0, header.bytes))) return std::nullopt;
    return header;
}

bool ForEachEntry(std::string_view bytes, const std::function<void(const FrameEntry&)>& each) {
    const auto* layout = reinterpret_cast<const FrameLayout*>(bytes.data());
    const uint64_t first = LoadBig<uint64_t>(layout->first);
    const uint32_t count = LoadBig<uint32_t>(layout->count);
    const uint32_t length = LoadBig<uint32_t>(layout->bytes);
    Decoder in(bytes.substr(kFrameHeaderBytes, length - kFrameHeaderBytes));
    FrameEntry entry;
    bool owned = false;
    for (uint32_t entries = 0; entries < count;) {
        const uint8_t kind = in.Byte();
        if (!in.ok()) return false;
        if (kind == kOwner) {
            entry.owner.disk.value = in.Varint();
            entry.owner.branch.value = in.Varint();
            entry.owner.generation.value = in.Varint();
            owned = true;
            continue;
        }
        if ((kind != kMap && kind != kUnmap && kind != kVoid) || !owned) return false;
        entry.number = first + entries++;
        if (!DecodeEntry(in, kind, &entry)) return false;
        each(entry);
    }
    return in.ok() && in.rest().find_first_not_of('\0') == std::string_view::npos;
}

}  // namespace varve::cow
