#include "cow/head/map_commit.h"

#include "cow/mutants.h"

namespace varve::cow {
namespace {

Extent ExtentOf(const Run& run) {
    return {run.place, run.count};
}

/// Whether a row of what was inherited, which the head does not know of, may be what `row` really
/// replaces: docs/design/flatten.md.
bool InheritedRow(const Catalog& catalog, const HeadCommit::Row& row, BranchId id,
                  Generation snapshot_below) {
    if (!row.previous) return false;
    while (id.value != 0 && id != row.previous->branch && InheritedAt(id) > snapshot_below) {
        if (catalog.IsFlattened(id)) return true;
        id = catalog.history().Get(id).parent;
    }
    return false;
}

Status BuildRow(CommitContext& context, const HeadCommit& commit, const HeadCommit::Row& row,
                Generation snapshot_below) {
    const RowAt at{commit.branch, commit.generation};
    context.batch.Put(MapKey(at.branch, row.chunk, at.generation), row.value);
    // An older row that no snapshot of this line resolves to may be dead now; only a sweep, which
    // sees the other lines too, can tell.
    bool note = false;
    if (row.previous != at) {
        context.batch.Put(TouchedKey(at.branch, at.generation, row.chunk), "");
        note = row.previous && row.previous->generation > snapshot_below;
        note = note || InheritedRow(context.catalog, row, at.branch, snapshot_below);
    }
    for (const Run& run : row.added) {
        if (Status s = context.allocator.MarkUsed(ExtentOf(run)); !s.ok()) return s;
    }
    NoteRecord dropped;
    for (const Run& run : row.dropped) {
        const bool mine = run.birth == commit.generation || Mutated(Mutant::kHeadFreesHeldBlock);
        // In a region that cannot be read it stays named, by a note, until it can be freed.
        if (mine && context.allocator.Open(ExtentOf(run)).ok()) {
            if (Status s = context.allocator.MarkFree(ExtentOf(run)); !s.ok()) return s;
            if (!Mutated(Mutant::kReusedBeforeCommit)) context.freed.push_back(ExtentOf(run));
        } else if (mine || run.birth > snapshot_below) {
            dropped.push_back(run);
        }
    }
    if ((note || !dropped.empty()) && !Mutated(Mutant::kNoteForgotten)) {
        context.noted = true;
        context.notes.push_back({at.branch, at.generation, row.chunk});
        const uint64_t number = context.catalog.NextId();
        context.batch.Put(NoteKey(at.branch, row.chunk, at.generation, number),
                          EncodeNote(dropped));
    }
    return Status();
}

}  // namespace

std::vector<Extent> FreedBy(const HeadCommit& commit) {
    std::vector<Extent> freed;
    for (const HeadCommit::Row& row : commit.rows) {
        for (const Run& run : row.dropped) {
            if (run.birth == commit.generation) freed.push_back(ExtentOf(run));
        }
    }
    return freed;
}

Status BuildHeadCommit(Core& core, CommitContext& context, DiskId disk, const HeadCommit& commit) {
    DiskRecord record = context.catalog.disk(disk).record;
    VARVE_CHECK(record.branch == commit.branch);
    const Generation snapshot_below =
        context.catalog.history().SnapshotBelow(commit.branch, commit.generation);
    for (const HeadCommit::Row& row : commit.rows) {
        for (const Run& run : row.added) record.mapped_blocks += run.count;
        for (const Run& run : row.dropped) record.mapped_blocks -= run.count;
        if (Status s = BuildRow(context, commit, row, snapshot_below); !s.ok()) {
            core.Fail(s.error().message);
            return s;
        }
    }
    for (const Extent& extent : commit.released) context.freed.push_back(extent);
    if (!commit.rows.empty()) {
        const uint64_t before = context.catalog.disk(disk).record.mapped_blocks;
        const auto change = static_cast<int64_t>(record.mapped_blocks - before);
        if (commit.snapshot.value != 0) {
            context.catalog.AddMapped(commit.snapshot, change, context.batch);
        }
        context.catalog.UpdateDisk(disk, std::move(record), context.batch);
    }
    return Status();
}

PlainRows TakePlain(HeadCommit& commit) {
    VARVE_CHECK(commit.rows.empty());
    PlainRows rows;
    rows.freed = std::move(commit.released);
    return rows;
}

}  // namespace varve::cow
