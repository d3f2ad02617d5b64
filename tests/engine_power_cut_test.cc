// The whole engine on the real RocksDB, with one power switch below RocksDB's files and the data.
// Not the simulation, which has more clients and commands; VARVE_SEED and VARVE_CUTS as in
// rocks_power_cut_test.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "cow/pool/pool.h"
#include "cow/store/rocks_store.h"
#include "tests/power_cut/logged_env.h"
#include "tests/power_cut/places.h"
#include "tests/simulation/scheduler.h"

namespace varve::power_cut {
namespace {

using simulation::Scheduler;

constexpr uint64_t kBlock = 4096, kSector = 512, kBlocks = 160;
constexpr char kData[] = "data";

/// A data file in memory; a log hears of writes and syncs. Transfers complete in any order.
class LoggedStore : public cow::BlockStore {
  public:
    /// `lying`: syncs do nothing.
    LoggedStore(Scheduler& scheduler, Executor& executor, FileLog& log, std::string& bytes,
                bool lying)
        : scheduler_(scheduler), executor_(executor), log_(log), bytes_(bytes), lying_(lying) {}
    uint32_t alignment() const override { return kSector; }
    void Submit(cow::BlockIo& io) override {
        cow::BlockIo* op = &io;
        const size_t position = log_.position();
        scheduler_.Later([this, op, position] { Complete(*op, position); });
    }

  private:
    struct Completion : Runnable {
        cow::BlockIo* io;
    };
    void Complete(cow::BlockIo& io, size_t submitted) {
        const FileLog::FileId file = log_.Find(kData);
        uint64_t offset = io.offset;
        for (uint32_t v = 0; v < io.vector_count; ++v) {
            const iovec& vector = io.vectors[v];
            if (bytes_.size() < offset + vector.iov_len) bytes_.resize(offset + vector.iov_len);
            char* here = bytes_.data() + offset;
            if (io.kind == cow::BlockIo::Kind::kRead) {
                std::memcpy(vector.iov_base, here, vector.iov_len);
            } else {
                std::memcpy(here, vector.iov_base, vector.iov_len);
                log_.Write(file, offset, {here, vector.iov_len});
            }
            offset += vector.iov_len;
        }
        if (io.kind == cow::BlockIo::Kind::kSync && !lying_) log_.Sync(file, submitted);
        io.error = 0;
        auto* completion = new Completion;
        completion->io = &io;
        completion->run = [](Runnable* self) {
            cow::BlockIo* done = static_cast<Completion*>(self)->io;
            delete static_cast<Completion*>(self);
            done->done(done);
        };
        executor_.Post(completion);
    }

    Scheduler& scheduler_;
    Executor& executor_;
    FileLog& log_;
    std::string& bytes_;
    const bool lying_;
};

class Roomy : public cow::SpaceStore {
    Status Provision(uint64_t, uint64_t) override { return Status(); }
    void Discard(uint64_t, uint64_t) override {}
    uint64_t Capacity(uint64_t) override { return 256 << 20; }
};

/// The engine on a directory of RocksDB's and a data file.
class Engine {
  public:
    Engine(uint64_t seed, FileLog& log, const std::string& directory, std::string data, bool create,
           bool lying = false)
        : scheduler_(seed), env_(NewLoggedEnv(log)), data_(std::move(data)) {
        home_ = &scheduler_.NewLane();
        environment_.home = home_;
        environment_.committer = &scheduler_.NewLane(true);
        environment_.loader = &scheduler_.NewLane(true);
        environment_.auditor = &scheduler_.NewLane();
        environment_.space = &space_;
        environment_.now_ms = [] { return int64_t{1'000'000}; };
        environment_.random = [] { return uint64_t{std::random_device{}()} + 1; };
        Scheduler::Lane& lane = scheduler_.NewLane();
        store_ = std::make_unique<LoggedStore>(scheduler_, lane, log, data_, lying);
        environment_.lanes.push_back({&lane, store_.get()});
        cow::RocksOptions rocks;
        rocks.create = create;
        rocks.buffer_bytes = 64 << 10;
        rocks.env = env_.get();
        auto metadata = cow::OpenRocksStore(directory, rocks);
        if (!metadata.ok()) {
            problem = metadata.error().message;
            return;
        }
        metadata_ = std::move(metadata.value());
        environment_.metadata = metadata_.get();
        auto pool = Do(cow::Pool::Open(environment_, {}));
        if (pool.ok()) pool_ = std::move(pool.value());
        if (!pool.ok()) problem = pool.error().message;
    }
    ~Engine() {
        if (!pool_) return;
        EXPECT_TRUE(Do(pool_->Shutdown()).ok());
        scheduler_.RunAll();
        pool_.reset();
    }

    template <typename T>
    T Do(Task<T> task) {
        return Await(scheduler_, *home_, std::move(task));
    }
    template <typename T>
    T On(cow::Volume& volume, Task<T> task) {
        return Await(scheduler_, volume.executor(), std::move(task));
    }
    cow::Export Attach(const std::string& name) {
        auto opened = Do(pool_->OpenExport(name));
        EXPECT_TRUE(opened.ok()) << name;
        return opened.value();
    }
    void Detach(const cow::Export& e) { Finish(DetachTask(e.id)); }
    /// All of it; empty if that fails.
    std::string Read(const std::string& name) {
        const cow::Export e = Attach(name);
        std::string bytes(e.volume->size(), '?');
        const std::span<std::byte> span(reinterpret_cast<std::byte*>(bytes.data()), bytes.size());
        if (On(*e.volume, e.volume->Read(0, span, nullptr)) != 0) bytes.clear();
        Detach(e);
        return bytes;
    }
    /// What the checker finds once nothing is under way; empty: nothing.
    std::string Check() {
        Finish(ReclaimTask());
        const auto report = cow::CheckMetadata(*metadata_);
        if (!report.ok()) return report.error().message;
        if (!report.value().errors.empty()) return report.value().errors[0];
        return report.value().leaked_blocks == 0 ? "" : "leaked blocks";
    }
    cow::Pool& pool() { return *pool_; }

    std::string problem;  // why it does not open

  private:
    void Finish(Task<void> task) {
        done_ = false;
        Spawn(std::move(task));
        scheduler_.RunUntil([this] { return done_; });
    }
    Task<void> DetachTask(uint64_t id) {
        co_await Hop(*home_);
        co_await pool_->CloseExport(id);
        done_ = true;
    }
    Task<void> ReclaimTask() {
        co_await Hop(*home_);
        co_await pool_->WaitForReclaim();
        done_ = true;
    }

    Scheduler scheduler_;
    Executor* home_ = nullptr;
    const std::unique_ptr<rocksdb::Env> env_;
    std::string data_;
    Roomy space_;
    std::unique_ptr<LoggedStore> store_;
    std::unique_ptr<cow::MetadataStore> metadata_;
    cow::Environment environment_;
    std::unique_ptr<cow::Pool> pool_;
    bool done_ = false;
};

constexpr size_t kNever = ~size_t{0};

/// Positions in the log: something was sent, and answered.
struct Span {
    size_t sent = kNever, answered = kNever;
};
struct Write {
    uint64_t number = 0;  // of the content; 0: zeros
    size_t sent = 0;      // position
    size_t durable = kNever;
};
struct Snapshot {
    std::vector<uint64_t> numbers;
    Span taken, deleted;
};

class EnginePowerCutTest : public testing::Test {
  protected:
    EnginePowerCutTest() : seed_(Setting("VARVE_SEED", std::random_device()())), random_(seed_) {
        std::printf("seed %llu\n", static_cast<unsigned long long>(seed_));
        for (auto& writes : blocks_) writes.push_back({0, 0, 0});
    }

    static std::string Content(uint64_t number, uint64_t bytes) {
        std::string content;
        while (content.size() < bytes) {
            content.append(reinterpret_cast<const char*>(&number), sizeof number);
        }
        return content;
    }

    /// All that was answered is durable.
    void Promised() {
        for (auto& writes : blocks_) {
            for (Write& write : writes) write.durable = std::min(write.durable, log_.position());
        }
    }

    void Record(unsigned steps, bool lying = false) {
        log_.Create(kData);
        log_.SyncNames(log_.position());
        Engine engine(seed_, log_, place_.New(), "", true, lying);
        ASSERT_EQ(engine.problem, "");
        ASSERT_TRUE(engine.Do(engine.pool().CreateDisk("d", kBlocks * kBlock)).ok());
        first_ = log_.position();
        const cow::Export disk = engine.Attach("d");
        for (unsigned i = 0; i < steps; ++i) Step(engine, *disk.volume);
        engine.Detach(disk);
        end_ = log_.position();
    }

    void Step(Engine& engine, cow::Volume& volume) {
        const uint64_t kind = random_() % 10;
        if (kind < 6) {
            const uint64_t count = 1 + random_() % 12, first = random_() % (kBlocks - count);
            const std::string data = Content(++number_, count * kBlock);
            for (uint64_t b = first; b < first + count; ++b) {
                blocks_[b].push_back({number_, log_.position()});
            }
            const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data.data()),
                                                   data.size());
            EXPECT_EQ(0, engine.On(volume, volume.Write(first * kBlock, bytes)));
        } else if (kind < 8) {
            EXPECT_EQ(0, engine.On(volume, volume.Flush()));
            Promised();
        } else if (kind == 8 || snapshots_.empty()) {
            const std::string name = fmt::format("s{}", ++number_);
            Snapshot& snapshot = snapshots_[name];
            for (const auto& writes : blocks_) snapshot.numbers.push_back(writes.back().number);
            snapshot.taken.sent = log_.position();
            EXPECT_TRUE(engine.Do(engine.pool().CreateSnapshots({"d@" + name})).ok());
            snapshot.taken.answered = log_.position();
            Promised();
        } else {
            auto victim = snapshots_.begin();
            std::advance(victim, static_cast<std::ptrdiff_t>(random_() % snapshots_.size()));
            if (victim->second.deleted.sent != kNever) return;
            victim->second.deleted.sent = log_.position();
            EXPECT_TRUE(engine.Do(engine.pool().DeleteSnapshot("d@" + victim->first, false)).ok());
            victim->second.deleted.answered = log_.position();
        }
    }

    /// What is wrong after a cut at `position`; empty: nothing.
    std::string After(size_t position) {
        Files files = log_.Cut(position, random_);
        const std::string data = files[kData];
        FileLog log(files);
        files.erase(kData);
        Engine engine(random_(), log, place_.New(files), data, false);
        if (!engine.problem.empty()) return engine.problem;
        std::string wrong = VerifyDisk(engine.Read("d"), position);
        if (wrong.empty()) wrong = VerifySnapshots(engine, position);
        return wrong.empty() ? engine.Check() : wrong;
    }

    std::string VerifyDisk(const std::string& bytes, size_t position) const {
        if (bytes.size() != kBlocks * kBlock) return "the disk cannot be read";
        for (uint64_t at = 0; at < bytes.size(); at += kSector) {
            const std::vector<Write>& writes = blocks_[at / kBlock];
            const std::string sector = bytes.substr(at, kSector);
            bool legal = false;
            for (const Write& write : writes) {
                if (write.durable <= position) legal = false;  // what was before is gone
                legal |= (write.sent < position || write.number == 0) &&
                         sector == Content(write.number, kSector);
            }
            if (!legal) return fmt::format("sector {} holds what it must not", at / kSector);
        }
        return "";
    }

    std::string VerifySnapshots(Engine& engine, size_t position) const {
        const auto listed = engine.Do(engine.pool().ListSnapshots("d"));
        if (!listed.ok()) return listed.error().message;
        size_t there = 0;
        for (const auto& info : listed.value()) {
            const Snapshot& snapshot = snapshots_.at(info.name);
            const Span &taken = snapshot.taken, &deleted = snapshot.deleted;
            if (taken.sent >= position || deleted.answered <= position) {
                return info.name + " is there, but must not be";
            }
            there += taken.answered <= position && deleted.sent >= position;
            std::string expected;
            for (const uint64_t number : snapshot.numbers) expected += Content(number, kBlock);
            if (engine.Read("d@" + info.name) != expected) return info.name + " is wrong";
        }
        for (const auto& [name, snapshot] : snapshots_) {
            there -= snapshot.taken.answered <= position && snapshot.deleted.sent >= position;
        }
        return there == 0 ? "" : "a snapshot is lost";
    }

    const uint64_t seed_;
    Random random_;
    Place place_;
    FileLog log_;
    std::vector<Write> blocks_[kBlocks];
    std::map<std::string, Snapshot> snapshots_;
    uint64_t number_ = 0;
    size_t first_ = 0, end_ = 0;  // positions: the disk is there; the end
};

TEST_F(EnginePowerCutTest, WhatWasPromisedIsThereAfterACutAnywhere) {
    Record(120);
    std::vector<size_t> cuts;
    const size_t count = Setting("VARVE_CUTS", 100);
    if (count == 0) {
        for (size_t at = first_; at <= end_; ++at) cuts.push_back(at);
    }
    while (cuts.size() < count) cuts.push_back(first_ + random_() % (end_ - first_ + 1));
    for (const size_t at : cuts) {
        ASSERT_EQ(After(at), "") << "cut at " << at << " of " << end_ << ", seed " << seed_;
    }
    std::printf("%zu snapshots, %zu operations, %zu cuts\n", snapshots_.size(), end_, cuts.size());
}

TEST_F(EnginePowerCutTest, ADataDeviceThatLiesIsFound) {
    Record(60, true);
    size_t found = 0;
    for (size_t i = 0; i < 20; ++i) found += !After(end_).empty();
    EXPECT_GT(found, 0U);
}

}  // namespace
}  // namespace varve::power_cut
