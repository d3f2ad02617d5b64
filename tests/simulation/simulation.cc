#include "tests/simulation/simulation.h"

#include "cow/format/format.h"
#include "tests/simulation/runner.h"

namespace varve::simulation {
namespace {

constexpr uint64_t kCaches[] = {256, 4096, 1 << 20};

}  // namespace

SimulationResult Runner::Run() {
    lanes_ = 1 + static_cast<unsigned>(dice_.Draw(4));
    data_traits_.alignment = dice_.Chance(0.25) ? 4096 : 512;
    data_traits_.reads_at_once = Dice::Of(options_.seed, kReadsAtOnce).Chance(0.25);
    pool_options_.map_cache_bytes = kCaches[dice_.Draw(3)];
    // All blocks of a region at once, or a few.
    Dice world = Dice::Of(options_.seed, kWorld);
    if (world.Chance(0.5)) pool_options_.lease_blocks_min = cow::kRegionBlocks;
    if (world.Chance(0.5)) {
        pool_options_.reclaim_step_chunks = 1 + world.Draw(3);
        pool_options_.reclaim_read_after = 1;  // as if there were many branches
    }
    if (world.Chance(0.5)) pool_options_.flatten_depth = 1 + world.Draw(3);
    // Its least, or a little more: it goes round.
    pool_options_.ring_bytes = world.Draw(3) << 18;
    Bound();
    Restart();
    if (tight_ && !limited_ && !options_.small && world.Chance(0.25)) FillUp(32 + world.Draw(400));
    while (round_ < options_.rounds && Fine() && !Struck()) {
        ++round_;
        Round();
    }
    result_.operations = media_.operations();
    if (Fine()) {
        Do(machine_->Stop());
        machine_.reset();
    } else {                       // the engine is in no state to be closed
        (void)machine_.release();  // NOLINT
    }
    return result_;
}

/// What metadata has room for.
void Runner::Bound() {
    Dice dice = Dice::Of(options_.seed, kMetadata);
    (void)dice.Chance(0.25);
    if (limited_)
        media_.metadata_capacity = media_.metadata_spare + (4 << 10) + dice.Draw(24 << 10);
}

void Runner::Round() {
    for (uint64_t i = 0; disks_.size() < scale_.disks_min && i < scale_.disks_min; ++i) {
        if (Fine() && media_.power() && !failed_) CreateDisk(i);
    }
    if (Fine() && media_.power() && !failed_) BusyRound();
    if (Fine() && media_.power() && !failed_ && !Struck()) QuietCommands();
    if (!media_.broken.empty()) Violation(media_.broken);
    Begin(kRound, 0);
    const bool must = !media_.power() || failed_ || reopen_ || Struck();
    if (Fine() && (must || dice_.Chance(0.3))) Reopen();
    if (!Fine()) return;
    const bool before = Struck();
    VerifyAll();
    if (!Fine() || (media_.power() && Struck() == before)) return;
    Reopen();
    if (Fine()) VerifyAll();
}

uint64_t Runner::RingBlocks() {
    cow::RingRecord ring;
    VARVE_CHECK(cow::Decode(media_.metadata()->at(cow::RingKey()), &ring));
    uint64_t blocks = 0;
    for (const cow::Extent& extent : ring.extents) blocks += extent.count;
    return blocks;
}

/// Leaves few blocks free, for all disks together: another disk, which nobody touches, has the
/// rest.
void Runner::FillUp(uint64_t free_blocks) {
    const uint64_t ring = RingBlocks();
    const uint64_t bytes = (cow::kRegionBlocks - 1 - ring - free_blocks) * cow::kBlockBytes;
    Do(machine_->Do(pool().CreateDisk(kBallast, bytes)));
    const auto opened = machine_->Do(pool().OpenExport(kBallast));
    if (!opened.ok()) return Violation(opened.error().message);
    cow::Volume& volume = *opened.value().volume;
    Errno error = Await(scheduler_, volume.executor(), volume.WriteZeroes(0, bytes, true));
    if (error == 0) error = Await(scheduler_, volume.executor(), volume.Flush());
    if (error != 0) Violation("the pool cannot be filled");
    Close(opened.value().id);
}

bool Runner::Open() {
    failed_ = reopen_ = false;
    machine_ = std::make_unique<Machine>(scheduler_, media_, lanes_, pool_options_, data_traits_);
    const Status s = machine_->Start();
    const bool excused = Faulty() || !media_.power();
    if (!s.ok() && !excused) Violation("does not open: " + s.error().message);
    scheduler_.RunAll();  // an interrupted shrink is finished before its disk may be opened
    return s.ok();
}

/// Off and on again, until nothing has met the recovery itself. A pool that was closed is as good
/// as killed.
void Runner::Restart() {
    for (bool whole = false; Fine() && !whole;) {
        if (media_.power()) media_.Cut();
        any_cut_ |= !media_.killed();
        media_.Restore();
        media_.faults = Faults{};
        if (machine_) past_.push_back(std::move(machine_));
        faulty_ = scrubbing_ = false;
        held_.clear();
        if (dice_.Chance(0.2)) media_.CutAfter(1 + dice_.Draw(40), dice_.Chance(0.5));
        const bool before = Struck();
        {
            const Exposed exposed(*this);
            whole = Open();
        }
        whole = whole && media_.power() && Struck() == before;
        CancelCut();
        if (whole || !Fine()) return;
        ++result_.crashes;
        if (machine_->runs()) (void)machine_->Stop();
    }
}

void Runner::Reopen() {
    Begin(kRestart, 0);
    if (Struck() && media_.power() && dice_.Chance(0.5)) media_.Cut();
    const bool before = Struck();
    Status stopped;
    {
        const Exposed exposed(*this);
        stopped = machine_->Stop();
    }
    const bool failed = failed_ || (!stopped.ok() && Faulty());
    const bool crashed = !media_.power() || failed || Struck() != before;
    if (!stopped.ok() && !crashed) Violation("does not close: " + stopped.error().message);
    if (crashed) ++result_.crashes;
    // A device that failed may have lost what the page cache showed.
    any_cut_ = failed;
    if (hurt_) Mend();
    if (!crashed && fragile_ && dice_.Chance(0.5)) Hurt();
    Restart();
    if (Fine()) SettleAll(crashed);
}

/// From the next start to the one after it a row of the allocator cannot be read. Nothing is
/// written to its region meanwhile, so that it is right again afterwards.
void Runner::Hurt() {
    auto rows = std::make_shared<SimMetadata::Rows>(*media_.metadata());
    const auto first = rows->lower_bound("R"), end = rows->lower_bound(cow::PrefixEnd("R"));
    const auto count = static_cast<uint64_t>(std::distance(first, end));
    if (count == 0) return;
    const auto row = std::next(first, static_cast<std::ptrdiff_t>(dice_.Draw(count)));
    Note("region {} cannot be read", cow::KeyNumber(row->first, 0));
    hurt_ = *row;
    row->second = "rubbish";
    media_.SetMetadata(std::move(rows));
}

void Runner::Mend() {
    auto rows = std::make_shared<SimMetadata::Rows>(*media_.metadata());
    std::string& value = (*rows)[hurt_->first];
    if (value != "rubbish") Violation("a row that could not be read was replaced");
    value = hurt_->second;
    media_.SetMetadata(std::move(rows));
    hurt_.reset();
}

void Runner::BusyRound() {
    std::vector<uint64_t> exports;
    clients_ = 1;
    if (Begin(kRound, 1) && dice_.Chance(options_.crash)) DrawCut(400, 12);
    if (Begin(kRound, 2) && options_.faults && dice_.Chance(0.7)) DrawFaults();
    Begin(kRound, 3);
    const uint64_t commands = dice_.Draw(scale_.commands);
    clients_ += StartClients(&exports);
    if (Fine()) clients_ += StartRude(&exports);
    if (!Fine()) return;
    Spawn(Commands(kCommander, static_cast<unsigned>(commands)));
    for (uint64_t i = 1; i < commanders_; ++i, ++clients_) {
        Spawn(Commands(kCommanders + i - 1, static_cast<unsigned>(commands)));
    }
    {
        const Exposed exposed(*this);
        if (!scheduler_.RunUntil([this] { return clients_ == 0; })) Violation("deadlock");
    }
    media_.faults = Faults{};
    CancelCut();
    for (const uint64_t id : exports) Close(id);
    if (!Faulty() || !media_.power()) return;
    // A round that nobody waited for may have met the fault.
    if (machine_->Do(pool().GetStatus()).value().failed) failed_ = true;
    if (!Struck()) faulty_ = false;
}

/// Returns how many.
uint64_t Runner::StartClients(std::vector<uint64_t>* exports) {
    struct Planned {
        const std::string& name;
        Disk& disk;
        uint64_t requests;
        cow::Volume* volume = nullptr;
    };
    std::vector<Planned> clients;
    for (auto& [name, disk] : disks_) {
        for (uint64_t i = 1 + dice_.Draw(scale_.clients); i > 0; --i) {
            const uint64_t requests = 5 + dice_.Draw(scale_.requests);
            clients.push_back({name, disk, requests * (rude_ ? kRudeRequests : 1)});
        }
    }
    for (Planned& client : clients) {
        const auto opened = machine_->Do(pool().OpenExport(client.name));
        if (!opened.ok()) {
            Violation(opened.error().message);
            return 0;
        }
        exports->push_back(opened.value().id);
        client.volume = opened.value().volume;
    }
    for (size_t i = 0; i < clients.size(); ++i) {
        const Planned& c = clients[i];
        Spawn(Client(kClients + i, c.name, &c.disk, c.volume, static_cast<unsigned>(c.requests)));
    }
    return clients.size();
}

void Runner::DrawFaults() {
    Faults& faults = media_.faults;
    faulty_ = true;
    switch (dice_.Draw(5)) {
        case 0:
            faults.read_error = 0.05;
            return Note("reads fail");
        case 1:
            faults.write_error = 0.05;
            return Note("writes fail");
        case 2:
            faults.sync_error = 0.1;
            return Note("syncs fail");
        case 3:
            faults.commit_error = 0.1;
            return Note("commits fail");
        default:
            faults.no_space = 0.5;
            return Note("space runs out");
    }
}

/// The `index`-th of this round.
void Runner::CreateDisk(uint64_t index) {
    Begin(kRound, index == 0 ? 4 : 16 + index);
    const std::string name = NewName('d');
    const uint64_t size = scale_.sizes[dice_.Draw(4)];
    Note("create disk {} {}", name, size);
    const Exposed exposed(*this);
    const Status s = machine_->Do(pool().CreateDisk(name, size));
    if (Refused(s)) return;
    if (s.ok() && media_.power()) {
        disks_.emplace(name, Disk(size));
    } else {
        uncertain_disks_.insert(name);
        uncertain_disk_ = std::make_unique<Disk>(size);
    }
    Do(s);
}

void Runner::QuietCommands() {
    const Exposed exposed(*this);
    Begin(kRound, 5);
    const uint64_t count = disks_.empty() ? 0 : dice_.Draw(4);
    if (Begin(kRound, 6) && dice_.Chance(0.3)) DrawCut(30, 3);
    for (uint64_t i = 0; i < count && media_.power() && Fine() && !reopen_ && !failed_; ++i) {
        if (!Begin(kQuiet, i)) continue;
        auto it = disks_.begin();
        std::advance(it, static_cast<std::ptrdiff_t>(dice_.Draw(disks_.size())));
        QuietCommand(it->first, it->second);
        Answered();
    }
    CancelCut();
}

void Runner::QuietCommand(const std::string& name, Disk& disk) {
    switch (dice_.Draw(8)) {
        case 7:
            return Flatten(name);
        case 0:
            return Restore(name, disk);
        case 1:
            return Clone(name, disk);
        case 2:
        case 5:
            return Resize(name, disk);
        case 3:
            return DeleteDisk(name);
        case 4:
            return DeleteAndClose(name, disk);
        default:
            return DeleteCounted(name, disk);
    }
}

SimulationResult Simulate(const SimulationOptions& options) {
    return Runner(options).Run();
}

}  // namespace varve::simulation
