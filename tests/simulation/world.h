// World: the simulated disk and metadata store with one power switch, and an engine on top.
// Not RocksDB and not io_uring: those have tests of their own.
#pragma once

#include <cstring>
#include <map>
#include <string>

#include "cow/pool.h"
#include "tests/simulation/media.h"

namespace varve::simulation {

/// Transfers complete in any order. Without power they fail and change nothing.
class SimBlockStore : public cow::BlockStore {
  public:
    SimBlockStore(Media& media, Executor& executor, uint32_t alignment)
        : media_(media), executor_(executor), alignment_(alignment) {}

    uint32_t alignment() const override { return alignment_; }

    void Submit(cow::BlockIo& io) override {
        VARVE_CHECK(io.offset % alignment_ == 0);
        const Start start{media_.write_order(), media_.failed_syncs(), media_.Tick()};
        cow::BlockIo* op = &io;
        media_.scheduler().Later([this, op, start] { Complete(*op, start); });
    }

  private:
    struct Completion : Runnable {
        cow::BlockIo* io;
    };
    struct Start {  // how things were when a transfer was submitted
        uint64_t order;
        uint64_t failed_syncs;
        bool was_on;
    };

    void Complete(cow::BlockIo& io, const Start& start) {
        const bool on = media_.Tick();
        io.error = on ? 0 : EIO;
        if (start.was_on && !on && io.kind == cow::BlockIo::Kind::kWrite) {
            ForEachSector(io, [this](uint64_t sector, std::byte* memory) {
                media_.TearSector(sector, Text(memory));
            });
        }
        if (on) Perform(io, start);
        auto* completion = new Completion;
        completion->io = &io;
        completion->run = [](Runnable* self) {
            cow::BlockIo* done = static_cast<Completion*>(self)->io;
            delete static_cast<Completion*>(self);
            done->done(done);
        };
        executor_.Post(completion);
    }

    void Perform(cow::BlockIo& io, const Start& start) {
        const Faults& faults = media_.faults;
        switch (io.kind) {
            case cow::BlockIo::Kind::kRead:
                if (media_.Fails(faults.read_error)) io.error = EIO;
                ForEachSector(io, [this](uint64_t sector, std::byte* memory) {
                    const std::string content = media_.ReadSector(sector);
                    std::memcpy(memory, content.data(), kSector);
                });
                return;
            case cow::BlockIo::Kind::kWrite:
                if (media_.Fails(faults.write_error)) io.error = EIO;
                ForEachSector(io, [&](uint64_t sector, std::byte* memory) {
                    if (io.error == 0 || media_.scheduler().Chance(0.5)) {
                        media_.WriteSector(sector, Text(memory));
                    }
                });
                return;
            case cow::BlockIo::Kind::kSync:
                if (media_.failed_syncs() != start.failed_syncs) {
                    io.error = EIO;
                } else if (media_.Fails(faults.sync_error)) {
                    io.error = EIO;
                    media_.FailSync(start.order);
                } else {
                    media_.SyncUpTo(start.order);
                }
                return;
        }
    }

    template <typename F>
    void ForEachSector(const cow::BlockIo& io, F&& apply) {
        uint64_t offset = io.offset;
        for (uint32_t v = 0; v < io.vector_count; ++v) {
            auto* memory = static_cast<std::byte*>(io.vectors[v].iov_base);
            for (size_t done = 0; done < io.vectors[v].iov_len; done += kSector) {
                VARVE_CHECK(io.vectors[v].iov_len - done >= kSector);
                apply(offset / kSector, memory + done);
                offset += kSector;
            }
        }
    }
    static std::string Text(const std::byte* memory) {
        return std::string(reinterpret_cast<const char*>(memory), kSector);
    }

    Media& media_;
    Executor& executor_;
    const uint32_t alignment_;
};

/// A file system of media.capacity() bytes with nothing but the data file on it. Like the real one
/// it refuses a stretch that the file holds already if there would be no room for another copy.
class SimSpace : public cow::SpaceStore {
  public:
    explicit SimSpace(Media& media) : media_(media) {}
    Status Provision(uint64_t offset, uint64_t length) override {
        const bool room = (media_.held.size() + 1) * length <= media_.capacity();
        if (!room || offset + length > media_.capacity() || media_.Fails(media_.faults.no_space)) {
            return MakeError(ErrorKind::kNoSpace, "the simulated device is full");
        }
        media_.held.insert(offset);
        return Status();
    }
    void Discard(uint64_t offset, uint64_t) override { media_.held.erase(offset); }
    uint64_t Capacity(uint64_t) override { return media_.capacity(); }

  private:
    Media& media_;
};

class SimMetadata : public cow::MetadataStore {
  public:
    using Rows = std::map<std::string, std::string>;
    explicit SimMetadata(Media& media) : media_(media) {}

    std::unique_ptr<cow::MetadataView> View() override {
        return std::make_unique<RowsView>(media_.metadata());
    }

    Status Commit(const cow::Batch& batch) override {
        const bool was_on = media_.power();
        const bool on = media_.Tick();
        const Error failed = MakeError(ErrorKind::kIo, "the simulated store failed");
        // A commit that the power cut met, or that failed, may be there afterwards or not.
        const bool faulty = on && media_.Fails(media_.faults.commit_error);
        const bool indeterminate = (was_on && !on) || faulty;
        if ((!on && !was_on) || (indeterminate && media_.scheduler().Chance(0.5))) return failed;
        auto rows = std::make_shared<Rows>(*media_.metadata());
        for (const cow::Batch::Op& op : batch.ops()) {
            if (op.value) {
                (*rows)[op.key] = *op.value;
            } else {
                rows->erase(op.key);
            }
        }
        media_.SetMetadata(std::move(rows));
        if (indeterminate) return failed;
        return Status();
    }

  private:
    class RowsCursor : public cow::Cursor {
      public:
        RowsCursor(std::shared_ptr<const Rows> rows, std::string_view lower, std::string_view upper)
            : rows_(std::move(rows)), lower_(lower), upper_(upper), at_(rows_->end()) {}
        void Seek(std::string_view key) override {
            at_ = rows_->lower_bound(std::max(lower_, std::string(key)));
        }
        void Next() override { ++at_; }
        bool valid() const override {
            return at_ != rows_->end() && (upper_.empty() || at_->first < upper_);
        }
        std::string_view key() const override { return at_->first; }
        std::string_view value() const override { return at_->second; }
        Status status() const override { return Status(); }

      private:
        std::shared_ptr<const Rows> rows_;
        const std::string lower_, upper_;
        Rows::const_iterator at_;
    };
    class RowsView : public cow::MetadataView {
      public:
        explicit RowsView(std::shared_ptr<const Rows> rows) : rows_(std::move(rows)) {}
        Result<std::optional<std::string>> Get(std::string_view key) override {
            const auto row = rows_->find(std::string(key));
            if (row == rows_->end()) return std::optional<std::string>();
            return std::optional<std::string>(row->second);
        }
        std::unique_ptr<cow::Cursor> Range(std::string_view lower,
                                           std::string_view upper) override {
            return std::make_unique<RowsCursor>(rows_, lower, upper);
        }

      private:
        const std::shared_ptr<const Rows> rows_;
    };
    Media& media_;
};

/// Time as the scheduler's steps. Sleepers wake earlier if there is nothing else to do.
class SimClock : public Clock {
  public:
    explicit SimClock(Scheduler& scheduler) : scheduler_(scheduler) {}
    int64_t NowUs() override { return static_cast<int64_t>(scheduler_.steps()) * kStepUs; }
    void PostAfter(int64_t us, Executor& executor, Runnable* runnable) override {
        const auto steps = static_cast<uint64_t>((us + kStepUs - 1) / kStepUs);
        scheduler_.After(steps, [&executor, runnable] { executor.Post(runnable); });
    }

  private:
    static constexpr int64_t kStepUs = 50;
    Scheduler& scheduler_;
};

/// The engine, running on a medium.
class Machine {
  public:
    Machine(Scheduler& scheduler, Media& media, unsigned lanes, cow::PoolOptions options,
            uint32_t alignment)
        : scheduler_(scheduler),
          home_(scheduler.NewLane()),
          loader_(scheduler.NewLane(true)),
          auditor_(scheduler.NewLane()),
          space_(media),
          metadata_(media),
          clock_(scheduler) {
        environment_.clock = &clock_;
        environment_.home = &home_;
        environment_.loader = &loader_;
        environment_.auditor = &auditor_;
        environment_.space = &space_;
        environment_.metadata = &metadata_;
        environment_.now_ms = [] { return int64_t{1'000'000}; };
        for (unsigned i = 0; i < lanes; ++i) {
            Scheduler::Lane& lane = scheduler.NewLane();
            stores_.push_back(std::make_unique<SimBlockStore>(media, lane, alignment));
            environment_.lanes.push_back({&lane, stores_.back().get()});
        }
        options_ = options;
    }

    Status Start() {
        Result<std::unique_ptr<cow::Pool>> pool =
            Await(scheduler_, home_, cow::Pool::Open(environment_, options_));
        if (!pool.ok()) return pool.error();
        pool_ = std::move(pool.value());
        return Status();
    }

    Status Stop() {
        const Status s = Await(scheduler_, home_, pool_->Shutdown());
        scheduler_.RunAll();
        pool_.reset();
        return s;
    }

    cow::Pool& pool() { return *pool_; }
    Executor& home() { return home_; }
    Scheduler& scheduler() { return scheduler_; }
    cow::MetadataStore& metadata() { return metadata_; }
    Clock& clock() { return clock_; }

    /// Runs a pool command to its end.
    template <typename T>
    T Do(Task<T> task) {
        return Await(scheduler_, home_, std::move(task));
    }

  private:
    Scheduler& scheduler_;
    Executor& home_;
    Executor& loader_;
    Executor& auditor_;
    SimSpace space_;
    SimMetadata metadata_;
    SimClock clock_;
    std::vector<std::unique_ptr<SimBlockStore>> stores_;
    cow::Environment environment_;
    cow::PoolOptions options_;
    std::unique_ptr<cow::Pool> pool_;
};

}  // namespace varve::simulation
