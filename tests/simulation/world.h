// World: the simulated disk and metadata store with one power switch, and an engine on top.
// Not RocksDB and not io_uring: those have tests of their own.
#pragma once

#include <cstring>
#include <map>
#include <string>

#include "cow/format/ring_record.h"
#include "cow/head/head.h"
#include "cow/pool/pool.h"
#include "tests/simulation/media.h"

namespace varve::simulation {

struct DataTraits {
    uint32_t alignment = 512;
    bool reads_at_once = false;  // as if mapped into memory
};

/// Transfers complete in any order. Without power they fail and change nothing.
class SimBlockStore : public cow::BlockStore {
  public:
    SimBlockStore(Media& media, Executor& executor, DataTraits traits)
        : media_(media),
          executor_(executor),
          traits_(traits),
          failed_syncs_seen_(media.failed_syncs()) {}

    uint32_t alignment() const override { return traits_.alignment; }

    void Submit(cow::BlockIo& io) override {
        VARVE_CHECK(io.offset % traits_.alignment == 0);
        const bool on = media_.Next(Call::kSubmit) != Fate::kDark;
        const Start start{media_.write_order(), on};
        if (io.kind == cow::BlockIo::Kind::kWrite) {
            media_.LookForAbandoned(static_cast<const std::byte*>(io.vectors[0].iov_base));
        }
        cow::BlockIo* op = &io;
        media_.scheduler().Later([this, op, start] { Complete(*op, start); });
    }

    bool DoNow(cow::BlockIo& io) override {
        if (io.kind != cow::BlockIo::Kind::kRead || !traits_.reads_at_once) return false;
        Transfer(io, {media_.write_order(), media_.power()});
        return true;
    }

  private:
    struct Completion : Runnable {
        cow::BlockIo* io;
    };
    struct Start {  // how things were when a transfer was submitted
        uint64_t order;
        bool was_on;
    };

    void Transfer(cow::BlockIo& io, const Start& start) {
        const Fate fate = media_.Next(CallOf(io.kind));
        const bool on = fate != Fate::kDark;
        io.error = fate == Fate::kDone ? 0 : EIO;
        const bool writes =
            io.kind == cow::BlockIo::Kind::kWrite || io.kind == cow::BlockIo::Kind::kAppend;
        if (start.was_on && !on && writes) {
            ForEachSector(io, [this](uint64_t sector, std::byte* memory) {
                media_.TearSector(sector, Content::Of(memory));
            });
        }
        if (on) Perform(io, start);
    }

    void Complete(cow::BlockIo& io, const Start& start) {
        Transfer(io, start);
        auto* completion = new Completion;
        completion->io = &io;
        completion->run = [](Runnable* self) {
            cow::BlockIo* done = static_cast<Completion*>(self)->io;
            delete static_cast<Completion*>(self);
            done->done(done);
        };
        executor_.Post(completion);
    }

    static Call CallOf(cow::BlockIo::Kind kind) {
        if (kind == cow::BlockIo::Kind::kSync) return Call::kSync;
        if (kind == cow::BlockIo::Kind::kAppend) return Call::kAppend;
        return kind == cow::BlockIo::Kind::kRead ? Call::kRead : Call::kWrite;
    }

    /// What a transfer does, even one that fails.
    void Perform(cow::BlockIo& io, const Start& start) {
        switch (io.kind) {
            case cow::BlockIo::Kind::kRead:
                ForEachSector(io, [this](uint64_t sector, std::byte* memory) {
                    std::memcpy(memory, media_.ReadSector(sector).bytes().data(), kSector);
                });
                return;
            case cow::BlockIo::Kind::kWrite:
            case cow::BlockIo::Kind::kAppend: {
                const bool all = io.error == 0 || media_.scheduler().Chance(0.3);
                ForEachSector(io, [&](uint64_t sector, std::byte* memory) {
                    if (all || media_.scheduler().Chance(0.5)) {
                        media_.WriteSector(sector, Content::Of(memory));
                    }
                });
                return;
            }
            case cow::BlockIo::Kind::kSync:
                if (media_.failed_syncs() != failed_syncs_seen_) {
                    io.error = EIO;
                } else if (io.error != 0) {
                    media_.FailSync(start.order);
                } else {
                    media_.SyncUpTo(start.order);
                }
                failed_syncs_seen_ = media_.failed_syncs();
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

    Media& media_;
    Executor& executor_;
    const DataTraits traits_;
    uint64_t failed_syncs_seen_;  // every open file is told once of each
};

/// A file system of media.capacity() bytes with nothing but the data file on it. Like the real one
/// it refuses a stretch that the file holds already if there would be no room for another copy.
class SimSpace : public cow::SpaceStore {
  public:
    explicit SimSpace(Media& media) : media_(media) {}
    Status Provision(uint64_t offset, uint64_t length) override {
        const bool room = (media_.held.size() + 1) * length <= media_.capacity();
        const bool refused = media_.Next(Call::kProvision) == Fate::kError;
        if (!room || offset + length > media_.capacity() || refused) {
            return MakeError(ErrorKind::kNoSpace, "the simulated device is full");
        }
        media_.held.insert(offset);
        return Status();
    }
    void Discard(uint64_t offset, uint64_t) override {
        media_.held.erase(offset / cow::kRegionBytes * cow::kRegionBytes);
    }
    uint64_t Capacity(uint64_t) override { return media_.capacity(); }

  private:
    Media& media_;
};

class SimMetadata : public cow::MetadataStore {
  public:
    using Rows = std::map<std::string, std::string>;
    explicit SimMetadata(Media& media) : media_(media) {}

    std::unique_ptr<cow::MetadataView> View() override {
        return std::make_unique<RowsView>(media_);
    }

    Status Commit(const cow::Batch& batch) override {
        media_.largest_batch = std::max(media_.largest_batch, batch.bytes());
        const bool was_on = media_.power();
        const Fate fate = media_.Next(Call::kCommit);
        const Error failed = MakeError(ErrorKind::kIo, "the simulated store failed");
        // A commit that the power cut met, or that failed, may be there afterwards or not.
        const bool indeterminate = was_on && fate != Fate::kDone;
        if (!was_on || (indeterminate && media_.scheduler().Chance(0.5))) return failed;
        auto rows = std::make_shared<Rows>(*media_.metadata());
        for (const cow::Batch::Op& op : batch.ops()) {
            const auto old = rows->find(op.key);
            if (old != rows->end()) {
                Count(old->first, old->second, false);
                rows->erase(old);
                if (media_.remembers_deleted) media_.deleted_rows.insert(op.key);
            }
            if (!op.value) continue;
            media_.deleted_rows.erase(op.key);
            Count(op.key, *op.value, true);
            rows->emplace(op.key, *op.value);
        }
        media_.SetMetadata(std::move(rows));
        const bool fits = !limited() || media_.metadata_bytes <= media_.metadata_capacity;
        if (media_.broken.empty() && !fits) media_.broken = "a commit found no room";
        if (indeterminate) return failed;
        return Status();
    }

    cow::MetadataSpace Space() override {
        if (!limited()) return {};
        const uint64_t room = media_.metadata_capacity - media_.metadata_spare;
        const uint64_t used = std::min(room, media_.metadata_bytes);
        return {room, room - used, media_.metadata_spare};
    }
    bool full() const override { return Above(0); }
    bool exhausted() const override { return Above(media_.metadata_spare / 2); }

  private:
    bool limited() const { return media_.metadata_capacity != 0; }
    bool Above(uint64_t more) const {
        const uint64_t room = media_.metadata_capacity - media_.metadata_spare;
        return limited() && media_.metadata_bytes >= room + more;
    }
    void Count(const std::string& key, const std::string& value, bool there) {
        const auto add = [there](uint64_t& to, uint64_t count) {
            there ? to += count : to -= count;
        };
        add(media_.metadata_bytes, key.size() + value.size());
    }

    class RowsCursor : public cow::Cursor {
      public:
        RowsCursor(Media& media, std::shared_ptr<const Rows> rows, std::string_view lower,
                   std::string_view upper, uint64_t deleted_most)
            : media_(media),
              deleted_most_(deleted_most),
              rows_(std::move(rows)),
              lower_(lower),
              upper_(upper),
              at_(rows_->end()) {
            media_.cursors_most = std::max(media_.cursors_most, ++media_.cursors);
        }
        ~RowsCursor() override { --media_.cursors; }
        void Seek(std::string_view key) override {
            ++media_.seeks;
            status_ = Lookup(media_);
            const std::string from = std::max(lower_, std::string(key));
            at_ = status_.ok() ? rows_->lower_bound(from) : rows_->end();
            PassDeleted(from);
            LoadPage();
        }
        void Next() override {
            ++media_.steps;
            const std::string from = at_->first;
            ++at_;
            PassDeleted(from);
            LoadPage();
        }
        bool valid() const override {
            return at_ != rows_->end() && (upper_.empty() || at_->first < upper_);
        }
        bool gave_up() const override { return gave_up_; }
        std::string_view key() const override { return at_->first; }
        std::string_view value() const override { return at_->second; }
        Status status() const override { return status_; }

      private:
        void LoadPage() {
            if (at_ == rows_->end() || !media_.OnBadPage(at_->first)) return;
            status_ = BadPage();
            at_ = rows_->end();
        }
        /// As RocksDB does it, each is a step.
        void PassDeleted(const std::string& from) {
            gave_up_ = false;
            const auto& deleted = media_.deleted_rows;
            uint64_t passed = 0;
            for (auto row = deleted.lower_bound(from); row != deleted.end(); ++row) {
                if (!upper_.empty() && *row >= upper_) break;
                if (at_ != rows_->end() && *row >= at_->first) break;
                ++media_.steps;
                if (++passed <= deleted_most_ || deleted_most_ == 0) continue;
                gave_up_ = true;
                at_ = rows_->end();
                break;
            }
        }

        Media& media_;
        const uint64_t deleted_most_;
        bool gave_up_ = false;
        std::shared_ptr<const Rows> rows_;
        const std::string lower_, upper_;
        Status status_;
        Rows::const_iterator at_;
    };
    class RowsView : public cow::MetadataView {
      public:
        explicit RowsView(Media& media) : media_(media), rows_(media.metadata()) {}
        Result<std::optional<std::string>> Get(std::string_view key) override {
            ++media_.seeks;
            const Status s = Lookup(media_);
            if (!s.ok()) return s.error();
            if (media_.OnBadPage(key)) return BadPage();
            const auto row = rows_->find(std::string(key));
            if (row == rows_->end()) return std::optional<std::string>();
            return std::optional<std::string>(row->second);
        }
        std::unique_ptr<cow::Cursor> Range(std::string_view lower, std::string_view upper,
                                           uint64_t deleted_most) override {
            return std::make_unique<RowsCursor>(media_, rows_, lower, upper, deleted_most);
        }

      private:
        Media& media_;
        const std::shared_ptr<const Rows> rows_;
    };

    static Error BadPage() {
        return MakeError(ErrorKind::kDamaged, "a page of the simulated store is damaged");
    }
    /// Reads need no power here: without any, nothing that comes of them is believed.
    static Status Lookup(Media& media) {
        const bool fails = media.scheduler().running() && media.Next(Call::kLookup) == Fate::kError;
        if (fails) return MakeError(ErrorKind::kIo, "the simulated store cannot be read");
        return Status();
    }

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
            DataTraits traits = {})
        : scheduler_(scheduler),
          home_(scheduler.NewLane()),
          committer_(scheduler.NewLane(true)),
          loader_(scheduler.NewLane(true)),
          auditor_(scheduler.NewLane()),
          space_(media),
          metadata_(media),
          clock_(scheduler) {
        environment_.clock = &clock_;
        environment_.home = &home_;
        environment_.committer = &committer_;
        environment_.loader = &loader_;
        environment_.auditor = &auditor_;
        environment_.space = &space_;
        environment_.metadata = &metadata_;
        environment_.now_ms = [] { return int64_t{1'000'000}; };
        environment_.random = [&media] { return ++media.drawn; };
        for (unsigned i = 0; i < lanes; ++i) {
            Scheduler::Lane& lane = scheduler.NewLane();
            stores_.push_back(std::make_unique<SimBlockStore>(media, lane, traits));
            environment_.lanes.push_back({&lane, stores_.back().get()});
            lanes_.push_back(&lane);
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

    /// Started, and not stopped.
    bool runs() const { return pool_ != nullptr; }
    cow::Pool& pool() { return *pool_; }
    Scheduler::Lane& home() { return home_; }
    const cow::Environment& environment() const { return environment_; }
    Scheduler::Lane& committer() { return committer_; }
    Scheduler::Lane& loader() { return loader_; }
    Scheduler::Lane& auditor() { return auditor_; }
    Scheduler& scheduler() { return scheduler_; }
    /// One of those that disks live on does nothing for a while.
    void RestOneLane() { scheduler_.Rest(*lanes_[scheduler_.Draw(lanes_.size())]); }
    cow::MetadataStore& metadata() { return metadata_; }
    Clock& clock() { return clock_; }

    /// Runs a pool command to its end.
    template <typename T>
    T Do(Task<T> task) {
        return Await(scheduler_, home_, std::move(task));
    }

  private:
    Scheduler& scheduler_;
    Scheduler::Lane& home_;
    Scheduler::Lane& committer_;
    Scheduler::Lane& loader_;
    Scheduler::Lane& auditor_;
    SimSpace space_;
    SimMetadata metadata_;
    SimClock clock_;
    std::vector<std::unique_ptr<SimBlockStore>> stores_;
    std::vector<Scheduler::Lane*> lanes_;
    cow::Environment environment_;
    cow::PoolOptions options_;
    std::unique_ptr<cow::Pool> pool_;
};

}  // namespace varve::simulation
