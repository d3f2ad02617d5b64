#include "tests/simulation/simulation.h"

#include <fmt/format.h>

#include <map>

#include "cow/transfers.h"
#include "tests/simulation/model.h"
#include "tests/simulation/world.h"

namespace varve::simulation {
namespace {

constexpr uint64_t kDisksMax = 4;
constexpr uint64_t kSnapshotsMax = 6;                                       // of one disk
constexpr uint64_t kSizes[] = {64 << 10, 200 << 10, 300 << 10, 528 << 10};  // up to 3 chunks

constexpr uint64_t kCaches[] = {256, 4096, 1 << 20};
constexpr uint64_t kRoomy = 256 << 20;
/// One region of the allocator: disks take it from each other, and what is freed is soon reused.
constexpr uint64_t kTight = 16 << 20;

struct Snapshot {
    Image image;
    std::shared_ptr<Moments> moments;  // of its cut, which other disks may share
};

struct Disk {
    explicit Disk(uint64_t size) : model(size) {}
    ModelDisk model;
    std::map<std::string, Snapshot> snapshots;
};

/// Memory whose alignment does not depend on the heap, so that a seed replays.
class Buffer {
  public:
    Buffer(size_t bytes, bool aligned)
        : memory_(cow::AllocateAligned(bytes + 8)), bytes_(bytes), shift_(aligned ? 0 : 8) {
        std::memset(span().data(), '?', bytes_);
    }
    std::span<std::byte> span() { return {memory_.get() + shift_, bytes_}; }
    std::string text() { return {reinterpret_cast<char*>(memory_.get()) + shift_, bytes_}; }
    void Fill(const std::string& text) { std::memcpy(span().data(), text.data(), bytes_); }

  private:
    cow::AlignedBuffer memory_;
    const size_t bytes_, shift_;
};

class Runner {
  public:
    explicit Runner(const SimulationOptions& options)
        : options_(options),
          scheduler_(options.seed),
          tight_(scheduler_.Chance(0.5)),
          media_(scheduler_, tight_ ? kTight : kRoomy) {}

    SimulationResult Run() {
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

  private:
    bool Fine() const { return result_.violation.empty(); }
    void Violation(const std::string& what) {
        if (Fine()) result_.violation = fmt::format("seed {}: {}", options_.seed, what);
    }
    void Do(const Status& s) {
        if (!s.ok() && media_.power() && !failed_) Violation("refused: " + s.error().message);
    }
    /// What was promised just now holds from now on: a good moment for the power to fail.
    void Answered() {
        if (cut_at_answer_ > 0 && --cut_at_answer_ == 0) media_.Cut();
    }
    void DrawCut(uint64_t operations, uint64_t answers) {
        if (scheduler_.Chance(0.5)) {
            media_.CutAfter(1 + scheduler_.Draw(operations));
        } else {
            cut_at_answer_ = 1 + scheduler_.Draw(answers);
        }
    }
    void CancelCut() {
        media_.CutAfter(0);
        cut_at_answer_ = 0;
    }
    Time Now() { return ++time_; }
    std::string NewName(char letter) { return fmt::format("{}{}", letter, ++names_); }
    cow::Pool& pool() { return machine_->pool(); }

    // ---- life and death

    void Open() {
        failed_ = reopen_ = false;
        machine_ = std::make_unique<Machine>(scheduler_, media_, lanes_, pool_options_, alignment_);
        const Status s = machine_->Start();
        if (!s.ok()) Violation("does not open: " + s.error().message);
    }

    void Reopen() {
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

    /// After a restart each disk and snapshot must be something that was legal.
    void SettleAll(bool crashed) {
        auto list = machine_->Do(pool().ListDisks());
        std::set<std::string> there;
        for (const cow::DiskInfo& info : list.value()) there.insert(info.name);
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
        if (begun_there_ > 0 && begun_lost_ > 0) Violation("a cut is there in part");
        uncertain_disks_.clear();
        uncertain_image_.reset();
        uncertain_snapshots_.clear();
        uncertain_name_.clear();
        begun_there_ = begun_lost_ = 0;
        // What a shrink cut off must not come back, even if a crash met it.
        const auto shrunk = disks_.find(std::exchange(grow_, {}));
        if (Fine() && shrunk != disks_.end()) ResizeTo(shrunk->first, shrunk->second, kSizes[3]);
    }

    void SettleDisk(const std::string& name, Disk& disk, bool crashed) {
        const std::string data = ReadAll(name);
        Image image = crashed ? disk.model.Remains() : disk.model.Cut(time_, time_);
        int64_t bad = Compare(image, data);
        const bool other = name == uncertain_name_ && uncertain_image_.has_value();
        if (bad >= 0 && other) {  // a restore or shrink that the crash met
            image = *uncertain_image_;
            bad = Compare(image, data);
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
            if (there.contains(key.second)) {
                disk.snapshots.emplace(key.second, uncertain.snapshot);
                if (uncertain.begun) ++begun_there_;
            } else {
                disk.snapshots.erase(key.second);
                if (uncertain.begun) ++begun_lost_;
            }
        }
        for (const auto& [snapshot, unused] : disk.snapshots) {
            if (!there.contains(snapshot)) return Violation("lost " + name + "@" + snapshot);
        }
        if (there.size() != disk.snapshots.size()) Violation("a deleted snapshot is back");
    }

    void VerifyAll() {
        for (auto& [name, disk] : disks_) {
            const std::string data = ReadAll(name);
            Image image = disk.model.Cut(time_, time_);
            const int64_t bad = Compare(image, data);
            if (bad >= 0) {
                return Violation(fmt::format("disk {} sector {} changed by itself", name, bad));
            }
            disk.model.Forget();
            VerifySnapshots(name, disk);
        }
        bool done = false;
        Spawn(WaitForReclaim(&done));
        scheduler_.RunUntil([&] { return done; });
        const auto report = cow::CheckMetadata(machine_->metadata());
        if (!report.ok()) return Violation("check: " + report.error().message);
        const cow::CheckReport& r = report.value();
        if (!r.errors.empty()) return Violation("check: " + r.errors[0]);
        if (r.leaked_blocks != 0) return Violation(fmt::format("{} leaked", r.leaked_blocks));
        if (r.reclaim_blocks != 0) return Violation(fmt::format("{} kept", r.reclaim_blocks));
    }

    void VerifySnapshots(const std::string& name, Disk& disk) {
        for (auto& [snapshot, state] : disk.snapshots) {
            const std::string full = name + "@" + snapshot;
            Verify(full, state, ReadAll(full));
        }
    }

    void Verify(const std::string& full, Snapshot& state, const std::string& data) {
        const int64_t bad = Compare(state.image, data, state.moments.get());
        if (bad < 0 && state.moments->none()) {
            return Violation(fmt::format("{} and its cut were never like this at once", full));
        }
        if (bad >= 0) {
            Explain(state.image, data, static_cast<size_t>(bad));
            return Violation(fmt::format("snapshot {} sector {} is wrong", full, bad));
        }
    }

    static void Explain(const Image& image, const std::string& data, size_t sector) {
        const auto shown = [](const Content& content) {
            return content.empty() ? std::string("zeros") : content.substr(0, 40);
        };
        std::fprintf(stderr, "  seen:    %s\n",
                     shown(Normal(data.substr(sector * kSectorBytes, kSectorBytes))).c_str());
        for (const Sector::State& state : image[sector]) {
            std::fprintf(stderr, "  allowed: %s\n", shown(state.content).c_str());
        }
    }

    Task<void> WaitForReclaim(bool* done) {
        co_await Hop(machine_->home());
        co_await pool().WaitForReclaim();
        *done = true;
    }

    // ---- requests

    std::string ReadAll(const std::string& name) {
        const auto opened = machine_->Do(pool().OpenExport(name));
        if (!opened.ok()) {
            Violation("cannot open " + name + ": " + opened.error().message);
            return {};
        }
        cow::Volume& volume = *opened.value().volume;
        Buffer data(volume.size(), true);
        const Errno error =
            Await(scheduler_, volume.executor(), volume.Read(0, data.span(), nullptr));
        if (error != 0 && media_.power()) {
            Violation(fmt::format("reading {} fails: {}", name, error));
        }
        Close(opened.value().id);
        return data.text();
    }

    void Close(uint64_t id) {
        bool done = false;
        Spawn(CloseTask(id, &done));
        scheduler_.RunUntil([&] { return done; });
    }
    Task<void> CloseTask(uint64_t id, bool* done) {
        co_await Hop(machine_->home());
        co_await pool().CloseExport(id);
        *done = true;
    }

    std::string Fill(const std::string& disk, uint64_t length) {
        // Each piece of 32 bytes says which disk it was written to and when, and differs from all
        // others.
        std::string text;
        const std::string tag = fmt::format("{}#{}#", disk, ++sequence_);
        while (text.size() < length)
            text += fmt::format("{:-<31}|", tag + std::to_string(text.size()));
        text.resize(length);
        return text;
    }

    struct Range {
        uint64_t offset, length;
    };
    Range DrawRange(uint64_t size) {
        const uint64_t kinds[] = {1, 512, 4096, 4096, 65536};
        const uint64_t unit = kinds[scheduler_.Draw(5)];
        uint64_t length = unit * (1 + scheduler_.Draw(unit == 1 ? 9000 : 12));
        length = std::min(length, size);
        uint64_t offset = scheduler_.Draw(size - length + 1);
        if (scheduler_.Chance(0.6)) offset = std::min(offset, uint64_t{40960});  // a hot spot
        offset = offset / unit * unit;
        return {offset, std::min(length, size - offset)};
    }

    struct Change {
        std::vector<Edit> edits;
        std::vector<std::vector<Content>> results;
        uint64_t first = 0;
    };
    Change BeginChange(ModelDisk& model, Range range, const std::string* data) {
        Change change;
        if (range.length == 0) return change;
        change.first = range.offset / kSectorBytes;
        const Time began = Now();
        const uint64_t end = range.offset + range.length;
        for (uint64_t s = change.first; s * kSectorBytes < end; ++s) {
            const uint64_t base = s * kSectorBytes;
            const uint64_t from = std::max(base, range.offset);
            const uint64_t to = std::min(base + kSectorBytes, end);
            Edit edit{
                began, from - base,
                data ? data->substr(from - range.offset, to - from) : std::string(to - from, 0)};
            change.results.push_back(model.sectors()[s].Begin(began, edit));
            change.edits.push_back(std::move(edit));
        }
        return change;
    }
    void EndChange(ModelDisk& model, const Change& change, Errno error) {
        if (!media_.power()) return;  // nobody hears answers any more
        const Time now = Now();
        for (size_t i = 0; i < change.results.size(); ++i) {
            model.sectors()[change.first + i].End(now, change.edits[i], change.results[i],
                                                  error == 0);
        }
    }
    void Judge(Errno error, const char* what) {
        if (error == 0 || !media_.power()) return;
        const bool faulty = options_.faults && (error == EIO || error == ENOSPC);
        const bool full = tight_ && error == ENOSPC;
        if (!faulty && !full) return Violation(fmt::format("{} fails with {}", what, error));
    }

    Task<void> Client(std::string name, Disk* disk, cow::Volume* volume, unsigned requests) {
        co_await Hop(volume->executor());
        for (unsigned i = 0; i < requests && media_.power() && Fine(); ++i) {
            ++result_.requests;
            const uint64_t kind = scheduler_.Draw(100);
            const Range range = DrawRange(disk->model.size());
            if (kind < 45) {
                const std::string data = Fill(name, range.length);
                Buffer buffer(data.size(), scheduler_.Chance(0.7));
                buffer.Fill(data);
                const std::span<const std::byte> bytes = buffer.span();
                const Change change = BeginChange(disk->model, range, &data);
                const Errno error = co_await volume->Write(range.offset, bytes);
                EndChange(disk->model, change, error);
                Judge(error, "write");
                if (kind < 10 && error == 0) co_await FlushOnce(disk, volume);  // FUA
            } else if (kind < 60) {
                const Range whole{0, disk->model.size()};
                const Range read = scheduler_.Chance(0.2) ? whole : range;
                co_await ReadOnce(name, disk, volume, read);
            } else if (kind < 75) {
                co_await TrimOnce(disk, volume, range);
            } else if (kind < 90) {
                const Change change = BeginChange(disk->model, range, nullptr);
                const bool allocate = kind < 80;
                const Errno error =
                    co_await volume->WriteZeroes(range.offset, range.length, allocate);
                EndChange(disk->model, change, error);
                Judge(error, "write zeroes");
            } else {
                co_await FlushOnce(disk, volume);
            }
        }
        co_await Hop(machine_->home());
        --clients_;
    }

    Task<void> TrimOnce(Disk* disk, cow::Volume* volume, Range range) {
        const uint64_t begin = (range.offset + 4095) / 4096 * 4096;
        const uint64_t end = (range.offset + range.length) / 4096 * 4096;
        Range whole{begin, end > begin ? end - begin : 0};
        const Change change = BeginChange(disk->model, whole, nullptr);
        const Errno error = co_await volume->Trim(range.offset, range.length);
        EndChange(disk->model, change, error);
        Judge(error, "trim");
    }

    Task<void> FlushOnce(Disk* disk, cow::Volume* volume) {
        const Time start = Now();
        const Errno error = co_await volume->Flush();
        if (!media_.power()) co_return;
        if (error == 0) disk->model.Flushed(start);
        if (error != 0) failed_ = true;
        Judge(error, "flush");
        if (error == 0) Answered();
    }

    Task<void> ReadOnce(std::string name, Disk* disk, cow::Volume* volume, Range range) {
        Buffer buffer(range.length, scheduler_.Chance(0.7));
        const Time start = Now();
        std::vector<cow::Allocation> map;
        const Errno error = co_await volume->Read(range.offset, buffer.span(), &map);
        const std::string data = buffer.text();
        if (!media_.power()) co_return;
        Judge(error, "read");
        if (error != 0) co_return;
        uint64_t covered = 0;
        for (const cow::Allocation& part : map) covered += part.length;
        if (covered != range.length) Violation("a read's map does not cover it");
        const uint64_t end = range.offset + range.length;
        for (uint64_t s = (range.offset + kSectorBytes - 1) / kSectorBytes;
             (s + 1) * kSectorBytes <= end; ++s) {
            const Content seen = Normal(data.substr(s * kSectorBytes - range.offset, kSectorBytes));
            if (!disk->model.sectors()[s].MayBe(seen, start, time_)) {
                Explain({disk->model.sectors()[s].Possible(start, time_)}, seen, 0);
                Violation(fmt::format("a read of {} sector {} shows what it never held", name, s));
            }
        }
    }

    // ---- commands beside clients

    Task<void> Commands(unsigned count) {
        co_await Hop(machine_->home());
        for (unsigned i = 0; i < count && media_.power() && Fine() && !failed_; ++i) {
            const uint64_t kind = scheduler_.Draw(100);
            if (kind < 50) {
                co_await TakeSnapshots();
            } else if (kind < 90) {
                co_await DeleteSnapshot();
            } else {
                co_await pool().CommitDirty();
            }
        }
        --clients_;
    }

    Task<void> TakeSnapshots() {
        std::vector<std::string> names;
        std::vector<std::pair<std::string, std::string>> keys;
        const bool several = scheduler_.Chance(0.6);
        for (auto& [name, disk] : disks_) {
            if (disk.snapshots.size() >= kSnapshotsMax || scheduler_.Chance(0.3)) continue;
            keys.emplace_back(name, NewName('s'));
            names.push_back(name + "@" + keys.back().second);
            if (!several) break;
        }
        if (names.empty()) co_return;
        const Time start = Now();
        Status s = co_await pool().CreateSnapshots(names);
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
        if (!s.ok() && options_.faults) failed_ = true;
        Do(s);
        if (s.ok()) Answered();
        if (!s.ok() || !scheduler_.Chance(0.3)) co_return;
        const auto& [name, snapshot] = keys[scheduler_.Draw(keys.size())];
        co_await LookAt(name + "@" + snapshot, disks_.at(name), snapshot);
    }

    /// Reads a snapshot that was taken a moment ago, beside clients.
    Task<void> LookAt(std::string full, Disk& disk, std::string snapshot) {
        const Result<cow::Export> opened = co_await pool().OpenExport(full);
        if (!opened.ok()) {
            const bool excused = !media_.power() || options_.faults;
            if (!excused) Violation("cannot open " + full + ": " + opened.error().message);
            co_return;
        }
        cow::Volume& volume = *opened.value().volume;
        Buffer data(volume.size(), true);
        co_await Hop(volume.executor());
        const Errno error = co_await volume.Read(0, data.span(), nullptr);
        co_await Hop(machine_->home());
        co_await pool().CloseExport(opened.value().id);
        Judge(error, "reading a snapshot");
        const bool known = error == 0 && media_.power() && disk.snapshots.contains(snapshot);
        if (known) Verify(full, disk.snapshots.at(snapshot), data.text());
    }

    Task<void> DeleteSnapshot() {
        for (auto& [name, disk] : disks_) {
            if (disk.snapshots.empty() || scheduler_.Chance(0.5)) continue;
            auto victim = disk.snapshots.begin();
            std::advance(victim,
                         static_cast<std::ptrdiff_t>(scheduler_.Draw(disk.snapshots.size())));
            const std::string snapshot = victim->first;
            Status s = co_await pool().DeleteSnapshot(name + "@" + snapshot, false);
            if (s.ok() && media_.power()) {
                disk.snapshots.erase(snapshot);
            } else {
                uncertain_snapshots_[{name, snapshot}] = {disk.snapshots.at(snapshot), false};
                if (options_.faults) failed_ = true;
            }
            Do(s);
            if (s.ok()) Answered();
            co_return;
        }
    }

    // ---- rounds

    void BusyRound() {
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

    void DrawFaults() {
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

    void CreateDisk() {
        const std::string name = NewName('d');
        const uint64_t size = kSizes[scheduler_.Draw(4)];
        Do(machine_->Do(pool().CreateDisk(name, size)));
        disks_.emplace(name, Disk(size));
    }

    /// Commands that need their disks without clients.
    void QuietCommands() {
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

    Snapshot* DrawSnapshot(Disk& disk, std::string* name) {
        if (disk.snapshots.empty()) return nullptr;
        auto it = disk.snapshots.begin();
        std::advance(it, static_cast<std::ptrdiff_t>(scheduler_.Draw(disk.snapshots.size())));
        *name = it->first;
        return &it->second;
    }

    /// A snapshot's image, made certain by reading it.
    bool Know(const std::string& disk, const std::string& name, Snapshot& snapshot) {
        const std::string data = ReadAll(disk + "@" + name);
        if (!media_.power()) return false;  // nothing was read
        const int64_t bad = Compare(snapshot.image, data, snapshot.moments.get());
        if (bad >= 0) Violation("snapshot " + disk + "@" + name + " is wrong");
        return bad < 0;
    }

    void Restore(const std::string& name, Disk& disk) {
        std::string from;
        Snapshot* snapshot = DrawSnapshot(disk, &from);
        if (!snapshot || !Know(name, from, *snapshot)) return;
        std::optional<std::string> keep;
        if (scheduler_.Chance(0.5) && disk.snapshots.size() < kSnapshotsMax) keep = NewName('k');
        const auto moments = std::make_shared<Moments>(time_, time_);
        const Snapshot kept{disk.model.Cut(time_, time_), moments};
        const Image image = snapshot->image;
        const Status s = machine_->Do(pool().RestoreSnapshot(name + "@" + from, keep, false));
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

    void Clone(const std::string& name, Disk& disk) {
        std::string from;
        Snapshot* snapshot = DrawSnapshot(disk, &from);
        if (!snapshot || disks_.size() >= kDisksMax || !Know(name, from, *snapshot)) return;
        const std::string clone = NewName('c');
        Disk fresh(snapshot->image.size() * kSectorBytes);
        fresh.model.Settle(snapshot->image, Now());
        const Status s = machine_->Do(pool().CloneSnapshot(name + "@" + from, clone));
        if (s.ok() && media_.power()) {
            disks_.emplace(clone, std::move(fresh));
        } else {
            uncertain_disks_.insert(clone);
            uncertain_disk_ = std::make_unique<Disk>(std::move(fresh));
        }
        Do(s);
    }

    void Resize(const std::string& name, Disk& disk) {
        const uint64_t before = disk.model.size();
        const uint64_t size = kSizes[scheduler_.Draw(4)];
        if (size < before && scheduler_.Chance(0.6)) {
            // The new size, what it unmaps, the end of it: three commits.
            Quiet();
            media_.CutAfter(1 + scheduler_.Draw(3));
        }
        ResizeTo(name, disk, size);
        if (size >= before) return;
        if (media_.power() && scheduler_.Chance(0.5)) ResizeTo(name, disk, before);
        if (!media_.power()) grow_ = name;
    }

    void ResizeTo(const std::string& name, Disk& disk, uint64_t size) {
        const Status s = machine_->Do(pool().ResizeDisk(name, size, true, false));
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

    void DeleteDisk(const std::string& name) {
        if (disks_.size() < 3) return;
        const Status s = machine_->Do(pool().DeleteDisk(name, true, false));
        if (s.ok() && media_.power()) {
            disks_.erase(name);
        } else {
            uncertain_disks_.insert(name);
        }
        Do(s);
    }

    /// With nothing else under way, deleting frees exactly what `unique` says.
    void DeleteCounted(const std::string& name, Disk& disk) {
        std::string victim;
        if (!DrawSnapshot(disk, &victim)) return;
        const auto info = machine_->Do(pool().ShowSnapshot(name + "@" + victim));
        if (!Quiet() || !info.ok()) return;
        const auto before = machine_->Do(pool().GetStatus());
        const Status s = machine_->Do(pool().DeleteSnapshot(name + "@" + victim, false));
        if (s.ok() && media_.power()) {
            disk.snapshots.erase(victim);
            if (!Quiet()) return;
            const auto after = machine_->Do(pool().GetStatus());
            if (media_.power() && before.value().used - after.value().used != info.value().unique) {
                Violation(fmt::format("{}@{}: unique was {}, deleting freed {}", name, victim,
                                      info.value().unique,
                                      before.value().used - after.value().used));
            }
        } else {
            uncertain_snapshots_[{name, victim}] = {disk.snapshots.at(victim), false};
        }
        Do(s);
    }

    /// The pool is closed before the deletion has given anything back.
    void DeleteAndClose(const std::string& name, Disk& disk) {
        std::string victim;
        if (!DrawSnapshot(disk, &victim)) return;
        const Status s = machine_->Do(pool().DeleteSnapshot(name + "@" + victim, false));
        if (s.ok() && media_.power()) {
            disk.snapshots.erase(victim);
        } else {
            uncertain_snapshots_[{name, victim}] = {disk.snapshots.at(victim), false};
        }
        Do(s);
        reopen_ = true;
    }
    bool Quiet() {
        bool done = false;
        Spawn(WaitForReclaim(&done));
        scheduler_.RunUntil([&] { return done; });
        return media_.power();
    }

    const SimulationOptions options_;
    Scheduler scheduler_;
    const bool tight_;
    Media media_;
    cow::PoolOptions pool_options_;
    unsigned lanes_ = 1;
    uint32_t alignment_ = 512;
    std::unique_ptr<Machine> machine_;
    std::map<std::string, Disk> disks_;
    SimulationResult result_;
    Time time_ = 0;
    uint64_t names_ = 0;
    uint64_t sequence_ = 0;
    uint64_t clients_ = 0;
    bool failed_ = false;         // the pool refuses writes: only a restart helps
    bool reopen_ = false;         // at once
    uint64_t cut_at_answer_ = 0;  // the power fails when so many more were given; 0: no

    // What a command that the crash met may have done or not.
    std::set<std::string> uncertain_disks_;
    std::unique_ptr<Disk> uncertain_disk_;
    struct Uncertain {
        Snapshot snapshot;
        bool begun;  // else its deletion
    };
    std::map<std::pair<std::string, std::string>, Uncertain> uncertain_snapshots_;
    uint64_t begun_there_ = 0, begun_lost_ = 0;
    std::string grow_;  // a disk whose shrinking a crash met
    std::string uncertain_name_;
    std::optional<Image> uncertain_image_;
};

}  // namespace

SimulationResult Simulate(const SimulationOptions& options) {
    return Runner(options).Run();
}

}  // namespace varve::simulation
