// A server that was killed, and what it has left under way on its data file: the next one must wait
// until the system has ended that. Loop devices and a mounted image stand for a slow path: root.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/buffers.h"
#include "cow/pool/pool_directory.h"
#include "nbdserver/daemon/data_plane.h"
#include "tests/run_on.h"

namespace varve::nbdserver {
namespace {

namespace fs = std::filesystem;

constexpr unsigned kThreads = 2;
constexpr int kPatienceMs = 30'000;

/// What the shell command prints, without the line's end. It must succeed.
std::string Output(const std::string& command) {
    std::string output;
    FILE* pipe = ::popen(command.c_str(), "r");
    for (int c = std::getc(pipe); c != EOF && c != '\n'; c = std::getc(pipe)) {
        output += static_cast<char>(c);
    }
    EXPECT_EQ(::pclose(pipe), 0) << command;
    return output;
}

/// Has a pool open in this process as a server has, and writes when a byte comes on `commands`.
/// Says on `answers` when it is ready, and when a write is on its way. Never returns.
[[noreturn]] void Serve(const cow::PoolDirectoryOptions& options, int commands, int answers) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    const auto directory = cow::PoolDirectory::Open(options);
    if (!directory.ok()) {
        std::fprintf(stderr, "%s\n", directory.error().message.c_str());
        ::_exit(1);
    }
    const int fd = directory.value()->data_fd();
    const Result<FileTraits> traits = ProbeFile(fd, options.direct);
    const auto plane = DataPlane::Start(kThreads, fd, traits.value(), ConnectionLimits{}, 0);
    if (!plane.ok()) ::_exit(2);
    char byte = 'r';
    BufferPool buffers(0);
    const Buffer block = buffers.Take(4096);
    const iovec vector{block.data(), 4096};
    cow::BlockIo io;
    io.kind = cow::BlockIo::Kind::kWrite;
    io.offset = 1 << 20;
    io.vectors = &vector;
    io.vector_count = 1;
    io.done = [](cow::BlockIo*) {};
    while (::write(answers, &byte, 1) == 1 && ::read(commands, &byte, 1) == 1) {
        const cow::Lane lane = plane.value()->lanes().at(0);
        RunOn(*lane.executor, [&] { lane.blocks->Submit(io); });
    }
    ::_exit(3);
}

class Served {
  public:
    explicit Served(const cow::PoolDirectoryOptions& options) {
        int commands[2], answers[2];
        EXPECT_EQ(::pipe2(commands, O_CLOEXEC), 0);
        EXPECT_EQ(::pipe2(answers, O_CLOEXEC), 0);
        process_ = ::fork();
        if (process_ == 0) Serve(options, commands[0], answers[1]);
        ::close(commands[0]);
        ::close(answers[1]);
        commands_ = commands[1];
        answers_ = answers[0];
        Answer();
    }
    ~Served() {
        Kill();
        ::close(commands_);
        ::close(answers_);
    }
    void Write() {
        EXPECT_EQ(::write(commands_, "w", 1), 1);
        Answer();
    }
    /// False if it does not end: then something of it waits itself.
    bool Kill() {
        if (process_ <= 0) return true;
        ::kill(process_, SIGKILL);
        const auto pidfd = static_cast<int>(::syscall(SYS_pidfd_open, process_, 0));
        pollfd ended{pidfd, POLLIN, 0};
        const bool in_time = ::poll(&ended, 1, kPatienceMs) == 1;
        ::close(pidfd);
        if (in_time) ::waitpid(process_, nullptr, 0);
        process_ = -1;
        return in_time;
    }
    /// Its open files of `path`, which live on in this process as in a request of the system's.
    std::vector<int> Take(const std::string& path) const {
        std::vector<int> taken;
        const auto pidfd = static_cast<int>(::syscall(SYS_pidfd_open, process_, 0));
        const fs::path fds = "/proc/" + std::to_string(process_) + "/fd";
        for (const fs::directory_entry& entry : fs::directory_iterator(fds)) {
            std::error_code error;
            if (fs::read_symlink(entry.path(), error) != path) continue;
            const int fd = std::stoi(entry.path().filename().string());
            taken.push_back(static_cast<int>(::syscall(SYS_pidfd_getfd, pidfd, fd, 0)));
            EXPECT_GE(taken.back(), 0);
        }
        ::close(pidfd);
        return taken;
    }

  private:
    void Answer() const {
        char byte = 0;
        EXPECT_EQ(::read(answers_, &byte, 1), 1);
    }
    pid_t process_ = -1;
    int commands_ = -1, answers_ = -1;
};

class LateWriteTest : public testing::Test {
  protected:
    LateWriteTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-late-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
        options_.path = root_ / "pool";
        options_.direct = false;
        options_.lock_wait_ms = 0;
    }
    ~LateWriteTest() override {
        for (auto undo = undo_.rbegin(); undo != undo_.rend(); ++undo) Output(*undo);
        fs::remove_all(root_);
    }
    Status Open() const { return cow::PoolDirectory::Open(options_).status(); }
    void Busy() const {
        const Status status = Open();
        ASSERT_FALSE(status.ok());
        EXPECT_EQ(status.error().kind, ErrorKind::kBusy) << status.error().message;
        EXPECT_NE(status.error().message.find("a server that has ended"), std::string::npos);
    }
    /// Until a write of somebody's waits in the device.
    static void AwaitWriteIn(const std::string& device) {
        const std::string path = "/sys/block/" + fs::path(device).filename().string() + "/inflight";
        unsigned reads = 0, writes = 0;
        for (int left = kPatienceMs; left > 0 && writes == 0; --left) {
            std::ifstream(path) >> reads >> writes;
            ::poll(nullptr, 0, 1);
        }
        ASSERT_GT(writes, 0U) << "no write reached " << device;
    }
    std::string Attach(const fs::path& image) {
        std::string device = Output("losetup --find --show " + image.string());
        undo_.push_back("losetup --detach " + device);
        return device;
    }

    fs::path root_;
    cow::PoolDirectoryOptions options_;
    std::vector<std::string> undo_;
};

TEST_F(LateWriteTest, EveryOpenFileThatCarriesTransfersHoldsTheLock) {
    size_t lanes = 0;
    for (size_t kept = 0;; ++kept) {
        Served server(options_);
        std::vector<int> taken = server.Take(root_ / "pool/data");
        ASSERT_TRUE(server.Kill());
        if (kept == taken.size()) {
            for (const int fd : taken) ::close(fd);
            break;
        }
        for (size_t i = 0; i < taken.size(); ++i) {
            if (i != kept) ::close(taken[i]);
        }
        const bool carries = (::fcntl(taken[kept], F_GETFL) & O_ACCMODE) == O_RDWR;
        EXPECT_TRUE(carries);
        Busy();
        ++lanes;
        ::close(taken[kept]);
        const Status status = Open();
        ASSERT_TRUE(status.ok()) << status.error().message;
    }
    EXPECT_GE(lanes, 1 + kThreads);
}

TEST_F(LateWriteTest, TheNextServerWaitsForTheWriteOfOneThatWasKilled) {
    // A device on a file system that can be frozen.
    const fs::path mounted = root_ / "mounted";
    fs::create_directory(mounted);
    Output("truncate --size 64M " + (root_ / "image").string());
    const std::string below = Attach(root_ / "image");
    Output("mkfs.ext4 -q " + below);
    Output("mount " + below + " " + mounted.string());
    undo_.push_back("umount " + mounted.string());
    Output("dd status=none if=/dev/zero bs=1M count=16 of=" + (mounted / "device").string());
    options_.data = Attach(mounted / "device");
    options_.direct = true;

    Served server(options_);
    server.Write();  // it has its place
    Output("sync; fsfreeze --freeze " + mounted.string());
    undo_.push_back("fsfreeze --unfreeze " + mounted.string());
    server.Write();
    AwaitWriteIn(options_.data);
    const bool killed = server.Kill();
    if (killed) Busy();
    EXPECT_TRUE(killed);
    Output(undo_.back());
    undo_.pop_back();
    options_.lock_wait_ms = 60'000;
    const Status status = Open();
    EXPECT_TRUE(status.ok()) << status.error().message;
}

}  // namespace
}  // namespace varve::nbdserver
