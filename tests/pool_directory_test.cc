// PoolDirectory: making, locking and opening pools, and every way in which their parts do not fit.
#include "cow/pool/pool_directory.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "cow/format/format.h"
#include "cow/head/journal.h"
#include "tests/old_journal.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;

class PoolDirectoryTest : public testing::Test {
  protected:
    PoolDirectoryTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-pool-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
        options_.path = root_ / "pool";
        options_.direct = false;
        options_.lock_wait_ms = 0;
    }
    ~PoolDirectoryTest() override {
        pool_.reset();
        fs::remove_all(root_);
    }

    Status Open() {
        pool_.reset();
        Result<std::unique_ptr<PoolDirectory>> pool = PoolDirectory::Open(options_);
        if (pool.ok()) pool_ = std::move(pool.value());
        return pool.status();
    }
    void MustOpen() {
        const Status status = Open();
        ASSERT_TRUE(status.ok()) << status.error().message;
    }
    /// Opening fails with `kind`, in one line that names `part`.
    void Refused(ErrorKind kind, const std::string& part) {
        const Status status = Open();
        ASSERT_FALSE(status.ok());
        EXPECT_STREQ(KindName(status.error().kind), KindName(kind)) << status.error().message;
        EXPECT_NE(status.error().message.find(part), std::string::npos) << status.error().message;
        EXPECT_EQ(status.error().message.find('\n'), std::string::npos);
    }
    static void WriteFile(const fs::path& path, const std::string& bytes) {
        std::ofstream(path, std::ios::binary) << bytes;
    }
    static std::string ReadFile(const fs::path& path) {
        std::ifstream file(path, std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }

    fs::path root_;
    PoolDirectoryOptions options_;
    std::unique_ptr<PoolDirectory> pool_;
};

TEST_F(PoolDirectoryTest, AbsentDirectoryBecomesAPoolOnce) {
    MustOpen();
    EXPECT_TRUE(pool_->created());
    EXPECT_EQ(pool_->data_path(), (root_ / "pool/data").string());
    const Uuid uuid = pool_->uuid();
    const Result<Superblock> superblock = DecodeSuperblock(ReadFile(root_ / "pool/data"), "data");
    ASSERT_TRUE(superblock.ok());
    EXPECT_EQ(superblock.value().uuid, uuid);
    Batch batch;
    batch.Put("Dx", "row");
    ASSERT_TRUE(pool_->metadata().Commit(batch).ok());
    MustOpen();
    EXPECT_FALSE(pool_->created());
    EXPECT_EQ(pool_->uuid(), uuid);
    EXPECT_EQ(pool_->metadata().View()->Get("Dx").value(), "row");
}

TEST_F(PoolDirectoryTest, EmptyDirectoryAndTrailingSlashAreFine) {
    fs::create_directory(root_ / "pool");
    options_.path += "/";
    MustOpen();
    EXPECT_EQ(pool_->path(), (root_ / "pool").string());
}

TEST_F(PoolDirectoryTest, AbsentPoolIsNotMadeUnlessAsked) {
    options_.create = false;
    Refused(ErrorKind::kNotFound, "there is no pool");
    EXPECT_FALSE(fs::exists(root_ / "pool"));
}

TEST_F(PoolDirectoryTest, DirectoryWithoutParentIsRefused) {
    options_.path = root_ / "no/pool";
    Refused(ErrorKind::kIo, "cannot make the directory");
}

TEST_F(PoolDirectoryTest, StrangersDirectoryIsLeftAlone) {
    fs::create_directory(root_ / "pool");
    WriteFile(root_ / "pool/letter", "dear");
    Refused(ErrorKind::kExists, "not empty");
    EXPECT_EQ(ReadFile(root_ / "pool/letter"), "dear");
    EXPECT_FALSE(fs::exists(root_ / "pool/lock"));
}

TEST_F(PoolDirectoryTest, PoolWithoutMetadataIsNotOverwritten) {
    MustOpen();
    ASSERT_TRUE(pool_->space().Provision(4096, 1 << 20).ok());
    pool_.reset();
    fs::rename(root_ / "pool/meta", root_ / "elsewhere");
    Refused(ErrorKind::kExists, "meta is missing");
    EXPECT_GT(fs::file_size(root_ / "pool/data"), 1U << 20);
    fs::rename(root_ / "elsewhere", root_ / "pool/meta");
    MustOpen();
}

TEST_F(PoolDirectoryTest, InterruptedCreationIsBegunAgain) {
    fs::create_directories(root_ / "pool/meta.new");
    WriteFile(root_ / "pool/meta.new/CURRENT", "junk");
    WriteFile(root_ / "pool/lock", "123\n");
    WriteFile(root_ / "pool/data", EncodeSuperblock({NewUuid(), 1}));
    MustOpen();
    EXPECT_TRUE(pool_->created());
    EXPECT_FALSE(fs::exists(root_ / "pool/meta.new"));
}

TEST_F(PoolDirectoryTest, SecondServerIsRefusedWithTheHoldersId) {
    MustOpen();
    const Result<std::unique_ptr<PoolDirectory>> second = PoolDirectory::Open(options_);
    ASSERT_FALSE(second.ok());
    EXPECT_EQ(second.error().kind, ErrorKind::kBusy);
    EXPECT_NE(second.error().message.find("process " + std::to_string(::getpid())),
              std::string::npos)
        << second.error().message;
    pool_.reset();
    MustOpen();
}

TEST_F(PoolDirectoryTest, CopiedPoolCannotShareTheDataFile) {
    options_.data = root_ / "disk.img";
    MustOpen();
    pool_.reset();
    fs::copy(root_ / "pool", root_ / "copy", fs::copy_options::recursive);
    MustOpen();
    PoolDirectoryOptions copy = options_;
    copy.path = root_ / "copy";
    const Result<std::unique_ptr<PoolDirectory>> second = PoolDirectory::Open(copy);
    ASSERT_FALSE(second.ok());
    EXPECT_EQ(second.error().kind, ErrorKind::kBusy);
}

TEST_F(PoolDirectoryTest, DataFileElsewhereIsRemembered) {
    options_.data = root_ / "disk.img";
    MustOpen();
    EXPECT_FALSE(fs::exists(root_ / "pool/data"));
    options_.data = "";
    MustOpen();
    EXPECT_EQ(pool_->data_path(), (root_ / "disk.img").string());
}

TEST_F(PoolDirectoryTest, NewPoolTakesNoExistingFile) {
    options_.data = root_ / "letter";
    WriteFile(options_.data, "dear");
    Refused(ErrorKind::kExists, "it exists already");
    EXPECT_EQ(ReadFile(options_.data), "dear");
}

TEST_F(PoolDirectoryTest, MovedDataFileIsFoundAgainByOption) {
    MustOpen();
    pool_.reset();
    fs::rename(root_ / "pool/data", root_ / "moved");
    Refused(ErrorKind::kNotFound, "is missing; if it has moved");
    options_.data = root_ / "moved";
    MustOpen();
    options_.data = "";
    MustOpen();
    EXPECT_EQ(pool_->data_path(), (root_ / "moved").string());
    pool_.reset();
    fs::rename(root_ / "moved", root_ / "pool/data");
    options_.data = root_ / "pool/data";
    MustOpen();
    pool_.reset();
    fs::rename(root_ / "pool", root_ / "renamed");  // its own data file moves with it
    options_.path = root_ / "renamed";
    options_.data = "";
    MustOpen();
}

TEST_F(PoolDirectoryTest, DataFileOfAnotherPoolIsRefused) {
    MustOpen();
    options_.path = root_ / "other";
    MustOpen();
    pool_.reset();
    fs::copy(root_ / "pool/data", root_ / "other/data", fs::copy_options::overwrite_existing);
    Refused(ErrorKind::kInvalid, "is the data file of pool");
}

TEST_F(PoolDirectoryTest, DataFileWithoutSuperblockIsRefused) {
    MustOpen();
    pool_.reset();
    WriteFile(root_ / "pool/data", "short");
    Refused(ErrorKind::kDamaged, "does not begin with a superblock");
    WriteFile(root_ / "pool/data", std::string(8192, '\0'));
    Refused(ErrorKind::kDamaged, "does not begin with a superblock");
}

TEST_F(PoolDirectoryTest, DamagedSuperblockIsRefused) {
    MustOpen();
    pool_.reset();
    std::string bytes = ReadFile(root_ / "pool/data");
    bytes[300] ^= 1;
    WriteFile(root_ / "pool/data", bytes);
    Refused(ErrorKind::kDamaged, "superblock");
}

TEST_F(PoolDirectoryTest, OtherVersionsAreRefused) {
    MustOpen();
    std::string row = *pool_->metadata().View()->Get(kDirectoryKey).value();
    pool_.reset();
    std::string bytes = ReadFile(root_ / "pool/data");
    bytes[11] = 9;
    WriteFile(root_ / "pool/data", bytes);
    Refused(ErrorKind::kInvalid, "format version 9");
    bytes[11] = kDataVersion;
    WriteFile(root_ / "pool/data", bytes);
    MustOpen();
    row[0] = 7;
    Batch batch;
    batch.Put(kDirectoryKey, row);
    ASSERT_TRUE(pool_->metadata().Commit(batch).ok());
    Refused(ErrorKind::kInvalid, "format version 7");
}

TEST_F(PoolDirectoryTest, MetadataWithoutIdentityIsDamaged) {
    MustOpen();
    Batch batch;
    batch.Delete(kDirectoryKey);
    ASSERT_TRUE(pool_->metadata().Commit(batch).ok());
    Refused(ErrorKind::kDamaged, "identity");
}

TEST_F(PoolDirectoryTest, DamagedMetadataIsRefused) {
    MustOpen();
    pool_.reset();
    WriteFile(root_ / "pool/meta/CURRENT", "MANIFEST-999999\n");
    const Status status = Open();
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().message.find('\n'), std::string::npos);
    EXPECT_NE(status.error().message.find("pool/meta"), std::string::npos);
}

TEST_F(PoolDirectoryTest, DataFileThatWasCutOffIsRefused) {
    MustOpen();
    const uint64_t used = kRegionBytes + 11 * kBlockBytes;  // its end
    std::string row(1 + kRegionBlocks / 8, '\0');
    row[0] = 'B';
    row[1] = 1;
    row[2] = 4;  // block 10
    Batch batch;
    batch.Put(PoolKey(), Encode(PoolRecord{.sequence = 9, .region_count = 3, .used_blocks = 2}));
    batch.Put(RegionKey(0), "F");
    batch.Put(RegionKey(1), row);
    ASSERT_TRUE(pool_->metadata().Commit(batch).ok());
    const std::string data = pool_->data_path();
    fs::resize_file(data, 3 * kRegionBytes);
    MustOpen();
    fs::resize_file(data, used);  // what is missing is not in use, as a crash may leave it
    MustOpen();
    pool_.reset();
    fs::resize_file(data, used - 1);
    Refused(ErrorKind::kDamaged, "data up to byte " + std::to_string(used) + " is in use");
    fs::resize_file(data, used);
    MustOpen();

    // What only the journal knows is in use, too.
    const MapChange change = {{5}, 2 * kRegionBlocks + 7, 0, 3};
    const MapChange dropped = {{6}, 0, 0, 64};
    batch = Batch();
    batch.Put(JournalKey(BranchId{1}, Generation{1}, 0),
              EncodeChanges(std::vector<MapChange>{change, dropped}));
    ASSERT_TRUE(pool_->metadata().Commit(batch).ok());
    pool_.reset();
    const uint64_t end = 2 * kRegionBytes + 10 * kBlockBytes;
    Refused(ErrorKind::kDamaged, "data up to byte " + std::to_string(end) + " is in use");
    fs::resize_file(data, end);
    MustOpen();
}

TEST_F(PoolDirectoryTest, UnreadableRowsOfADataFileThatIsShortAreDamage) {
    MustOpen();
    Batch batch;
    batch.Put(PoolKey(), Encode(PoolRecord{.sequence = 9, .region_count = 2, .used_blocks = 2}));
    batch.Put(RegionKey(1), "X");
    ASSERT_TRUE(pool_->metadata().Commit(batch).ok());
    pool_.reset();
    Refused(ErrorKind::kDamaged, "allocator region 1 is damaged");
}

TEST_F(PoolDirectoryTest, OpensWithDirectAccess) {
    options_.direct = true;
    const Status status = Open();
    if (status.ok()) {
        EXPECT_NE(::fcntl(pool_->data_fd(), F_GETFL) & O_DIRECT, 0);
    } else {
        EXPECT_NE(status.error().message.find("--cache buffered"), std::string::npos);
    }
}

TEST_F(PoolDirectoryTest, SuperblockSurvivesEncoding) {
    const Superblock superblock{NewUuid(), 1234567890123};
    const std::string bytes = EncodeSuperblock(superblock);
    ASSERT_EQ(bytes.size(), 4096U);
    const Result<Superblock> decoded = DecodeSuperblock(bytes, "x");
    ASSERT_TRUE(decoded.ok());
    EXPECT_EQ(decoded.value().uuid, superblock.uuid);
    EXPECT_EQ(decoded.value().created_ms, superblock.created_ms);
    EXPECT_EQ(FormatUuid(superblock.uuid).size(), 36U);
    EXPECT_NE(NewUuid(), NewUuid());
}

TEST_F(PoolDirectoryTest, SpaceIsProvisionedAndGivenBack) {
    MustOpen();
    struct stat about;
    const auto blocks = [&] {
        EXPECT_EQ(::fstat(pool_->data_fd(), &about), 0);
        return static_cast<uint64_t>(about.st_blocks) * 512;
    };
    ASSERT_TRUE(pool_->space().Provision(4096, 8 << 20).ok());
    const uint64_t full = blocks();
    EXPECT_GE(full, 8U << 20);
    EXPECT_EQ(about.st_size, 4096 + (8 << 20));
    pool_->space().Discard(4096, 4 << 20);
    EXPECT_LE(blocks(), full - (4 << 20));
    EXPECT_EQ(about.st_size, 4096 + (8 << 20));
    ASSERT_TRUE(pool_->space().Provision(4096, 4 << 20).ok());
    EXPECT_EQ(blocks(), full);
    MustOpen();  // the superblock is still there
}

TEST_F(PoolDirectoryTest, ReserveOfTheFileSystemIsNotTouched) {
    MustOpen();
    struct statvfs system;
    ASSERT_EQ(::fstatvfs(pool_->data_fd(), &system), 0);
    const uint64_t free = uint64_t{system.f_bavail} * system.f_frsize;
    const uint64_t total = uint64_t{system.f_blocks} * system.f_frsize;
    const uint64_t reserve = std::min<uint64_t>(256 << 20, total / 20);
    const Status status = pool_->space().Provision(4096, free - reserve / 2);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().kind, ErrorKind::kNoSpace);
    EXPECT_EQ(fs::file_size(pool_->data_path()), 4096U);
    EXPECT_LT(pool_->space().Capacity(0), free);
    EXPECT_GE(pool_->space().Capacity(1 << 20), 1U << 20);
}

TEST_F(PoolDirectoryTest, ReserveForMetadataIsAskedForEvenIfDataHasRoom) {
    MustOpen();
    // /proc stands for a full file system: it has no block to spare.
    Result<DataSpace> space = DataSpace::Make(pool_->data_fd(), pool_->data_path(), "/proc");
    ASSERT_TRUE(space.ok());
    const Status status = space.value().Provision(4096, 4096);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().kind, ErrorKind::kNoSpace);
    EXPECT_NE(status.error().message.find("/proc"), std::string::npos);
}

}  // namespace
}  // namespace varve::cow
