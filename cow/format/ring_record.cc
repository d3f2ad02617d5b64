#include "cow/format/ring_record.h"

#include "base/endian.h"
#include "cow/format/codec.h"
#include "cow/format/format.h"

namespace varve::cow {
namespace {

uint64_t TakeTag(Decoder& in) {
    const std::string_view bytes = in.Take(sizeof(uint64_t));
    return in.ok() ? LoadBig<uint64_t>(bytes.data()) : 0;
}

}  // namespace

std::string RingKey() {
    return "G";
}

std::string Encode(const RingRecord& record) {
    std::string out(1, static_cast<char>(kFormatVersion));
    AppendBig(out, record.tag);
    AppendVarint(out, record.segment_blocks);
    for (const Extent& extent : record.extents) {
        AppendVarint(out, extent.place);
        AppendVarint(out, extent.count);
    }
    return out;
}

bool Decode(std::string_view value, RingRecord* record) {
    Decoder in(value);
    const bool version = in.Byte() == kFormatVersion;
    record->tag = TakeTag(in);
    record->segment_blocks = in.Varint();
    record->extents.clear();
    bool sound = version && record->segment_blocks > 0 && record->segment_blocks <= kRegionBlocks;
    while (sound && in.ok() && !in.rest().empty()) {
        Extent extent;
        extent.place = in.Varint();
        extent.count = in.Varint();
        sound = extent.count > 0 && ArePlaces(extent.place, extent.count);
        record->extents.push_back(extent);
    }
    return sound && in.Finished();
}

}  // namespace varve::cow
