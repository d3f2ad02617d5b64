// Opening and making pools that are interrupted anywhere, by a killed process or a power cut, and
// halves of a pool that are of different times.
// The system calls below stand between the program and the system: in a child of this program they
// end it at a given one, and undo what was not synced if the power is to fail as well. What RocksDB
// does below its own directory is left as it is: rocks_power_cut_test cuts there.
#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <string_view>
#include <vector>

#include "base/endian.h"
#include "cow/pool/epoch.h"
#include "cow/pool/pool_directory.h"

namespace {

namespace fs = std::filesystem;

constexpr int kDied = 77;

/// What this process did, and when it ends. Off in the test itself.
class Interposed {
  public:
    static Interposed& Get() {
        static Interposed* const self = new Interposed;
        return *self;
    }

    /// A call that changes something comes now. In metadata that are made anew one is as good as
    /// another: they are removed whole.
    std::unique_lock<std::mutex> Next(const std::string& path) {
        std::unique_lock lock(mutex_);
        const bool counts = die_at_ != 0 && path.find("/meta.new/") == std::string::npos;
        if (counts && ++calls_ == die_at_) Die();
        return lock;
    }
    std::unique_lock<std::mutex> Next(int fd) { return Next(die_at_ != 0 ? PathOf(fd) : ""); }
    bool watches(const std::string& path) const {
        return die_at_ != 0 && path.starts_with(root_) && path.find("/meta") == std::string::npos;
    }
    void Wrote(int fd, off_t offset, size_t bytes) {
        const std::string path = PathOf(fd);
        if (!watches(path)) return;
        struct stat about;
        ::fstat(fd, &about);
        std::string old(bytes, '\0');
        const int again = Open(path, O_RDONLY);
        const ssize_t n = ::pread(again, old.data(), bytes, offset);
        ::close(again);
        old.resize(static_cast<size_t>(std::max<ssize_t>(n, 0)));
        Remember(InodeOf(path), [path, offset, old, size = about.st_size] {
            const int file = Open(path, O_WRONLY);
            ::syscall(SYS_pwrite64, file, old.data(), old.size(), offset);
            ::syscall(SYS_ftruncate, file, size);
            ::close(file);
        });
    }
    void Named(const std::string& path, std::function<void()> undo) {
        if (watches(path)) Remember(InodeOf(fs::path(path).parent_path()), std::move(undo));
    }
    void Synced(int fd) {
        struct stat about;
        ::fstat(fd, &about);
        std::erase_if(loose_, [&](const Loose& one) { return one.inode == about.st_ino; });
    }

  private:
    struct Loose {
        ino_t inode;  // to be synced
        std::function<void()> undo;
    };

    Interposed() {
        if (const char* at = std::getenv("VARVE_DIE_AT")) die_at_ = std::stoul(at);
        if (const char* root = std::getenv("VARVE_ROOT")) root_ = root;
        power_ = std::getenv("VARVE_POWER") != nullptr;
    }
    static int Open(const std::string& path, int flags) {
        return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path.c_str(), flags, 0));
    }
    static std::string PathOf(int fd) {
        std::error_code error;
        return fs::read_symlink("/proc/self/fd/" + std::to_string(fd), error).string();
    }
    static ino_t InodeOf(const std::string& path) {
        struct stat about {};
        ::stat(path.c_str(), &about);
        return about.st_ino;
    }
    void Remember(ino_t inode, std::function<void()> undo) {
        loose_.push_back({inode, std::move(undo)});
    }
    [[noreturn]] void Die() {
        if (power_) {
            for (auto one = loose_.rbegin(); one != loose_.rend(); ++one) one->undo();
        }
        ::_exit(kDied);
    }

    std::mutex mutex_;
    size_t die_at_ = 0, calls_ = 0;
    std::string root_;
    bool power_ = false;
    std::vector<Loose> loose_;
};

int OpenOrMake(const char* path, int flags, unsigned mode) {
    const auto lock = Interposed::Get().Next(path);
    const bool made = (flags & O_CREAT) != 0 && ::access(path, F_OK) != 0;
    const int fd = static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, mode));
    if (made && fd >= 0) {
        Interposed::Get().Named(
            path, [name = std::string(path)] { ::syscall(SYS_unlink, name.c_str()); });
    }
    return fd;
}

}  // namespace

extern "C" {
int open(const char* path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    const unsigned mode = (flags & O_CREAT) != 0 ? va_arg(rest, unsigned) : 0;
    va_end(rest);
    if ((flags & O_CREAT) != 0) return OpenOrMake(path, flags, mode);
    return static_cast<int>(::syscall(SYS_openat, AT_FDCWD, path, flags, 0));
}
ssize_t pwrite(int fd, const void* bytes, size_t count, off_t offset) {
    const auto lock = Interposed::Get().Next(fd);
    Interposed::Get().Wrote(fd, offset, count);
    return ::syscall(SYS_pwrite64, fd, bytes, count, offset);
}
int fsync(int fd) {
    const auto lock = Interposed::Get().Next(fd);
    const int result = static_cast<int>(::syscall(SYS_fsync, fd));
    if (result == 0) Interposed::Get().Synced(fd);
    return result;
}
int fdatasync(int fd) {
    return fsync(fd);
}
int rename(const char* from, const char* to) noexcept {
    const auto lock = Interposed::Get().Next(from);
    const int result = static_cast<int>(::syscall(SYS_rename, from, to));
    const std::string path = to;
    // Of a directory that is RocksDB's the name counts.
    const std::string parent = fs::path(path).parent_path();
    if (result == 0 && parent.find("/meta") == std::string::npos) {
        Interposed::Get().Named(parent + "/.", [from = std::string(from), path] {
            ::syscall(SYS_rename, path.c_str(), from.c_str());
        });
    }
    return result;
}
int mkdir(const char* path, mode_t mode) noexcept {
    const auto lock = Interposed::Get().Next(path);
    const int result = static_cast<int>(::syscall(SYS_mkdir, path, mode));
    if (result == 0) {
        Interposed::Get().Named(path, [name = std::string(path)] { fs::remove_all(name); });
    }
    return result;
}
int unlink(const char* path) noexcept {
    const auto lock = Interposed::Get().Next(path);
    return static_cast<int>(::syscall(SYS_unlink, path));
}
}

namespace varve::cow {
namespace {

std::string ReadFile(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}
void WriteFile(const fs::path& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
}
void Copy(const fs::path& from, const fs::path& to) {
    fs::remove_all(to);
    fs::copy(from, to, fs::copy_options::recursive);
}

class PoolOpeningTest : public testing::Test {
  protected:
    PoolOpeningTest() {
        const fs::path shared = "/dev/shm";  // quick syncs
        const fs::path place = fs::exists(shared) ? shared : fs::temp_directory_path();
        std::string pattern = (place / "varve-opening-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
        options_.path = root_ / "pool";
        options_.direct = false;
        options_.lock_wait_ms = 0;
    }
    ~PoolOpeningTest() override {
        pool_.reset();
        fs::remove_all(root_);
    }
    Status Open() {
        pool_.reset();
        Result<std::unique_ptr<PoolDirectory>> pool = PoolDirectory::Open(options_);
        if (!pool.ok()) return pool.error();
        pool_ = std::move(pool.value());
        return pool_->BeginEpoch();
    }
    void MustOpen() {
        const Status status = Open();
        ASSERT_TRUE(status.ok()) << status.error().message;
    }
    void MustOpenAndClose() {
        MustOpen();
        pool_.reset();
    }
    void Refused(const std::string& part, ErrorKind kind = ErrorKind::kDamaged) {
        const Status status = Open();
        ASSERT_FALSE(status.ok());
        EXPECT_STREQ(KindName(status.error().kind), KindName(kind)) << status.error().message;
        EXPECT_NE(status.error().message.find(part), std::string::npos) << status.error().message;
        EXPECT_EQ(status.error().message.find('\n'), std::string::npos);
    }
    Superblock ReadSuperblock() {
        const Result<Superblock> superblock = DecodeSuperblock(ReadFile(data()), "data");
        EXPECT_TRUE(superblock.ok());
        return superblock.ok() ? superblock.value() : Superblock();
    }
    fs::path data() const {
        return options_.data.empty() ? root_ / "pool/data" : fs::path(options_.data);
    }
    fs::path meta() const { return root_ / "pool/meta"; }

    /// Opens and closes the pool in another process, which ends at its `die_at`-th change. False if
    /// it was done before.
    bool OpensUntil(size_t die_at, bool power) {
        const std::string command = fmt::format(
            "{} VARVE_DIE_AT={} VARVE_ROOT={} VARVE_POOL={} VARVE_DATA={} {} "
            "--open > {} 2>&1",
            power ? "VARVE_POWER=1" : "", die_at, root_.string(), options_.path, options_.data,
            fs::read_symlink("/proc/self/exe").string(), (root_ / "output").string());
        const int status = std::system(command.c_str());
        EXPECT_TRUE(WIFEXITED(status));
        const bool died = WEXITSTATUS(status) == kDied;
        EXPECT_TRUE(died || WEXITSTATUS(status) == 0) << ReadFile(root_ / "output");
        return died;
    }

    fs::path root_;
    PoolDirectoryOptions options_;
    std::unique_ptr<PoolDirectory> pool_;
};

/// What the other process does.
int OpenAndClose() {
    PoolDirectoryOptions options;
    options.path = std::getenv("VARVE_POOL");
    options.data = std::getenv("VARVE_DATA");
    options.direct = false;
    const Result<std::unique_ptr<PoolDirectory>> pool = PoolDirectory::Open(options);
    if (pool.ok() && pool.value()->BeginEpoch().ok()) return 0;
    if (!pool.ok()) std::fprintf(stderr, "%s\n", pool.error().message.c_str());
    return 1;
}

// ---- halves of different times

TEST_F(PoolOpeningTest, OlderMetadataAreRefused) {
    MustOpenAndClose();
    Copy(meta(), root_ / "old");
    MustOpenAndClose();
    Copy(meta(), root_ / "new");
    Copy(root_ / "old", meta());
    Refused("of different times");
    Refused("the metadata must come from an older");
    Copy(root_ / "new", meta());
    MustOpen();
}

TEST_F(PoolOpeningTest, AnOlderDataFileIsRefused) {
    MustOpenAndClose();
    const std::string old = ReadFile(data());
    MustOpenAndClose();
    WriteFile(data(), old);
    Refused("the data file must come from an older");
}

TEST_F(PoolOpeningTest, ACopyOfOneHalfFromBetweenOpeningAndClosingIsRefused) {
    MustOpen();
    Copy(meta(), root_ / "old");
    const std::string old = ReadFile(data());
    pool_.reset();
    Copy(meta(), root_ / "new");
    Copy(root_ / "old", meta());
    Refused("of different times");
    Copy(root_ / "new", meta());
    WriteFile(data(), old);
    Refused("of different times");
    Copy(root_ / "old", meta());  // they belong together
    MustOpen();
}

TEST_F(PoolOpeningTest, HalvesOfTwoCopiesThatWentOnAreRefused) {
    MustOpenAndClose();
    Copy(root_ / "pool", root_ / "copy");
    MustOpenAndClose();
    const std::string data_of_one = ReadFile(data());
    const std::string path = options_.path;
    options_.path = root_ / "copy";
    MustOpenAndClose();
    WriteFile(root_ / "copy/data", data_of_one);
    Refused("of different times");  // though they count alike
}

TEST_F(PoolOpeningTest, ForceMakesHalvesOfDifferentTimesOne) {
    MustOpenAndClose();
    Copy(meta(), root_ / "old");
    MustOpenAndClose();
    Copy(root_ / "old", meta());
    Refused("--force-epoch");
    options_.force_epoch = true;
    MustOpenAndClose();
    options_.force_epoch = false;
    MustOpenAndClose();
    Copy(root_ / "old", meta());
    Refused("of different times");
}

TEST_F(PoolOpeningTest, LookingBeginsNoEpoch) {
    MustOpenAndClose();
    const Superblock before = ReadSuperblock();
    EXPECT_GT(before.epoch.number, 0U);
    ASSERT_TRUE(PoolDirectory::Open(options_).ok());
    EXPECT_EQ(ReadSuperblock().epoch, before.epoch);
}

/// A superblock as version 1 had it.
std::string OldSuperblock(const Superblock& superblock) {
    std::string bytes = EncodeSuperblock(superblock);
    StoreBig(bytes.data() + 8, uint32_t{1});
    bytes.replace(40, bytes.size() - 40, bytes.size() - 40, '\0');
    uint32_t crc = ~0U;  // CRC32C, bit by bit
    for (size_t i = 0; i + 4 < bytes.size(); ++i) {
        crc ^= static_cast<uint8_t>(bytes[i]);
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0x82f63b78U & -(crc & 1));
    }
    StoreBig(bytes.data() + bytes.size() - 4, ~crc);
    return bytes;
}

TEST_F(PoolOpeningTest, APoolFromBeforeEpochsGetsOne) {
    MustOpen();
    Batch batch;
    batch.Delete(kEpochKey);
    ASSERT_TRUE(pool_->metadata().Commit(batch).ok());
    Superblock superblock = ReadSuperblock();
    Copy(meta(), root_ / "old");
    pool_.reset();
    Copy(root_ / "old", meta());
    superblock.epoch = {};
    WriteFile(data(), OldSuperblock(superblock));
    const std::string old = ReadFile(data());
    MustOpenAndClose();
    EXPECT_GT(ReadSuperblock().epoch.number, 0U);
    EXPECT_EQ(ReadSuperblock().uuid, superblock.uuid);
    MustOpenAndClose();
    Copy(meta(), root_ / "new");
    Copy(root_ / "old", meta());
    Refused("of different times");
    Copy(root_ / "new", meta());
    WriteFile(data(), old);
    Refused("of different times");
}

TEST_F(PoolOpeningTest, NoPowerCutTearsTheSuperblock) {
    const Superblock superblock{NewUuid(), 1234567890123, NewEpoch(7)};
    Superblock next = superblock;
    next.epoch = NewEpoch(8);
    const std::string after = EncodeSuperblock(next);
    for (const bool old : {false, true}) {
        const std::string before = old ? OldSuperblock(superblock) : EncodeSuperblock(superblock);
        ASSERT_TRUE(DecodeSuperblock(before, "before").ok());
        // Only the first sector is ever written again.
        const std::string written =
            after.substr(0, kSuperblockSector) + before.substr(kSuperblockSector);
        for (unsigned kept = 0; kept < 256; ++kept) {
            std::string torn = before;
            for (size_t sector = 0; sector < 8; ++sector) {
                if ((kept >> sector & 1) != 0)
                    torn.replace(sector * 512, 512, written, sector * 512, 512);
            }
            const Result<Superblock> read = DecodeSuperblock(torn, "torn");
            ASSERT_TRUE(read.ok()) << kept;
            const Epoch expected = (kept & 1) != 0 ? next.epoch : old ? Epoch() : superblock.epoch;
            EXPECT_EQ(read.value().epoch, expected);
        }
    }
}

// ---- interruptions

TEST_F(PoolOpeningTest, OpeningMayBeInterruptedAnywhere) {
    MustOpenAndClose();
    Copy(root_ / "pool", root_ / "whole");
    size_t points = 0;
    for (const bool power : {false, true}) {
        for (size_t at = 1;; ++at) {
            Copy(root_ / "whole", root_ / "pool");
            if (!OpensUntil(at, power)) break;
            ++points;
            MustOpenAndClose();
            Copy(root_ / "whole/meta", meta());
            Refused("of different times");
            if (HasFailure()) FAIL() << "at change " << at << ", power cut: " << power;
        }
    }
    std::printf("%zu interruptions\n", points);
    EXPECT_GT(points, 20U);
}

TEST_F(PoolOpeningTest, CreationMayBeInterruptedAnywhere) {
    size_t points = 0;
    for (const std::string data : {"", "disk.img"}) {
        if (!data.empty()) options_.data = root_ / data;
        for (const bool power : {false, true}) {
            for (size_t at = 1;; ++at) {
                for (const char* name : {"pool", "disk.img"}) fs::remove_all(root_ / name);
                if (!OpensUntil(at, power)) break;
                ++points;
                MustOpenAndClose();
                if (HasFailure()) FAIL() << "at change " << at << ", power cut: " << power;
                EXPECT_FALSE(fs::exists(root_ / "pool/creating"));
            }
        }
    }
    std::printf("%zu interruptions\n", points);
    EXPECT_GT(points, 40U);
}

TEST_F(PoolOpeningTest, AFileThatTheCreationHasNotMadeIsNotTakenOver) {
    options_.data = root_ / "disk.img";
    const auto leftover = [&] {
        fs::remove_all(root_ / "pool");
        fs::create_directory(root_ / "pool");
        const Superblock superblock{NewUuid(), 1, {}};
        WriteFile(root_ / "pool/creating", EncodeSuperblock(superblock));
        return EncodeSuperblock(superblock);
    };
    const std::string foreign = EncodeSuperblock({NewUuid(), 1, {}});
    for (const std::string& content : {foreign, std::string("dear"), std::string(8192, '\0')}) {
        leftover();
        WriteFile(data(), content);
        Refused("it exists already", ErrorKind::kExists);
        EXPECT_EQ(ReadFile(data()), content);
    }
    const std::string own = leftover();
    WriteFile(data(), own + "data");
    Refused("it exists already", ErrorKind::kExists);
    WriteFile(data(), own);
    MustOpen();
    pool_.reset();

    // Without a note of an earlier creation, zeros are somebody's as well.
    fs::remove_all(root_ / "pool");
    WriteFile(data(), std::string(4096, '\0'));
    Refused("it exists already", ErrorKind::kExists);
    EXPECT_FALSE(fs::exists(root_ / "pool/creating"));
    // Nor is a small file in the directory taken for an interrupted creation's.
    options_.data.clear();
    WriteFile(data(), "dear");
    Refused("it exists already", ErrorKind::kExists);
    EXPECT_EQ(ReadFile(data()), "dear");
}

}  // namespace
}  // namespace varve::cow

int main(int argc, char** argv) {
    if (argc == 2 && std::string_view(argv[1]) == "--open") return varve::cow::OpenAndClose();
    testing::InitGoogleTest(&argc, argv);
    return RUN_ALL_TESTS();
}
