// Verifies the map: whose rows are read, and that each block has one owner.
// A family is read window by window, with one cursor for rows and one for notes, however many
// branches it has: ten thousand clones or restores are nothing unusual.
#include <fmt/format.h>

#include <algorithm>

#include "cow/format/runs.h"
#include "cow/pool/checker.h"

namespace varve::cow {
namespace {

constexpr uint64_t kNoChunk = ~uint64_t{0};
/// Chunks of a window. What is in memory is a window's rows, of all branches of a family.
constexpr uint64_t kWindowChunks = 16;

/// Where the rows of `letter` of `id` begin from `chunk` on.
std::string KeyFrom(char letter, BranchId id, uint64_t chunk) {
    std::string key = MapKey(id, ChunkIndex{chunk}, kHead);
    key[0] = letter;
    return key.substr(0, 17);
}

/// Whether the cursor stands at a row of `id`.
bool AtBranch(const Cursor& cursor, BranchId id) {
    return cursor.valid() && KeyNumber(cursor.key(), 0) == id.value;
}

}  // namespace

uint64_t HashRow(uint64_t branch, uint64_t generation, uint64_t chunk) {
    uint64_t h = branch * 0x9e3779b97f4a7c15 + generation;
    h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9 + chunk;
    h = (h ^ (h >> 32)) * 0x94d049bb133111eb;
    return h ^ (h >> 29);
}

BranchRows* FamilyChunk::Find(BranchId id) {
    const auto at = std::lower_bound(rows.begin(), rows.end(), id,
                                     [](const BranchRows& r, BranchId b) { return r.branch < b; });
    return at == rows.end() || at->branch != id ? nullptr : &*at;
}

/// Calls take(chunk) for each row of `id` from chunk `*next` up to `end`; `*next` becomes the next
/// chunk that has some. REQUIRES: of one pass, which begins with `table.placed` false, branches
/// come in ascending order.
template <typename F>
Status Checker::ReadWindow(Table& table, BranchId id, uint64_t* next, uint64_t end, F&& take) {
    if (*next >= end) return Status();
    Cursor& cursor = *table.cursor;
    const std::string from = KeyFrom(table.letter, id, *next);
    // What the cursor has come over in this pass, deleted rows among it, is not passed again.
    const bool ahead = table.placed && (!cursor.valid() || cursor.key() >= from);
    if (!ahead) cursor.Seek(from);
    table.placed = true;
    for (; AtBranch(cursor, id); cursor.Next()) {
        const uint64_t chunk = KeyNumber(cursor.key(), 1);
        if (chunk >= end) break;
        take(chunk);
    }
    *next = AtBranch(cursor, id) ? KeyNumber(cursor.key(), 1) : kNoChunk;
    return cursor.status();
}

Status Checker::ReadRows(Table& map, Family::Member& member, uint64_t end, Window& window) {
    const BranchId id = member.branch;
    return ReadWindow(map, id, &member.next_row, end, [&](uint64_t chunk) {
        const Generation generation{~KeyNumber(map.cursor->key(), 2)};
        std::optional<Runs> runs = DecodeRuns(map.cursor->value(), generation);
        ++report_.map_rows;
        row_hash_ += HashRow(id.value, generation.value, chunk);
        if (!runs) {
            Fault(fmt::format("branch {}, chunk {}, generation {}: unreadable map row", id.value,
                              chunk, generation.value));
            return;
        }
        std::vector<BranchRows>& rows = window[chunk].rows;
        if (rows.empty() || rows.back().branch != id) rows.push_back({id, {}});
        rows.back().versions.push_back({ChunkIndex{chunk}, {id, generation}, std::move(*runs)});
    });
}

Status Checker::ReadNotes(Table& notes, Family::Member& member, uint64_t end, Window& window) {
    const BranchId id = member.branch;
    return ReadWindow(notes, id, &member.next_note, end, [&](uint64_t chunk) {
        ++notes_;
        std::optional<NoteRecord> note = DecodeNote(notes.cursor->value());
        if (note) {
            window[chunk].dead.push_back(std::move(*note));
        } else {
            Fault(fmt::format("branch {}, chunk {}: unreadable note", id.value, chunk));
        }
    });
}

/// Whether some view reads the parent's state of this chunk through `id`.
bool Checker::FallsThrough(FamilyChunk& chunk, BranchId id) const {
    BranchRows* const rows = chunk.Find(id);
    if (!rows) return IsRead(chunk, id, Generation{0}, kHead);
    if (!rows->decided) {
        rows->falls_through = IsRead(chunk, id, Generation{0}, rows->versions[0].at.generation);
        rows->decided = true;
    }
    return rows->falls_through;
}

/// Whether the state at generations in [from, to) of `id` is read. As deep as there are branches in
/// a row without a view.
bool Checker::IsRead(FamilyChunk& chunk, BranchId id, Generation from, Generation to) const {
    const History::Branch& branch = catalog_.history().Get(id);
    if (to == kHead && branch.head) return true;
    const auto snapshot = branch.snapshots.lower_bound(from);
    if (snapshot != branch.snapshots.end() && *snapshot < to) return true;
    auto child = branch.children.lower_bound(from);
    for (; child != branch.children.end() && child->first < to; ++child) {
        if (FallsThrough(chunk, child->second)) return true;
    }
    return false;
}

/// Sorts the rows into those that a view resolves to and the others.
void Checker::FindVisible(FamilyChunk& chunk) {
    for (size_t b = chunk.rows.size(); b-- > 0;) {  // children first: the way down is short
        const std::vector<MapRow>& rows = chunk.rows[b].versions;
        FallsThrough(chunk, chunk.rows[b].branch);
        for (size_t r = 0; r < rows.size(); ++r) {
            const Generation to = r + 1 < rows.size() ? rows[r + 1].at.generation : kHead;
            const bool visible = IsRead(chunk, chunk.rows[b].branch, rows[r].at.generation, to);
            (visible ? chunk.live : chunk.dead).push_back(rows[r].runs);
            dead_rows_ += visible ? 0 : 1;
        }
    }
}

/// Of a whole branch nobody reads its parent's state.
void Checker::CheckWhole(const Family& family, FamilyChunk& chunk) {
    for (const BranchId id : family.whole) {
        const History::Branch& branch = catalog_.history().Get(id);
        if (!FallsThrough(chunk, id)) continue;
        if (MappedAt(chunk, branch.parent, branch.fork) == 0) continue;
        Fault(fmt::format("branch {} is flattened, but lacks chunk {}", id.value, chunk.index));
    }
}

uint64_t Checker::MappedAt(FamilyChunk& chunk, BranchId id, Generation at) const {
    while (id.value != 0) {
        if (const BranchRows* const rows = chunk.Find(id)) {
            for (size_t r = rows->versions.size(); r-- > 0;) {
                const MapRow& row = rows->versions[r];
                if (row.at.generation <= at) return MappedBlocks(row.runs);
            }
        }
        const History::Branch& branch = catalog_.history().Get(id);
        id = branch.parent;
        at = branch.fork;
    }
    return 0;
}

void Checker::CountMapped(FamilyChunk& chunk) {
    for (const BranchRows& rows : chunk.rows) {
        const History::Branch& branch = catalog_.history().Get(rows.branch);
        auto before = static_cast<int64_t>(MappedAt(chunk, branch.parent, branch.fork));
        for (const MapRow& row : rows.versions) {
            const auto now = static_cast<int64_t>(MappedBlocks(row.runs));
            mapped_[rows.branch][row.at.generation] += now - before;
            before = now;
        }
    }
}

/// Gives the blocks of `states` that no earlier state of this chunk (`seen`) has to `owner`.
void Checker::Own(uint64_t chunk, const std::vector<Runs>& states, PlacesSeen& seen,
                  BlockSet& owner) {
    for (const Runs& state : states) {
        for (const Run& run : state) {
            for (uint64_t i = 0; i < run.count; ++i) {
                if (seen.Insert(run.first + i, run.place + i))
                    OwnBlock(chunk, run.place + i, owner);
            }
        }
    }
}

void Checker::OwnBlock(uint64_t chunk, uint64_t block, BlockSet& owner) {
    if (block >= blocks_) {
        Fault(fmt::format("chunk {}: block {} lies beyond the data file", chunk, block));
    } else if (!owner.Insert(block) || (&owner == &dying_ && live_.Contains(block))) {
        Fault(fmt::format("chunk {}: block {} has another owner too", chunk, block));
    }
}

Status Checker::CheckFamily(Family& family) {
    Table map{'M', view_.Range("M", PrefixEnd("M"))};
    Table notes{'W', view_.Range("W", PrefixEnd("W"))};
    PlacesSeen seen;
    for (;;) {
        uint64_t first = kNoChunk;
        for (const Family::Member& member : family.members) {
            first = std::min({first, member.next_row, member.next_note});
        }
        if (first == kNoChunk) return Status();
        const uint64_t end = std::min(first, kNoChunk - kWindowChunks) + kWindowChunks;
        Window window;
        map.placed = notes.placed = false;
        for (Family::Member& member : family.members) {
            if (Status s = ReadRows(map, member, end, window); !s.ok()) return s;
            if (Status s = ReadNotes(notes, member, end, window); !s.ok()) return s;
        }
        for (auto& [index, chunk] : window) {
            chunk.index = index;
            for (BranchRows& of : chunk.rows) std::reverse(of.versions.begin(), of.versions.end());
            FindVisible(chunk);
            CheckWhole(family, chunk);
            CountMapped(chunk);
            seen.Clear();
            Own(index, chunk.live, seen, live_);
            Own(index, chunk.dead, seen, dying_);
        }
    }
}

Status Checker::CheckFamilies() {
    std::map<BranchId, BranchId> roots;
    std::map<BranchId, Family> families;  // by root
    for (const auto& [id, branch] : catalog_.history().branches()) {
        const auto parent = roots.find(branch.parent);
        const BranchId root = parent == roots.end() ? id : parent->second;
        roots[id] = root;
        families[root].members.push_back({id});
        if (branch.whole) families[root].whole.push_back(id);
    }
    for (auto& [root, family] : families) {
        if (Status s = CheckFamily(family); !s.ok()) return s;
    }
    return Status();
}

}  // namespace varve::cow
