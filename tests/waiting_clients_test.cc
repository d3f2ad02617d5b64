// Clients that wait inside the server for an export that the device keeps from being opened: they
// keep nobody else out, are bounded, and go when their peers are gone. Lists are shared.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/time.h>

#include <future>
#include <thread>

#include "admin/unix_socket.h"
#include "base/clock.h"
#include "base/run_on.h"
#include "base/worker.h"
#include "nbdserver/daemon/export_lists.h"
#include "nbdserver/daemon/server.h"
#include "nbdserver/wire/wire.h"
#include "tests/admin_server.h"
#include "tests/fake_pool.h"
#include "tests/raw_nbd.h"
#include "tests/run_on.h"

namespace varve::nbdserver {
namespace {

using admin::OwnedFd;

/// The server alone, in front of a pool that opens no exports: as when a disk waits for the device.
class WaitingClientsTest : public ::testing::Test {
  protected:
    WaitingClientsTest() {
        limits_.negotiating_max = 2;
        limits_.waiting_max = 3;
        RunOn(home_, [&] { pool_.HoldExports(true); });
        clients_ = std::make_unique<Clients>(
            home_, clock_, pool_, [this](Executor&) -> ConnectionHost& { return *host_; });
        server_ = std::make_unique<Server>(control_, home_, pool_, *clients_, nullptr, limits_);
        Result<Listener> listener = ListenNbdUnix(path_);
        VARVE_CHECK(listener.ok());
        std::vector<Listener> listeners;
        listeners.push_back(std::move(listener.value()));
        server_->Start(std::move(listeners));
        thread_ = std::thread([this] { control_.Run(); });
    }
    ~WaitingClientsTest() override {
        RunOn(home_, [&] { pool_.HoldExports(false); });
        RunOn(control_, [&] { server_->Close(); });
        RunOn(control_, Ended(server_->Closed()));
        RunOn(home_, Ended(clients_->Gone()));
        control_.Stop();
        thread_.join();
    }

    OwnedFd Connect() {
        Result<OwnedFd> socket = admin::ConnectUnix(path_);
        VARVE_CHECK(socket.ok());
        const timeval patience{60, 0};
        ::setsockopt(socket.value().get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
        EXPECT_EQ(Receive(socket.value().get(), sizeof(wire::Greeting)).size(),
                  sizeof(wire::Greeting));
        return std::move(socket.value());
    }
    static Task<bool> Ended(Task<void> task) {
        co_await task;
        co_return true;
    }
    OwnedFd Ask(const std::string& name) {
        OwnedFd fd = Connect();
        std::string data;
        AppendBig(data, static_cast<uint32_t>(name.size()));
        SendAll(fd.get(), kHello + Option(wire::kOptGo, data + name + std::string(2, '\0')));
        return fd;
    }
    void UntilOpening(uint64_t count) {
        while (RunOn(home_, [&] { return pool_.opening(); }) != count) std::this_thread::yield();
    }
    void UntilConnections(uint64_t count) {
        while (RunOn(control_, [&] { return server_->connections(); }) != count) {
            std::this_thread::yield();
        }
    }
    /// The type of the next reply to an option.
    static uint32_t ReplyType(int fd) {
        const std::string bytes = Receive(fd, sizeof(wire::OptionReply));
        if (bytes.size() < sizeof(wire::OptionReply)) return 0;
        wire::OptionReply reply;
        std::memcpy(static_cast<void*>(&reply), bytes.data(), sizeof reply);
        Receive(fd, reply.length);
        return reply.type;
    }

    testing::TemporaryDirectory directory_;
    const std::string path_ = directory_.path() + "/nbd.sock";
    ServerLimits limits_;
    Control control_;
    SystemClock clock_;
    Worker home_{"home", 1};
    testing::FakePool pool_{home_};
    ConnectionHost* host_ = nullptr;  // nobody gets that far
    std::unique_ptr<Clients> clients_;
    std::unique_ptr<Server> server_;
    std::thread thread_;
};

TEST_F(WaitingClientsTest, KeepNobodyElseOut) {
    std::vector<OwnedFd> waiting;
    for (int i = 0; i < 3; ++i) waiting.push_back(Ask("stuck"));
    UntilOpening(3);
    OwnedFd lists = Connect();
    SendAll(lists.get(), kHello + Option(wire::kOptList, ""));
    EXPECT_EQ(ReplyType(lists.get()), wire::kRepAck);
    // Other exports have places of their own.
    OwnedFd other = Ask("other");
    UntilOpening(4);
    RunOn(home_, [&] { pool_.HoldExports(false); });
    for (const OwnedFd& fd : waiting) EXPECT_EQ(ReplyType(fd.get()), wire::kRepErrUnknown);
    EXPECT_EQ(ReplyType(other.get()), wire::kRepErrUnknown);
}

TEST_F(WaitingClientsTest, AreRefusedBeyondTheirBound) {
    std::vector<OwnedFd> waiting;
    for (int i = 0; i < 3; ++i) waiting.push_back(Ask("stuck"));
    for (int i = 0; i < 10; ++i) {
        const OwnedFd refused = Ask("stuck");
        EXPECT_EQ(ReplyType(refused.get()), wire::kRepErrPolicy);
    }
    UntilOpening(3);
}

TEST_F(WaitingClientsTest, ThatAreGoneWaitNoLonger) {
    const OwnedFd stays = Ask("stuck");
    for (int round = 0; round < 5; ++round) {
        std::vector<OwnedFd> leave;
        for (int i = 0; i < 2; ++i) leave.push_back(Ask("stuck"));
        UntilOpening(3);
        leave.clear();
        UntilOpening(1);
        UntilConnections(1);
    }
    RunOn(home_, [&] { pool_.HoldExports(false); });
    EXPECT_EQ(ReplyType(stays.get()), wire::kRepErrUnknown);
}

/// Its name or the rules may have changed meanwhile: what held when it asked is not enough.
TEST_F(WaitingClientsTest, AreAskedForTheirRightsOnceMore) {
    const auto rules = [](const char* text) { return access::Rules::Parse(text).value(); };
    RunOn(home_, [&] { pool_.SetExports({"stuck"}); });
    RunOn(home_, clients_->ChangeRules(rules("any stuck read-write")));
    const OwnedFd fd = Ask("stuck");
    UntilOpening(1);
    RunOn(home_, clients_->ChangeRules(rules("any other read-write")));
    RunOn(home_, [&] { pool_.HoldExports(false); });
    EXPECT_EQ(ReplyType(fd.get()), wire::kRepErrUnknown);
    EXPECT_EQ(RunOn(home_, [&] { return pool_.closed(); }), 1U);
}

class ExportListsTest : public ::testing::Test {
  protected:
    using List = std::shared_ptr<const ListReply>;

    ~ExportListsTest() override {
        control_.Stop();
        thread_.join();
    }
    List Get(access::Grants grants = {}) { return RunOn(control_, lists_.Get(std::move(grants))); }
    uint64_t Encoded() {
        return RunOn(control_, [&] { return lists_.encoded(); });
    }
    void SetExports(const std::vector<std::string>& names) {
        RunOn(home_, [&] { pool_.SetExports(names); });
    }
    uint64_t Listed() {
        return RunOn(home_, [&] { return pool_.listed(); });
    }

    static constexpr uint64_t kBytesMax = 200;
    Control control_;
    Worker home_{"home", 1};
    testing::FakePool pool_{home_};
    ExportLists lists_{control_, home_, pool_, kBytesMax};
    std::thread thread_{[this] { control_.Run(); }};
};

TEST_F(ExportListsTest, AreEncodedOnceForEachStateOfTheCatalog) {
    const std::vector<std::string> large = {"a", std::string(130, 'b')};
    SetExports(large);
    List first = Get(), second = Get();
    EXPECT_EQ(first, second);
    EXPECT_EQ(first->exports, 2U);
    // As many as may exist at a time; one more waits until somebody has taken his.
    std::vector<List> held = {first};
    first = second = nullptr;
    for (size_t i = 1; i < ExportLists::kListsMax; ++i) {
        SetExports(large);
        held.push_back(Get());
        EXPECT_EQ(Encoded(), i + 1);
    }
    SetExports({});
    std::future<List> next = std::async(std::launch::async, [&] { return Get(); });
    while (Listed() < ExportLists::kListsMax + 2) std::this_thread::yield();
    RunOn(control_, [&] { return true; });
    EXPECT_EQ(Encoded(), ExportLists::kListsMax);
    RunOn(control_, [&] { held.erase(held.begin()); });
    EXPECT_EQ(next.get()->exports, 0U);
    RunOn(control_, [&] { held.clear(); });
}

TEST_F(ExportListsTest, SmallOnesDoNotWaitForEachOther) {
    std::vector<List> held;
    for (int i = 0; i < 12; ++i) {
        SetExports({"a"});
        held.push_back(Get());
    }
    EXPECT_EQ(Encoded(), held.size());
    RunOn(control_, [&] { held.clear(); });
}

TEST_F(ExportListsTest, NameWhatTheirReadersMayOpen) {
    SetExports({"a", "a@s", "b"});
    const auto rules =
        access::Rules::Parse("psk=alice a read-only\nany *@* read-only\npsk=bob a read-only")
            .value();
    const auto grants = [&](const std::string& user) {
        access::Subject subject;
        subject.identity.psk_user = user;
        return access::Grants(rules, subject);
    };
    List alice = Get(grants("alice")), again = Get(grants("alice"));
    EXPECT_EQ(alice, again);  // shared
    EXPECT_EQ(alice->exports, 2U);
    EXPECT_EQ(alice->pieces[0].find("b"), std::string::npos);
    List bob = Get(grants("bob")), nobody = Get(grants("nobody")), all = Get();
    EXPECT_EQ(bob->exports, 2U);
    EXPECT_EQ(nobody->exports, 1U);
    EXPECT_EQ(all->exports, 3U);
    EXPECT_EQ(Encoded(), 4U);
    EXPECT_EQ(Get(grants("alice")), alice);  // for as long as somebody takes it
    EXPECT_EQ(Encoded(), 4U);
    RunOn(control_, [&] { alice = again = bob = nobody = all = nullptr; });
}

}  // namespace
}  // namespace varve::nbdserver
