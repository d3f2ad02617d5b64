// Reading map rows from the metadata store: which row does a view see for each chunk.
// Blocking calls on a consistent view; the cache in front of it is chunk_cache.h.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "cow/history/history.h"
#include "cow/store/stores.h"

namespace varve::cow {

/// Which stored row a chunk's state came from.
struct RowAt {
    BranchId branch;
    Generation generation;
    friend bool operator==(const RowAt&, const RowAt&) = default;
};

struct MapRow {
    ChunkIndex chunk;
    RowAt at;
    Runs runs;
};

struct DamagedRow {
    ChunkIndex chunk;
    std::string what;  // which row it is
};

struct MapRows {
    std::vector<MapRow> rows;         // ascending; chunks without a row are left out
    std::vector<DamagedRow> damaged;  // those whose row cannot be read; they are not in `rows`
    ChunkIndex next;                  // no chunk from the end of the range up to here has a row

    /// kDamaged, with the first of `damaged`: for whoever needs them all.
    Status AllReadable() const;
};

/// The state that a row of `chunk` holds. kDamaged, with the row's place.
Result<Runs> DecodeRow(ChunkIndex chunk, const RowAt& at, std::string_view value);

/// The rows that `line` resolves chunks [first, end) to. An error is the store's. Costs a seek for
/// each stretch, and steps over rows that were deleted lately: some thousand at most, or those of
/// the next GiB.
Result<MapRows> ReadMap(MetadataView& view, const Line& line, ChunkIndex first, ChunkIndex end);

/// The same where rows lie on a damaged page of the store: chunk by chunk, and one that needs that
/// page is among the damaged. Other errors are the store's. Slow.
Result<MapRows> ReadMapInPieces(MetadataView& view, const Line& line, ChunkIndex first,
                                ChunkIndex end);

/// All rows of `chunk` in `stretch`, newest first.
Result<std::vector<MapRow>> ReadVersions(MetadataView& view, const Stretch& stretch,
                                         ChunkIndex chunk);

}  // namespace varve::cow
