#include "cow/head/journal.h"

#include <fmt/format.h>

#include <algorithm>

#include "cow/format/codec.h"
#include "cow/format/format.h"
#include "cow/format/runs.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Neighbours whose rows are read together.
constexpr uint64_t kIndicesTogether = 16;

}  // namespace

bool DecodeChanges(std::string_view value, std::vector<MapChange>* changes) {
    Decoder in(value);
    if (in.Byte() != kFormatVersion) return false;
    while (in.ok() && !in.rest().empty()) {
        const ChunkIndex chunk{in.Varint()};
        const uint64_t first = in.Byte(), count = in.Byte(), place = in.Varint();
        const MapChange change = MapChangeOf(chunk, first, count, place);
        const bool fits = place == 0 || ArePlaces(place, count);
        if (!in.ok() || !fits || !IsSound(change)) return false;
        changes->push_back(change);
    }
    return in.Finished();
}

Result<std::vector<JournalPart>> ReadJournal(MetadataView& view) {
    std::vector<JournalPart> parts;
    const auto cursor = view.Range("L", PrefixEnd("L"));
    for (cursor->Seek("L"); cursor->valid(); cursor->Next()) {
        const std::string_view key = cursor->key();
        const BranchId branch{KeyNumber(key, 0)};
        const Generation generation{KeyNumber(key, 1)};
        const bool same = !parts.empty() && parts.back().branch == branch &&
                          parts.back().generation == generation;
        if (!same) parts.push_back({branch, generation, {}, {}});
        if (KeyNumbers(key) != 3 || !DecodeChanges(cursor->value(), &parts.back().changes)) {
            return MakeError(ErrorKind::kDamaged,
                             fmt::format("a journal row of branch {}, generation {} is damaged",
                                         branch.value, generation.value));
        }
        parts.back().keys.emplace_back(key);
    }
    if (Status s = cursor->status(); !s.ok()) return s.error();
    for (JournalPart& part : parts) SortByChunk(part.changes);
    return parts;
}

void SortByChunk(std::vector<MapChange>& changes) {
    if (Mutated(Mutant::kJournalOutOfOrder)) std::reverse(changes.begin(), changes.end());
    std::stable_sort(changes.begin(), changes.end(),
                     [](const MapChange& a, const MapChange& b) { return a.chunk < b.chunk; });
}

Result<std::vector<JournaledChunk>> ApplyJournal(MetadataView& view, const Line& line,
                                                 const JournalPart& part, size_t begin, size_t most,
                                                 size_t* end, std::vector<DamagedRow>* lost) {
    std::vector<JournaledChunk> chunks;
    std::vector<MapRow> rows;  // of the chunks below `known`
    std::vector<DamagedRow> damaged;
    ChunkIndex known;
    size_t next = begin;
    while (next < part.changes.size() && chunks.size() < most) {
        const ChunkIndex index = part.changes[next].chunk;
        if (index >= known) {
            known.value = index.value + kIndicesTogether;
            Result<MapRows> read = ReadMap(view, line, index, known);
            if (!read.ok() && read.error().kind != ErrorKind::kDamaged) return read.error();
            if (!read.ok()) read = ReadMapInPieces(view, line, index, known);
            if (!read.ok()) return read.error();
            rows = std::move(read.value().rows);
            damaged = std::move(read.value().damaged);
        }
        const auto bad = std::find_if(damaged.begin(), damaged.end(),
                                      [index](const DamagedRow& r) { return r.chunk == index; });
        if (bad != damaged.end()) {
            lost->push_back(*bad);
            while (next < part.changes.size() && part.changes[next].chunk == index) ++next;
            continue;
        }
        JournaledChunk& chunk = chunks.emplace_back();
        chunk.index = index;
        const auto row = std::find_if(rows.begin(), rows.end(),
                                      [index](const MapRow& r) { return r.chunk == index; });
        if (row != rows.end()) {
            chunk.row = row->at;
            chunk.before = std::move(row->runs);
        }
        chunk.after = chunk.before;
        for (; next < part.changes.size() && part.changes[next].chunk == index; ++next) {
            const MapChange& change = part.changes[next];
            if (change.place == 0) {
                Unmap(chunk.after, change.first, change.first + change.count, nullptr);
            } else {
                Run run;
                run.place = change.place;
                run.first = change.first;
                run.count = change.count;
                run.birth = part.generation;
                Map(chunk.after, run, nullptr);
            }
        }
    }
    *end = next;
    return chunks;
}

}  // namespace varve::cow
