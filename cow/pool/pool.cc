// Opening and closing a pool, its status, and where space comes from when it is scarce.
#include "cow/pool/pool.h"

#include <algorithm>

#include "base/log.h"
#include "cow/pool/pool_impl.h"

namespace varve::cow {
namespace {

/// Of the pool's capacity, free: with less, deletions do not give way to requests.
constexpr uint64_t kScarcePart = 16;
constexpr uint64_t kScarceBytesMax = 1 << 30;
/// A lease is idle if so many commits of the timer came without a use of it. How many are given
/// back in one go; others wait for the next.
constexpr uint64_t kQuietTimes = 10;
constexpr size_t kRecallTogether = 256;
/// How long that holds for whoever asks for the status and waits.
constexpr int64_t kHurryUs = 1'000'000;
/// What takes longer is told as being waited for.
constexpr int64_t kToldUs = 1'000'000;

}  // namespace

PoolImpl::PoolImpl(Environment environment, PoolOptions options, Catalog catalog)
    : core_(std::move(environment)),
      lanes_(core_, options.map_cache_bytes),
      options_(options),
      catalog_(std::move(catalog)),
      allocator_(core_.metadata(), *core_.environment.space, catalog_.mutable_pool(),
                 options.capacity_max),
      leases_(core_, allocator_),
      reclaimer_(
          core_, catalog_, committer_, [this] { return Scarce(); }, [this] { RefreshLines(); },
          options.reclaim_step_chunks, options.reclaim_read_after),
      committer_(core_, lanes_, catalog_, allocator_, leases_,
                 [this](const std::vector<NotePlace>& notes) { reclaimer_.Wake(notes); }),
      checksummer_(core_, lanes_, catalog_, committer_,
                   [this](DiskId id) { return FoldSealed(id); }),
      scrubber_(core_, lanes_, catalog_, [this](DiskId id) { return FoldSealed(id); }),
      ticker_(core_.environment.clock, core_.home()),
      commands_(core_.home()),
      command_ended_(core_.home()),
      sealed_seen_(core_.home()),
      exports_made_(core_.home()),
      export_closed_(core_.home()),
      visit_ended_(core_.home()),
      refreshed_(core_.home()),
      counted_(core_.home()),
      background_(core_.home()) {
    core_.on_failure = [this] {
        for (const auto& lane : lanes_) lane->journal.TellOfRoom();
    };
    core_.owed_by_lane = core_.metadata().Space().owed / core_.environment.lanes.size();
}

PoolImpl::~PoolImpl() {
    VARVE_CHECK(disks_.empty() && snapshots_.empty());
}

Task<Result<std::unique_ptr<Pool>>> Pool::Open(Environment environment, PoolOptions options,
                                               std::function<Status()> recovered) {
    VARVE_CHECK(!environment.lanes.empty());
    const std::unique_ptr<MetadataView> view = environment.metadata->View();
    Result<Catalog> catalog = Catalog::Load(*view);
    if (!catalog.ok()) co_return catalog.error();
    auto pool =
        std::make_unique<PoolImpl>(std::move(environment), options, std::move(catalog.value()));
    const Status s = co_await pool->Recover(recovered);
    if (!s.ok()) {
        co_await pool->Abandon();
        co_return s.error();
    }
    pool->Start();
    co_return std::unique_ptr<Pool>(std::move(pool));
}

void PoolImpl::Start() {
    core_.opened = true;
    for (const auto& [id, disk] : catalog_.disks()) {
        AddHead(id);
        disks_.at(id).stored = true;
        if (disk.record.trimming) {
            Disk& shrunk = disks_.at(id);
            shrunk.busy = shrunk.trimming = shrunk.fenced = true;
            Spawn(Trimmed(id));
        }
    }
    reclaimer_.Start();
    checksummer_.Start();
}

Task<void> PoolImpl::Trimmed(DiskId id) {
    background_.Enter();
    const Status s = co_await FinishShrink(id);
    (void)s;  // it is in the log, and the disk stays busy
    background_.Leave();
}

Task<Status> PoolImpl::Shutdown() {
    core_.closing = true;
    co_await commands_.Drained();
    VARVE_CHECK(exports_.empty());
    co_await background_.Drained();
    co_await reclaimer_.Stop();
    co_await checksummer_.Stop();
    co_await FoldAll();  // together: one by one, each disk would pay for a sync and a commit
    Status result;
    while (!disks_.empty()) {
        const DiskId id = disks_.begin()->first;
        const Status s = co_await Settle(*disks_.at(id).head);
        if (!s.ok()) result = s;
        co_await DropHead(id);
    }
    co_await committer_.Idle();
    if (result.ok() && !core_.failed) result = co_await EndRing();
    co_await Abandon();
    co_await ticker_.Idle();
    co_return result;
}

/// Waits for what goes on by itself, on home and on the lanes.
Task<void> PoolImpl::Abandon() {
    co_await committer_.Idle();
    co_await leases_.Idle();
    for (const auto& lane : lanes_) {
        co_await Hop(lane->executor);
        co_await lane->journal.Idle();
    }
    co_await Hop(core_.home());
}

Task<Status> PoolImpl::Commit(Change change) {
    co_return co_await committer_.Commit(std::move(change), core_.home());
}

Task<Status> PoolImpl::CommitHead(DiskId disk, HeadCommit& commit, Executor& lane) {
    if (commit.rows.empty()) {
        PlainRows rows = TakePlain(commit);
        co_return co_await committer_.CommitPlain(std::move(rows), lane);
    }
    Change change = [this, disk, &commit](CommitContext& context) {
        return BuildHeadCommit(core_, context, disk, commit);
    };
    std::vector<uint64_t> regions = RegionsOf(FreedBy(commit));
    co_await Hop(core_.home());
    co_return co_await committer_.CommitIn(std::move(regions), std::move(change), lane);
}

Task<Result<std::vector<Extent>>> PoolImpl::LeaseBlocks(DiskId disk, Executor& lane, uint64_t most,
                                                        bool urgent) {
    co_await Hop(core_.home());
    most = std::max(most, options_.lease_blocks_min);
    Result<std::vector<Extent>> lease = co_await leases_.Take(most);
    if (!lease.ok() && lease.error().kind == ErrorKind::kNoSpace && urgent) {
        lease = co_await FindSpace(disk, most);
    }
    co_await Hop(lane);
    co_return lease;
}

/// The pool looks full: takes back what idle disks were handed, folds trims, and waits for
/// deletions under way, for kSpacePatienceUs at most. kNoSpace only when all of that gave nothing.
Task<Result<std::vector<Extent>>> PoolImpl::FindSpace(DiskId for_disk, uint64_t most) {
    const Error full = MakeError(ErrorKind::kNoSpace,
                                 "the pool is full; delete snapshots or disks, or enlarge it");
    std::vector<DiskId> others;  // that hold some
    bool changing = !reclaimer_.idle() || committer_.resting();
    for (const auto& [id, disk] : disks_) {
        changing |= disk.head->changed();
        if (id != for_disk && disk.head->has_lease()) others.push_back(id);
    }
    changing |= !others.empty();
    if (full_ && !changing && full_at_release_ == committer_.released_blocks()) co_return full;
    background_.Enter();
    const Pacer::Hurry hurry(core_.pacer, Pacer::Work::kSpace);
    co_await RecallLeases(std::move(others));
    Result<std::vector<Extent>> lease = co_await leases_.Take(most);
    if (!lease.ok()) {
        co_await FoldAll();
        co_await committer_.Settled();
        lease = co_await leases_.Take(most);
    }
    const Deadline deadline(core_.environment.clock, kSpacePatienceUs);
    for (bool more = true; !lease.ok() && more && !core_.closing && !deadline.over();) {
        // Once more after the last step: what it freed may not have been there at the one before.
        more = co_await reclaimer_.WaitStep();
        co_await committer_.Settled();
        lease = co_await leases_.Take(most);
    }
    full_ = !lease.ok();
    full_at_release_ = committer_.released_blocks();
    background_.Leave();
    co_return lease;
}

void PoolImpl::EndVisit(DiskId id) {
    if (--disks_.at(id).visitors == 0) visit_ended_.WakeAll();
}

Task<void> PoolImpl::RecallLeases(std::vector<DiskId> ids) {
    for (const DiskId id : ids) {
        const auto disk = disks_.find(id);
        if (disk == disks_.end()) continue;
        Head& head = *disk->second.head;
        ++disk->second.visitors;
        co_await Hop(head.executor());
        const std::vector<Extent> extents = head.TakeLease();
        co_await Hop(core_.home());
        EndVisit(id);
        leases_.Release(extents);
    }
}

/// Disks that have taken no new blocks for a while need none in hand.
Task<void> PoolImpl::ReturnIdleLeases() {
    std::vector<DiskId> idle;
    for (auto& [id, disk] : disks_) {
        const uint64_t allocations = disk.head->allocations();
        const bool quiet = disk.head->has_lease() && allocations == disk.allocations;
        disk.allocations = allocations;
        disk.quiet = quiet ? disk.quiet + 1 : 0;
        if (disk.quiet >= kQuietTimes && idle.size() < kRecallTogether) idle.push_back(id);
    }
    if (idle.empty()) co_return;
    background_.Enter();
    co_await RecallLeases(std::move(idle));
    background_.Leave();
}

Task<void> PoolImpl::CommitOne(DiskId id, bool fold, Join* join) {
    Head& head = *disks_.at(id).head;
    ++disks_.at(id).visitors;
    co_await Hop(head.executor());
    // A failure shows in the pool's state.
    const Errno ignored = fold ? co_await head.Fold() : co_await head.Commit();
    (void)ignored;
    co_await Hop(core_.home());
    EndVisit(id);
    join->Done();
}

Task<void> PoolImpl::CommitChanged(bool fold) {
    std::vector<DiskId> changed;
    for (const auto& [id, disk] : disks_) {
        if (disk.head->changed()) changed.push_back(id);
    }
    if (changed.empty() || core_.failed) co_return;
    background_.Enter();
    Join join(static_cast<uint32_t>(changed.size()));
    for (const DiskId id : changed) Spawn(CommitOne(id, fold, &join));
    co_await join;
    background_.Leave();
}

/// How long a lane has had requests of which none ended, as far as looks have shown. Each call is
/// one; the commit timer makes some.
int64_t PoolImpl::StandstillUs() {
    const int64_t now = ticker_.NowUs();
    int64_t longest = 0;
    size_t i = 0;
    for (const auto& lane : lanes_) {
        if (lane_looks_.size() == i) lane_looks_.emplace_back();
        LaneLook& look = lane_looks_[i++];
        const uint64_t ended = lane->load.ended();
        const bool busy = lane->load.begun() != ended;
        if (!busy || !look.busy || ended != look.ended) look = {busy, ended, now};
        longest = std::max(longest, now - look.since_us);
    }
    return longest;
}

Task<void> PoolImpl::CommitDirty() {
    WatchHealth();
    StandstillUs();
    co_await CommitChanged(lanes_.crowded() || ring_->crowded());
    co_await ReturnIdleLeases();
    background_.Enter();
    co_await lanes_.Balance();
    background_.Leave();
}

/// Brings all that has been answered into map rows, which is where figures are taken from.
Task<void> PoolImpl::FoldAll() {
    co_await CommitChanged(true);
}

Task<Result<PoolStatus>> PoolImpl::GetStatus() {
    PoolStatus status;
    status.approximate = !co_await Refreshed();
    for (const Waits::Entry& entry : core_.waits.List(kToldUs)) {
        status.waiting.push_back({entry.what, static_cast<uint64_t>(entry.us / 1'000'000)});
    }
    const int64_t standstill = StandstillUs();
    if (standstill >= kToldUs) {
        status.waiting.push_back({"requests", static_cast<uint64_t>(standstill / 1'000'000)});
    }
    status.used = catalog_.pool().used_blocks * kBlockBytes;
    status.capacity = std::max(allocator_.Capacity(), status.used);
    status.home_reads = allocator_.home_reads();
    status.leased = allocator_.leased_blocks() * kBlockBytes;
    status.disks = catalog_.disks().size();
    status.snapshots = catalog_.snapshots().size();
    status.reclaim_pending =
        std::max<uint64_t>(reclaimer_.jobs_pending(), reclaimer_.idle() ? 0 : 1);
    status.reclaim_set_aside = reclaimer_.set_aside();
    status.reclaimed_chunks = reclaimer_.swept_chunks();
    status.reclaimed_bytes = reclaimer_.freed_blocks() * kBlockBytes;
    status.commits = committer_.commits();
    status.map_cache_limit = options_.map_cache_bytes;
    status.checksums_pending = checksummer_.pending();
    status.checksummed_bytes = checksummer_.summed_blocks() * kBlockBytes;
    status.scrub_running = scrubber_.running();
    status.scrubbed_bytes = scrubber_.verified_blocks() * kBlockBytes;
    status.damaged_bytes = core_.damaged_blocks() * kBlockBytes;
    status.failed = core_.failed;
    status.failure = core_.failed ? core_.failure() : reclaimer_.failure();
    status.map_cache_used = map_cache_used_;
    Judge(status);
    co_return status;
}

Task<Result<CheckReport>> PoolImpl::Check() {
    const bool fresh = co_await Refreshed();
    (void)fresh;  // what is not in map rows is in the journal, which is verified too
    co_await Hop(core_.auditor());
    Result<CheckReport> report = CheckMetadata(core_.metadata());
    co_await Hop(core_.home());
    co_return report;
}

Task<Result<ScrubReport>> PoolImpl::Scrub(std::optional<std::string> disk) {
    std::optional<DiskId> id;
    if (disk) {
        const Result<DiskId> found = catalog_.FindDisk(*disk);
        if (!found.ok()) co_return found.error();
        id = found.value();
    }
    background_.Enter();
    co_await FoldAll();
    Result<ScrubReport> report = co_await scrubber_.Run(id);
    background_.Leave();
    co_return report;
}

Task<void> PoolImpl::WaitForReclaim() {
    const Pacer::Hurry hurry(core_.pacer, Pacer::Work::kSpace);
    co_await FoldAll();
    co_await reclaimer_.WaitIdle();
    co_await committer_.Idle();
}

Task<void> PoolImpl::WaitForChecksums() {
    const Pacer::Hurry hurry(core_.pacer, Pacer::Work::kChecksums);
    co_await checksummer_.WaitIdle();
}

void PoolImpl::HurryReclaim() {
    core_.pacer.HurryFor(Pacer::Work::kSpace, kHurryUs);
}

/// Whether writers may soon have to wait for deletions.
bool PoolImpl::Scarce() const {
    const uint64_t capacity = allocator_.Capacity();
    const uint64_t used = catalog_.pool().used_blocks * kBlockBytes;
    return used + std::min(capacity / kScarcePart, kScarceBytesMax) >= capacity;
}

}  // namespace varve::cow
