// Commands: those beside clients, and those that need their disks without clients.
#include <fmt/ranges.h>

#include "tests/simulation/runner.h"

namespace varve::simulation {

Task<void> Runner::Commands(uint64_t actor, unsigned count) {
    co_await Hop(machine_->home());
    for (unsigned i = 0; i < count && media_.power() && Fine() && !failed_; ++i) {
        if (!Begin(actor, i)) continue;
        const uint64_t kind = dice_.Draw(100);
        if (kind < 50) {
            co_await TakeSnapshots();
        } else if (kind < 85) {
            co_await DeleteSnapshot();
        } else if (kind < 88) {
            Note("scrub");
            co_await Scrub();
        } else if (kind < 94) {
            co_await FlattenBeside();
        } else {
            Note("commit what is dirty");
            co_await pool().CommitDirty();
        }
    }
    --clients_;
}

Task<void> Runner::TakeSnapshots() {
    std::vector<std::string> names;
    std::vector<std::pair<std::string, std::string>> keys;
    const bool several = dice_.Chance(0.6);
    for (auto& [name, disk] : disks_) {
        if (disk.snapshots.size() >= scale_.snapshots || dice_.Chance(0.3)) continue;
        keys.emplace_back(name, NewName('s'));
        names.push_back(name + "@" + keys.back().second);
        if (!several) break;
    }
    if (names.empty()) co_return;
    const bool look = dice_.Chance(0.3);
    const auto [seen, shot] = keys[dice_.Draw(keys.size())];
    Note("snapshot {}", fmt::join(names, " "));
    const Time start = Now();
    if (names.size() > 1 && dice_.Chance(0.3)) machine_->RestOneLane();  // in the middle of the cut
    Status s = co_await pool().CreateSnapshots(names);
    if (Refused(s)) co_return;
    const auto moments = std::make_shared<Moments>(start, time_);
    for (const auto& [name, snapshot] : keys) {
        Disk& disk = disks_.at(name);
        Snapshot taken{disk.model.Cut(start, time_), moments};
        if (s.ok() && media_.power()) {
            disk.snapshots.emplace(snapshot, std::move(taken));
            ++result_.snapshots;
        } else {
            uncertain_snapshots_[{name, snapshot}] = {std::move(taken), true};
        }
    }
    Do(s);
    // What a snapshot was answered for is made durable again soon, by its fold.
    if (s.ok() && cut_at_answer_ > 0 && dice_.Chance(0.3)) cut_at_answer_ = 1;
    if (s.ok()) Answered();
    if (s.ok() && look) co_await LookAt(seen + "@" + shot, disks_.at(seen), shot);
}

Task<void> Runner::LookAt(std::string full, Disk& disk, std::string snapshot) {
    if (!held_.insert(full).second) co_return;  // another is at it
    const Result<cow::Export> opened = co_await pool().OpenExport(full);
    if (!opened.ok()) {
        const bool excused = !media_.power() || Faulty();
        if (!excused) Violation("cannot open " + full + ": " + opened.error().message);
        co_return;
    }
    cow::Volume& volume = *opened.value().volume;
    Buffer data(volume.size(), true);
    co_await Hop(volume.executor());
    const Errno error = co_await volume.Read(0, data.span(), nullptr);
    co_await Hop(machine_->home());
    co_await pool().CloseExport(opened.value().id);
    held_.erase(full);
    Judge(error, "reading a snapshot");
    const bool known = error == 0 && media_.power() && disk.snapshots.contains(snapshot);
    if (known) Verify(full, disk.snapshots.at(snapshot), data.text());
}

Task<void> Runner::FlattenBeside() {
    if (disks_.empty()) co_return;
    auto it = disks_.begin();
    std::advance(it, static_cast<std::ptrdiff_t>(dice_.Draw(disks_.size())));
    Note("flatten {}", it->first);
    const Status s = co_await pool().FlattenDisk(it->first);
    Do(s);
}

Task<void> Runner::DeleteSnapshot() {
    for (auto& [name, disk] : disks_) {
        if (disk.snapshots.empty() || dice_.Chance(0.5)) continue;
        auto victim = disk.snapshots.begin();
        std::advance(victim, static_cast<std::ptrdiff_t>(dice_.Draw(disk.snapshots.size())));
        const std::string snapshot = victim->first;
        if (!held_.insert(name + "@" + snapshot).second) continue;  // another is at it
        Note("delete {}@{}", name, snapshot);
        Status s = co_await pool().DeleteSnapshot(name + "@" + snapshot, false);
        held_.erase(name + "@" + snapshot);
        if (s.ok() && media_.power()) {
            disk.snapshots.erase(snapshot);
        } else {
            uncertain_snapshots_[{name, snapshot}] = {disk.snapshots.at(snapshot), false};
        }
        Do(s);
        if (s.ok()) Answered();
        co_return;
    }
}

Snapshot* Runner::DrawSnapshot(Disk& disk, std::string* name) {
    if (disk.snapshots.empty()) return nullptr;
    auto it = disk.snapshots.begin();
    std::advance(it, static_cast<std::ptrdiff_t>(dice_.Draw(disk.snapshots.size())));
    *name = it->first;
    return &it->second;
}

bool Runner::Know(const std::string& disk, const std::string& name, Snapshot& snapshot) {
    const std::optional<std::string> data = ReadAll(disk + "@" + name);
    if (!data) return false;
    const int64_t bad = Compare(snapshot.image, *data, snapshot.moments.get());
    if (bad >= 0) Violation("snapshot " + disk + "@" + name + " is wrong");
    return bad < 0;
}

void Runner::Restore(const std::string& name, Disk& disk) {
    std::string from;
    Snapshot* snapshot = DrawSnapshot(disk, &from);
    if (!snapshot || !Know(name, from, *snapshot)) return;
    std::optional<std::string> keep;
    if (dice_.Chance(0.5) && disk.snapshots.size() < scale_.snapshots) keep = NewName('k');
    Note("restore {}@{}{}", name, from, keep ? " keep as " + *keep : "");
    const auto moments = std::make_shared<Moments>(time_, time_);
    const Snapshot kept{disk.model.Cut(time_, time_), moments};
    const Image image = snapshot->image;
    const Status s = machine_->Do(pool().RestoreSnapshot(name + "@" + from, keep, false, false));
    if (Refused(s)) return;
    if (s.ok() && media_.power()) {
        if (keep) disk.snapshots.emplace(*keep, kept);
        disk.model.Settle(image, Now());
    } else {
        uncertain_name_ = name;
        uncertain_image_ = image;
        if (keep) uncertain_snapshots_[{name, *keep}] = {kept, true};
    }
    Do(s);
}

void Runner::Clone(const std::string& name, Disk& disk) {
    std::string from;
    Snapshot* snapshot = DrawSnapshot(disk, &from);
    if (!snapshot || disks_.size() >= scale_.disks || !Know(name, from, *snapshot)) return;
    const std::string clone = NewName('c');
    Note("clone {}@{} {}", name, from, clone);
    Disk fresh(snapshot->image.size() * kSectorBytes);
    fresh.model.Settle(snapshot->image, Now());
    const Status s = machine_->Do(pool().CloneSnapshot(name + "@" + from, clone));
    if (Refused(s)) return;
    if (s.ok() && media_.power()) {
        disks_.emplace(clone, std::move(fresh));
    } else {
        uncertain_disks_.insert(clone);
        uncertain_disk_ = std::make_unique<Disk>(std::move(fresh));
    }
    Do(s);
}

void Runner::Flatten(const std::string& name) {
    Note("flatten {}", name);
    if (dice_.Chance(0.5)) {
        Quiet();  // so that what is cut off is the flattening
        media_.CutAfter(1 + dice_.Draw(6));
    }
    const Status s = machine_->Do(pool().FlattenDisk(name));
    Do(s);
    if (!s.ok() || !media_.power()) return;
    const auto info = machine_->Do(pool().ShowDisk(name));
    const bool certain = media_.power() && info.ok();
    if (certain && info.value().depth != 1) {
        Violation(fmt::format("{} is flattened, its depth is {}", name, info.value().depth));
    }
}

void Runner::Resize(const std::string& name, Disk& disk) {
    const uint64_t before = disk.model.size();
    const uint64_t size = scale_.sizes[dice_.Draw(4)];
    if (size < before && dice_.Chance(0.6)) {
        // The new size, what it unmaps, the end of it: three commits.
        Quiet();
        media_.CutAfter(1 + dice_.Draw(3));
    }
    ResizeTo(name, disk, size);
    if (size >= before) return;
    if (media_.power() && !failed_ && dice_.Chance(0.5)) ResizeTo(name, disk, before);
    if (!media_.power()) grow_ = name;
}

void Runner::ResizeTo(const std::string& name, Disk& disk, uint64_t size) {
    Note("resize {} {}", name, size);
    const Status s = machine_->Do(pool().ResizeDisk(name, size, true, false));
    // The rest of its last block may have to be zeroed, in a new one. Nothing has changed then.
    const bool full = tight_ && !s.ok() && s.error().kind == ErrorKind::kNoSpace;
    if (full && media_.power() && !Faulty()) return;
    if (s.ok() && media_.power()) {
        disk.model.Resize(size);
    } else {
        uncertain_name_ = name;
        // Before the crash nothing was under way, but what was not flushed may be lost.
        Image remains = disk.model.Remains();
        remains.resize(size / kSectorBytes, {Sector::State()});
        uncertain_image_ = remains;
    }
    Do(s);
}

void Runner::DeleteDisk(const std::string& name) {
    if (disks_.size() < 3) return;
    Note("delete disk {}", name);
    const Status s = machine_->Do(pool().DeleteDisk(name, true, false));
    if (s.ok() && media_.power()) {
        disks_.erase(name);
    } else {
        uncertain_disks_.insert(name);
    }
    Do(s);
}

void Runner::DeleteCounted(const std::string& name, Disk& disk) {
    std::string victim;
    if (!DrawSnapshot(disk, &victim)) return;
    const auto info = machine_->Do(pool().ShowSnapshot(name + "@" + victim));
    if (!Quiet() || hurt_ || !info.ok() || info.value().approximate) return;
    const auto before = machine_->Do(pool().GetStatus());
    Note("delete {}@{} when all is quiet", name, victim);
    const Status s = machine_->Do(pool().DeleteSnapshot(name + "@" + victim, false));
    if (s.ok() && media_.power()) {
        disk.snapshots.erase(victim);
        if (!Quiet() || Struck()) return;
        const auto after = machine_->Do(pool().GetStatus());
        const bool certain = media_.power() && !Struck() && !before.value().approximate &&
                             !after.value().approximate;
        if (after.value().home_reads > 0) Violation("rows of the allocator were read on home");
        if (certain && before.value().used - after.value().used != info.value().unique) {
            Violation(fmt::format("{}@{}: unique was {}, deleting freed {}", name, victim,
                                  info.value().unique, before.value().used - after.value().used));
        }
    } else {
        uncertain_snapshots_[{name, victim}] = {disk.snapshots.at(victim), false};
    }
    Do(s);
}

void Runner::DeleteAndClose(const std::string& name, Disk& disk) {
    std::string victim;
    if (!DrawSnapshot(disk, &victim)) return;
    Note("delete {}@{} and close", name, victim);
    const Status s = machine_->Do(pool().DeleteSnapshot(name + "@" + victim, false));
    if (s.ok() && media_.power()) {
        disk.snapshots.erase(victim);
    } else {
        uncertain_snapshots_[{name, victim}] = {disk.snapshots.at(victim), false};
    }
    Do(s);
    reopen_ = true;
}

}  // namespace varve::simulation
