// The file system that RocksDB gets: logs that are overwritten in place. What a crash makes of them
// is tested by rocks_power_cut_test.
#include "cow/store/rocks_files.h"

#include <gtest/gtest.h>
#include <isa-l/crc.h>
#include <rocksdb/file_system.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cow/store/rocks_log.h"
#include "tests/power_cut/logged_env.h"
#include "tests/power_cut/places.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

/// A file system that has no room for long writes, but begins with them.
class Narrow : public rocksdb::FileSystemWrapper {
  public:
    Narrow() : FileSystemWrapper(rocksdb::FileSystem::Default()) {}
    const char* Name() const override { return "Narrow"; }
    IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                             std::unique_ptr<rocksdb::FSWritableFile>* result,
                             IODebugContext* debug) override {
        std::unique_ptr<rocksdb::FSWritableFile> file;
        IOStatus status = target()->NewWritableFile(path, options, &file, debug);
        if (status.ok()) *result = std::make_unique<File>(std::move(file));
        return status;
    }

  private:
    struct File : rocksdb::FSWritableFileOwnerWrapper {
        using FSWritableFileOwnerWrapper::FSWritableFileOwnerWrapper;
        IOStatus PositionedAppend(const Slice& data, uint64_t offset, const IOOptions& options,
                                  IODebugContext* debug) override {
            if (data.size() < kLogAheadBytes) {
                return target()->PositionedAppend(data, offset, options, debug);
            }
            const Slice half(data.data(), 1000);
            IOStatus status = target()->PositionedAppend(half, offset, options, debug);
            return status.ok() ? IOStatus::NoSpace("no room") : status;
        }
    };
};

class RocksFilesTest : public testing::Test {
  protected:
    RocksFilesTest() { Make("1.log"); }

    void Make(const std::string& name) {
        path_ = root_ / name;
        const rocksdb::Status status = env_->NewWritableFile(path_.string(), &file_, {});
        ASSERT_TRUE(status.ok()) << status.ToString();
    }
    void Commit(size_t bytes, char content = 'c') {
        ASSERT_TRUE(file_->Append(std::string(bytes, content)).ok());
        ASSERT_TRUE(file_->Sync().ok());
        expected_ += std::string(bytes, content);
    }
    uint64_t Size() const { return fs::file_size(path_); }
    /// What was committed, and then zeros only.
    void Verify() const {
        std::ifstream in(path_, std::ios::binary);
        const std::string content((std::istreambuf_iterator<char>(in)), {});
        ASSERT_GE(content.size(), expected_.size());
        EXPECT_TRUE(content.starts_with(expected_));
        EXPECT_EQ(content.find_first_not_of('\0', expected_.size()), std::string::npos);
    }

    power_cut::Place place_;
    const fs::path root_ = place_.New();
    fs::path path_;
    std::unique_ptr<rocksdb::Env> env_ = NewOverwritingEnv(*rocksdb::Env::Default());
    std::unique_ptr<rocksdb::WritableFile> file_;
    std::string expected_;
};

TEST_F(RocksFilesTest, ShortCommitsOverwriteWhatIsThere) {
    uint64_t grown = 0;
    uint64_t size = 0;
    for (int i = 0; i < 3000; ++i) {
        Commit(200, static_cast<char>('a' + i % 26));
        if (Size() != size) ++grown;
        size = Size();
    }
    Verify();
    EXPECT_EQ(grown, 3u);
    EXPECT_EQ(file_->GetFileSize(), 600'000u);
    EXPECT_LE(Size(), 600'000 + kLogAheadBytes);
}

TEST_F(RocksFilesTest, LongCommitsGetNoZeros) {
    Commit(kLogAheadBytes);
    EXPECT_EQ(Size(), kLogAheadBytes);
    Commit(1);
    EXPECT_EQ(Size(), 2 * kLogAheadBytes + 1);
    Commit(kLogAheadBytes - 1);
    EXPECT_EQ(Size(), 2 * kLogAheadBytes + 1);
    Commit(2 * kLogAheadBytes);
    Verify();
    EXPECT_EQ(Size(), 4 * kLogAheadBytes);
}

TEST_F(RocksFilesTest, WithoutRoomForZerosALogGrows) {
    const auto narrow = rocksdb::NewCompositeEnv(std::make_shared<Narrow>());
    env_ = NewOverwritingEnv(*narrow);
    Make("2.log");
    for (int i = 1; i <= 20; ++i) {
        Commit(100);
        Verify();
        EXPECT_EQ(Size(), std::max(1100u, 100u * static_cast<unsigned>(i)));  // tried only once
    }
}

TEST_F(RocksFilesTest, OtherFilesAreLeftAlone) {
    Make("2.sst");
    Commit(100);
    Verify();
    EXPECT_EQ(Size(), 100u);
}

/// A record of a log, which must fit into what is left of its block.
std::string LogRecord(const std::string& payload) {
    std::string covered = "\x01" + payload;
    auto* bytes = reinterpret_cast<unsigned char*>(covered.data());
    const uint32_t crc = ~crc32_iscsi(bytes, static_cast<int>(covered.size()), ~0U);
    const uint32_t masked = ((crc >> 15) | (crc << 17)) + 0xa282ead8U;
    const auto length = static_cast<uint16_t>(payload.size());
    std::string record(6, '\0');
    std::memcpy(record.data(), &masked, sizeof masked);
    std::memcpy(record.data() + 4, &length, sizeof length);
    return record + covered;
}

// A power cut may lose any sectors of what was not synced: it must never look like damage.
TEST_F(RocksFilesTest, RecordsOfTheListOfFilesThatAreSyncedTogetherAreTornAtMost) {
    const uint64_t seed = std::random_device()();
    SCOPED_TRACE("seed " + std::to_string(seed));
    power_cut::Random random(seed);
    const std::string name = "MANIFEST-000001";
    size_t torn = 0;
    for (int round = 0; round < 30; ++round) {
        power_cut::FileLog log;
        const auto logged = power_cut::NewLoggedEnv(log);
        env_ = NewOverwritingEnv(*logged);
        Make(name);
        std::vector<std::pair<size_t, size_t>> synced;  // position, bytes
        size_t bytes = 0;
        while (bytes < 20'000) {
            for (size_t group = 1 + random() % 5; group > 0; --group) {
                std::string payload(1 + random() % 1500, '\0');
                for (char& c : payload) c = static_cast<char>(1 + random() % 255);
                ASSERT_TRUE(file_->Append(LogRecord(payload)).ok());
                bytes += 7 + payload.size();
            }
            ASSERT_TRUE(file_->Sync().ok());
            synced.emplace_back(log.position(), bytes);
        }
        for (size_t at = synced.front().first; at <= log.position(); ++at) {
            const auto later = std::upper_bound(synced.begin(), synced.end(), std::pair(at, ~0UL));
            const std::string left = log.Cut(at, random).at(name);
            const LogScan scan = ScanLog(left, LogRecords::kFileChanges);
            ASSERT_NE(scan.end, LogScan::End::kDamaged) << "cut at " << at;
            ASSERT_GE(scan.offset, std::prev(later)->second) << "cut at " << at;
            torn += scan.end == LogScan::End::kTorn;
        }
    }
    EXPECT_GT(torn, 0u);
}

}  // namespace
}  // namespace varve::cow
