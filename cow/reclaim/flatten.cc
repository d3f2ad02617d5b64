#include "cow/reclaim/flatten.h"

#include <algorithm>

#include "cow/format/runs.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

constexpr uint64_t kNoMore = ~uint64_t{0};

/// The lowest view that may read what the branch inherited: on it, or at a fork. 0: there is none.
Generation LowestView(const History::Branch& branch) {
    Generation lowest = branch.head ? kHead : Generation{0};
    const auto below = [&lowest](Generation g) {
        if (lowest.value == 0 || g < lowest) lowest = g;
    };
    if (!branch.snapshots.empty()) below(*branch.snapshots.begin());
    if (!branch.children.empty()) below(branch.children.begin()->first);
    return lowest;
}

/// Whether the view at `lowest` resolves the chunk to a row of the branch's own.
Result<bool> HasRow(MetadataView& view, BranchId branch, Generation lowest, ChunkIndex chunk) {
    const std::string newest = MapKey(branch, chunk, lowest);
    const auto cursor = view.Range(newest, MapKey(branch, chunk, Generation{0}));
    cursor->Seek(newest);
    if (Status s = cursor->status(); !s.ok()) return s.error();
    return cursor->valid();
}

}  // namespace

Flattener::Rows Flattener::Read(MetadataView& view, BranchId branch, const Line& inherited,
                                Generation lowest, ChunkIndex from, size_t chunks) {
    Rows found;
    const ChunkIndex end{from.value + chunks};
    Result<MapRows> rows = ReadMap(view, inherited, from, end);
    found.status = rows.ok() ? rows.value().AllReadable() : rows.status();
    if (!found.status.ok()) return found;
    found.next = rows.value().next;
    for (MapRow& row : rows.value().rows) {
        const Result<bool> there = HasRow(view, branch, lowest, row.chunk);
        if (!there.ok()) found.status = there.error();
        if (!there.ok()) break;
        if (!there.value()) found.rows.push_back(std::move(row));
    }
    return found;
}

Task<Status> Flattener::Put(BranchId branch, const std::vector<MapRow>& rows) {
    Change change = [branch, &rows](CommitContext& context) {
        const Generation generation = InheritedAt(branch);
        for (const MapRow& row : rows) {
            context.batch.Put(MapKey(branch, row.chunk, generation),
                              EncodeRuns(row.runs, generation));
            context.batch.Put(TouchedKey(branch, generation, row.chunk), "");
        }
        return Status();
    };
    co_return co_await committer_.Commit(std::move(change), core_.home());
}

/// Rows below the branch, and of what it inherited, may have lost their last reader.
Task<Status> Flattener::End(BranchId branch, Flattening flattening) {
    Change change = [branch, flattening](CommitContext& context) {
        const History::Branch& record = context.catalog.history().Get(branch);
        context.catalog.SetFlattening(branch, flattening, context.batch);
        if (Mutated(Mutant::kFlattenLeavesRows)) return Status();
        if (record.parent.value != 0) {
            context.catalog.AddJob({record.parent, record.fork}, context.batch);
        }
        context.catalog.AddJob({branch, InheritedAt(branch)}, context.batch);
        context.noted = true;
        return Status();
    };
    next_.erase(branch);
    const Status s = co_await committer_.Commit(std::move(change), core_.home());
    if (s.ok()) done_();
    co_return s;
}

Task<Result<bool>> Flattener::Step(std::string* unread) {
    // Its rows can wait for room; what the reclaimer gives back wakes it.
    if (catalog_.flattening().empty() || core_.metadata().full()) co_return false;
    std::erase_if(next_, [this](const auto& at) {  // of branches that are gone
        return !catalog_.flattening().contains(at.first);
    });
    auto turn = catalog_.flattening().upper_bound(branch_);
    if (turn == catalog_.flattening().end()) turn = catalog_.flattening().begin();
    const BranchId id = branch_ = *turn;
    const ChunkIndex from = next_[id];
    std::unique_ptr<MetadataView> view;
    Generation lowest;
    Line inherited;
    std::function<void()> look = [&] {
        const History::Branch& branch = catalog_.history().Get(id);
        lowest = LowestView(branch);
        inherited = catalog_.history().LineOf(branch.parent, branch.fork);
        view = core_.metadata().View();
    };
    co_await committer_.Look(std::move(look));
    Status s;
    if (lowest.value == 0) {  // nobody needs it any more
        s = co_await End(id, Flattening::kNone);
        if (!s.ok()) co_return s.error();
        co_return true;
    }
    Rows found;
    co_await Hop(core_.loader());
    found = Read(*view, id, inherited, lowest, from, step_chunks_);
    co_await Hop(core_.home());
    if (!found.status.ok()) {
        *unread = found.status.error().message;
        s = co_await End(id, Flattening::kNone);
        if (!s.ok()) co_return s.error();
        co_return true;
    }
    if (!found.rows.empty()) s = co_await Put(id, found.rows);
    if (!s.ok()) co_return s.error();
    next_[id] = found.next;
    const bool early = Mutated(Mutant::kFlattenedEarly);
    if (found.next.value == kNoMore || early) s = co_await End(id, Flattening::kDone);
    if (!s.ok()) co_return s.error();
    co_return true;
}

}  // namespace varve::cow
