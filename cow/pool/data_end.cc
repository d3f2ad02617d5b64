#include "cow/pool/data_end.h"

#include <fmt/format.h>

#include <algorithm>

#include "cow/format/format.h"
#include "cow/format/ring_record.h"
#include "cow/head/journal.h"
#include "cow/space/allocator.h"

namespace varve::cow {

Result<uint64_t> ProvisionedEnd(MetadataView& view) {
    const Result<std::optional<std::string>> row = view.Get(PoolKey());
    if (!row.ok()) return row.error();
    if (!row.value()) return uint64_t{0};
    PoolRecord record;
    uint8_t version = 0;
    if (!Decode(*row.value(), &record, &version)) return uint64_t{0};
    return record.region_count * kRegionBytes;
}

Result<uint64_t> UsedEnd(MetadataView& view, uint64_t from) {
    uint64_t end = from;
    const std::string lower = RegionKey(from / kRegionBytes);
    const auto regions = view.Range(lower, PrefixEnd(lower.substr(0, 1)));
    for (regions->Seek(lower); regions->valid(); regions->Next()) {
        const uint64_t region = KeyNumber(regions->key(), 0);
        const std::optional<uint64_t> blocks = Allocator::UsedEnd(regions->value());
        if (!blocks) {
            return MakeError(ErrorKind::kDamaged,
                             fmt::format("allocator region {} is damaged", region));
        }
        if (*blocks == 0) continue;
        end = std::max(end, region * kRegionBytes + *blocks * kBlockBytes);
    }
    if (!regions->status().ok()) return regions->status().error();
    const Result<std::optional<std::string>> ring = view.Get(RingKey());
    if (!ring.ok()) return ring.error();
    RingRecord record;
    if (ring.value() && Decode(*ring.value(), &record)) {
        for (const Extent& extent : record.extents) {
            end = std::max(end, (extent.place + extent.count) * kBlockBytes);
        }
    }
    const Result<std::vector<JournalPart>> journal = ReadJournal(view);
    if (!journal.ok()) return journal.error();
    for (const JournalPart& part : journal.value()) {
        for (const MapChange& change : part.changes) {
            if (change.place == 0) continue;
            end = std::max(end, (change.place + change.count) * kBlockBytes);
        }
    }
    return end;
}

}  // namespace varve::cow
