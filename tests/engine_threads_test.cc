// The engine on real threads and a real file, with whoever posts held up afterwards: what it has
// started elsewhere comes back before it has gone on, also on another thread of its own executor.
// Not the simulation, which has one thread and cannot meet this.
#include <gtest/gtest.h>
#include <sys/uio.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <random>
#include <thread>

#include "base/run_on.h"
#include "base/worker.h"
#include "cow/pool/pool.h"
#include "cow/pool/pool_directory.h"

namespace varve {
namespace {

namespace fs = std::filesystem;
using cow::BlockIo;

constexpr uint64_t kDiskBytes = 4 << 20;

class SlowlyPosted : public Executor {
  public:
    SlowlyPosted(const std::string& name, unsigned threads) : worker_(name, threads) {}
    void Post(Runnable* runnable) override {
        worker_.Post(runnable);
        std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
    Executor& worker() { return worker_; }

  private:
    Worker worker_;
};

/// Moves the bytes inside Submit; completes by a post.
class FileStore : public cow::BlockStore {
  public:
    FileStore(Executor& executor, int fd) : executor_(executor), fd_(fd) {}
    uint32_t alignment() const override { return 1; }
    void Submit(BlockIo& io) override {
        const int n = static_cast<int>(io.vector_count);
        const auto at = static_cast<off_t>(io.offset);
        ssize_t result = 0;
        if (io.kind == BlockIo::Kind::kRead) result = ::preadv(fd_, io.vectors, n, at);
        const bool writes = io.kind == BlockIo::Kind::kWrite || io.kind == BlockIo::Kind::kAppend;
        if (writes) result = ::pwritev(fd_, io.vectors, n, at);
        io.error = result < 0 ? errno : 0;
        auto* completion = new Completion;
        completion->io = &io;
        completion->run = [](Runnable* self) {
            BlockIo* done = static_cast<Completion*>(self)->io;
            delete static_cast<Completion*>(self);
            done->done(done);
        };
        executor_.Post(completion);
    }

  private:
    struct Completion : Runnable {
        BlockIo* io = nullptr;
    };
    Executor& executor_;
    const int fd_;
};

class EngineThreadsTest : public testing::Test {
  protected:
    EngineThreadsTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-threads-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
        cow::PoolDirectoryOptions options;
        options.path = root_ / "pool";
        options.direct = false;
        auto directory = cow::PoolDirectory::Open(options);
        VARVE_CHECK(directory.ok());
        directory_ = std::move(directory.value());
        store_ = std::make_unique<FileStore>(lane_.worker(), directory_->data_fd());
        cow::Environment environment;
        environment.home = &home_;
        environment.committer = &committer_;
        environment.loader = &loader_;
        environment.auditor = &auditor_;
        environment.lanes.push_back({&lane_, store_.get()});
        environment.space = &directory_->space();
        environment.metadata = &directory_->metadata();
        environment.now_ms = [] { return int64_t{0}; };
        environment.random = [] { return uint64_t{std::random_device{}()} + 1; };
        auto pool = RunOn(home_, cow::Pool::Open(environment, {}));
        VARVE_CHECK(pool.ok());
        pool_ = std::move(pool.value());
    }
    ~EngineThreadsTest() override {
        EXPECT_TRUE(RunOn(home_, pool_->Shutdown()).ok());
        pool_.reset();
        directory_.reset();
        fs::remove_all(root_);
    }

    static Task<bool> Settle(cow::Pool* pool) {
        co_await pool->WaitForChecksums();
        co_await pool->WaitForReclaim();
        co_return true;
    }
    static Task<bool> Close(cow::Pool* pool, uint64_t id) {
        co_await pool->CloseExport(id);
        co_return true;
    }
    Errno Write(cow::Volume& volume, char fill) {
        const std::string data(kDiskBytes, fill);
        return RunOn(lane_, volume.Write(0, std::as_bytes(std::span(data))));
    }

    fs::path root_;
    std::unique_ptr<cow::PoolDirectory> directory_;
    SlowlyPosted home_{"home", 1}, lane_{"lane", 1}, loader_{"loader", 2}, auditor_{"auditor", 1},
        committer_{"committer", 1};
    std::unique_ptr<FileStore> store_;
    std::unique_ptr<cow::Pool> pool_;
};

TEST_F(EngineThreadsTest, NoAwaiterMissesTheEndOfItsTask) {
    ASSERT_TRUE(RunOn(home_, pool_->CreateDisk("d", kDiskBytes)).ok());
    const auto disk = RunOn(home_, pool_->OpenExport("d"));
    ASSERT_TRUE(disk.ok());
    ASSERT_EQ(0, Write(*disk.value().volume, 'a'));
    std::vector<std::string> names{"d@s"};
    ASSERT_TRUE(RunOn(home_, pool_->CreateSnapshots(std::move(names))).ok());
    RunOn(home_, Settle(pool_.get()));
    ASSERT_EQ(0, Write(*disk.value().volume, 'b'));
    const auto report = RunOn(home_, pool_->Scrub(std::nullopt));
    ASSERT_TRUE(report.ok());
    EXPECT_EQ(kDiskBytes / cow::kBlockBytes, report.value().verified_blocks);
    EXPECT_EQ(0U, report.value().damaged_blocks);
    ASSERT_TRUE(RunOn(home_, pool_->DeleteSnapshot("d@s", false)).ok());
    RunOn(home_, Settle(pool_.get()));
    EXPECT_EQ(kDiskBytes, RunOn(home_, pool_->GetStatus()).value().used);
    RunOn(home_, Close(pool_.get(), disk.value().id));
}

}  // namespace
}  // namespace varve
