// Recovery: folds the journal that a crash left into map rows, before anything else is done with
// the pool. Interrupted by another crash, it begins again: docs/design/ring.md.
#include <fmt/format.h>

#include <algorithm>

#include "base/log.h"
#include "cow/format/runs.h"
#include "cow/journal/ring_reader.h"
#include "cow/mutants.h"
#include "cow/pool/pool_impl.h"
#include "cow/volume/block_sum.h"
#include "cow/volume/transfers.h"

namespace varve::cow {
namespace {

/// Chunks that are folded in one commit.
constexpr size_t kFoldTogether = 256;
/// Journal rows that are deleted in one commit.
constexpr size_t kRowsTogether = 1024;
/// Entries whose blocks are looked at together: 8 MiB at most.
constexpr size_t kVerifyTogether = 32;
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

/// What is told once the pool is open, and keys of journal rows that are folded.
struct PoolImpl::Recovered {
    std::vector<std::string> losses, keys;
    size_t changes = 0;
};

Task<Status> PoolImpl::FoldParts(const std::vector<JournalPart>& parts, Recovered* recovered) {
    Status s;
    for (const JournalPart& part : parts) {
        s = co_await FoldPart(part, &recovered->losses);
        if (!s.ok()) break;
        recovered->changes += part.changes.size();
    }
    co_await committer_.Idle();
    co_return s;
}

/// The journal of a pool that was last opened before there was a ring.
Task<Status> PoolImpl::FoldRows(Recovered* recovered) {
    const Result<std::vector<JournalPart>> parts = ReadJournal(*core_.metadata().View());
    if (!parts.ok()) co_return parts.error();
    for (const JournalPart& part : parts.value()) {  // before anything is changed
        if (!catalog_.OwnerOf(part.branch, part.generation)) co_return NobodySees(part);
    }
    for (const JournalPart& part : parts.value()) {
        recovered->keys.insert(recovered->keys.end(), part.keys.begin(), part.keys.end());
    }
    co_return co_await FoldParts(parts.value(), recovered);
}

// ---- the ring

/// An entry of the ring.
struct PoolImpl::Candidate {
    MapOwner owner;
    MapChange change;
    std::vector<uint32_t> sums;     // none: it is known to be durable
    uint64_t there = ~uint64_t{0};  // blocks of it that hold what they should, a bit each
};

/// Of the data file, through the first lane.
Task<Result<std::string>> PoolImpl::ReadData(uint64_t offset, uint64_t length) {
    LaneState& lane = **lanes_.begin();
    const AlignedBuffer memory = AllocateAligned(length);
    IoPieces pieces;
    AppendPiece(pieces, offset, memory.get(), length);
    co_await Hop(lane.executor);
    const Errno error = co_await TransferAll(lane.blocks, BlockIo::Kind::kRead, pieces);
    co_await Hop(core_.home());
    if (error != 0) co_return SystemError(error, "the journal in the data file cannot be read");
    co_return std::string(reinterpret_cast<const char*>(memory.get()), length);
}

Task<Status> PoolImpl::ReadRing(std::vector<Candidate>* candidates) {
    const Ring ring(ring_record_, 1);
    RingReader reader(ring_record_.tag);
    const Result<std::string> slots = co_await ReadData(ring.slot(0), ring.segment_bytes());
    if (!slots.ok()) co_return slots.error();
    for (uint64_t at = 0; at < ring.segment_bytes(); at += kSlotBytes) {
        reader.AddSlot(std::string_view(slots.value()).substr(at, kSlotBytes));
    }
    for (size_t i = 0; i < ring.segments(); ++i) {
        Result<std::string> segment = co_await ReadData(ring.offset(i), ring.segment_bytes());
        if (!segment.ok()) co_return segment.error();
        reader.AddSegment(std::move(segment.value()));
    }
    co_return reader.ForEach([&](const FrameEntry& entry, bool durable) {
        Candidate& candidate = candidates->emplace_back();
        candidate.owner = entry.owner;
        candidate.change = entry.change;
        if (durable || Mutated(Mutant::kTailUnverified)) return;
        for (uint64_t i = 0; i < entry.sums.size() / sizeof(uint32_t); ++i) {
            candidate.sums.push_back(entry.sum(i));
        }
    });
}

/// Looks at the blocks of some candidates, all at once.
Task<Status> PoolImpl::VerifySome(Candidate* begin, Candidate* end) {
    LaneState& lane = **lanes_.begin();
    std::vector<AlignedBuffer> memory;
    IoPieces pieces;
    for (const Candidate* c = begin; c != end; ++c) {
        memory.push_back(AllocateAligned(std::max<size_t>(1, c->sums.size()) * kBlockBytes));
        if (c->sums.empty()) continue;
        pieces.push_back(
            {c->change.place * kBlockBytes, {memory.back().get(), c->sums.size() * kBlockBytes}});
    }
    co_await Hop(lane.executor);
    const Errno error = co_await TransferAll(lane.blocks, BlockIo::Kind::kRead, pieces);
    co_await Hop(core_.home());
    if (error != 0) co_return SystemError(error, "what the journal speaks of cannot be read");
    for (Candidate* c = begin; c != end; ++c) {
        const std::byte* block = memory[static_cast<size_t>(c - begin)].get();
        for (size_t i = 0; i < c->sums.size(); ++i, block += kBlockBytes) {
            if (BlockSum(block) != c->sums[i]) c->there &= ~(uint64_t{1} << i);
        }
    }
    co_return Status();
}

/// What lies behind the last sync that is known to have ended counts if it is there.
Task<Status> PoolImpl::Verify(std::vector<Candidate>& candidates) {
    Status s;
    // The file may be shorter than what was written to it last, if that was never synced.
    for (const Candidate& c : candidates) {
        const uint64_t last = c.change.place + c.change.count - 1;
        const uint64_t known = catalog_.pool().region_count;
        if (c.change.place == 0 || last / kRegionBlocks < known) continue;
        if (!Mutated(Mutant::kRegionsNotKnown)) allocator_.Cover(last);
        if (c.sums.empty()) continue;
        for (uint64_t region = known; region <= last / kRegionBlocks; ++region) {
            s = core_.environment.space->Extend((region + 1) * kRegionBytes);
            if (!s.ok()) co_return s;
        }
    }
    for (size_t next = 0; next < candidates.size() && s.ok(); next += kVerifyTogether) {
        const size_t end = std::min(candidates.size(), next + kVerifyTogether);
        const auto unknown = [](const Candidate& c) { return !c.sums.empty(); };
        Candidate* const first = candidates.data() + next;
        Candidate* const last = candidates.data() + end;
        if (std::any_of(first, last, unknown)) s = co_await VerifySome(first, last);
    }
    co_return s;
}

/// Sorts what is there by whom it belongs to.
std::vector<JournalPart> PoolImpl::PartsOf(const std::vector<Candidate>& candidates) {
    std::map<std::pair<BranchId, Generation>, JournalPart> sorted;
    for (const Candidate& c : candidates) {
        Generation generation = c.owner.generation;
        if (!catalog_.OwnerOf(c.owner.branch, generation)) {
            // It belongs to a generation that was folded before its snapshot was deleted, or before
            // its disk was; or to one that began with a snapshot that was lost.
            const auto disk = catalog_.disks().find(c.owner.disk);
            if (disk == catalog_.disks().end()) continue;
            const DiskRecord& record = disk->second.record;
            if (record.branch != c.owner.branch || generation < record.generation) continue;
            if (Mutated(Mutant::kNewGenerationLost)) continue;
            generation = record.generation;
        }
        JournalPart& part = sorted[{c.owner.branch, generation}];
        part.branch = c.owner.branch;
        part.generation = generation;
        MapChange change = c.change;
        if (c.sums.empty()) {
            part.changes.push_back(change);
            continue;
        }
        for (uint64_t i = 0; i < c.change.count; ++i) {
            if ((c.there >> i & 1) == 0) continue;
            change.place = c.change.place + i;
            change.first = c.change.first + i;
            change.count = 1;
            part.changes.push_back(change);
        }
    }
    std::vector<JournalPart> parts;
    for (auto& [key, part] : sorted) {
        SortByChunk(part.changes);
        parts.push_back(std::move(part));
    }
    return parts;
}

Task<Status> PoolImpl::FoldRing(Recovered* recovered) {
    const Result<std::optional<std::string>> row = core_.metadata().View()->Get(RingKey());
    if (!row.ok()) co_return row.error();
    if (!row.value()) co_return Status();
    if (!Decode(*row.value(), &ring_record_)) {
        co_return MakeError(ErrorKind::kDamaged,
                            "the metadata's row about the journal is damaged; "
                            "restore the pool from a copy");
    }
    for (const Extent& extent : ring_record_.extents) allocator_.Reserve(extent);
    if (ring_record_.tag == 0) co_return Status();
    // What a killed process left in the page cache must be durable before rows name it.
    LaneState& lane = **lanes_.begin();
    co_await Hop(lane.executor);
    const Errno error = co_await Transfer(lane.blocks, BlockIo::Kind::kSync, 0, nullptr, 0);
    co_await Hop(core_.home());
    if (error != 0) co_return SystemError(error, "the data file cannot be synced");
    std::vector<Candidate> candidates;
    Status s = co_await ReadRing(&candidates);
    if (s.ok()) s = co_await Verify(candidates);
    if (!s.ok()) co_return s;
    const std::vector<JournalPart> parts = PartsOf(candidates);
    candidates.clear();
    co_return co_await FoldParts(parts, recovered);
}

void PoolImpl::Tell(const Recovered& recovered) {
    for (const std::string& loss : recovered.losses) Log(LogLevel::kError, loss);
    for (const uint64_t region : allocator_.renewed()) {
        Log(LogLevel::kError,
            fmt::format("allocator region {} is damaged; all of it counts as used from now on",
                        region));
    }
    if (recovered.changes == 0) return;
    Log(LogLevel::kInfo, fmt::format("folded {} map changes of the journal", recovered.changes));
}

/// Until all is done the pool may be refused, with one line that says why. What it has lost is told
/// by the start that opens it: as long as the journal is there, the next one finds it again.
Task<Status> PoolImpl::Recover(const std::function<Status()>& ready) {
    Recovered recovered;
    Status s = co_await FoldRows(&recovered);
    if (s.ok()) s = co_await FoldRing(&recovered);
    if (s.ok()) s = co_await FindRing();
    if (s.ok() && ready) s = ready();
    if (s.ok()) s = co_await DropRows(recovered.keys);
    if (s.ok()) s = co_await BeginRing();
    co_await committer_.Idle();
    if (s.ok()) Tell(recovered);
    co_return s;
}

}  // namespace varve::cow
