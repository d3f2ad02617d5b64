#include "cow/space/leases.h"

namespace varve::cow {
namespace {

/// Rows read on the way to a lease before the data file is grown instead.
constexpr uint64_t kKnowBeforeGrowing = 1024;
/// Rows read without letting others use the loader: about 2 ms.
constexpr uint64_t kKnowTogether = 128;
/// Regions provisioned ahead of demand: 32 MiB.
constexpr size_t kReadyAhead = 2;

}  // namespace

Leases::Leases(Core& core, Allocator& allocator)
    : core_(core), allocator_(allocator), providing_(core.home()), background_(core.home()) {}

Task<Result<std::vector<Extent>>> Leases::Take(uint64_t most) {
    for (;;) {
        std::vector<Extent> extents = allocator_.TakeReady(most);
        if (!extents.empty()) {
            const bool low = allocator_.ready() < kReadyAhead;
            if (low && !ahead_ && !refused_ && !core_.closing) Spawn(ProvideAhead());
            co_return std::move(extents);
        }
        // In a pool that is nearly full many small leases must not each try to make the file grow.
        if (refused_) extents = allocator_.TakeTight(most);
        if (!extents.empty()) co_return std::move(extents);
        const bool refused_before = refused_;
        Status s;
        co_await providing_.Lock();
        if (refused_ == refused_before) s = co_await Provide(1);
        providing_.Unlock();
        if (s.ok()) continue;
        if (s.error().kind != ErrorKind::kNoSpace) co_return s.error();
        extents = allocator_.TakeTight(most);
        if (extents.empty()) co_return s.error();
        co_return std::move(extents);
    }
}

void Leases::Release(const std::vector<Extent>& extents) {
    for (const Extent& extent : extents) allocator_.Release(extent);
    refused_ = false;
    if (!giving_ && allocator_.any_surplus()) Spawn(GiveBack());
}

Task<void> Leases::Idle() {
    co_await background_.Drained();
}

/// Until `wanted` regions are ready. REQUIRES: providing_ is locked.
Task<Status> Leases::Provide(size_t wanted) {
    bool full = false;  // the file cannot grow: then every row there is may be worth reading
    uint64_t known = 0;
    while (allocator_.ready() < wanted) {
        Status s;
        const std::optional<uint64_t> bare = allocator_.FindBare();
        const bool learn = !allocator_.all_known() && (full || known < kKnowBeforeGrowing);
        if (bare) {
            s = co_await Reprovision(*bare);
        } else if (learn) {
            known += kKnowTogether;
            s = co_await Learn(kKnowTogether);
        } else if (!full) {
            s = co_await Grow();
            full = !s.ok() && s.error().kind == ErrorKind::kNoSpace;
            if (full && !allocator_.all_known()) s = Status();
        } else {
            s = MakeError(ErrorKind::kNoSpace, "the pool is full");
        }
        if (!s.ok()) {
            refused_ = true;
            co_return s;
        }
    }
    refused_ = false;
    co_return Status();
}

/// Reads the rows of regions that are not known yet.
Task<Status> Leases::Learn(uint64_t most) {
    const std::vector<uint64_t> regions = allocator_.Unknown(most);
    std::vector<std::optional<std::string>> rows;
    Status s;
    co_await Hop(core_.loader());
    const std::unique_ptr<MetadataView> view = core_.metadata().View();
    for (const uint64_t region : regions) {
        Result<std::optional<std::string>> row = view->Get(RegionKey(region));
        if (!row.ok()) {
            s = row.error();
            break;
        }
        rows.push_back(std::move(row.value()));
    }
    co_await Hop(core_.home());
    for (size_t i = 0; i < rows.size() && s.ok(); ++i) s = allocator_.Learn(regions[i], rows[i]);
    co_return s;
}

Task<Status> Leases::Grow() {
    const Result<uint64_t> region = allocator_.NextRegion();
    if (!region.ok()) co_return region.error();
    co_await Hop(core_.loader());
    Status s = core_.environment.space->Provision(region.value() * kRegionBytes, kRegionBytes);
    co_await Hop(core_.home());
    if (s.ok()) allocator_.AddRegion();
    co_return s;
}

/// The region is wholly free, and was discarded by this run or, who knows, by an earlier one. If it
/// was not, it may hold the very space that is missing: then it gives that back first.
Task<Status> Leases::Reprovision(uint64_t region) {
    SpaceStore& space = *core_.environment.space;
    co_await Hop(core_.loader());
    Status s = space.Provision(region * kRegionBytes, kRegionBytes);
    if (!s.ok() && region > 0) {
        space.Discard(region * kRegionBytes, kRegionBytes);
        s = space.Provision(region * kRegionBytes, kRegionBytes);
    }
    co_await Hop(core_.home());
    if (s.ok()) allocator_.Provisioned(region);
    co_return s;
}

Task<void> Leases::ProvideAhead() {
    ahead_ = true;
    background_.Enter();
    co_await providing_.Lock();
    const Status ignored = co_await Provide(kReadyAhead);  // who needs blocks will see it, too
    (void)ignored;
    providing_.Unlock();
    background_.Leave();
    ahead_ = false;
}

Task<void> Leases::GiveBack() {
    giving_ = true;
    background_.Enter();
    while (const std::optional<uint64_t> region = allocator_.TakeSurplus()) {
        const Pacer::Step step = core_.pacer.Begin();
        co_await Hop(core_.loader());
        core_.environment.space->Discard(*region * kRegionBytes, kRegionBytes);
        co_await Hop(core_.home());
        allocator_.Discarded(*region);
        co_await core_.pacer.Rest(step, Pacer::Work::kSpace);
    }
    background_.Leave();
    giving_ = false;
}

}  // namespace varve::cow
