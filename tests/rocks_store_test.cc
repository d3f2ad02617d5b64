// RocksStore: commits, views, cursors, and what it makes of logs that a crash or a fault changed.
#include "cow/store/rocks_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>

#include "cow/store/rocks_files.h"
#include "cow/store/rocks_log.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;

class RocksStoreTest : public testing::Test {
  protected:
    RocksStoreTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-rocks-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
        path_ = root_ / "meta";
    }
    ~RocksStoreTest() override {
        store_.reset();
        fs::remove_all(root_);
    }

    Status Open(bool create = false) {
        store_.reset();
        RocksOptions options;
        options.create = create;
        Result<std::unique_ptr<MetadataStore>> store = OpenRocksStore(path_.string(), options);
        if (store.ok()) store_ = std::move(store.value());
        return store.status();
    }
    void Put(const std::string& key, const std::string& value) {
        Batch batch;
        batch.Put(key, value);
        const Status status = store_->Commit(batch);
        ASSERT_TRUE(status.ok()) << status.error().message;
    }
    /// Fifty rows of some 500 bytes, then one of 100 KB that spans several blocks of the log.
    void FillAndClose() {
        ASSERT_TRUE(Open(true).ok());
        for (int i = 0; i < 50; ++i) Put("k" + std::to_string(100 + i), std::string(500, 'x'));
        Put("last", std::string(100'000, 'y'));
        store_.reset();
    }
    size_t Rows() {
        const auto view = store_->View();
        const auto cursor = view->Range("a", "z");
        size_t rows = 0;
        for (cursor->Seek(""); cursor->valid(); cursor->Next()) ++rows;
        EXPECT_TRUE(cursor->status().ok());
        return rows;
    }
    fs::path LogPath() const {
        for (const auto& entry : fs::directory_iterator(path_)) {
            if (entry.path().extension() == ".log") return entry.path();
        }
        return {};
    }
    fs::path ListPath() const {
        std::ifstream current(path_ / "CURRENT");
        std::string name;
        std::getline(current, name);
        return path_ / name;
    }
    static void Overwrite(const fs::path& file, uint64_t offset, const std::string& bytes) {
        std::fstream stream(file, std::ios::in | std::ios::out | std::ios::binary);
        stream.seekp(static_cast<std::streamoff>(offset));
        stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
        ASSERT_TRUE(stream.good());
    }

    fs::path root_, path_;
    std::unique_ptr<MetadataStore> store_;
};

// On a full file system, the second line of such a log meets an assertion of RocksDB's.
TEST_F(RocksStoreTest, KeepsNoLogFileOfItsOwn) {
    FillAndClose();
    EXPECT_FALSE(fs::exists(path_ / "LOG"));
}

TEST_F(RocksStoreTest, AbsentStoreIsNotMadeUnlessAsked) {
    const Status status = Open(false);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().kind, ErrorKind::kNotFound);
    EXPECT_FALSE(fs::exists(path_ / "CURRENT"));
    EXPECT_TRUE(Open(true).ok());
}

TEST_F(RocksStoreTest, ACurrentThatNamesNoListIsRefused) {
    FillAndClose();
    const std::string list = ListPath().filename().string();
    for (const std::string& name :
         {std::string(), std::string("\n"), std::string("."), std::string("MANIFEST-"),
          "../store/" + list + "\n", std::string(16, '\0')}) {
        std::ofstream(path_ / "CURRENT", std::ios::trunc | std::ios::binary) << name;
        EXPECT_FALSE(Open().ok()) << "'" << name << "'";
    }
    std::ofstream(path_ / "CURRENT", std::ios::trunc) << list << '\n';
    EXPECT_TRUE(Open().ok());
}

TEST_F(RocksStoreTest, CommittedRowsSurviveReopening) {
    ASSERT_TRUE(Open(true).ok());
    Batch batch;
    batch.Put("a", "1");
    batch.Put("b", std::string("\0\n\xff", 3));
    batch.Put("c", "");
    batch.Put("gone", "x");
    batch.Delete("gone");
    ASSERT_TRUE(store_->Commit(batch).ok());
    ASSERT_TRUE(Open().ok());
    const auto view = store_->View();
    EXPECT_EQ(view->Get("a").value(), "1");
    EXPECT_EQ(view->Get("b").value(), std::string("\0\n\xff", 3));
    EXPECT_EQ(view->Get("c").value(), "");
    EXPECT_EQ(view->Get("gone").value(), std::nullopt);
}

TEST_F(RocksStoreTest, ViewDoesNotSeeLaterCommits) {
    ASSERT_TRUE(Open(true).ok());
    Put("a", "old");
    const auto view = store_->View();
    Put("a", "new");
    Put("b", "new");
    EXPECT_EQ(view->Get("a").value(), "old");
    EXPECT_EQ(view->Get("b").value(), std::nullopt);
    const auto cursor = view->Range("a", "z");
    cursor->Seek("a");
    ASSERT_TRUE(cursor->valid());
    EXPECT_EQ(cursor->value(), "old");
    cursor->Next();
    EXPECT_FALSE(cursor->valid());
    EXPECT_TRUE(cursor->status().ok());
}

TEST_F(RocksStoreTest, CursorStaysWithinItsBounds) {
    ASSERT_TRUE(Open(true).ok());
    for (const char* key : {"a", "b", "b1", "c", "d"}) Put(key, key);
    const auto view = store_->View();
    const auto cursor = view->Range("b", "d");
    std::string seen;
    for (cursor->Seek("a"); cursor->valid(); cursor->Next())
        seen += std::string(cursor->key()) + " ";
    EXPECT_EQ(seen, "b b1 c ");
    cursor->Seek("b0");
    ASSERT_TRUE(cursor->valid());
    EXPECT_EQ(cursor->key(), "b1");
    cursor->Seek("d");
    EXPECT_FALSE(cursor->valid());
    const auto nothing = view->Range("b", "b");
    nothing->Seek("b");
    EXPECT_FALSE(nothing->valid());
}

TEST_F(RocksStoreTest, CursorOutlivesItsView) {
    ASSERT_TRUE(Open(true).ok());
    Put("a", "1");
    auto view = store_->View();
    const auto cursor = view->Range("a", "z");
    view.reset();
    Put("a", "2");
    cursor->Seek("a");
    ASSERT_TRUE(cursor->valid());
    EXPECT_EQ(cursor->value(), "1");
}

TEST_F(RocksStoreTest, CommitsSurviveKill) {
    // The child commits until it is killed in the middle of something; it tells each success.
    ASSERT_TRUE(Open(true).ok());
    store_.reset();
    int fds[2];
    ASSERT_EQ(::pipe(fds), 0);
    const pid_t child = ::fork();
    if (child == 0) {
        Result<std::unique_ptr<MetadataStore>> store = OpenRocksStore(path_.string(), {});
        if (!store.ok()) ::_exit(1);
        for (uint32_t i = 0;; ++i) {
            Batch batch;
            batch.Put("k" + std::to_string(i), std::string(i * 37 % 9000, 'x'));
            if (!store.value()->Commit(batch).ok()) ::_exit(1);
            if (::write(fds[1], &i, sizeof i) != sizeof i) ::_exit(1);
        }
    }
    ::close(fds[1]);
    uint32_t told = 0;
    while (told < 200) ASSERT_EQ(::read(fds[0], &told, sizeof told), ssize_t{sizeof told});
    ::kill(child, SIGKILL);
    uint32_t more = 0;
    while (::read(fds[0], &more, sizeof more) == ssize_t{sizeof more}) told = more;
    ::close(fds[0]);
    ::waitpid(child, nullptr, 0);
    ASSERT_TRUE(Open().ok());
    const auto view = store_->View();
    for (uint32_t i = 0; i <= told; ++i) {
        const auto value = view->Get("k" + std::to_string(i));
        ASSERT_TRUE(value.ok());
        ASSERT_EQ(value.value(), std::string(i * 37 % 9000, 'x')) << i << " of " << told;
    }
}

TEST_F(RocksStoreTest, TornLastRecordIsDroppedHoweverItIsTorn) {
    FillAndClose();
    fs::copy(path_, root_ / "image");
    const uint64_t size = fs::file_size(LogPath());
    const uint64_t seed = std::random_device()();
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    for (int round = 0; round < 24; ++round) {
        store_.reset();
        fs::remove_all(path_);
        fs::copy(root_ / "image", path_);
        const uint64_t back = 1 + random() % 99'000;  // inside the last record
        SCOPED_TRACE("round " + std::to_string(round) + ", " + std::to_string(back));
        if (round % 2 == 0) {
            fs::resize_file(LogPath(), size - back);
        } else {  // sectors are missing
            const uint64_t from = (size - back) / 512 * 512;
            const uint64_t hole = std::min<uint64_t>(size - from, 512 * (1 + random() % 8));
            Overwrite(LogPath(), from, std::string(hole, '\0'));
        }
        const Status status = Open();
        ASSERT_TRUE(status.ok()) << status.error().message;
        EXPECT_EQ(Rows(), 50U);
        Put("after", "1");  // and what is committed on top of it stays
        ASSERT_TRUE(Open().ok());
        EXPECT_EQ(Rows(), 51U);
    }
}

TEST_F(RocksStoreTest, ZerosAfterTheLogAreNoDamage) {
    FillAndClose();
    fs::resize_file(LogPath(), fs::file_size(LogPath()) + 70'000);
    ASSERT_TRUE(Open().ok());
    EXPECT_EQ(Rows(), 51U);
}

TEST_F(RocksStoreTest, DamageInAnyRecordIsRefused) {
    FillAndClose();
    fs::copy(path_, root_ / "image");
    const uint64_t size = fs::file_size(LogPath()) - 600;
    const uint64_t seed = std::random_device()();
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    for (int round = 0; round < 24; ++round) {
        fs::remove_all(path_);
        fs::copy(root_ / "image", path_);
        const uint64_t at = random() % size;
        SCOPED_TRACE("round " + std::to_string(round) + ", byte " + std::to_string(at));
        Overwrite(LogPath(), at, std::string(1 + random() % 600, '\xee'));
        const Status status = Open();
        ASSERT_FALSE(status.ok());
        EXPECT_EQ(status.error().kind, ErrorKind::kDamaged);
        EXPECT_NE(status.error().message.find(".log is damaged at byte"), std::string::npos);
        EXPECT_EQ(status.error().message.find('\n'), std::string::npos);
    }
}

std::string ContentOf(const fs::path& file) {
    std::ifstream in(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

/// Each bit of a file's first bytes in its turn: the store must not open, and say that this file is
/// damaged.
void EveryBitIsRefused(const fs::path& file, size_t bytes, const std::function<Status()>& open) {
    const std::string right = ContentOf(file);
    ASSERT_GT(bytes, 0U);
    for (size_t bit = 0; bit < bytes * 8; ++bit) {
        SCOPED_TRACE(file.filename().string() + ", bit " + std::to_string(bit));
        std::string wrong = right;
        wrong[bit / 8] = static_cast<char>(wrong[bit / 8] ^ (1 << bit % 8));
        std::ofstream(file, std::ios::binary) << wrong;
        const Status status = open();
        ASSERT_FALSE(status.ok());
        EXPECT_EQ(status.error().kind, ErrorKind::kDamaged);
        EXPECT_NE(status.error().message.find(file.filename().string()), std::string::npos)
            << status.error().message;
    }
    std::ofstream(file, std::ios::binary) << right;
}

TEST_F(RocksStoreTest, AFlippedBitOfTheLogIsRefused) {
    ASSERT_TRUE(Open(true).ok());
    for (int i = 0; i < 4; ++i) Put("k" + std::to_string(i), std::string(30, 'x'));
    store_.reset();
    EveryBitIsRefused(LogPath(), fs::file_size(LogPath()), [this] { return Open(); });
    ASSERT_TRUE(Open().ok());
    EXPECT_EQ(Rows(), 4U);
}

TEST_F(RocksStoreTest, AFlippedBitOfALogThatACrashLeftIsRefused) {
    ASSERT_TRUE(Open(true).ok());
    for (int i = 0; i < 3; ++i) Put("k" + std::to_string(i), std::string(30, 'x'));
    Put("k3", "a region's bitmap, half of it zeros: " + std::string(600, '\0'));
    fs::copy(path_, root_ / "image");
    store_.reset();
    fs::remove_all(path_);
    fs::rename(root_ / "image", path_);
    EXPECT_GT(fs::file_size(LogPath()), kLogAheadBytes);
    const size_t used = ContentOf(LogPath()).find_last_not_of('\0') + 1;
    EveryBitIsRefused(LogPath(), used, [this] { return Open(); });
    // Nothing is lost where nothing was.
    Overwrite(LogPath(), 4000, "garbage");
    ASSERT_TRUE(Open().ok());
    EXPECT_EQ(Rows(), 4U);
}

TEST_F(RocksStoreTest, AFlippedBitOfTheListOfFilesIsRefused) {
    for (int life = 0; life < 3; ++life) {  // the latest list has a table in it
        ASSERT_TRUE(Open(life == 0).ok());
        Put("k" + std::to_string(life), "1");
    }
    store_.reset();
    EveryBitIsRefused(ListPath(), fs::file_size(ListPath()), [this] { return Open(); });
    ASSERT_TRUE(Open().ok());
    EXPECT_EQ(Rows(), 3U);
}

// RocksDB itself would refuse it.
TEST_F(RocksStoreTest, TornListOfFilesIsCut) {
    FillAndClose();
    const uint64_t size = fs::file_size(ListPath());
    fs::resize_file(ListPath(), size + 700);
    Overwrite(ListPath(), size, "\x11\x22\x33\x44\x20\x02\x01***");  // 544 bytes long
    ASSERT_TRUE(Open().ok());
    EXPECT_EQ(Rows(), 51U);
}

TEST_F(RocksStoreTest, DamagedTableGivesAnErrorAndNoRows) {
    ASSERT_TRUE(Open(true).ok());
    for (int i = 0; i < 2000; ++i) Put("k" + std::to_string(10000 + i), std::string(100, 'x'));
    ASSERT_TRUE(Open().ok());  // replaying the log writes a table
    store_.reset();
    fs::path table;
    for (const auto& entry : fs::directory_iterator(path_)) {
        if (entry.path().extension() == ".sst") table = entry.path();
    }
    ASSERT_FALSE(table.empty());
    Overwrite(table, 100, std::string(20, '\xee'));
    ASSERT_TRUE(Open().ok());
    const auto view = store_->View();
    const auto row = view->Get("k10000");
    ASSERT_FALSE(row.ok());
    EXPECT_EQ(row.error().kind, ErrorKind::kDamaged);
    const auto cursor = view->Range("a", "z");
    cursor->Seek("a");
    EXPECT_FALSE(cursor->valid());
    ASSERT_FALSE(cursor->status().ok());
    EXPECT_EQ(cursor->status().error().kind, ErrorKind::kDamaged);
    EXPECT_EQ(cursor->status().error().message.find('\n'), std::string::npos);
}

TEST_F(RocksStoreTest, MissingTableIsDamage) {
    ASSERT_TRUE(Open(true).ok());
    Put("a", "1");
    ASSERT_TRUE(Open().ok());
    store_.reset();
    for (const auto& entry : fs::directory_iterator(path_)) {
        if (entry.path().extension() == ".sst") fs::remove(entry.path());
    }
    const Status status = Open();
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().kind, ErrorKind::kDamaged);
}

TEST_F(RocksStoreTest, AfterAFailedCommitNothingIsCommitted) {
    ASSERT_TRUE(Open(true).ok());
    Put("a", "1");
    // The log's descriptor becomes one that cannot be written to.
    const std::string log = fs::canonical(LogPath()).string();
    for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
        std::error_code error;
        if (fs::read_symlink(entry.path(), error).string() != log) continue;
        const int broken = ::open("/dev/full", O_WRONLY);
        ASSERT_GE(::dup2(broken, std::stoi(entry.path().filename().string())), 0);
        ::close(broken);
    }
    Batch batch;
    batch.Put("b", "1");
    const Status first = store_->Commit(batch);
    ASSERT_FALSE(first.ok());
    EXPECT_EQ(first.error().kind, ErrorKind::kNoSpace);
    const Status second = store_->Commit(batch);
    ASSERT_FALSE(second.ok());
    EXPECT_EQ(second.error().message, first.error().message);
    EXPECT_EQ(store_->View()->Get("a").value(), "1");
}

TEST(RocksLogTest, EmptyLogIsWhole) {
    EXPECT_EQ(ScanLog("").end, LogScan::End::kWhole);
    EXPECT_EQ(ScanLog(std::string(40'000, '\0')).end, LogScan::End::kWhole);
}

TEST(RocksLogTest, AnyBytesAreScanned) {
    const uint64_t seed = std::random_device()();
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    for (int round = 0; round < 200; ++round) {
        std::string bytes(random() % 70'000, '\0');
        for (char& c : bytes) c = static_cast<char>(random() % 6);
        const LogScan scan = ScanLog(bytes);
        EXPECT_NE(scan.end, LogScan::End::kWhole);
        EXPECT_EQ(scan.offset, 0U);
    }
}

}  // namespace
}  // namespace varve::cow
