#include "cow/space/leases.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/log.h"

namespace varve::cow {
namespace {

/// Rows read on the way to a lease before the data file is grown, or a tight region taken, instead.
constexpr uint64_t kKnowBeforeGrowing = 1024;
/// Regions provisioned ahead of demand: 32 MiB.
constexpr size_t kReadyAhead = 2;
/// A read of rows that takes so long is of a device that fails, and whoever needs a lease waits:
/// no others are tried for so many times as long.
constexpr int64_t kSlowReadUs = 1'000'000;
constexpr int64_t kRestAfterSlow = 10;

}  // namespace

Leases::Leases(Core& core, Allocator& allocator)
    : core_(core), allocator_(allocator), providing_(core.home()), background_(core.home()) {}

Task<Result<std::vector<Extent>>> Leases::Take(uint64_t most) {
    for (;;) {
        std::optional<uint64_t> region = allocator_.FindReady();
        // In a pool that is nearly full many small leases must not each try to make the file grow.
        if (!region && refused_) region = allocator_.FindTight();
        if (region) {
            const std::vector<uint64_t> held{*region};
            allocator_.Hold(held);
            const Status opened = co_await OpenOne(*region);
            std::vector<Extent> extents;
            if (opened.ok()) extents = allocator_.Take(*region, most);
            allocator_.Unhold(held);
            if (!opened.ok()) allocator_.SetAside(*region, opened.error());
            if (!opened.ok()) Log(LogLevel::kError, opened.error().message);
            if (extents.empty()) continue;  // others were faster
            Refilled();
            co_return std::move(extents);
        }
        const bool refused_before = refused_;
        Status s;
        co_await providing_.Lock();
        if (refused_ == refused_before) s = co_await Provide(1, true);
        providing_.Unlock();
        if (s.ok()) continue;
        if (s.error().kind != ErrorKind::kNoSpace) co_return s.error();
        if (!refused_ || !allocator_.FindTight()) co_return s.error();
    }
}

void Leases::Refilled() {
    const bool low = allocator_.ready() < kReadyAhead;
    if (low && !ahead_ && !refused_ && !core_.closing) Spawn(ProvideAhead());
}

Task<Status> Leases::OpenOne(uint64_t region) {
    if (!allocator_.NeedsRow(region)) co_return Status();
    co_await Hop(core_.loader());
    const Result<std::optional<std::string>> row = core_.metadata().View()->Get(RegionKey(region));
    co_await Hop(core_.home());
    if (!row.ok()) co_return row.error();
    co_return allocator_.Learn(region, row.value());
}

Task<void> Leases::Open(std::vector<uint64_t> regions) {
    std::erase_if(regions, [this](uint64_t region) { return !allocator_.NeedsRow(region); });
    if (regions.empty()) co_return;
    std::vector<Result<std::optional<std::string>>> rows;
    co_await Hop(core_.loader());
    const std::unique_ptr<MetadataView> view = core_.metadata().View();
    for (const uint64_t region : regions) rows.push_back(view->Get(RegionKey(region)));
    co_await Hop(core_.home());
    for (size_t i = 0; i < regions.size(); ++i) {
        Status s = rows[i].status();
        if (s.ok()) s = allocator_.Learn(regions[i], rows[i].value());
        if (!s.ok()) allocator_.SetAside(regions[i], s.error());
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

/// Until `wanted` regions are ready. Not `urgent`: not by reading all rows there are. REQUIRES:
/// providing_ is locked.
Task<Status> Leases::Provide(size_t wanted, bool urgent) {
    bool full = false;  // the file cannot grow: then every row there is may be worth reading
    uint64_t rows = 0;
    while (allocator_.ready() < wanted) {
        Status s;
        const std::optional<uint64_t> bare = allocator_.FindBare();
        const bool search =
            rows < kKnowBeforeGrowing || (urgent && full && !allocator_.FindTight());
        if (bare) {
            s = co_await Reprovision(*bare);
        } else if (search && !allocator_.all_known()) {
            co_await Learn(&rows);
        } else if (!full) {
            s = co_await Grow();
            full = !s.ok() && s.error().kind == ErrorKind::kNoSpace;
            if (full && (!allocator_.all_known() || MayReadOn())) s = Status();
        } else if (urgent && MayReadOn() && !allocator_.FindTight()) {
            co_await ReadOn();
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

/// Reads the rows of a page of regions that are not known yet, and adds how many there are, or one
/// if there is none. What cannot be read counts as full.
Task<void> Leases::Learn(uint64_t* rows) {
    const uint64_t page = *allocator_.UnknownPage();
    PageReader reader(page, allocator_.RegionsIn(page));
    co_await ReadPage(reader);
    *rows += reader.rows() + 1;
    if (!reader.done()) KeepUnfinished(std::move(reader));
}

/// Goes on with a page of which some rows were not tried. Only if nothing else is left: each try
/// may take long.
Task<void> Leases::ReadOn() {
    PageReader reader = std::move(unfinished_.front());
    unfinished_.pop_front();
    untried_ -= reader.untried();
    co_await ReadPage(reader);
    if (!reader.done()) KeepUnfinished(std::move(reader));
}

bool Leases::MayReadOn() const {
    Clock* const clock = core_.environment.clock;
    return !unfinished_.empty() && (!clock || clock->NowUs() >= read_on_from_us_);
}

void Leases::KeepUnfinished(PageReader reader) {
    Log(LogLevel::kError,
        fmt::format("up to {} of the allocator's regions from {} on were not read, as it takes "
                    "long: {}; that is tried again when nothing else is free",
                    reader.untried(), reader.first(), reader.why().error().message));
    untried_ += reader.untried();
    unfinished_.push_back(std::move(reader));
}

/// About 2 ms; where the device fails, some seconds.
Task<void> Leases::ReadPage(PageReader& reader) {
    Clock* const clock = core_.environment.clock;
    co_await Hop(core_.loader());
    const int64_t begun_us = clock ? clock->NowUs() : 0;
    reader.Read(*core_.metadata().View(), clock);
    const int64_t now_us = clock ? clock->NowUs() : 0;
    co_await Hop(core_.home());
    const int64_t took_us = now_us - begun_us;
    if (took_us >= kSlowReadUs) read_on_from_us_ = now_us + kRestAfterSlow * took_us;
    const uint64_t before = allocator_.set_aside();
    allocator_.LearnPage(reader.page(), reader.states());
    const uint64_t aside = allocator_.set_aside() - before;
    if (aside > 0) {
        Log(LogLevel::kError,
            fmt::format("{} of the allocator's regions from {} on cannot be read{}; they are not "
                        "written to until the next start",
                        aside, reader.first(),
                        reader.why().ok() ? "" : ": " + reader.why().error().message));
    }
}

Task<Status> Leases::Grow() {
    const Result<uint64_t> region = allocator_.NextRegion();
    if (!region.ok()) co_return region.error();
    SpaceStore& space = *core_.environment.space;
    const uint64_t offset = region.value() * kRegionBytes;
    co_await Hop(core_.loader());
    Status s = space.Provision(offset, kRegionBytes);
    if (!s.ok() && s.error().kind == ErrorKind::kNoSpace) {
        // The file may have it already, of a growth that a crash met: then it gives that back
        // first.
        const uint64_t kept = offset == 0 ? kBlockBytes : 0;  // the superblock
        space.Discard(offset + kept, kRegionBytes - kept);
        s = space.Provision(offset, kRegionBytes);
    }
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
    const Status ignored =
        co_await Provide(kReadyAhead, false);  // who needs blocks will see it, too
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
