// Recovery: folds the journal that a crash left into map rows, before anything else is done with
// the pool. Interrupted by another crash, it begins again: docs/design/journal.md, rule 3.
#include <fmt/format.h>

#include "base/log.h"
#include "cow/format/runs.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// Chunks that are folded in one commit.
constexpr size_t kFoldTogether = 256;
/// Journal rows that are deleted in one commit.
constexpr size_t kRowsTogether = 1024;
/// The row of a chunk whose last writes are lost: none that a head writes.
constexpr const char* kLostRow = "?";

Error NobodySees(const JournalPart& part) {
    return MakeError(ErrorKind::kDamaged,
                     fmt::format("the pool's metadata is damaged: there is a journal of branch {}, "
                                 "generation {}, which nobody sees; restore it from a copy",
                                 part.branch.value, part.generation.value));
}

HeadCommit MakeCommit(const JournalPart& part, SnapshotId snapshot,
                      std::vector<JournaledChunk> chunks) {
    HeadCommit commit;
    commit.branch = part.branch;
    commit.generation = part.generation;
    commit.snapshot = snapshot;
    for (JournaledChunk& chunk : chunks) {
        HeadCommit::Row row;
        row.chunk = chunk.index;
        row.previous = chunk.row;
        row.added = Subtract(chunk.after, chunk.before);
        row.dropped = Subtract(chunk.before, chunk.after);
        if (row.added.empty() && row.dropped.empty()) continue;  // folded before the crash
        row.value = EncodeRuns(chunk.after, part.generation);
        commit.rows.push_back(std::move(row));
    }
    return commit;
}

/// The chunk cannot be read as it was before these changes. It reads as an error from now on, even
/// if it can be read later: without them it would be older than what was flushed.
void Lose(const JournalPart& part, ChunkIndex chunk, CommitContext& context) {
    context.batch.Put(MapKey(part.branch, chunk, part.generation), kLostRow);
    context.batch.Put(TouchedKey(part.branch, part.generation, chunk), "");
}

}  // namespace

/// What is lost with rows that cannot be read is told in `losses`, a line each.
Task<Status> PoolImpl::FoldPart(const JournalPart& part, std::vector<std::string>* losses) {
    const std::optional<Catalog::Owner> owner = catalog_.OwnerOf(part.branch, part.generation);
    const Line line = catalog_.history().LineOf(part.branch, part.generation);
    const auto view = core_.metadata().View();
    for (size_t next = 0; next < part.changes.size();) {
        std::vector<DamagedRow> lost;
        Result<std::vector<JournaledChunk>> chunks =
            ApplyJournal(*view, line, part, next, kFoldTogether, &next, &lost);
        if (!chunks.ok()) co_return chunks.error();
        HeadCommit commit = MakeCommit(part, owner->snapshot, std::move(chunks.value()));
        if (commit.empty() && lost.empty()) continue;
        std::vector<Extent> touched = FreedBy(commit);
        for (const HeadCommit::Row& row : commit.rows) {
            for (const Run& run : row.added) touched.push_back({run.place, run.count});
        }
        Change change = [&](CommitContext& context) -> Status {
            for (const HeadCommit::Row& row : commit.rows) {
                for (const Run& run : row.added) {
                    Status s = context.allocator.Claim({run.place, run.count});
                    if (!s.ok()) return s;
                }
            }
            for (const DamagedRow& row : lost) Lose(part, row.chunk, context);
            if (commit.empty()) return Status();
            return BuildHeadCommit(core_, context, owner->disk, commit);
        };
        std::vector<uint64_t> regions = RegionsOf(touched);
        const Status s =
            co_await committer_.CommitIn(std::move(regions), std::move(change), core_.home());
        if (!s.ok()) co_return s;
        for (const DamagedRow& row : lost) {
            losses->push_back(fmt::format("disk {} has lost its last writes to chunk {}: {}",
                                          catalog_.disk(owner->disk).record.name, row.chunk.value,
                                          row.what));
        }
    }
    co_return Status();
}

/// Deletes journal rows that are folded, the oldest first.
Task<Status> PoolImpl::DropRows(const std::vector<std::string>& keys) {
    Status s;
    for (size_t next = 0; next < keys.size() && s.ok(); next += kRowsTogether) {
        const size_t end = std::min(keys.size(), next + kRowsTogether);
        Change change = [&keys, next, end](CommitContext& context) {
            for (size_t i = next; i < end; ++i) context.batch.Delete(keys[i]);
            return Status();
        };
        s = co_await Commit(std::move(change));
    }
    co_return s;
}

/// Until all is done the pool may be refused, with one line that says why. What it has lost is told
/// by the start that opens it: as long as the journal is there, the next one finds it again.
Task<Status> PoolImpl::Recover(const std::function<Status()>& recovered) {
    Result<std::vector<JournalPart>> parts = ReadJournal(*core_.metadata().View());
    if (!parts.ok()) co_return parts.error();
    for (const JournalPart& part : parts.value()) {  // before anything is changed
        if (!catalog_.OwnerOf(part.branch, part.generation)) co_return NobodySees(part);
    }
    Status s;
    size_t changes = 0;
    std::vector<std::string> losses, keys;
    for (JournalPart& part : parts.value()) {
        s = co_await FoldPart(part, &losses);
        if (!s.ok()) break;
        changes += part.changes.size();
        std::move(part.keys.begin(), part.keys.end(), std::back_inserter(keys));
    }
    co_await committer_.Idle();
    if (s.ok() && recovered) s = recovered();
    if (s.ok()) s = co_await DropRows(keys);
    co_await committer_.Idle();
    if (!s.ok()) co_return s;
    for (const std::string& loss : losses) Log(LogLevel::kError, loss);
    for (const uint64_t region : allocator_.renewed()) {
        Log(LogLevel::kError,
            fmt::format("allocator region {} is damaged; all of it counts as used from now on",
                        region));
    }
    if (changes > 0) {
        Log(LogLevel::kInfo, fmt::format("folded {} map changes of the journal", changes));
    }
    co_return s;
}

}  // namespace varve::cow
