#include "tests/simulation/runner.h"

namespace varve::simulation {
namespace {

constexpr uint64_t kCaches[] = {256, 4096, 1 << 20};

}  // namespace

SimulationResult Runner::Run() {
    lanes_ = 1 + static_cast<unsigned>(scheduler_.Draw(4));
    alignment_ = scheduler_.Chance(0.5) ? 512 : 4096;
    if (alignment_ == 4096) alignment_ = scheduler_.Chance(0.5) ? 4096 : 512;
    pool_options_.map_cache_bytes = kCaches[scheduler_.Draw(3)];
    Open();
    for (unsigned round = 0; round < options_.rounds && Fine(); ++round) {
        if (disks_.size() < 2) CreateDisk();
        BusyRound();
        if (Fine() && media_.power() && !failed_) QuietCommands();
        const bool must = !media_.power() || failed_ || reopen_;
        if (Fine() && (must || scheduler_.Chance(0.3))) Reopen();
        if (Fine()) VerifyAll();
    }
    if (Fine()) {
        Do(machine_->Stop());
        machine_.reset();
    }
    // After a violation the engine is in no state to be closed.
    if (!Fine()) (void)machine_.release();  // NOLINT
    result_.operations = media_.operations();
    return result_;
}

void Runner::Open() {
    failed_ = reopen_ = false;
    machine_ = std::make_unique<Machine>(scheduler_, media_, lanes_, pool_options_, alignment_);
    const Status s = machine_->Start();
    if (!s.ok()) Violation("does not open: " + s.error().message);
}

void Runner::Reopen() {
    const bool crashed = !media_.power() || failed_;
    const Status stopped = machine_->Stop();
    if (!stopped.ok() && !crashed) Violation("does not close: " + stopped.error().message);
    if (crashed) ++result_.crashes;
    if (media_.power()) media_.Cut();
    media_.Restore();
    media_.faults = Faults{};
    machine_.reset();
    Open();
    scheduler_.RunAll();  // an interrupted shrink is finished before its disk may be opened
    if (Fine()) SettleAll(crashed);
}

void Runner::BusyRound() {
    std::vector<uint64_t> exports;
    clients_ = 1;
    if (scheduler_.Chance(options_.crash)) DrawCut(400, 12);
    if (options_.faults && scheduler_.Chance(0.7)) DrawFaults();
    const unsigned commands = static_cast<unsigned>(scheduler_.Draw(10));
    for (auto& [name, disk] : disks_) {
        const uint64_t count = 1 + scheduler_.Draw(3);
        for (uint64_t i = 0; i < count; ++i) {
            const auto opened = machine_->Do(pool().OpenExport(name));
            if (!opened.ok()) return Violation(opened.error().message);
            exports.push_back(opened.value().id);
            ++clients_;
            Spawn(Client(name, &disk, opened.value().volume,
                         5 + static_cast<unsigned>(scheduler_.Draw(30))));
        }
    }
    Spawn(Commands(commands));
    if (!scheduler_.RunUntil([this] { return clients_ == 0; })) Violation("deadlock");
    media_.faults = Faults{};
    CancelCut();
    for (const uint64_t id : exports) Close(id);
    if (!options_.faults || !media_.power()) return;
    // A round that nobody waited for may have met the fault.
    if (machine_->Do(pool().GetStatus()).value().failed) failed_ = true;
}

void Runner::DrawFaults() {
    Faults& faults = media_.faults;
    switch (scheduler_.Draw(5)) {
        case 0:
            faults.read_error = 0.05;
            return;
        case 1:
            faults.write_error = 0.05;
            return;
        case 2:
            faults.sync_error = 0.1;
            return;
        case 3:
            faults.commit_error = 0.1;
            return;
        default:
            faults.no_space = 0.5;
            return;
    }
}

void Runner::CreateDisk() {
    const std::string name = NewName('d');
    const uint64_t size = kSizes[scheduler_.Draw(4)];
    Do(machine_->Do(pool().CreateDisk(name, size)));
    disks_.emplace(name, Disk(size));
}

void Runner::QuietCommands() {
    const unsigned count = static_cast<unsigned>(scheduler_.Draw(4));
    if (scheduler_.Chance(0.3)) DrawCut(30, 3);
    for (unsigned i = 0; i < count && media_.power() && Fine() && !reopen_; ++i) {
        auto it = disks_.begin();
        std::advance(it, static_cast<std::ptrdiff_t>(scheduler_.Draw(disks_.size())));
        switch (scheduler_.Draw(7)) {
            case 0:
                Restore(it->first, it->second);
                break;
            case 1:
                Clone(it->first, it->second);
                break;
            case 2:
            case 5:
                Resize(it->first, it->second);
                break;
            case 3:
                DeleteDisk(it->first);
                break;
            case 4:
                DeleteAndClose(it->first, it->second);
                break;
            default:
                DeleteCounted(it->first, it->second);
                break;
        }
        Answered();
    }
    CancelCut();
}

SimulationResult Simulate(const SimulationOptions& options) {
    return Runner(options).Run();
}

}  // namespace varve::simulation
