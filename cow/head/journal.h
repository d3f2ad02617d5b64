// What a journal says that a crash has left: map changes that are in no map row yet, and chunks as
// they are with them. Not how the ring is read (journal/ring_reader.h): here are the journal rows
// of pools from before there was one, which nobody writes any more.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "cow/format/map_change.h"
#include "cow/store/stores.h"
#include "cow/volume/map_reader.h"

namespace varve::cow {

/// The changes of a journal row's value, in the order in which they happened, appended to
/// `changes`; false if `value` breaks a rule of the format.
bool DecodeChanges(std::string_view value, std::vector<MapChange>* changes);

/// What the journal says of one generation of a branch.
struct JournalPart {
    BranchId branch;
    Generation generation;
    std::vector<std::string> keys;   // of its rows
    std::vector<MapChange> changes;  // by chunk; of one chunk in the order they happened
};

/// The whole journal: by branch, older generations first. kDamaged names an unreadable row.
Result<std::vector<JournalPart>> ReadJournal(MetadataView& view);

/// As JournalPart has them.
void SortByChunk(std::vector<MapChange>& changes);

/// A chunk as the journal leaves it.
struct JournaledChunk {
    ChunkIndex index;
    std::optional<RowAt> row;  // which holds `before`
    Runs before, after;
};

/// Applies changes of `part`, from the `begin`-th on, to what `line` resolves their chunks to.
/// At most `most` chunks; `*end` is where to go on. Chunks whose rows cannot be read are left out,
/// and added to `lost`.
Result<std::vector<JournaledChunk>> ApplyJournal(MetadataView& view, const Line& line,
                                                 const JournalPart& part, size_t begin, size_t most,
                                                 size_t* end, std::vector<DamagedRow>* lost);

}  // namespace varve::cow
