// DataSpace on what pool_directory_test does not have: a block device, a file system that cannot
// reserve space, a file that may not grow. Loop devices and a mounted image stand for them: root.
#include "cow/space/data_space.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "cow/pool/pool_directory.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kMiB = 1 << 20;

/// What the shell command prints, without the line's end. It must succeed.
std::string Output(const std::string& command) {
    std::string output;
    FILE* pipe = ::popen(command.c_str(), "r");
    if (pipe == nullptr) return output;
    char line[4096];
    while (std::fgets(line, sizeof(line), pipe) != nullptr) output += line;
    EXPECT_EQ(::pclose(pipe), 0) << command;
    return output.substr(0, output.find('\n'));
}

class DataSpaceTest : public testing::Test {
  protected:
    DataSpaceTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-space-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
    }
    ~DataSpaceTest() override {
        if (fd_ >= 0) ::close(fd_);
        if (mounted_) Output("umount " + (root_ / "mounted").string());
        if (!device_.empty()) Output("losetup --detach " + device_);
        fs::remove_all(root_);
    }

    /// A sparse file.
    std::string Image(uint64_t bytes) {
        std::string image = (root_ / "image").string();
        const int fd = ::open(image.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
        EXPECT_EQ(::ftruncate(fd, static_cast<off_t>(bytes)), 0);
        ::close(fd);
        return image;
    }
    /// A block device of as many bytes.
    void Attach(uint64_t bytes) {
        device_ = Output("losetup --find --show " + Image(bytes));
        ASSERT_EQ(device_.substr(0, 5), "/dev/");
    }
    DataSpace Space(const std::string& path) {
        fd_ = ::open(path.c_str(), O_RDWR | O_CREAT, 0600);
        EXPECT_GE(fd_, 0) << path;
        Result<DataSpace> space = DataSpace::Make(fd_, path, root_.string());
        EXPECT_TRUE(space.ok());
        return std::move(space.value());
    }
    /// Bytes that the image takes from its file system.
    uint64_t Stored() const {
        struct stat about;
        EXPECT_EQ(::stat((root_ / "image").c_str(), &about), 0);
        return uint64_t(about.st_blocks) * 512;
    }
    static void Refused(const Status& status, ErrorKind kind, const std::string& part) {
        ASSERT_FALSE(status.ok());
        EXPECT_STREQ(KindName(status.error().kind), KindName(kind)) << status.error().message;
        EXPECT_NE(status.error().message.find(part), std::string::npos) << status.error().message;
    }

    fs::path root_;
    std::string device_;
    bool mounted_ = false;
    int fd_ = -1;
};

TEST_F(DataSpaceTest, ADevicesSpaceEndsWithIt) {
    Attach(8 * kMiB + 512);  // not a multiple of a block
    DataSpace space = Space(device_);
    EXPECT_EQ(space.device_bytes(), 8 * kMiB + 512);
    EXPECT_EQ(space.Capacity(0), 8 * kMiB);
    EXPECT_EQ(space.Capacity(4 * kMiB), 8 * kMiB);
    EXPECT_TRUE(space.Provision(0, 4 * kMiB).ok());
    EXPECT_TRUE(space.Provision(4 * kMiB, 4 * kMiB).ok());
    Refused(space.Provision(8 * kMiB, 4 * kMiB), ErrorKind::kNoSpace,
            device_ + " has only 8.0 MiB");
}

TEST_F(DataSpaceTest, WhatADeviceDiscardsIsGivenBack) {
    Attach(8 * kMiB);
    DataSpace space = Space(device_);
    const std::string bytes(kMiB, 'v');
    for (uint64_t offset = 0; offset < 8 * kMiB; offset += kMiB) {
        ASSERT_EQ(::pwrite(fd_, bytes.data(), kMiB, static_cast<off_t>(offset)), ssize_t(kMiB));
    }
    ASSERT_EQ(::fsync(fd_), 0);
    ASSERT_GE(Stored(), 8 * kMiB);
    space.Discard(4 * kMiB, 4 * kMiB);
    EXPECT_LE(Stored(), 5 * kMiB);
    std::string read(kMiB, 0);
    ASSERT_EQ(::pread(fd_, read.data(), kMiB, 3 * kMiB), ssize_t(kMiB));
    EXPECT_EQ(read, bytes);
}

TEST_F(DataSpaceTest, APoolOnADeviceHasItToItself) {
    Attach(64 * kMiB);
    PoolDirectoryOptions options;
    options.path = root_ / "pool";
    options.data = device_;
    // A device may hold something: it must be empty to be claimed, which this one is.
    Result<std::unique_ptr<PoolDirectory>> pool = PoolDirectory::Open(options);
    ASSERT_TRUE(pool.ok()) << pool.error().message;
    EXPECT_EQ(pool.value()->space().Capacity(0), 64 * kMiB);

    PoolDirectoryOptions another = options;
    another.path = root_ / "another";
    EXPECT_FALSE(PoolDirectory::Open(another).ok());  // in use
    pool.value().reset();
    Refused(PoolDirectory::Open(another).status(), ErrorKind::kExists, device_);
    options.data.clear();
    pool = PoolDirectory::Open(options);  // remembered
    ASSERT_TRUE(pool.ok()) << pool.error().message;
    EXPECT_EQ(pool.value()->data_path(), device_);
}

TEST_F(DataSpaceTest, AFileSystemThatCannotReserveIsNamed) {
    const std::string image = Image(16 * kMiB);
    const std::string mounted = (root_ / "mounted").string();
    fs::create_directory(mounted);
    Output("mke2fs -q -t ext2 " + image + " && mount -o loop " + image + " " + mounted);
    mounted_ = true;
    const std::string data = mounted + "/data";
    DataSpace space = Space(data);
    Refused(space.Provision(0, kMiB), ErrorKind::kFailed, "cannot reserve space (fallocate)");
    EXPECT_EQ(fs::file_size(data), 0U);
}

TEST_F(DataSpaceTest, WhatCannotBeExtendedIsLeftAsItWas) {
    const std::string data = (root_ / "data").string();
    DataSpace space = Space(data);
    ASSERT_TRUE(space.Provision(0, 2 * kMiB).ok());
    rlimit before;
    ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
    const auto handler = std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {3 * kMiB, before.rlim_max};
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
    const Status status = space.Provision(2 * kMiB, 2 * kMiB);
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
    std::signal(SIGXFSZ, handler);
    ASSERT_FALSE(status.ok());
    EXPECT_NE(status.error().message.find("cannot extend " + data), std::string::npos)
        << status.error().message;
    EXPECT_EQ(fs::file_size(data), 2 * kMiB);
    EXPECT_TRUE(space.Provision(2 * kMiB, 2 * kMiB).ok());
}

// A file system of its own: others would change what is free.
TEST_F(DataSpaceTest, WhatAFileDiscardedIsCountedOnce) {
    const fs::path mounted = root_ / "mounted";
    fs::create_directory(mounted);
    Output("mount -t tmpfs -o size=64m tmpfs " + mounted.string());
    mounted_ = true;
    DataSpace space = Space((mounted / "data").string());
    const uint64_t capacity = space.Capacity(0);
    ASSERT_TRUE(space.Provision(0, 16 * kMiB).ok());
    ASSERT_TRUE(space.Provision(16 * kMiB, 16 * kMiB).ok());
    EXPECT_EQ(space.Capacity(32 * kMiB), capacity);
    space.Discard(16 * kMiB, 16 * kMiB);
    EXPECT_EQ(space.Capacity(32 * kMiB), capacity);
    space.Discard(0, 16 * kMiB);
    EXPECT_EQ(space.Capacity(32 * kMiB), capacity);
    ASSERT_TRUE(space.Provision(0, 16 * kMiB).ok());
    EXPECT_EQ(space.Capacity(32 * kMiB), capacity);
}

TEST_F(DataSpaceTest, WhatIsClosedIsAnError) {
    const std::string data = (root_ / "data").string();
    EXPECT_FALSE(DataSpace::Make(-1, data, root_.string()).ok());
    DataSpace space = Space(data);
    ::close(fd_);
    fd_ = -1;
    EXPECT_FALSE(space.Provision(0, kMiB).ok());
    EXPECT_EQ(space.Capacity(3 * kMiB), 3 * kMiB);  // what there was
}

}  // namespace
}  // namespace varve::cow
