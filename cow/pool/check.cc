// Verifies the metadata: every invariant of docs/format.md, on one consistent view.
// Reads everything once. Families of branches are in check_families.cc.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "cow/format/ring_record.h"
#include "cow/format/runs.h"
#include "cow/head/journal.h"
#include "cow/pool/checker.h"
#include "cow/space/allocator.h"
#include "cow/volume/checksums.h"
#include "cow/volume/map_reader.h"

namespace varve::cow {
namespace {

constexpr size_t kErrorsShown = 100;
constexpr size_t kJournaledTogether = 1024;

}  // namespace

void Checker::Fault(std::string text) {
    ++faults_;
    if (report_.errors.size() < kErrorsShown) report_.errors.push_back(std::move(text));
}

/// The journal's blocks are owned, but not marked: whoever opens the pool folds it first.
Status Checker::CheckJournal() {
    const Result<std::vector<JournalPart>> parts = ReadJournal(view_);
    if (!parts.ok() && parts.error().kind != ErrorKind::kDamaged) return parts.error();
    if (!parts.ok()) Fault(parts.error().message);
    if (!parts.ok() || parts.value().empty()) return Status();
    BlockSet journaled(catalog_.pool().region_count);
    for (const JournalPart& part : parts.value()) {
        if (!catalog_.OwnerOf(part.branch, part.generation)) {
            Fault(fmt::format("there is a journal of branch {}, generation {}, which nobody sees",
                              part.branch.value, part.generation.value));
            continue;
        }
        const Line line = catalog_.history().LineOf(part.branch, part.generation);
        for (size_t next = 0; next < part.changes.size();) {
            std::vector<DamagedRow> lost;  // CheckFamilies has found them
            const Result<std::vector<JournaledChunk>> chunks =
                ApplyJournal(view_, line, part, next, kJournaledTogether, &next, &lost);
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
            const bool mapped =
                block < blocks_ && (live_.Contains(block) || dying_.Contains(block));
            if (mapped) {
                Fault(fmt::format("chunk {}: block {} has another owner too", chunk, block));
            } else {
                OwnBlock(chunk, block, journaled);
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

/// Blocks that `id` shows at `at`, of what it inherits as well.
int64_t Checker::CountAt(BranchId id, Generation at) const {
    const auto branch = mapped_.find(id);
    if (branch == mapped_.end() || branch->second.empty()) return 0;
    const auto above = branch->second.upper_bound(at);
    return above == branch->second.begin() ? 0 : std::prev(above)->second;
}

/// Makes totals of what each generation changed. Parents come before their children.
void Checker::SumUp() {
    for (const auto& [id, branch] : catalog_.history().branches()) {
        std::map<Generation, int64_t>& counts = mapped_[id];
        int64_t total = branch.parent.value == 0 ? 0 : CountAt(branch.parent, branch.fork);
        counts.try_emplace(Generation{0});
        for (auto& [generation, count] : counts) count = total += count;
    }
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
    uint64_t used = 0, lost = 0, unreadable = 0;
    const auto compare = [&](uint64_t region, const Allocator::Bits& bitmap) {
        uint64_t bits[kWords];
        std::memcpy(bits, &bitmap, sizeof bits);
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
    const auto cursor = view_.Range("R", PrefixEnd("R"));
    for (cursor->Seek("R"); cursor->valid(); cursor->Next()) {
        const uint64_t region = KeyNumbers(cursor->key()) == 1 ? KeyNumber(cursor->key(), 0) : ~0ul;
        const std::optional<Allocator::Bits> bitmap = Allocator::UsedOf(cursor->value());
        if (!bitmap || region >= listed.size()) {
            Fault(
                fmt::format("allocator region {} is unreadable: nothing is written to it, and "
                            "nothing given back",
                            region));
            ++unreadable;
            if (region < listed.size()) listed[region] = true;
            continue;
        }
        listed[region] = true;
        compare(region, *bitmap);
    }
    for (uint64_t region = 0; region < listed.size(); ++region) {
        if (!listed[region]) compare(region, Allocator::Bits());
    }
    if (lost > 0) Fault(fmt::format("{} blocks are mapped but not marked as used", lost));
    if (used != catalog_.pool().used_blocks && unreadable == 0) {
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

/// The ring's blocks belong to nobody else. What is in it, whoever opens the pool finds out.
Status Checker::CheckRing() {
    const Result<std::optional<std::string>> row = view_.Get(RingKey());
    if (!row.ok()) return row.error();
    RingRecord ring;
    if (row.value() && !Decode(*row.value(), &ring)) Fault("the row about the ring is unreadable");
    for (const Extent& extent : ring.extents) {
        for (uint64_t block = extent.place; block < extent.place + extent.count; ++block) {
            if (block >= blocks_) {
                Fault(fmt::format("block {} of the ring lies beyond the data file", block));
                return Status();
            }
            const uint64_t owned = live_.word(block / 64) | dying_.word(block / 64);
            if (owned >> block % 64 & 1) {
                Fault(fmt::format("block {} of the ring has another owner too", block));
            }
        }
    }
    return Status();
}

Result<CheckReport> Checker::Verify() {
    report_.disks = catalog_.disks().size();
    report_.snapshots = catalog_.snapshots().size();
    report_.branches = catalog_.history().branches().size();
    if (Status s = CheckFamilies(); !s.ok()) return s.error();
    if (Status s = CheckJournal(); !s.ok()) return s.error();
    if (Status s = CheckRing(); !s.ok()) return s.error();
    if (Status s = CheckTouched(); !s.ok()) return s.error();
    if (Status s = CheckRegions(); !s.ok()) return s.error();
    if (Status s = CheckSums(); !s.ok()) return s.error();
    SumUp();
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
