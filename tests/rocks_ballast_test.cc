// The file that holds room for RocksDB, on a file system that another process fills.
#include "cow/store/rocks_ballast.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <rocksdb/db.h>
#include <rocksdb/file_system.h>
#include <rocksdb/sst_file_manager.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>

#include "cow/store/rocks_store.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

constexpr uint64_t kBallastBytes = 8 << 20;

/// A file system with room for `room` bytes more, and for what a ballast has given up. A write that
/// finds too little writes a part.
class Full : public rocksdb::FileSystemWrapper {
  public:
    Full() : FileSystemWrapper(rocksdb::FileSystem::Default()) {}
    const char* Name() const override { return "Full"; }
    IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                             std::unique_ptr<rocksdb::FSWritableFile>* result,
                             IODebugContext* debug) override {
        std::unique_ptr<rocksdb::FSWritableFile> file;
        IOStatus status = target()->NewWritableFile(path, options, &file, debug);
        if (!status.ok()) return status;
        auto wrapped = std::make_unique<File>(std::move(file), *this);
        wrapped->table = path.ends_with(".sst");
        *result = std::move(wrapped);
        return status;
    }

    /// So little that RocksDB does not take an error for mended.
    IOStatus GetFreeSpace(const std::string&, const IOOptions&, uint64_t* free,
                          IODebugContext*) override {
        *free = 0;
        return IOStatus::OK();
    }

    std::atomic<int64_t> room = int64_t{1} << 40;
    std::atomic<bool> refuse_compactions = false, hold_flushes = false;
    IOStatus refusal = IOStatus::NoSpace("no room");
    uint64_t most_compacting = 0;  // seen while something was written
    Ballast* ballast = nullptr;

  private:
    struct File : rocksdb::FSWritableFileOwnerWrapper {
        File(std::unique_ptr<rocksdb::FSWritableFile> file, Full& system)
            : FSWritableFileOwnerWrapper(std::move(file)), full(system) {}
        IOStatus Append(const Slice& data, const IOOptions& options,
                        IODebugContext* debug) override {
            // By its name: a flush is of any priority but low.
            if (table && priority != rocksdb::Env::IO_LOW) full.hold_flushes.wait(true);
            if (Refused()) return full.refusal;
            full.most_compacting = std::max(full.most_compacting, full.ballast->compacting.load());
            if (Take(data.size())) return target()->Append(data, options, debug);
            IOStatus status = target()->Append(Slice(data.data(), data.size() / 2), options, debug);
            return status.ok() ? full.refusal : status;
        }
        IOStatus Append(const Slice& data, const IOOptions& options,
                        const rocksdb::DataVerificationInfo&, IODebugContext* debug) override {
            return Append(data, options, debug);
        }
        IOStatus PositionedAppend(const Slice& data, uint64_t offset, const IOOptions& options,
                                  IODebugContext* debug) override {
            if (Refused() || !Take(data.size())) return full.refusal;
            return target()->PositionedAppend(data, offset, options, debug);
        }
        void SetIOPriority(rocksdb::Env::IOPriority its) override {
            priority = its;
            target()->SetIOPriority(its);
        }
        bool Refused() const { return priority == rocksdb::Env::IO_LOW && full.refuse_compactions; }
        bool Take(uint64_t bytes) {
            const uint64_t given = full.ballast->bytes() - full.ballast->held();
            if (full.room + static_cast<int64_t>(given) < static_cast<int64_t>(bytes)) return false;
            full.room -= static_cast<int64_t>(bytes);
            return true;
        }
        Full& full;
        bool table = false;
        rocksdb::Env::IOPriority priority = rocksdb::Env::IO_TOTAL;
    };
};

class BallastTest : public testing::Test {
  protected:
    uint64_t Size() { return fs::file_size(path_); }
    const fs::path root_ =
        fs::path(testing::TempDir()) / ("varve-ballast-test-" + std::to_string(::getpid()));
    const std::string path_ = (root_ / "ballast").string();
    void SetUp() override {
        fs::remove_all(root_);
        fs::create_directories(root_);
    }
    void TearDown() override { fs::remove_all(root_); }
};

TEST_F(BallastTest, IsGivenUpInPiecesAndTakenBackWhenThereIsTwiceTheRoom) {
    Ballast ballast(path_, kBallastBytes);
    EXPECT_EQ(0u, ballast.held());
    ballast.Refill(2 * kBallastBytes - 1);
    EXPECT_EQ(0u, ballast.held());
    ballast.Refill(2 * kBallastBytes);
    EXPECT_EQ(kBallastBytes, ballast.held());
    struct stat about;
    ASSERT_EQ(0, ::stat(path_.c_str(), &about));
    EXPECT_LE(kBallastBytes, uint64_t{512} * static_cast<uint64_t>(about.st_blocks));
    EXPECT_TRUE(ballast.Give(kBallastBytes - 100, kBallastBytes / 2));
    EXPECT_EQ(kBallastBytes / 2, ballast.held());
    EXPECT_FALSE(ballast.Give(1, kBallastBytes / 2));
    EXPECT_TRUE(ballast.Give(kBallastBytes, 0));
    EXPECT_FALSE(ballast.Give(1, 0));
    EXPECT_EQ(0u, Size());
    ballast.Refill(2 * kBallastBytes);
    EXPECT_EQ(kBallastBytes, Size());
}

/// Allocates `room` bytes more, then fails with `error`.
Ballast::Allocate Quota(uint64_t* room, int error, uint64_t* largest) {
    return [=](int fd, off_t from, off_t bytes) {
        *largest = std::max(*largest, static_cast<uint64_t>(bytes));
        if (*room < static_cast<uint64_t>(bytes)) return error;
        *room -= static_cast<uint64_t>(bytes);
        return ::fallocate(fd, 0, from, bytes) == 0 ? 0 : errno;
    };
}

RocksOptions UnderQuota(uint64_t* room, uint64_t* largest) {
    RocksOptions options;
    options.create = options.reserve = true;
    options.buffer_bytes = 1 << 20;
    options.allocate = Quota(room, EDQUOT, largest);
    return options;
}

TEST_F(BallastTest, SaysThatAQuotaGivesLessThanTheFileSystemHas) {
    uint64_t room = (3 << 20) + 1, largest = 0;
    Ballast ballast(path_, kBallastBytes, Quota(&room, EDQUOT, &largest));
    EXPECT_FALSE(ballast.refused());
    ballast.Refill(100 * kBallastBytes);
    EXPECT_TRUE(ballast.refused());
    EXPECT_EQ(3u << 20, ballast.held());  // what there was
    EXPECT_EQ(3u << 20, Size());
    EXPECT_GE(1u << 20, largest);  // a try takes no more from others
    ASSERT_TRUE(ballast.Give(1 << 20, 0));
    ballast.Refill(0);
    EXPECT_TRUE(ballast.refused()) << "it is not whole yet";
    room = kBallastBytes;
    ballast.Refill(100 * kBallastBytes);
    EXPECT_FALSE(ballast.refused());
    EXPECT_EQ(kBallastBytes, ballast.held());
}

// Then there is none, and more is kept free instead.
TEST_F(BallastTest, AFileSystemThatAllocatesNothingRefusesNothing) {
    uint64_t room = 0, largest = 0;
    Ballast ballast(path_, kBallastBytes, Quota(&room, EOPNOTSUPP, &largest));
    ballast.Refill(100 * kBallastBytes);
    EXPECT_FALSE(ballast.refused());
    EXPECT_EQ(0u, ballast.held());
}

TEST_F(BallastTest, AStoreWhoseBallastAQuotaRefusesIsFull) {
    uint64_t room = 4 << 20, largest = 0;
    auto store = OpenRocksStore((root_ / "db").string(), UnderQuota(&room, &largest));
    ASSERT_TRUE(store.ok());
    EXPECT_EQ(0u, store.value()->Space().free);
    EXPECT_TRUE(store.value()->full());
    EXPECT_FALSE(store.value()->exhausted());  // half of it is there
    room = 4 << 20;
    EXPECT_LT(0u, store.value()->Space().free);
    EXPECT_FALSE(store.value()->full());
}

TEST_F(BallastTest, AStoreThatAQuotaLeavesLessThanHalfOfItsBallastIsExhausted) {
    uint64_t room = 3 << 20, largest = 0;
    const auto store = OpenRocksStore((root_ / "db").string(), UnderQuota(&room, &largest));
    ASSERT_TRUE(store.ok());
    EXPECT_TRUE(store.value()->exhausted());
}

TEST_F(BallastTest, HoldsWhatItHeldBefore) {
    { Ballast(path_, kBallastBytes).Refill(2 * kBallastBytes); }
    EXPECT_EQ(kBallastBytes, Ballast(path_, kBallastBytes).held());
    EXPECT_EQ(kBallastBytes / 2, Ballast(path_, kBallastBytes / 2).held());
    EXPECT_EQ(kBallastBytes / 2, Size());
    // A copy that became a hole holds nothing.
    fs::remove(path_);
    { const File hole = OpenFile(path_, O_RDWR | O_CREAT); }
    fs::resize_file(path_, kBallastBytes);
    EXPECT_EQ(0u, Ballast(path_, kBallastBytes).held());
}

/// Rows of 1000 bytes, one commit each, until one fails.
int WriteRows(rocksdb::DB& db, int first, int count) {
    rocksdb::WriteOptions options;
    for (int i = first; i < first + count; ++i) {
        const std::string key = "key" + std::to_string(i * 7919 % 100'000);
        const std::string value(1000, static_cast<char>('a' + i % 26));
        rocksdb::WriteBatch row;
        EXPECT_TRUE(row.Put(key, value).ok());
        if (!WriteBesideErrors(db, options, row).ok()) return i - first;
    }
    return count;
}

/// RocksDB on `full`, above which `ballast` is.
struct Stack {
    Stack(Ballast& ballast, std::string directory) : path(std::move(directory)) {
        full->ballast = &ballast;
        full_env = rocksdb::NewCompositeEnv(full);
        env = NewBallastEnv(*full_env, ballast);
        options.env = env.get();
        options.create_if_missing = true;
        options.compression = rocksdb::kNoCompression;
    }
    std::unique_ptr<rocksdb::DB> Open() {
        // As in the store: else a compaction that is refused ends all work of the background. Not
        // one of an earlier opening, whose thread may look for room for some seconds more: RocksDB
        // waits for it to end, which it does not, as it takes the new opening for its own.
        options.sst_file_manager.reset(rocksdb::NewSstFileManager(env.get()));
        rocksdb::DB* db = nullptr;
        const rocksdb::Status status = rocksdb::DB::Open(options, path, &db);
        EXPECT_TRUE(status.ok()) << status.ToString();
        return std::unique_ptr<rocksdb::DB>(db);
    }

    const std::shared_ptr<Full> full = std::make_shared<Full>();
    std::unique_ptr<rocksdb::Env> full_env, env;
    rocksdb::Options options;
    const std::string path;
};

/// What refuses a write: a full file system, or a quota, as RocksDB tells of it.
class RefusalTest : public BallastTest, public testing::WithParamInterface<Errno> {
  protected:
    static IOStatus Refusal() {
        if (GetParam() == ENOSPC) return IOStatus::NoSpace("While appending to file: f");
        return IOStatus::IOError("While appending to file: f", std::strerror(GetParam()));
    }
};
INSTANTIATE_TEST_SUITE_P(Errors, RefusalTest, testing::Values(ENOSPC, EDQUOT));

// Logs, tables and the list of files grow at its cost; nothing of what was committed is lost, and
// the store opens again where there is no room but the ballast.
TEST_P(RefusalTest, RocksDbGoesOnWhereOthersFilledTheFileSystem) {
    Ballast ballast(path_, kBallastBytes);
    ballast.Refill(2 * kBallastBytes);
    Stack stack(ballast, (root_ / "db").string());
    stack.full->refusal = Refusal();
    stack.options.write_buffer_size = 256 << 10;
    auto db = stack.Open();
    ASSERT_EQ(500, WriteRows(*db, 0, 500));
    stack.full->room = 0;  // now
    ASSERT_EQ(1500, WriteRows(*db, 500, 1500));
    EXPECT_GT(kBallastBytes, ballast.held());
    db.reset();
    stack.full->room = -static_cast<int64_t>(ballast.bytes() - ballast.held());
    db = stack.Open();
    for (int i = 0; i < 2000; ++i) {
        std::string value;
        const std::string key = "key" + std::to_string(i * 7919 % 100'000);
        ASSERT_TRUE(db->Get({}, key, &value).ok()) << i;
        EXPECT_EQ(std::string(1000, static_cast<char>('a' + i % 26)), value);
    }
}

TEST_P(RefusalTest, AWriteWaitsForAMemtableBesideACompactionThatWasRefused) {
    Ballast ballast(path_, kBallastBytes);
    ballast.Refill(2 * kBallastBytes);
    Stack stack(ballast, (root_ / "db").string());
    stack.full->refusal = Refusal();
    stack.options.write_buffer_size = 64 << 10;
    stack.options.max_write_buffer_number = 6;  // while writes are delayed nothing is called low
    stack.options.level0_file_num_compaction_trigger = 100;  // not before it is asked for
    stack.options.level0_slowdown_writes_trigger = stack.options.level0_stop_writes_trigger = 100;
    const auto db = stack.Open();
    ASSERT_EQ(300, WriteRows(*db, 0, 300));
    stack.full->refuse_compactions = true;
    const rocksdb::Status refused = db->CompactRange({}, nullptr, nullptr);
    EXPECT_TRUE(refused.IsNoSpace()) << refused.ToString();
    stack.full->hold_flushes = true;
    int written = 0;
    std::atomic<bool> ended = false;
    std::thread writer([&] {
        written = WriteRows(*db, 300, 600);
        ended = true;
    });
    for (uint64_t stopped = 0; stopped == 0 && !ended; std::this_thread::yield()) {
        EXPECT_TRUE(db->GetIntProperty("rocksdb.is-write-stopped", &stopped));
    }
    EXPECT_FALSE(ended);
    stack.full->hold_flushes = false;
    stack.full->hold_flushes.notify_all();
    writer.join();
    EXPECT_EQ(600, written);
}

TEST_P(RefusalTest, WithoutABallastItIsNoSpace) {
    Ballast ballast(path_, 0);
    Stack stack(ballast, (root_ / "db").string());
    stack.full->refusal = Refusal();
    const auto db = stack.Open();
    stack.full->room = 0;
    const rocksdb::Status status = db->Put({}, "key", "value");
    EXPECT_TRUE(status.IsNoSpace()) << status.ToString();
}

TEST_F(BallastTest, AnyOtherErrorStaysWhatItIs) {
    Ballast ballast(path_, kBallastBytes);
    ballast.Refill(2 * kBallastBytes);
    Stack stack(ballast, (root_ / "db").string());
    stack.full->refusal = IOStatus::IOError("While appending to file: f", std::strerror(EIO));
    const auto db = stack.Open();
    stack.full->room = 0;
    const rocksdb::Status status = db->Put({}, "key", "value");
    EXPECT_TRUE(status.IsIOError() && !status.IsNoSpace()) << status.ToString();
    EXPECT_EQ(kBallastBytes, ballast.held());
}

// What is free must not look less for as long as a compaction lasts. A flush's tables stay.
TEST_F(BallastTest, CountsTheTablesThatCompactionsAreWriting) {
    Ballast ballast(path_, 0);
    Stack stack(ballast, (root_ / "db").string());
    stack.options.disable_auto_compactions = true;
    stack.options.writable_file_max_buffer_size = 64 << 10;
    const auto db = stack.Open();
    ASSERT_TRUE(db);
    for (const int first : {0, 1000}) {
        ASSERT_EQ(1000, WriteRows(*db, first, 1000));
        ASSERT_TRUE(db->Flush({}).ok());
    }
    EXPECT_EQ(0u, stack.full->most_compacting);
    ASSERT_TRUE(db->CompactRange({}, nullptr, nullptr).ok());
    EXPECT_LE(1'800'000u, stack.full->most_compacting);  // of 2,000,000 that it writes
    EXPECT_EQ(0u, ballast.compacting);
}

}  // namespace
}  // namespace varve::cow
