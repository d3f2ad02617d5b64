#include "cow/store/rocks_store.h"

#include <fmt/format.h>
#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/slice_transform.h>
#include <rocksdb/sst_file_manager.h>
#include <rocksdb/table.h>
#include <rocksdb/utilities/table_properties_collectors.h>
#include <sys/statvfs.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <filesystem>
#include <mutex>
#include <optional>
#include <utility>

#include "base/log.h"
#include "cow/store/rocks_ballast.h"
#include "cow/store/rocks_descriptors.h"
#include "cow/store/rocks_files.h"
#include "cow/store/rocks_log.h"

namespace varve::cow {
namespace {

constexpr size_t kHintBytes = 9;  // of a key: its letter and first number

std::string OneLine(std::string text) {
    for (char& c : text) {
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
    }
    return text;
}

Error ToError(const rocksdb::Status& status, const std::string& path) {
    ErrorKind kind = ErrorKind::kIo;
    const char* advice = "look at the device and the system's log";
    if (status.IsNoSpace()) {
        kind = ErrorKind::kNoSpace;
        advice = "make room on its file system";
    } else if (status.IsCorruption()) {
        kind = ErrorKind::kDamaged;
        advice = "restore the pool from a backup";
    } else if (status.IsInvalidArgument() || status.IsNotSupported()) {
        kind = ErrorKind::kInvalid;
        advice = "it may come from another version of RocksDB";
    }
    return MakeError(
        kind, fmt::format("metadata in {}: {}; {}", path, OneLine(status.ToString()), advice));
}

rocksdb::Slice ToSlice(std::string_view text) {
    return {text.data(), text.size()};
}
std::string_view ToView(const rocksdb::Slice& slice) {
    return {slice.data(), slice.size()};
}

/// What RocksDB says of its own accord, for --log-level debug. Its own log file would lie on the
/// metadata's file system: where that is full, its writer meets an assertion at the second line.
class Messages : public rocksdb::Logger {
  public:
    Messages() : rocksdb::Logger(rocksdb::InfoLogLevel::WARN_LEVEL) {}

    void LogHeader(const char*, va_list) override {}  // all its settings
    using rocksdb::Logger::Logv;
    void Logv(const char* format, va_list values) override {
        char text[1024];
        std::vsnprintf(text, sizeof text, format, values);
        Log(LogLevel::kDebug, "RocksDB: " + OneLine(text));
    }
};

/// A RocksDB snapshot, held by a view and by its cursors.
class Pinned {
  public:
    explicit Pinned(rocksdb::DB& db) : db_(db), snapshot_(db.GetSnapshot()) {}
    ~Pinned() { db_.ReleaseSnapshot(snapshot_); }
    Pinned(const Pinned&) = delete;

    rocksdb::DB& db() const { return db_; }
    rocksdb::ReadOptions ReadOptions() const {
        rocksdb::ReadOptions options;
        options.snapshot = snapshot_;
        options.verify_checksums = true;
        return options;
    }

  private:
    rocksdb::DB& db_;
    const rocksdb::Snapshot* snapshot_;
};

class RocksCursor : public Cursor {
  public:
    RocksCursor(std::shared_ptr<const Pinned> pinned, const std::string& path,
                std::string_view lower, std::string_view upper, uint64_t deleted_most)
        : pinned_(std::move(pinned)), path_(path), lower_(lower), upper_(upper) {
        lower_slice_ = lower_;
        upper_slice_ = upper_;
        rocksdb::ReadOptions options = pinned_->ReadOptions();
        options.iterate_lower_bound = &lower_slice_;
        options.iterate_upper_bound = &upper_slice_;
        options.max_skippable_internal_keys = deleted_most;
        iterator_.reset(pinned_->db().NewIterator(options));
    }

    void Seek(std::string_view key) override { iterator_->Seek(ToSlice(key)); }
    void Next() override { iterator_->Next(); }
    bool valid() const override { return iterator_->Valid(); }
    std::string_view key() const override { return ToView(iterator_->key()); }
    std::string_view value() const override { return ToView(iterator_->value()); }
    Status status() const override {
        const rocksdb::Status status = iterator_->status();
        return status.ok() || gave_up() ? Status() : Status(ToError(status, path_));
    }
    bool gave_up() const override { return iterator_->status().IsIncomplete(); }

  private:
    const std::shared_ptr<const Pinned> pinned_;
    const std::string& path_;  // the store's
    const std::string lower_;
    const std::string upper_;
    rocksdb::Slice lower_slice_;  // the iterator points to these
    rocksdb::Slice upper_slice_;
    std::unique_ptr<rocksdb::Iterator> iterator_;
};

class RocksView : public MetadataView {
  public:
    RocksView(rocksdb::DB& db, const std::string& path)
        : pinned_(std::make_shared<const Pinned>(db)), path_(path) {}

    Result<std::optional<std::string>> Get(std::string_view key) override {
        std::string value;
        const rocksdb::Status status =
            pinned_->db().Get(pinned_->ReadOptions(), ToSlice(key), &value);
        if (status.IsNotFound()) return std::optional<std::string>();
        if (!status.ok()) return ToError(status, path_);
        return std::optional<std::string>(std::move(value));
    }

    std::unique_ptr<Cursor> Range(std::string_view lower, std::string_view upper,
                                  uint64_t deleted_most) override {
        return std::make_unique<RocksCursor>(pinned_, path_, lower, upper, deleted_most);
    }

  private:
    const std::shared_ptr<const Pinned> pinned_;
    const std::string& path_;  // the store's
};

/// What a store is opened with, and lives on. In the order in which it is built up.
struct Ground {
    std::unique_ptr<Ballast> ballast;
    std::unique_ptr<rocksdb::Env> descriptors_env;
    std::unique_ptr<rocksdb::Env> ballast_env;
    std::unique_ptr<rocksdb::Env> env;
    std::shared_ptr<rocksdb::SstFileManager> tables;
};

class RocksStore : public MetadataStore {
  public:
    RocksStore(Ground ground, std::unique_ptr<rocksdb::DB> db, std::string path,
               const RocksOptions& options)
        : ground_(std::move(ground)),
          db_(std::move(db)),
          path_(std::move(path)),
          buffer_bytes_(options.buffer_bytes),
          reserve_(options.reserve) {
        Space();
    }

    ~RocksStore() override {
        const rocksdb::Status status = db_->Close();
        (void)status;  // every commit was synced: there is nothing left to lose
    }

    std::unique_ptr<MetadataView> View() override {
        return std::make_unique<RocksView>(*db_, path_);
    }

    /// Of what is free now, tables being written or not yet deleted are gone soon, the logs may
    /// become as long as they may be, and kSpareBuffers are for flushes and what is owed.
    MetadataSpace Space() override {
        struct statvfs system;
        uint64_t live = 0, memory = 0;
        if (!reserve_ || ::statvfs(path_.c_str(), &system) != 0) return {};
        const uint64_t available = uint64_t{system.f_bavail} * system.f_frsize;
        ground_.ballast->Refill(available);
        db_->GetIntProperty(rocksdb::DB::Properties::kLiveSstFilesSize, &live);
        db_->GetIntProperty(rocksdb::DB::Properties::kSizeAllMemTables, &memory);
        const uint64_t closed = std::max(ground_.tables->GetTotalSize(), live);
        const uint64_t written = closed + ground_.ballast->compacting;
        const uint64_t logs = kLogBuffers * buffer_bytes_;
        const uint64_t missing = ground_.ballast->bytes() - ground_.ballast->held();
        const uint64_t room = available + (written - live) + std::min(memory, logs);
        const uint64_t spare = kSpareBuffers * buffer_bytes_;
        const uint64_t kept = logs + spare + missing;
        MetadataSpace space;
        // A quota has ended: only what the ballast still holds is left.
        const bool refused = ground_.ballast->refused();
        const bool spent = refused && ground_.ballast->held() < ground_.ballast->bytes() / 2;
        space.free = room > kept && !refused ? room - kept : 0;
        space.capacity = live + space.free;
        space.owed = spare;
        full_.store(space.free == 0, std::memory_order_relaxed);
        exhausted_.store(room + spare / 2 < kept || spent, std::memory_order_relaxed);
        return space;
    }
    bool full() const override { return full_.load(std::memory_order_relaxed); }
    bool exhausted() const override { return exhausted_.load(std::memory_order_relaxed); }

    void Compact(std::atomic<bool>& cancelled) override {
        rocksdb::CompactRangeOptions options;
        options.exclusive_manual_compaction = false;
        options.canceled = &cancelled;
        // One that fails for lack of room leaves everything as it was.
        db_->CompactRange(options, nullptr, nullptr).PermitUncheckedError();
        Space();
    }

    Status Commit(const Batch& batch) override {
        std::lock_guard lock(mutex_);
        if (failure_) return *failure_;
        unmeasured_ += batch.bytes();
        if (unmeasured_ >= buffer_bytes_ / kMeasureEach || full()) {
            unmeasured_ = 0;
            Space();
        }
        rocksdb::WriteBatch rows;
        rocksdb::Status status;
        for (const Batch::Op& op : batch.ops()) {
            status = op.value ? rows.Put(op.key, *op.value) : rows.Delete(op.key);
            if (!status.ok()) break;
        }
        // A record's last sector must not read as zeros, as if it had never been written: rows may
        // end in many. Only the log gets this.
        if (status.ok()) status = rows.PutLogData("\xff");
        rocksdb::WriteOptions options;
        options.sync = true;  // claim of MetadataStore::Commit: what succeeded is durable
        if (status.ok()) status = WriteBesideErrors(*db_, options, rows);
        if (status.ok()) return Status();
        // The log may or may not hold the batch; a later one on top of it could bring it back.
        failure_ = ToError(status, path_);
        return *failure_;
    }

  private:
    static constexpr uint64_t kLogBuffers = 3;
    static constexpr uint64_t kSpareBuffers = 4;
    static constexpr uint64_t kMeasureEach = 8;  // part of a buffer

    const Ground ground_;  // outlives db_
    const std::unique_ptr<rocksdb::DB> db_;
    const std::string path_;
    const uint64_t buffer_bytes_;
    const bool reserve_;
    std::atomic<bool> full_ = false;
    std::atomic<bool> exhausted_ = false;
    uint64_t unmeasured_ = 0;  // bytes committed since the last Space()
    std::mutex mutex_;         // one commit at a time: a torn record can only be the log's last
    std::optional<Error> failure_;
};

Ground MakeGround(const std::string& path, const RocksOptions& given) {
    Ground ground;
    std::error_code ignored;
    if (given.reserve) std::filesystem::create_directory(path, ignored);  // RocksDB says why
    ground.ballast = std::make_unique<Ballast>(
        path + "/ballast", given.reserve ? RocksReserve(given.buffer_bytes) : 0, given.allocate);
    rocksdb::Env& base = given.env ? *given.env : *rocksdb::Env::Default();
    ground.descriptors_env = NewSpareDescriptorsEnv(base);
    ground.ballast_env = NewBallastEnv(*ground.descriptors_env, *ground.ballast);
    ground.env = NewOverwritingEnv(*ground.ballast_env);
    ground.tables.reset(rocksdb::NewSstFileManager(ground.env.get()));
    return ground;
}

rocksdb::Options MakeOptions(const RocksOptions& given, const Ground& ground,
                             rocksdb::WALRecoveryMode recovery) {
    rocksdb::Options options;
    options.env = ground.env.get();
    options.sst_file_manager = ground.tables;
    options.create_if_missing = given.create;
    options.paranoid_checks = true;
    options.compression = rocksdb::kLZ4Compression;

    // Memory: three memtables, one cache that also holds indexes, a bounded number of files.
    options.write_buffer_size = given.buffer_bytes;
    options.max_write_buffer_number = 3;
    options.max_total_wal_size = 3 * given.buffer_bytes;
    options.max_open_files = static_cast<int>(given.open_files_max);
    options.target_file_size_base = given.buffer_bytes;
    options.target_file_size_multiplier = 2;
    options.max_bytes_for_level_base = 4 * given.buffer_bytes;
    options.max_compaction_bytes = 4 * given.buffer_bytes;
    rocksdb::BlockBasedTableOptions table;
    table.block_cache = rocksdb::NewLRUCache(given.cache_bytes);
    table.block_size = 8 << 10;
    table.cache_index_and_filter_blocks = true;
    table.pin_l0_filter_and_index_blocks_in_cache = true;
    options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));

    // Rows of a batch come in the order of their keys, so each one's place in the memtable is
    // beside that of the one before: measured, 3.6 us for a map row and its mark instead of 5.1.
    options.memtable_insert_with_hint_prefix_extractor.reset(
        rocksdb::NewFixedPrefixTransform(kHintBytes));
    options.allow_concurrent_memtable_write = false;

    // A new log is not preallocated in one go: measured on tmpfs with buffers of 32 MiB, the
    // longest commit of 1024 rows was 5 ms instead of 15.
    options.allow_fallocate = false;

    // Threads: one that flushes, one that compacts, none that prints statistics.
    options.max_background_jobs = 2;
    options.max_subcompactions = 1;
    options.stats_dump_period_sec = 0;
    options.stats_persist_period_sec = 0;

    // Deleted disks and snapshots leave tombstones, which slow seeks down until compacted.
    options.table_properties_collector_factories = {
        rocksdb::NewCompactOnDeletionCollectorFactory(512, 128)};
    options.level_compaction_dynamic_level_bytes = true;

    options.wal_recovery_mode = recovery;
    options.recycle_log_file_num = 0;
    options.avoid_flush_during_shutdown = true;  // the log has it; exit quickly
    options.max_bgerror_resume_count = 0;        // nothing is retried that may lie

    options.info_log_level = rocksdb::InfoLogLevel::WARN_LEVEL;
    options.info_log = std::make_shared<Messages>();
    options.max_manifest_file_size = 16 << 20;
    return options;
}

}  // namespace

Result<std::unique_ptr<MetadataStore>> OpenRocksStore(const std::string& path,
                                                      const RocksOptions& given) {
    std::error_code ignored;
    if (!given.create && !std::filesystem::exists(path + "/CURRENT", ignored)) {
        return MakeError(ErrorKind::kNotFound, fmt::format("there is no metadata in {}", path));
    }
    // Every commit is synced and commits come one at a time, so a crash can only tear the log's
    // last record, in any way: cut short, or with any of its sectors missing. Dropping that one
    // loses nothing that was promised; any other broken record was promised. No mode of RocksDB's
    // tells the two apart: tolerating a short tail refuses a last record with a missing sector, and
    // point in time silently drops whatever follows a broken record. So the scan decides. The same
    // goes for the list of files, for which RocksDB has no modes.
    Status files = CutTornFileList(path);
    if (!files.ok()) return files.error();
    const Result<bool> torn = LogsAreTorn(path);
    if (!torn.ok()) return torn.error();
    const auto recovery = torn.value() ? rocksdb::WALRecoveryMode::kPointInTimeRecovery
                                       : rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
    Ground ground = MakeGround(path, given);
    const rocksdb::Options options = MakeOptions(given, ground, recovery);
    rocksdb::DB* raw = nullptr;
    const rocksdb::Status status = rocksdb::DB::Open(options, path, &raw);
    if (!status.ok()) return ToError(status, path);
    std::unique_ptr<rocksdb::DB> db(raw);
    return std::unique_ptr<MetadataStore>(
        std::make_unique<RocksStore>(std::move(ground), std::move(db), path, given));
}

}  // namespace varve::cow
