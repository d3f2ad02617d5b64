// The whole server in this process: real sockets, a real pool, the admin socket, SIGTERM.
#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <libnbd.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <filesystem>
#include <future>
#include <random>
#include <thread>

#include "admin/unix_socket.h"
#include "nbdserver/daemon/daemon.h"
#include "nbdserver/wire/wire.h"
#include "tests/raw_nbd.h"
#include "tests/server_fixture.h"

namespace varve::nbdserver {
namespace {

TEST_F(ServerTest, ServesOnTcpAndUnix) {
    options_.listen.push_back({"::1", 0});
    StartWithDisk();
    ASSERT_EQ(daemon_->uris().size(), 4U);
    EXPECT_EQ(daemon_->uris()[0].rfind("nbd://127.0.0.1:", 0), 0U);
    EXPECT_EQ(daemon_->uris()[1].rfind("nbd://[::1]:", 0), 0U);
    EXPECT_EQ(daemon_->uris()[3], "admin=" + (root_ / "pool/admin.sock").string());
    for (const std::string& uri :
         {daemon_->uris()[0] + "/disk0", daemon_->uris()[1] + "/disk0", Uri("disk0"), Uri("")}) {
        Nbd nbd(uri);
        ASSERT_TRUE(nbd.connected()) << nbd.error();
        EXPECT_EQ(nbd_get_size(nbd), 16 << 20);
        char byte = 'x';
        EXPECT_EQ(nbd_pwrite(nbd, &byte, 1, 12345, 0), 0);
        byte = 0;
        EXPECT_EQ(nbd_pread(nbd, &byte, 1, 12345, 0), 0);
        EXPECT_EQ(byte, 'x');
    }
    Nbd nothing(Uri("nope"));
    EXPECT_FALSE(nothing.connected());
    EXPECT_EQ(nbd_get_errno(), ENOENT);
}

TEST_F(ServerTest, AllAddressesAreThoseOfIpv4Too) {
    options_.listen = {{"::", 0}};
    StartWithDisk();
    for (const char* host : {"127.0.0.1", "[::1]"}) {
        Nbd nbd(std::string("nbd://") + host + ":" + std::to_string(Port()) + "/disk0");
        EXPECT_TRUE(nbd.connected()) << nbd.error();
    }
    Stop();
    options_.listen = {{"::", 0}, {"0.0.0.0", 0}};  // side by side
    Start();
    EXPECT_EQ(daemon_->uris()[1].rfind("nbd://0.0.0.0:", 0), 0U);
}

TEST_F(ServerTest, EmptyNameIsTheOnlyDiskOrNone) {
    Start();
    EXPECT_FALSE(Nbd(Uri("")).connected());
    Call("disk.create", R"({"name":"a","size":4096})");
    EXPECT_TRUE(Nbd(Uri("")).connected());
    Call("disk.create", R"({"name":"b","size":4096})");
    EXPECT_FALSE(Nbd(Uri("")).connected());
}

TEST_F(ServerTest, SnapshotsAreReadOnlyExports) {
    StartWithDisk();
    Nbd disk(Uri("disk0"));
    ASSERT_EQ(nbd_pwrite(disk, "old", 3, 0, 0), 0);
    Call("snapshot.create", R"({"snapshots":["disk0@a"]})");
    ASSERT_EQ(nbd_pwrite(disk, "new", 3, 0, 0), 0);
    Nbd snapshot(Uri("disk0@a"));
    ASSERT_TRUE(snapshot.connected()) << snapshot.error();
    EXPECT_EQ(nbd_is_read_only(snapshot), 1);
    EXPECT_EQ(nbd_can_multi_conn(snapshot), 1);
    char bytes[3];
    ASSERT_EQ(nbd_pread(snapshot, bytes, 3, 0, 0), 0);
    EXPECT_EQ(std::string(bytes, 3), "old");
}

TEST_F(ServerTest, FirstRequestMayComeWithTheLastOption) {
    StartWithDisk();
    OwnedFd fd = ConnectGreeted();
    SendAll(fd.get(), kHello + ExportName("disk0") + RequestHeader(wire::kCmdRead, 0, 512) +
                          RequestHeader(wire::kCmdDisconnect, 0, 0));
    EXPECT_EQ(Receive(fd.get(), 10 + 16 + 512).size(), 10U + 16 + 512);
    ExpectClosed(fd.get());
}

TEST_F(ServerTest, AbortedNegotiationIsAcknowledged) {
    Start();
    OwnedFd fd = ConnectGreeted();
    SendAll(fd.get(), kHello + Option(wire::kOptAbort, ""));
    EXPECT_EQ(Receive(fd.get(), 100).size(), sizeof(wire::OptionReply));
}

TEST_F(ServerTest, SilentClientIsClosedAtTheDeadline) {
    options_.negotiation_timeout_s = 1;
    StartWithDisk();
    OwnedFd attached = Attach("disk0");  // the deadline is not for those
    OwnedFd silent = ConnectGreeted();
    OwnedFd dribbling = ConnectGreeted();
    SendAll(dribbling.get(), kHello + "IHAVE");
    ExpectClosed(silent.get());
    ExpectClosed(dribbling.get());
    SendAll(attached.get(), RequestHeader(wire::kCmdRead, 0, 1));
    EXPECT_EQ(Receive(attached.get(), 17).size(), 17U);
}

TEST_F(ServerTest, NegotiationsBeyondTheCapWait) {
    options_.negotiating_max = 2;
    StartWithDisk();
    OwnedFd first = ConnectGreeted(), second = ConnectGreeted();
    OwnedFd third = Connect();
    OwnedFd fourth = Connect();
    SendAll(third.get(), kHello + ExportName("disk0"));
    first.Reset();
    EXPECT_EQ(Receive(third.get(), 28).size(), 28U);
    EXPECT_EQ(Receive(fourth.get(), 18).size(), 18U) << "an attached client frees its place";
}

// One more waits than there are places: one goes for it, who has been there longest.
TEST_F(ServerTest, OneThatWaitsEndsOneThatIsSilent) {
    options_.negotiating_max = 2;
    options_.negotiation_timeout_s = 3600;
    StartWithDisk();
    OwnedFd first = ConnectGreeted(), second = ConnectGreeted();
    OwnedFd third = ConnectGreeted();
    ExpectClosed(first.get());
    SendAll(second.get(), kHello + ExportName("disk0"));
    EXPECT_EQ(Receive(second.get(), 10).size(), 10U);
}

// They leave as fast as others come, not one after the other: that would take minutes.
TEST_F(ServerTest, CrowdOfSilentClientsDoesNotKeepOthersOut) {
    constexpr timeval kTooLong{60, 0};
    options_.negotiation_timeout_s = 3600;
    StartWithDisk();
    std::vector<OwnedFd> silent;
    for (size_t i = 0; i < 2 * options_.negotiating_max; ++i) silent.push_back(Connect());
    OwnedFd honest = Connect();
    ::setsockopt(honest.get(), SOL_SOCKET, SO_RCVTIMEO, &kTooLong, sizeof kTooLong);
    SendAll(honest.get(), kHello + ExportName("disk0"));
    EXPECT_EQ(Receive(honest.get(), 28).size(), 28U);
}

// All places are taken, but nobody waits for one.
TEST_F(ServerTest, ExactlyFullIsNotCrowded) {
    options_.negotiating_max = 2;
    StartWithDisk();
    OwnedFd first = ConnectGreeted(), second = ConnectGreeted();
    pollfd closed[2] = {{first.get(), POLLIN, 0}, {second.get(), POLLIN, 0}};
    EXPECT_EQ(::poll(closed, 2, 1500), 0) << "closed before the deadline of 10 s";
    SendAll(first.get(), kHello + ExportName("disk0"));
    EXPECT_EQ(Receive(first.get(), 10).size(), 10U);
}

TEST_F(ServerTest, ConnectionsBeyondTheLimitAreClosed) {
    options_.connections_max = 2;
    StartWithDisk();
    OwnedFd first = Attach("disk0"), second = ConnectGreeted();
    OwnedFd third = Connect();
    ExpectClosed(third.get());
    first.Reset();
    second.Reset();
    // The places come back, as soon as the server has noticed.
    for (;;) {
        OwnedFd fd = Connect();
        if (Receive(fd.get(), 18).size() == 18) break;
    }
}

TEST_F(ServerTest, GarbageHarmsNobody) {
    StartWithDisk();
    OwnedFd attached = Attach("disk0");
    const uint64_t seed = std::random_device()();
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    for (int round = 0; round < 300; ++round) {
        OwnedFd fd = ConnectGreeted();
        std::string bytes = round % 2 ? kHello + Option(1 + random() % 11, "") : "";
        bytes.resize(bytes.size() + random() % 100);
        for (size_t i = bytes.size() / 2; i < bytes.size(); ++i) {
            bytes[i] = static_cast<char>(random());
        }
        if (::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL) < 0) continue;
        if (round % 3) ::shutdown(fd.get(), SHUT_WR);
    }
    SendAll(attached.get(), RequestHeader(wire::kCmdRead, 0, 1));
    EXPECT_EQ(Receive(attached.get(), 17).size(), 17U);
    Nbd nbd(Uri("disk0"));
    EXPECT_TRUE(nbd.connected()) << nbd.error();
}

TEST_F(ServerTest, ClientsAreListedUnderTheirPresentName) {
    StartWithDisk();
    OwnedFd fd = Attach("");
    SendAll(fd.get(), RequestHeader(wire::kCmdRead, 0, 4096));
    EXPECT_EQ(Receive(fd.get(), 16 + 4096).size(), 16U + 4096);
    Call("disk.rename", R"({"name":"disk0","to":"other"})");
    const std::string list = Call("client.list");
    EXPECT_NE(list.find("\"other\""), std::string::npos) << list;
    EXPECT_NE(list.find("\"idle_s\":"), std::string::npos) << list;
    EXPECT_NE(list.find("unix:uid="), std::string::npos) << list;
    EXPECT_NE(list.find("4096"), std::string::npos) << list;
    EXPECT_EQ(list.find("disk0"), std::string::npos) << list;
}

TEST_F(ServerTest, DisconnectClosesTheClientsOfADisk) {
    StartWithDisk();
    Call("disk.create", R"({"name":"disk1","size":16777216})");
    OwnedFd zero = Attach("disk0"), one = Attach("disk1");
    const std::string answer = Call("client.disconnect", R"({"disk":"disk0"})");
    EXPECT_EQ(answer.find("error"), std::string::npos) << answer;
    ExpectClosed(zero.get());
    SendAll(one.get(), RequestHeader(wire::kCmdRead, 0, 1));
    EXPECT_EQ(Receive(one.get(), 17).size(), 17U);
    EXPECT_EQ(Call("client.list").find("\"disk0\""), std::string::npos);
}

TEST_F(ServerTest, ClientsComeAndGoWhileTheyAreListedAndDisconnected) {
    StartWithDisk();
    Call("snapshot.create", R"({"snapshots":["disk0@a"]})");
    std::atomic<bool> done{false};
    std::thread admin([&] {
        while (!done) {
            EXPECT_EQ(Call("client.list").find("error"), std::string::npos);
            Call("client.disconnect", R"({"disk":"disk0"})");
        }
    });
    for (int round = 0; round < 100; ++round) {
        OwnedFd fd = ConnectGreeted();
        SendAll(fd.get(), kHello + ExportName(round % 2 ? "disk0@a" : "disk0"));
        if (Receive(fd.get(), 10).size() < 10) continue;  // disconnected already
        const std::string read = RequestHeader(wire::kCmdRead, 0, 512);
        if (::send(fd.get(), read.data(), read.size(), MSG_NOSIGNAL) > 0) Receive(fd.get(), 528);
    }
    done = true;
    admin.join();
}

TEST_F(ServerTest, CommandsFenceClients) {
    StartWithDisk();
    {
        Nbd nbd(Uri("disk0"));
        ASSERT_EQ(nbd_pwrite(nbd, "old", 3, 0, 0), 0);
        Call("snapshot.create", R"({"snapshots":["disk0@a"]})");
        ASSERT_EQ(nbd_pwrite(nbd, "new", 3, 0, 0), 0);
        EXPECT_NE(Call("snapshot.restore", R"({"snapshot":"disk0@a"})").find("\"busy\""),
                  std::string::npos);
        const std::string answer =
            Call("snapshot.restore", R"({"snapshot":"disk0@a","disconnect":true})");
        EXPECT_EQ(answer.find("error"), std::string::npos) << answer;
        EXPECT_NE(nbd_pwrite(nbd, "late", 4, 0, 0), 0);
        EXPECT_NE(Call("disk.show", R"({"name":"disk0"})").find("\"offline\":true"),
                  std::string::npos);
    }
    Call("disk.online", R"({"name":"disk0"})");
    Nbd nbd(Uri("disk0"));
    char bytes[3];
    ASSERT_EQ(nbd_pread(nbd, bytes, 3, 0, 0), 0);
    EXPECT_EQ(std::string(bytes, 3), "old");
}

TEST_F(ServerTest, AskingAboutAnExportDoesNotAttach) {
    StartWithDisk();
    Call("snapshot.create", R"({"snapshots":["disk0@a"]})");
    std::string name;
    AppendBig(name, uint32_t{5});
    const std::string info = Option(wire::kOptInfo, name + "disk0" + std::string(2, '\0'));
    std::atomic<bool> done{false};
    std::thread asking([&] {
        while (!done) {
            OwnedFd fd = ConnectGreeted();
            std::string options = kHello;
            for (int i = 0; i < 30; ++i) options += info;
            SendAll(fd.get(), options);
            Receive(fd.get(), 30 * (20 + 12 + 20));
        }
    });
    for (int round = 0; round < 30; ++round) {
        const std::string answer = Call("snapshot.restore", R"({"snapshot":"disk0@a"})");
        EXPECT_EQ(answer.find("error"), std::string::npos) << answer;
    }
    done = true;
    asking.join();
}

TEST_F(ServerTest, ClientThatDoesNotReadIsFencedToo) {
    StartWithDisk();
    OwnedFd stuck = Attach("disk0");
    std::string requests;
    for (int i = 0; i < 64; ++i) requests += RequestHeader(wire::kCmdRead, 0, 1 << 20);
    SendAll(stuck.get(), requests);
    Call("snapshot.create", R"({"snapshots":["disk0@a"]})");
    const std::string answer =
        Call("snapshot.restore", R"({"snapshot":"disk0@a","disconnect":true})");
    EXPECT_EQ(answer.find("error"), std::string::npos) << answer;
}

TEST_F(ServerTest, StopsWithStuckAndSilentClients) {
    StartWithDisk();
    OwnedFd stuck = Attach("disk0");
    std::string requests;
    for (int i = 0; i < 64; ++i) requests += RequestHeader(wire::kCmdRead, 0, 1 << 20);
    SendAll(stuck.get(), requests);
    OwnedFd idle = Attach("disk0");
    OwnedFd silent = ConnectGreeted();
    Result<OwnedFd> admin = admin::ConnectUnix(root_ / "pool/admin.sock");
    ASSERT_TRUE(admin.ok());
    Stop();
    ExpectClosed(idle.get());
    ExpectClosed(silent.get());
    EXPECT_FALSE(fs::exists(root_ / "nbd.sock"));
    EXPECT_FALSE(fs::exists(root_ / "pool/admin.sock"));
}

TEST_F(ServerTest, StoppingKeepsWhatWasWritten) {
    StartWithDisk();
    Nbd nbd(Uri("disk0"));
    ASSERT_EQ(nbd_pwrite(nbd, "kept", 4, 4096, 0), 0);  // never flushed
    Stop();
    Start();
    Nbd again(Uri("disk0"));
    char bytes[4];
    ASSERT_EQ(nbd_pread(again, bytes, 4, 4096, 0), 0);
    EXPECT_EQ(std::string(bytes, 4), "kept");
}

TEST_F(ServerTest, RequestsInFlightAreAnsweredWhenStopping) {
    StartWithDisk();
    OwnedFd fd = Attach("disk0");
    std::string requests;
    for (int i = 0; i < 20; ++i) requests += RequestHeader(wire::kCmdRead, 0, 4096);
    SendAll(fd.get(), requests);
    Stop();
    for (int i = 0; i < 20; ++i) EXPECT_EQ(Receive(fd.get(), 16 + 4096).size(), 16U + 4096);
    ExpectClosed(fd.get());
}

TEST_F(ServerTest, ShortOfDescriptorsItGoesOn) {
    StartWithDisk();
    OwnedFd attached = Attach("disk0");
    const OwnedFd waiting(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(Port());
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    rlimit before{};
    ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
    rlimit none = before;
    none.rlim_cur = static_cast<rlim_t>(OwnedFd(::dup(0)).get());  // the lowest that is free
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
    EXPECT_EQ(::connect(waiting.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    SendAll(attached.get(), RequestHeader(wire::kCmdRead, 0, 1));
    EXPECT_EQ(Receive(attached.get(), 17).size(), 17U);
    ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
    EXPECT_EQ(Receive(waiting.get(), 18).size(), 18U);
}

TEST_F(ServerTest, OccupiedPortIsRefusedAndHarmsNothing) {
    StartWithDisk();
    Options second = options_;
    second.pool = root_ / "second";
    second.listen_unix.clear();
    second.listen[0].port = Port();
    const Result<std::unique_ptr<Daemon>> refused = Daemon::Start(second);
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().kind, ErrorKind::kBusy);
    EXPECT_NE(refused.error().message.find("127.0.0.1:" + std::to_string(Port())),
              std::string::npos);
    second.listen = {};
    second.listen_unix = {{root_ / "nbd.sock", {}}};
    const Result<std::unique_ptr<Daemon>> also = Daemon::Start(second);
    ASSERT_FALSE(also.ok());
    EXPECT_EQ(also.error().kind, ErrorKind::kBusy);
    EXPECT_TRUE(Nbd(Uri("disk0")).connected());
}

TEST_F(ServerTest, StaleUnixSocketIsReplaced) {
    {
        const OwnedFd fd(::socket(AF_UNIX, SOCK_STREAM, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        ASSERT_LT((root_ / "nbd.sock").string().size(), sizeof address.sun_path);
        std::strcpy(address.sun_path, (root_ / "nbd.sock").c_str());
        ASSERT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    }
    ASSERT_TRUE(fs::exists(root_ / "nbd.sock"));
    StartWithDisk();
    EXPECT_TRUE(Nbd(Uri("disk0")).connected());
}

}  // namespace
}  // namespace varve::nbdserver
