// Verifies the metadata: every invariant of docs/format.md, on one consistent view.
// Reads everything once; needs two bits of memory for each block of the data file.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "cow/format/runs.h"
#include "cow/head/journal.h"
#include "cow/history/catalog.h"
#include "cow/pool/pool.h"
#include "cow/space/allocator.h"
#include "cow/volume/checksums.h"
#include "cow/volume/map_reader.h"

namespace varve::cow {
namespace {

constexpr size_t kErrorsShown = 100;
constexpr uint64_t kNoChunk = ~uint64_t{0};
constexpr size_t kJournaledTogether = 1024;

/// A branch's rows and notes, walked chunk by chunk.
struct BranchWalk {
    BranchId id;
    std::unique_ptr<Cursor> rows, notes;
    std::vector<MapRow> versions;  // of the present chunk, oldest first
    bool falls_through = false;    // some view reads the parent's state of the present chunk
};

/// Blocks of the data file as a set.
class BlockSet {
  public:
    explicit BlockSet(uint64_t blocks) : words_((blocks + 63) / 64) {}
    /// False if it was there.
    bool Insert(uint64_t block) {
        uint64_t& word = words_[block / 64];
        const uint64_t bit = uint64_t{1} << block % 64;
        if (word & bit) return false;
        word |= bit;
        return true;
    }
    uint64_t word(uint64_t index) const { return words_[index]; }

  private:
    std::vector<uint64_t> words_;
};

class Checker {
  public:
    Checker(MetadataView& view, Catalog catalog)
        : view_(view),
          catalog_(std::move(catalog)),
          blocks_(catalog_.pool().region_count * kRegionBlocks),
          live_(blocks_),
          dying_(blocks_) {}

    Result<CheckReport> Verify();

  private:
    void Fault(std::string text);
    Status CheckFamily(const std::vector<BranchId>& branches);
    Status ReadChunk(BranchWalk& walk, uint64_t chunk, std::vector<Runs>& dead);
    void FindVisible(std::vector<BranchWalk>& walks, std::vector<Runs>& live,
                     std::vector<Runs>& dead);
    void CheckWhole(const std::vector<BranchWalk>& walks, uint64_t chunk);
    void CountMapped(std::vector<BranchWalk>& walks);
    uint64_t MappedAt(const std::vector<BranchWalk>& walks, BranchId id, Generation at) const;
    void Own(uint64_t chunk, const std::vector<Runs>& states, std::vector<Runs>& seen,
             BlockSet& owner);
    Status CheckJournal();
    void OwnJournaled(uint64_t chunk, const Runs& added, BlockSet& journaled);
    Status CheckTouched();
    void CheckCounts();
    int64_t CountAt(BranchId id, Generation at) const;
    Status CheckRegions();
    Status CheckSums();

    MetadataView& view_;
    const Catalog catalog_;
    const uint64_t blocks_;
    BlockSet live_, dying_;
    CheckReport report_;
    uint64_t faults_ = 0;
    uint64_t notes_ = 0;
    uint64_t dead_rows_ = 0;
    uint64_t row_hash_ = 0;
    std::vector<bool> in_use_;                                  // regions with used blocks
    std::map<BranchId, std::map<Generation, int64_t>> mapped_;  // changes, by generation
};

uint64_t HashRow(uint64_t branch, uint64_t generation, uint64_t chunk) {
    uint64_t h = branch * 0x9e3779b97f4a7c15 + generation;
    h = (h ^ (h >> 29)) * 0xbf58476d1ce4e5b9 + chunk;
    h = (h ^ (h >> 32)) * 0x94d049bb133111eb;
    return h ^ (h >> 29);
}

std::string PrefixOf(char letter, BranchId id) {
    std::string key = MapKey(id, ChunkIndex{0}, kHead).substr(0, 9);
    key[0] = letter;
    return key;
}

void Checker::Fault(std::string text) {
    ++faults_;
    if (report_.errors.size() < kErrorsShown) report_.errors.push_back(std::move(text));
}

Status Checker::ReadChunk(BranchWalk& walk, uint64_t chunk, std::vector<Runs>& dead) {
    walk.versions.clear();
    for (Cursor& c = *walk.rows; c.valid() && KeyNumber(c.key(), 1) == chunk; c.Next()) {
        const Generation generation{~KeyNumber(c.key(), 2)};
        std::optional<Runs> runs = DecodeRuns(c.value(), generation);
        ++report_.map_rows;
        row_hash_ += HashRow(walk.id.value, generation.value, chunk);
        if (!runs) {
            Fault(fmt::format("branch {}, chunk {}, generation {}: unreadable map row",
                              walk.id.value, chunk, generation.value));
            continue;
        }
        walk.versions.push_back({ChunkIndex{chunk}, {walk.id, generation}, std::move(*runs)});
    }
    std::reverse(walk.versions.begin(), walk.versions.end());
    for (Cursor& c = *walk.notes; c.valid() && KeyNumber(c.key(), 1) == chunk; c.Next()) {
        ++notes_;
        std::optional<NoteRecord> note = DecodeNote(c.value());
        if (note) {
            dead.push_back(std::move(*note));
        } else {
            Fault(fmt::format("branch {}, chunk {}: unreadable note", walk.id.value, chunk));
        }
    }
    if (Status s = walk.rows->status(); !s.ok()) return s;
    return walk.notes->status();
}

/// Sorts the rows of the present chunk into those that a view resolves to and the others.
/// Children come after their parents in `walks`, so they are looked at first.
void Checker::FindVisible(std::vector<BranchWalk>& walks, std::vector<Runs>& live,
                          std::vector<Runs>& dead) {
    std::map<BranchId, BranchWalk*> by_id;
    for (BranchWalk& walk : walks) by_id[walk.id] = &walk;
    for (size_t w = walks.size(); w-- > 0;) {
        BranchWalk& walk = walks[w];
        const History::Branch& branch = catalog_.history().Get(walk.id);
        // Is the state somewhere in [from, to) read?
        const auto read = [&](Generation from, Generation to) {
            const auto snapshot = branch.snapshots.lower_bound(from);
            if (snapshot != branch.snapshots.end() && *snapshot < to) return true;
            auto child = branch.children.lower_bound(from);
            for (; child != branch.children.end() && child->first < to; ++child) {
                if (by_id.at(child->second)->falls_through) return true;
            }
            return to == kHead && branch.head;
        };
        const std::vector<MapRow>& rows = walk.versions;
        walk.falls_through = read(Generation{0}, rows.empty() ? kHead : rows[0].at.generation);
        for (size_t r = 0; r < rows.size(); ++r) {
            const Generation to = r + 1 < rows.size() ? rows[r + 1].at.generation : kHead;
            const bool visible = read(rows[r].at.generation, to);
            (visible ? live : dead).push_back(rows[r].runs);
            dead_rows_ += visible ? 0 : 1;
        }
    }
}

/// Of a whole branch nobody reads its parent's state.
void Checker::CheckWhole(const std::vector<BranchWalk>& walks, uint64_t chunk) {
    for (const BranchWalk& walk : walks) {
        const History::Branch& branch = catalog_.history().Get(walk.id);
        if (!branch.whole || !walk.falls_through) continue;
        if (MappedAt(walks, branch.parent, branch.fork) == 0) continue;
        Fault(fmt::format("branch {} is flattened, but lacks chunk {}", walk.id.value, chunk));
    }
}

uint64_t Checker::MappedAt(const std::vector<BranchWalk>& walks, BranchId id, Generation at) const {
    while (id.value != 0) {
        const auto walk = std::find_if(walks.begin(), walks.end(),
                                       [id](const BranchWalk& w) { return w.id == id; });
        for (size_t r = walk->versions.size(); r-- > 0;) {
            const MapRow& row = walk->versions[r];
            if (row.at.generation <= at) return MappedBlocks(row.runs);
        }
        const History::Branch& branch = catalog_.history().Get(id);
        id = branch.parent;
        at = branch.fork;
    }
    return 0;
}

void Checker::CountMapped(std::vector<BranchWalk>& walks) {
    for (const BranchWalk& walk : walks) {
        if (walk.versions.empty()) continue;
        const History::Branch& branch = catalog_.history().Get(walk.id);
        auto before = static_cast<int64_t>(MappedAt(walks, branch.parent, branch.fork));
        for (const MapRow& row : walk.versions) {
            const auto now = static_cast<int64_t>(MappedBlocks(row.runs));
            mapped_[walk.id][row.at.generation] += now - before;
            before = now;
        }
    }
}

/// Gives the blocks of `states` that no earlier state of this chunk (`seen`) has to `owner`.
void Checker::Own(uint64_t chunk, const std::vector<Runs>& states, std::vector<Runs>& seen,
                  BlockSet& owner) {
    for (Runs fresh : states) {
        for (const Runs& other : seen) fresh = Subtract(fresh, other);
        for (const Run& run : fresh) {
            for (uint64_t i = 0; i < run.count; ++i) {
                const uint64_t block = run.place + i;
                if (block >= blocks_) {
                    Fault(
                        fmt::format("chunk {}: block {} lies beyond the data file", chunk, block));
                } else if (!owner.Insert(block) ||
                           (&owner == &dying_ && (live_.word(block / 64) >> block % 64 & 1))) {
                    Fault(fmt::format("chunk {}: block {} has another owner too", chunk, block));
                }
            }
        }
        if (!fresh.empty()) seen.push_back(std::move(fresh));
    }
}

Status Checker::CheckFamily(const std::vector<BranchId>& branches) {
    std::vector<BranchWalk> walks;
    for (const BranchId id : branches) {
        BranchWalk& walk = walks.emplace_back();
        walk.id = id;
        const std::string rows = PrefixOf('M', id), notes = PrefixOf('W', id);
        walk.rows = view_.Range(rows, PrefixEnd(rows));
        walk.notes = view_.Range(notes, PrefixEnd(notes));
        walk.rows->Seek(rows);
        walk.notes->Seek(notes);
    }
    for (;;) {
        uint64_t chunk = kNoChunk;
        for (const BranchWalk& walk : walks) {
            for (const Cursor* c : {walk.rows.get(), walk.notes.get()}) {
                if (Status s = c->status(); !s.ok()) return s;
                if (c->valid()) chunk = std::min(chunk, KeyNumber(c->key(), 1));
            }
        }
        if (chunk == kNoChunk) return Status();
        std::vector<Runs> live, dead, seen;
        for (BranchWalk& walk : walks) {
            if (Status s = ReadChunk(walk, chunk, dead); !s.ok()) return s;
        }
        FindVisible(walks, live, dead);
        CheckWhole(walks, chunk);
        CountMapped(walks);
        Own(chunk, live, seen, live_);
        Own(chunk, dead, seen, dying_);
    }
}

/// The journal's blocks are owned, but not marked: whoever opens the pool folds it first.
Status Checker::CheckJournal() {
    const Result<std::vector<JournalPart>> parts = ReadJournal(view_);
    if (!parts.ok() && parts.error().kind != ErrorKind::kDamaged) return parts.error();
    if (!parts.ok()) Fault(parts.error().message);
    if (!parts.ok() || parts.value().empty()) return Status();
    BlockSet journaled(blocks_);
    for (const JournalPart& part : parts.value()) {
        if (!catalog_.OwnerOf(part.branch, part.generation)) {
            Fault(fmt::format("there is a journal of branch {}, generation {}, which nobody sees",
                              part.branch.value, part.generation.value));
            continue;
        }
        const Line line = catalog_.history().LineOf(part.branch, part.generation);
        for (size_t next = 0; next < part.changes.size();) {
            const Result<std::vector<JournaledChunk>> chunks =
                ApplyJournal(view_, line, part, next, kJournaledTogether, &next);
            if (!chunks.ok()) return chunks.error();
            for (const JournaledChunk& chunk : chunks.value()) {
                OwnJournaled(chunk.index.value, Subtract(chunk.after, chunk.before), journaled);
            }
        }
    }
    return Status();
}

void Checker::OwnJournaled(uint64_t chunk, const Runs& added, BlockSet& journaled) {
    for (const Run& run : added) {
        for (uint64_t block = run.place; block < run.place + run.count; ++block) {
            if (block >= blocks_) {
                Fault(fmt::format("chunk {}: block {} lies beyond the data file", chunk, block));
                continue;
            }
            const uint64_t owned = live_.word(block / 64) | dying_.word(block / 64);
            if (!journaled.Insert(block) || (owned >> block % 64 & 1)) {
                Fault(fmt::format("chunk {}: block {} has another owner too", chunk, block));
            }
        }
    }
}

/// Touched marks and map rows must name the same; compared by count and sum of hashes.
Status Checker::CheckTouched() {
    uint64_t marks = 0, hash = 0;
    const auto cursor = view_.Range("T", PrefixEnd("T"));
    for (cursor->Seek("T"); cursor->valid(); cursor->Next()) {
        ++marks;
        const std::string_view key = cursor->key();
        if (KeyNumbers(key) != 3) {
            Fault("a touched mark's key has a wrong length");
            continue;
        }
        hash += HashRow(KeyNumber(key, 0), KeyNumber(key, 1), KeyNumber(key, 2));
    }
    if (marks != report_.map_rows || hash != row_hash_) {
        Fault(fmt::format("{} map rows and {} touched marks do not belong together",
                          report_.map_rows, marks));
    }
    return cursor->status();
}

int64_t Checker::CountAt(BranchId id, Generation at) const {
    int64_t count = 0;
    while (id.value != 0) {
        if (const auto changes = mapped_.find(id); changes != mapped_.end()) {
            for (const auto& [generation, change] : changes->second) {
                if (generation <= at) count += change;
            }
        }
        const History::Branch& branch = catalog_.history().Get(id);
        id = branch.parent;
        at = branch.fork;
    }
    return count;
}

void Checker::CheckCounts() {
    const auto compare = [this](const std::string& name, uint64_t stored, int64_t counted) {
        if (static_cast<int64_t>(stored) == counted) return;
        Fault(fmt::format("{}: {} blocks are mapped, its record says {}", name, counted, stored));
    };
    for (const auto& [id, disk] : catalog_.disks()) {
        compare("disk " + disk.record.name, disk.record.mapped_blocks,
                CountAt(disk.record.branch, kHead));
    }
    for (const auto& [id, snapshot] : catalog_.snapshots()) {
        compare("snapshot " + catalog_.disk(snapshot.disk).record.name + "@" + snapshot.name,
                snapshot.mapped_blocks, CountAt(snapshot.branch, snapshot.generation));
    }
}

Status Checker::CheckRegions() {
    constexpr uint64_t kWords = kRegionBlocks / 64;
    std::vector<bool>& listed = in_use_;
    listed.resize(catalog_.pool().region_count);
    uint64_t used = 0, lost = 0;
    const auto compare = [&](uint64_t region, const uint64_t* bits) {
        for (uint64_t w = 0; w < kWords; ++w) {
            const uint64_t live = live_.word(region * kWords + w);
            const uint64_t dying = dying_.word(region * kWords + w);
            used += static_cast<uint64_t>(std::popcount(bits[w]));
            lost += static_cast<uint64_t>(std::popcount((live | dying) & ~bits[w]));
            report_.leaked_blocks +=
                static_cast<uint64_t>(std::popcount(bits[w] & ~(live | dying)));
            report_.reclaim_blocks += static_cast<uint64_t>(std::popcount(bits[w] & dying));
        }
    };
    uint64_t bits[kWords];
    const auto cursor = view_.Range("R", PrefixEnd("R"));
    for (cursor->Seek("R"); cursor->valid(); cursor->Next()) {
        const uint64_t region = KeyNumbers(cursor->key()) == 1 ? KeyNumber(cursor->key(), 0) : ~0ul;
        const bool full = cursor->value() == "F";
        const bool sound = region < listed.size() &&
                           (full || cursor->value().size() == 1 + sizeof(Allocator::Bits));
        if (!sound) {
            Fault(fmt::format("allocator region {} is unreadable", region));
            continue;
        }
        std::memset(bits, 0xff, sizeof bits);
        if (!full) std::memcpy(bits, cursor->value().data() + 1, sizeof bits);
        listed[region] = true;
        compare(region, bits);
    }
    std::memset(bits, 0, sizeof bits);
    for (uint64_t region = 0; region < listed.size(); ++region) {
        if (!listed[region]) compare(region, bits);
    }
    if (lost > 0) Fault(fmt::format("{} blocks are mapped but not marked as used", lost));
    if (used != catalog_.pool().used_blocks) {
        Fault(fmt::format("{} blocks are marked as used, the pool's record says {}", used,
                          catalog_.pool().used_blocks));
    }
    report_.used_blocks = used;
    return cursor->status();
}

/// Checksums are bound to births, so those of blocks that are gone are no fault in a region that is
/// in use; a wholly free one has none.
Status Checker::CheckSums() {
    const auto cursor = view_.Range("C", PrefixEnd("C"));
    for (cursor->Seek("C"); cursor->valid(); cursor->Next()) {
        const std::string_view key = cursor->key();
        const uint64_t index = KeyNumbers(key) == 1 ? KeyNumber(key, 0) : ~uint64_t{0};
        const uint64_t region = index / (kRegionBlocks / kSumsRowBlocks);
        const std::optional<SumsRow> row = SumsRow::Decode(cursor->value());
        if (!row) {
            Fault(fmt::format("checksum row {} is unreadable", index));
        } else if (region >= in_use_.size() || !in_use_[region]) {
            Fault(fmt::format("checksum row {} is of blocks that are not used", index));
        } else {
            for (const SumsRow::Slot& slot : row->Unpack()) {
                report_.checksums += slot.birth.value != 0 ? 1 : 0;
                if (slot.birth.value < catalog_.pool().sequence) continue;
                Fault(fmt::format("checksum row {} is of a generation that never was", index));
            }
        }
    }
    if (Status s = cursor->status(); !s.ok()) return s;
    const auto marks = view_.Range("K", PrefixEnd("K"));
    for (marks->Seek("K"); marks->valid(); marks->Next()) {
        const bool sound = KeyNumbers(marks->key()) == 1 &&
                           catalog_.snapshots().contains(SnapshotId{KeyNumber(marks->key(), 0)});
        if (!sound)
            Fault("a mark says that a snapshot has checksums, but there is no such snapshot");
    }
    return marks->status();
}

Result<CheckReport> Checker::Verify() {
    report_.disks = catalog_.disks().size();
    report_.snapshots = catalog_.snapshots().size();
    report_.branches = catalog_.history().branches().size();
    std::map<BranchId, std::vector<BranchId>> families;  // by root; parents before children
    for (const auto& [id, branch] : catalog_.history().branches()) {
        families[catalog_.history().Root(id)].push_back(id);
    }
    for (const auto& [root, branches] : families) {
        if (Status s = CheckFamily(branches); !s.ok()) return s.error();
    }
    if (Status s = CheckJournal(); !s.ok()) return s.error();
    if (Status s = CheckTouched(); !s.ok()) return s.error();
    if (Status s = CheckRegions(); !s.ok()) return s.error();
    if (Status s = CheckSums(); !s.ok()) return s.error();
    CheckCounts();
    const bool pending = !catalog_.jobs().empty() || notes_ > 0 || !catalog_.flattening().empty();
    if (dead_rows_ > 0 && !pending) {
        Fault(fmt::format("{} map rows are dead and no deletion is pending", dead_rows_));
    }
    if (faults_ > report_.errors.size()) {
        report_.errors.push_back(fmt::format("and {} more", faults_ - report_.errors.size()));
    }
    return report_;
}

}  // namespace

Result<CheckReport> CheckMetadata(MetadataStore& store) {
    const std::unique_ptr<MetadataView> view = store.View();
    Result<Catalog> catalog = Catalog::Load(*view);
    if (catalog.ok()) return Checker(*view, std::move(catalog.value())).Verify();
    if (catalog.error().kind != ErrorKind::kDamaged) return catalog.error();
    CheckReport report;
    report.errors.push_back(catalog.error().message);
    return report;
}

}  // namespace varve::cow
