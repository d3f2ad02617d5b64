// ServerTest: the whole server in this process, for tests that are its clients: real sockets, a
// real pool, the admin socket, SIGTERM.
#pragma once

#include <gtest/gtest.h>
#include <libnbd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <future>

#include "admin/unix_socket.h"
#include "nbdserver/daemon/daemon.h"
#include "nbdserver/wire/wire.h"
#include "tests/raw_nbd.h"

namespace varve::nbdserver {

namespace fs = std::filesystem;
using admin::OwnedFd;

/// Waits until the peer has closed.
inline void ExpectClosed(int fd) {
    char bytes[4096];
    ssize_t n = 0;
    while ((n = ::recv(fd, bytes, sizeof bytes, 0)) > 0) {
    }
    EXPECT_TRUE(n == 0 || errno == ECONNRESET);
}

inline std::string ExportName(const std::string& name) {
    return Option(wire::kOptExportName, name);
}

/// A libnbd handle.
class Nbd {
  public:
    /// `context`: to be asked for.
    explicit Nbd(const std::string& uri, const char* context = nullptr) : nbd_(nbd_create()) {
        if (context) nbd_add_meta_context(nbd_, context);
        connected_ = nbd_connect_uri(nbd_, uri.c_str()) == 0;
        if (!connected_) error_ = nbd_get_error();
    }
    ~Nbd() { nbd_close(nbd_); }
    Nbd(const Nbd&) = delete;

    operator nbd_handle*() const { return nbd_; }  // NOLINT: for libnbd's functions
    bool connected() const { return connected_; }
    const std::string& error() const { return error_; }

  private:
    nbd_handle* nbd_;
    bool connected_ = false;
    std::string error_;
};

class ServerTest : public testing::Test {
  protected:
    ServerTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-server-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
        options_.pool = root_ / "pool";
        options_.listen_unix = {{root_ / "nbd.sock", {}}};
        options_.listen = {{"127.0.0.1", 0}};
        options_.threads = 2;
        options_.direct = false;
    }
    ~ServerTest() override {
        if (daemon_) Stop();
        fs::remove_all(root_);
    }

    void Start() {
        Result<std::unique_ptr<Daemon>> daemon = Daemon::Start(options_);
        ASSERT_TRUE(daemon.ok()) << daemon.error().message;
        daemon_ = std::move(daemon.value());
        outcome_ = std::async(std::launch::async, [this] { return daemon_->Run(); });
    }
    void StartWithDisk() {
        Start();
        EXPECT_EQ(Call("disk.create", R"({"name":"disk0","size":16777216})").find("error"),
                  std::string::npos);
    }
    /// SIGTERM to this process: the daemon has taken it over.
    void Stop() {
        ::kill(::getpid(), SIGTERM);
        const Status outcome = outcome_.get();
        EXPECT_TRUE(outcome.ok()) << outcome.error().message;
        daemon_.reset();
    }

    /// One call on the admin socket; the whole answer.
    std::string Call(const std::string& method, const std::string& params = "{}") {
        Result<OwnedFd> socket = admin::ConnectUnix(root_ / "pool/admin.sock");
        if (!socket.ok()) return "error: " + socket.error().message;
        SendAll(socket.value().get(), R"({"jsonrpc":"2.0","id":1,"method":")" + method +
                                          R"(","params":)" + params + "}\n");
        std::string line;
        while (line.empty() || line.back() != '\n') {
            const std::string byte = Receive(socket.value().get(), 1);
            if (byte.empty()) break;
            line += byte;
        }
        return line;
    }
    /// A connection that has been greeted, or closed instead.
    OwnedFd Connect() {
        Result<OwnedFd> socket = admin::ConnectUnix(root_ / "nbd.sock");
        EXPECT_TRUE(socket.ok());
        return std::move(socket.value());
    }
    OwnedFd ConnectGreeted() {
        OwnedFd fd = Connect();
        EXPECT_EQ(Receive(fd.get(), sizeof(wire::Greeting)).size(), sizeof(wire::Greeting));
        return fd;
    }
    /// A connection in transmission.
    OwnedFd Attach(const std::string& name) {
        OwnedFd fd = ConnectGreeted();
        SendAll(fd.get(), kHello + ExportName(name));
        EXPECT_EQ(Receive(fd.get(), 10).size(), 10U);
        return fd;
    }
    uint16_t Port() const {
        const std::string& uri = daemon_->uris()[0];
        return static_cast<uint16_t>(std::stoi(uri.substr(uri.rfind(':') + 1)));
    }
    std::string Uri(const std::string& name) const {
        return "nbd+unix:///" + name + "?socket=" + (root_ / "nbd.sock").string();
    }

    fs::path root_;
    Options options_;
    std::unique_ptr<Daemon> daemon_;
    std::future<Status> outcome_;
};

}  // namespace varve::nbdserver
