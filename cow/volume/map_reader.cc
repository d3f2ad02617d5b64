#include "cow/volume/map_reader.h"

#include <fmt/format.h>

#include <algorithm>

#include "cow/format/format.h"
#include "cow/format/runs.h"

namespace varve::cow {
namespace {

constexpr uint64_t kNoChunk = ~uint64_t{0};
/// Deleted rows that a move of a cursor may meet: some 0.1 ms.
constexpr uint64_t kDeletedMost = 1024;
/// Chunks that are looked at for the next row when there were more: a GiB.
constexpr uint64_t kLookAhead = 4096;

Result<MapRow> DecodeKeyed(std::string_view key, std::string_view value) {
    if (KeyNumbers(key) == 3) {
        const BranchId branch{KeyNumber(key, 0)};
        const ChunkIndex chunk{KeyNumber(key, 1)};
        const Generation generation{~KeyNumber(key, 2)};
        Result<Runs> runs = DecodeRow(chunk, {branch, generation}, value);
        if (!runs.ok()) return runs.error();
        return MapRow{chunk, {branch, generation}, std::move(runs.value())};
    }
    return MakeError(ErrorKind::kDamaged, "a map row's key has a wrong length");
}

/// Steps over the versions of one branch that are newer than `to`, then over older ones.
struct BranchScan {
    Cursor& cursor;
    const Stretch& stretch;

    /// Places the cursor at the row `stretch` resolves the first chunk at or after `chunk` to;
    /// gives that chunk, or kNoChunk. Seeks only if a few steps do not get there.
    uint64_t FindFrom(uint64_t chunk, uint64_t end) {
        for (unsigned steps = 0; chunk < end;) {
            if (!cursor.valid()) return kNoChunk;
            const uint64_t here = KeyNumber(cursor.key(), 1);
            const Generation generation{~KeyNumber(cursor.key(), 2)};
            if (here > chunk) chunk = here;
            if (here == chunk && generation <= stretch.to) return here < end ? here : kNoChunk;
            if (++steps % 4 == 0) {
                cursor.Seek(MapKey(stretch.branch, ChunkIndex{chunk}, stretch.to));
            } else {
                cursor.Next();
            }
        }
        return kNoChunk;
    }
};

/// What a range of chunks resolves to, as far as it is known.
struct Found {
    struct Slot {
        bool known = false;
        std::optional<MapRow> row;  // none: its row is damaged
    };
    std::vector<Slot> slots;
    std::vector<DamagedRow> damaged;
};

/// Adds to `found` what `stretch` resolves of [first, end); slots that are known stay. Gives the
/// next chunk at or after `end`, and before `look_to`, that has any row in the branch; nothing if
/// it met more deleted rows than `deleted_most` in one move.
Result<std::optional<uint64_t>> ScanBranch(MetadataView& view, const Stretch& stretch,
                                           uint64_t first, uint64_t end, uint64_t look_to,
                                           uint64_t deleted_most, Found& found) {
    const std::string lower = MapKey(stretch.branch, ChunkIndex{first}, kHead);
    const std::string upper =
        look_to == kNoChunk ? PrefixEnd(MapKey(stretch.branch, ChunkIndex{0}, kHead).substr(0, 9))
                            : MapKey(stretch.branch, ChunkIndex{look_to}, kHead);
    const auto cursor = view.Range(lower, upper, deleted_most);
    cursor->Seek(MapKey(stretch.branch, ChunkIndex{first}, stretch.to));
    BranchScan scan{*cursor, stretch};
    for (uint64_t chunk = first;;) {
        chunk = scan.FindFrom(chunk, end);
        if (chunk == kNoChunk) break;
        Found::Slot& slot = found.slots[chunk - first];
        if (!slot.known) {
            slot.known = true;
            Result<MapRow> row = DecodeKeyed(cursor->key(), cursor->value());
            if (row.ok()) {
                slot.row = std::move(row.value());
            } else {
                found.damaged.push_back({ChunkIndex{chunk}, row.error().message});
            }
        }
        ++chunk;
        cursor->Next();
    }
    // The cursor may stand at an old version of the range's last chunk.
    if (cursor->valid() && KeyNumber(cursor->key(), 1) < end) {
        cursor->Seek(MapKey(stretch.branch, ChunkIndex{end}, kHead));
    }
    if (Status s = cursor->status(); !s.ok()) return s.error();
    if (cursor->gave_up()) return std::optional<uint64_t>();
    return std::optional<uint64_t>(cursor->valid() ? KeyNumber(cursor->key(), 1) : look_to);
}

/// The same, looking as far as it may.
Result<uint64_t> ScanBranch(MetadataView& view, const Stretch& stretch, uint64_t first,
                            uint64_t end, Found& found) {
    auto next = ScanBranch(view, stretch, first, end, kNoChunk, kDeletedMost, found);
    const bool gave_up = next.ok() && !next.value();
    // What was found stays; it is looked for again, now in a range that is closed.
    if (gave_up) next = ScanBranch(view, stretch, first, end, end + kLookAhead, 0, found);
    if (!next.ok()) return next.error();
    return *next.value();
}

/// The row that `line` resolves `chunk` to, by one seek for each stretch and no move: that might
/// meet a page on which there is nothing of the chunk.
Result<std::optional<MapRow>> ReadRow(MetadataView& view, const Line& line, ChunkIndex chunk) {
    for (const Stretch& stretch : line) {
        const std::string lower = MapKey(stretch.branch, chunk, stretch.to);
        const auto cursor = view.Range(lower, MapKey(stretch.branch, chunk, stretch.after));
        cursor->Seek(lower);
        if (Status s = cursor->status(); !s.ok()) return s.error();
        if (!cursor->valid()) continue;
        Result<MapRow> row = DecodeKeyed(cursor->key(), cursor->value());
        if (!row.ok()) return row.error();
        return std::optional<MapRow>(std::move(row.value()));
    }
    return std::optional<MapRow>();
}

}  // namespace

Result<Runs> DecodeRow(ChunkIndex chunk, const RowAt& at, std::string_view value) {
    if (std::optional<Runs> runs = DecodeRuns(value, at.generation)) return std::move(*runs);
    return MakeError(ErrorKind::kDamaged,
                     fmt::format("the map row of branch {}, chunk {}, generation {} is damaged",
                                 at.branch.value, chunk.value, at.generation.value));
}

Result<MapRows> ReadMap(MetadataView& view, const Line& line, ChunkIndex first, ChunkIndex end) {
    VARVE_CHECK(first < end);
    Found found;
    found.slots.resize(end.value - first.value);
    uint64_t next = kNoChunk;
    for (const Stretch& stretch : line) {
        const Result<uint64_t> after = ScanBranch(view, stretch, first.value, end.value, found);
        if (!after.ok()) return after.error();
        next = std::min(next, after.value());
    }
    MapRows rows;
    rows.next = ChunkIndex{next};
    rows.damaged = std::move(found.damaged);
    for (Found::Slot& slot : found.slots) {
        if (slot.row) rows.rows.push_back(std::move(*slot.row));
    }
    return rows;
}

Result<MapRows> ReadMapInPieces(MetadataView& view, const Line& line, ChunkIndex first,
                                ChunkIndex end) {
    MapRows rows;
    rows.next = end;
    for (ChunkIndex chunk = first; chunk < end; ++chunk.value) {
        Result<std::optional<MapRow>> row = ReadRow(view, line, chunk);
        if (!row.ok() && row.error().kind != ErrorKind::kDamaged) return row.error();
        if (!row.ok()) {
            rows.damaged.push_back({chunk, row.error().message});
        } else if (row.value()) {
            rows.rows.push_back(std::move(*row.value()));
        }
    }
    return rows;
}

Status MapRows::AllReadable() const {
    if (damaged.empty()) return Status();
    return MakeError(ErrorKind::kDamaged, damaged.front().what);
}

Result<std::vector<MapRow>> ReadVersions(MetadataView& view, const Stretch& stretch,
                                         ChunkIndex chunk) {
    const std::string newest = MapKey(stretch.branch, chunk, stretch.to);
    const auto cursor = view.Range(newest, MapKey(stretch.branch, chunk, stretch.after));
    std::vector<MapRow> rows;
    for (cursor->Seek(newest); cursor->valid(); cursor->Next()) {
        Result<MapRow> row = DecodeKeyed(cursor->key(), cursor->value());
        if (!row.ok()) return row.error();
        rows.push_back(std::move(row.value()));
    }
    if (Status s = cursor->status(); !s.ok()) return s.error();
    return rows;
}

}  // namespace varve::cow
