#include "cow/integrity/checksummer.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/log.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Checksums that are committed together: of 32 MiB.
constexpr size_t kStoreTogether = 8192;

}  // namespace

Checksummer::Checksummer(Core& core, const Lanes& lanes, Catalog& catalog, Committer& committer,
                         std::function<Task<void>(DiskId)> folded)
    : core_(core),
      lanes_(lanes),
      catalog_(catalog),
      committer_(committer),
      folded_(std::move(folded)),
      wake_(core.home()),
      changed_(core.home()) {}

void Checksummer::Start() {
    running_ = true;
    idle_ = false;
    Spawn(Run());
}

Task<void> Checksummer::Stop() {
    stopping_ = true;
    wake_.WakeAll();
    while (running_) co_await changed_.Wait();
}

void Checksummer::Add(SnapshotId snapshot) {
    pending_[catalog_.snapshot(snapshot).generation] = snapshot;
    if (running_) idle_ = false;
    wake_.WakeAll();
}

void Checksummer::Wake() {
    if (!running_ || !idle_ || pending_.empty()) return;
    idle_ = false;
    wake_.WakeAll();
}

uint64_t Checksummer::pending() const {
    uint64_t count = 0;
    for (const auto* some : {&pending_, &given_up_}) {
        for (const auto& [generation, id] : *some) count += catalog_.snapshots().contains(id);
    }
    return count;
}

Task<void> Checksummer::WaitIdle() {
    while (!idle_) co_await changed_.Wait();
}

Task<void> Checksummer::Run() {
    Status s = co_await ReadMarks();
    while (s.ok() && !stopping_ && !core_.failed) {
        if (pending_.empty() || core_.metadata().full()) {
            idle_ = true;
            changed_.WakeAll();
            co_await wake_.Wait();
            continue;
        }
        // The oldest first: those that come after it on its line need not look at what it sees.
        const auto [generation, id] = *pending_.begin();
        const Status summed = co_await SumSnapshot(id);
        if (core_.closing || core_.failed) break;
        if (!summed.ok() && summed.error().kind == ErrorKind::kNoSpace) continue;
        pending_.erase(generation);
        if (summed.ok()) continue;
        given_up_[generation] = id;
        Log(LogLevel::kError,
            fmt::format("snapshot {} lacks checksums: {}", id.value, summed.error().message));
    }
    if (!s.ok()) Log(LogLevel::kError, "checksums cannot be made: " + s.error().message);
    idle_ = true;
    running_ = false;
    changed_.WakeAll();
}

Task<Status> Checksummer::ReadMarks() {
    std::vector<SnapshotId> marked;
    Status s;
    co_await Hop(core_.auditor());
    {
        const auto view = core_.metadata().View();
        const auto cursor = view->Range("K", PrefixEnd("K"));
        for (cursor->Seek("K"); cursor->valid(); cursor->Next()) {
            marked.push_back(SnapshotId{KeyNumber(cursor->key(), 0)});
        }
        s = cursor->status();
    }
    co_await Hop(core_.home());
    for (const auto& [id, record] : catalog_.snapshots()) {
        const bool done = std::binary_search(marked.begin(), marked.end(), id);
        if (!done) pending_[record.generation] = id;
    }
    co_return s;
}

FrozenWalk::View Checksummer::ViewOf(const SnapshotRecord& record) const {
    const History& history = catalog_.history();
    FrozenWalk::View view;
    const bool early = Mutated(Mutant::kSumOfUnsealed);
    view.line = history.LineOf(record.branch, early ? kHead : record.generation);
    // Only those that are completely summed end the way down.
    const auto summed = [this](Generation generation) {
        return !pending_.contains(generation) && !given_up_.contains(generation);
    };
    view.stretches = history.StretchesDownTo(
        record.branch, Generation{record.generation.value - 1},
        [&](BranchId id, Generation from) { return history.SnapshotDownFrom(id, from, summed); });
    view.stretches.front().to = early ? kHead : record.generation;
    return view;
}

Task<Status> Checksummer::SumSnapshot(SnapshotId id) {
    if (!catalog_.snapshots().contains(id)) co_return Status();
    if (!Mutated(Mutant::kSummedTooEarly)) co_await folded_(catalog_.snapshot(id).disk);
    if (!catalog_.snapshots().contains(id)) co_return Status();
    const SnapshotRecord record = catalog_.snapshot(id);
    LaneState& lane = lanes_.Of(record.disk);
    FrozenWalk walk(ViewOf(record));
    std::vector<Sum> sums;
    Errno unreadable = 0;
    FrozenVisitor visitor;
    visitor.wants = [](const FrozenBlock& block) { return !block.sum; };
    visitor.read = [&](FrozenBlock& block, uint32_t sum) {
        if (block.error != 0) {
            unreadable = block.error;
        } else {
            sums.push_back({block.place, block.birth, sum});
        }
    };
    while (!walk.done()) {
        const Pacer::Step step = core_.pacer.Begin();
        Status s = co_await StepFrozen(core_, lane, walk, visitor);
        if (!s.ok()) co_return s;
        if (!catalog_.snapshots().contains(id)) co_return Status();
        const bool last = walk.done() && unreadable == 0;
        if (walk.done() || sums.size() >= kStoreTogether) {
            if (core_.metadata().full()) co_return MakeError(ErrorKind::kNoSpace, "no room");
            std::vector<Sum> some = std::exchange(sums, {});
            s = co_await Store(id, std::move(some), last);
            if (!s.ok()) co_return s;
        }
        co_await core_.pacer.Rest(step, Pacer::Work::kChecksums);
    }
    if (unreadable != 0) co_return SystemError(unreadable, "its data cannot be read");
    co_return Status();
}

/// Adds `sums` to their rows, which only this changes, in one commit, with the snapshot's mark.
Task<Status> Checksummer::Store(SnapshotId id, std::vector<Sum> sums, bool mark) {
    std::vector<uint64_t> rows;
    std::vector<std::string> values;
    Status s;
    co_await Hop(core_.auditor());
    std::sort(sums.begin(), sums.end(),
              [](const Sum& a, const Sum& b) { return a.place < b.place; });
    const auto view = core_.metadata().View();
    for (size_t i = 0; i < sums.size() && s.ok();) {
        const uint64_t index = sums[i].place / kSumsRowBlocks;
        const Result<std::optional<std::string>> value = view->Get(SumsKey(index));
        if (!value.ok()) s = value.error();
        std::optional<SumsRow> row;
        if (value.ok() && value.value()) row = SumsRow::Decode(*value.value());
        SumsRow::Slots slots = row ? row->Unpack() : SumsRow::Slots{};
        for (; i < sums.size() && sums[i].place / kSumsRowBlocks == index; ++i) {
            slots[sums[i].place % kSumsRowBlocks] = {sums[i].birth, sums[i].sum};
        }
        rows.push_back(index);
        values.push_back(SumsRow(slots).Encode());
    }
    co_await Hop(core_.home());
    if (!s.ok()) co_return s;
    Change change = [&](CommitContext& context) {
        // While the snapshot is there, its blocks are used: no region of theirs loses its rows.
        if (!context.catalog.snapshots().contains(id)) return Status();
        for (size_t i = 0; i < rows.size(); ++i) {
            context.batch.Put(SumsKey(rows[i]), std::move(values[i]));
        }
        if (mark) context.batch.Put(SummedKey(id), "");
        return Status();
    };
    s = co_await committer_.Commit(std::move(change), core_.home());
    if (!s.ok()) co_return s;
    summed_blocks_ += sums.size();
    for (const auto& lane : lanes_) {
        co_await Hop(lane->executor);
        lane->sums.Forget(rows);
    }
    co_await Hop(core_.home());
    co_return s;
}

}  // namespace varve::cow
