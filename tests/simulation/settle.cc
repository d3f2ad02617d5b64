// What must be there: after a restart, and whenever the machine is quiet.
#include "tests/simulation/runner.h"

namespace varve::simulation {

void Runner::SettleAll(bool crashed) {
    auto list = machine_->Do(pool().ListDisks());
    std::set<std::string> there;
    for (const cow::DiskInfo& info : list.value()) there.insert(info.name);
    there.erase(kBallast);
    for (const std::string& name : uncertain_disks_) {
        if (there.contains(name) && !disks_.contains(name)) {
            disks_.emplace(name, *uncertain_disk_);
        }
        if (!there.contains(name)) disks_.erase(name);
    }
    for (auto& [name, disk] : disks_) {
        if (!there.contains(name)) return Violation("lost disk " + name);
        SettleDisk(name, disk, crashed);
    }
    if (there.size() != disks_.size()) Violation("a disk came back from the dead");
    for (const auto& [cut, fate] : cuts_) {
        if (fate.there && fate.lost) Violation("a cut is there in part");
    }
    uncertain_disks_.clear();
    uncertain_image_.reset();
    uncertain_snapshots_.clear();
    uncertain_name_.clear();
    cuts_.clear();
    // What a shrink cut off must not come back, even if a crash met it.
    const auto shrunk = disks_.find(std::exchange(grow_, {}));
    if (Fine() && shrunk != disks_.end()) ResizeTo(shrunk->first, shrunk->second, scale_.sizes[3]);
}

void Runner::SettleDisk(const std::string& name, Disk& disk, bool crashed) {
    const std::optional<std::string> data = ReadAll(name);
    if (!data) return;
    // A killed process loses nothing that was answered.
    const bool lost = crashed && any_cut_;
    Image image = lost ? disk.model.Remains() : disk.model.Cut(time_, time_);
    int64_t bad = Compare(image, *data);
    const bool other = name == uncertain_name_ && uncertain_image_.has_value();
    if (bad >= 0 && other) {  // a restore or shrink that the crash met
        image = *uncertain_image_;
        bad = Compare(image, *data);
    }
    if (bad >= 0) {
        return Violation(fmt::format("disk {} sector {} holds what it never held", name, bad));
    }
    disk.model.Settle(image, Now());
    std::set<std::string> there;
    auto list = machine_->Do(pool().ListSnapshots(name));
    if (!list.ok()) return Violation("list: " + list.error().message);
    for (const auto& info : list.value()) there.insert(info.name);
    for (auto& [key, uncertain] : uncertain_snapshots_) {
        if (key.first != name) continue;
        const bool kept = there.contains(key.second);
        if (kept) {
            disk.snapshots.emplace(key.second, uncertain.snapshot);
        } else {
            disk.snapshots.erase(key.second);
        }
        Fate& fate = cuts_[uncertain.snapshot.moments.get()];
        if (uncertain.begun) (kept ? fate.there : fate.lost) = true;
    }
    for (const auto& [snapshot, unused] : disk.snapshots) {
        if (!there.contains(snapshot)) return Violation("lost " + name + "@" + snapshot);
    }
    if (there.size() != disk.snapshots.size()) Violation("a deleted snapshot is back");
}

void Runner::VerifyAll() {
    Begin(kVerifier, 0);
    for (auto& [name, disk] : disks_) {
        const std::optional<std::string> data = ReadAll(name);
        if (!data) return;
        Image image = disk.model.Cut(time_, time_);
        const int64_t bad = Compare(image, *data);
        if (bad >= 0) {
            return Violation(fmt::format("disk {} sector {} changed by itself", name, bad));
        }
        disk.model.Forget();
        VerifySnapshots(name, disk);
    }
    if (!Quiet()) return;
    if (hurt_) return VerifyChecksums();  // all is checked when it has been mended
    const auto report = cow::CheckMetadata(machine_->metadata());
    if (!report.ok()) return Violation("check: " + report.error().message);
    const cow::CheckReport& r = report.value();
    if (!r.errors.empty()) return Violation("check: " + r.errors[0]);
    if (r.leaked_blocks != 0) return Violation(fmt::format("{} leaked", r.leaked_blocks));
    if (r.reclaim_blocks != 0) return Violation(fmt::format("{} kept", r.reclaim_blocks));
    VerifyChecksums();
}

void Runner::VerifySnapshots(const std::string& name, Disk& disk) {
    for (auto& [snapshot, state] : disk.snapshots) {
        const std::string full = name + "@" + snapshot;
        const std::optional<std::string> data = ReadAll(full);
        if (data) Verify(full, state, *data);
    }
}

void Runner::Verify(const std::string& full, Snapshot& state, const std::string& data) {
    const int64_t bad = Compare(state.image, data, state.moments.get());
    if (bad < 0 && state.moments->none()) {
        return Violation(fmt::format("{} and its cut were never like this at once", full));
    }
    if (bad >= 0) {
        Explain(state.image, data, static_cast<size_t>(bad));
        return Violation(fmt::format("snapshot {} sector {} is wrong", full, bad));
    }
}

void Runner::Explain(const Image& image, const std::string& data, size_t sector) {
    const auto shown = [](const Content& content) {
        return content.zeros() ? std::string("zeros") : std::string(content.bytes().substr(0, 40));
    };
    std::fprintf(stderr, "  seen:    %s\n",
                 shown(Content::Of(data.data() + sector * kSectorBytes)).c_str());
    for (const Sector::State& state : image[sector]) {
        std::fprintf(stderr, "  allowed: %s\n", shown(state.content).c_str());
    }
}

Task<void> Runner::WaitForReclaim(bool* done) {
    co_await Hop(machine_->home());
    co_await pool().WaitForReclaim();
    *done = true;
}

std::optional<std::string> Runner::ReadAll(const std::string& name) {
    const auto opened = machine_->Do(pool().OpenExport(name));
    if (!opened.ok()) {
        const bool excused = Faulty() || !media_.power();
        if (!excused) Violation("cannot open " + name + ": " + opened.error().message);
        return std::nullopt;
    }
    cow::Volume& volume = *opened.value().volume;
    Buffer data(volume.size(), true);
    const Errno error = Await(scheduler_, volume.executor(), volume.Read(0, data.span(), nullptr));
    Close(opened.value().id);
    if (error == 0 && media_.power()) return data.text();
    if (media_.power() && !Faulty()) Violation(fmt::format("reading {} fails: {}", name, error));
    return std::nullopt;
}

void Runner::Close(uint64_t id) {
    bool done = false;
    Spawn(CloseTask(id, &done));
    scheduler_.RunUntil([&] { return done; });
}

Task<void> Runner::CloseTask(uint64_t id, bool* done) {
    co_await Hop(machine_->home());
    co_await pool().CloseExport(id);
    *done = true;
}

bool Runner::Quiet() {
    const bool before = Struck();
    const Exposed exposed(*this);
    bool done = false;
    Spawn(WaitForReclaim(&done));
    scheduler_.RunUntil([&] { return done; });
    return media_.power() && Struck() == before;
}

}  // namespace varve::simulation
