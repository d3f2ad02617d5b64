// Connection under TLS: requests in records of any size, in pieces of any size, and all ways in
// which a stream of records can end, over socket pairs, against a volume in memory. The client is
// the same code with the keys of the other side; that OpenSSL agrees with it shows tls_test.
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <deque>
#include <future>
#include <map>
#include <random>
#include <thread>

#include "nbdserver/connection/connection.h"
#include "nbdserver/tls/records.h"
#include "nbdserver/wire/wire.h"
#include "tests/fake_volume.h"
#include "tests/raw_nbd.h"
#include "tests/run_on.h"
#include "tests/tls_agreement.h"

namespace varve::nbdserver {
namespace {

constexpr size_t kDataBytes = sizeof(wire::Chunk) + sizeof(wire::OffsetData);
constexpr size_t kHoleBytes = sizeof(wire::Chunk) + sizeof(wire::OffsetHole);

constexpr uint64_t kSize = 64 << 20;

/// The client's end, record by record.
class Client : public ClientEnd {
  public:
    Client(int fd, const tls::Agreement& agreement, std::mt19937_64& dice)
        : ClientEnd(fd), records_(OtherSide(agreement)), dice_(dice) {}
    tls::Records& records() { return records_; }

    /// In records of at most `most` bytes.
    std::string Seal(std::string_view data, size_t most = 16384) {
        std::string sealed;
        while (!data.empty()) {
            const std::string_view part = data.substr(0, 1 + dice_() % most);
            records_.SealCopy(part, sealed);
            data.remove_prefix(part.size());
        }
        return sealed;
    }
    /// In pieces of at most `most` bytes.
    void SendRaw(std::string_view bytes, size_t most = 1 << 20) {
        while (!bytes.empty()) {
            const std::string_view piece = bytes.substr(0, 1 + dice_() % most);
            const ssize_t n = send(fd(), piece.data(), piece.size(), MSG_NOSIGNAL);
            if (n <= 0) return;  // the server hung up: the reading side will tell
            bytes.remove_prefix(static_cast<size_t>(n));
        }
    }
    void Send(std::string_view data) { SendRaw(Seal(data)); }

    /// Fewer bytes at the end of the stream.
    std::string Receive(size_t bytes) {
        while (plain_.size() < bytes && ReceiveMore()) {
        }
        std::string data = plain_.substr(0, bytes);
        plain_.erase(0, data.size());
        return data;
    }
    /// The cookie of the next answer, a simple one, and the data of a READ of `length`.
    uint64_t Next(uint32_t* error, uint32_t length = 0, std::string* data = nullptr) {
        const std::string head = Receive(sizeof(wire::SimpleReply));
        if (head.size() < sizeof(wire::SimpleReply)) {
            ADD_FAILURE() << "the connection ended in place of a reply";
            return 0;
        }
        EXPECT_EQ(LoadBig<uint32_t>(head.data()), wire::kSimpleReplyMagic);
        *error = LoadBig<uint32_t>(head.data() + 4);
        if (data && !*error) *data = Receive(length);
        return LoadBig<uint64_t>(head.data() + 8);
    }
    uint32_t Ask(uint16_t type, uint64_t offset, uint32_t length, const std::string& payload = "",
                 std::string* data = nullptr) {
        Send(RequestHeader(type, offset, length, 7) + payload);
        uint32_t error = 0;
        EXPECT_EQ(Next(&error, length, data), 7U);
        return error;
    }
    /// Nothing more comes but the end.
    bool AtEnd() { return Receive(1).empty(); }

  private:
    bool ReceiveMore() {
        char piece[65536];
        const ssize_t n = recv(fd(), piece, sizeof piece, 0);
        if (n <= 0) return false;
        records_.BeginReceive();
        sealed_.append(piece, static_cast<size_t>(n));
        records_.OpenCopy(sealed_, plain_);
        return !records_.closed() && !records_.broken();
    }

    tls::Records records_;
    std::mt19937_64& dice_;
    std::string sealed_, plain_;
};

class ConnectionTlsTest : public testing::TestWithParam<tls::Version> {
  protected:
    ConnectionTlsTest() {
        const uint64_t seed = std::random_device()();
        std::printf("seed %lu\n", seed);
        dice_.seed(seed);
        Start({});
    }
    ~ConnectionTlsTest() override { StopHost(); }

    void Start(ConnectionLimits limits) {
        StopHost();
        Result<std::unique_ptr<Reactor>> reactor = Reactor::Start({});
        ASSERT_TRUE(reactor.ok()) << reactor.error().message;
        reactor_ = std::move(reactor.value());
        volume_ = std::make_unique<FakeVolume>(*reactor_, kSize);
        host_ = std::make_unique<ConnectionHost>(*reactor_, limits);
    }
    void StopHost() {
        if (!reactor_) return;
        clients_.clear();
        RunOn(*reactor_, [&] {
            volume_->Release();
            host_->EndAll();
        });
        for (std::promise<void>& ended : ended_) ended.get_future().wait();
        ended_.clear();
        EXPECT_EQ(RunOn(*reactor_, [&] { return host_->bytes_in_flight(); }), 0U);
        reactor_->Stop();
        host_.reset();
        volume_.reset();
        reactor_.reset();
    }
    Client& Connect(TransmissionOptions options = {}, size_t fragment_max = 16384,
                    uint64_t records_max = uint64_t{1} << 24) {
        int fds[2];
        EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
        const tls::Agreement agreement = MakeAgreement(GetParam(), fragment_max);
        options.tls = std::make_unique<tls::Records>(agreement, records_max);
        std::promise<void>& ended = ended_.emplace_back();
        RunOn(*reactor_, [&] {
            host_->Start(fds[0], std::move(options), *volume_, [&ended] { ended.set_value(); });
        });
        return clients_.emplace_back(fds[1], agreement, dice_);
    }
    std::string Noise(size_t bytes) {
        std::string noise(bytes, '\0');
        for (char& c : noise) c = static_cast<char>(dice_());
        return noise;
    }
    std::string Content(uint64_t offset, size_t length) {
        return RunOn(*reactor_, [&] {
            return std::string(reinterpret_cast<char*>(volume_->data() + offset), length);
        });
    }
    void WaitUntilEnded() {
        ended_.back().get_future().wait();
        ended_.back() = {};
        ended_.back().set_value();
    }
    /// Sends `writes` of all sizes at once, in records and pieces of at most so many bytes, then
    /// reads all of it back.
    void WriteAndReadBack(Client& client, int writes, size_t record, size_t piece) {
        std::map<uint64_t, std::string> written;
        std::string stream;
        for (int i = 0; i < writes; ++i) {
            const uint64_t offset = static_cast<uint64_t>(i) << 20;
            const uint32_t lengths[] = {512, 4096, 16384, 40000, 131072, 1 << 20};
            written[offset] = Noise(lengths[dice_() % 6]);
            const auto length = static_cast<uint32_t>(written[offset].size());
            stream += RequestHeader(wire::kCmdWrite, offset, length, offset) + written[offset];
        }
        const std::string sealed = client.Seal(stream, record);
        std::future<void> sending =
            std::async(std::launch::async, [&] { client.SendRaw(sealed, piece); });
        for (int i = 0; i < writes; ++i) {
            uint32_t error = 0;
            EXPECT_EQ(written.count(client.Next(&error)), 1U);
            EXPECT_EQ(error, 0U);
        }
        sending.get();
        for (const auto& [offset, data] : written) {
            EXPECT_TRUE(Content(offset, data.size()) == data);
            std::string back;
            client.Ask(wire::kCmdRead, offset, static_cast<uint32_t>(data.size()), "", &back);
            EXPECT_TRUE(back == data);
        }
    }

    std::mt19937_64 dice_;
    std::unique_ptr<Reactor> reactor_;
    std::unique_ptr<FakeVolume> volume_;
    std::unique_ptr<ConnectionHost> host_;
    std::deque<Client> clients_;
    std::deque<std::promise<void>> ended_;
};

INSTANTIATE_TEST_SUITE_P(Versions, ConnectionTlsTest,
                         testing::Values(tls::Version::k12, tls::Version::k13),
                         [](const auto& version) {
                             return version.param == tls::Version::k12 ? "Tls12" : "Tls13";
                         });

TEST_P(ConnectionTlsTest, RequestsInRecordsAndPiecesOfAnySize) {
    for (const size_t record : {16384, 3000, 100}) {
        WriteAndReadBack(Connect(), 30, record, 1 << 20);
        WriteAndReadBack(Connect(), 8, record, 3000);
    }
    WriteAndReadBack(Connect(), 1, 50, 7);
}

TEST_P(ConnectionTlsTest, UnderLimitsThatPauseInTheMiddleOfRecords) {
    ConnectionLimits limits;
    limits.requests_max = 3;
    limits.bytes_max = 1 << 20;
    Start(limits);
    for (const size_t record : {16384, 100}) {
        WriteAndReadBack(Connect(), 30, record, 1 << 20);
        WriteAndReadBack(Connect(), 8, record, 3000);
    }
}

TEST_P(ConnectionTlsTest, ManySmallRequestsInOneRecord) {
    ConnectionLimits limits;
    limits.requests_max = 10;
    Start(limits);
    Client& client = Connect();
    std::string stream;
    for (uint64_t i = 0; i < 3000; ++i) stream += RequestHeader(wire::kCmdRead, i * 512, 512, i);
    std::future<void> sending = std::async(std::launch::async, [&] { client.Send(stream); });
    std::vector<bool> seen(3000);
    for (size_t i = 0; i < seen.size(); ++i) {
        uint32_t error = 0;
        std::string data;
        seen.at(client.Next(&error, 512, &data)) = true;
        EXPECT_EQ(data.size(), 512U);
    }
    EXPECT_EQ(std::count(seen.begin(), seen.end(), true), 3000);
    sending.get();
}

TEST_P(ConnectionTlsTest, RepliesInRecordsAsShortAsTheClientWants) {
    for (const size_t fragment : {512, 16384}) {
        Client& client = Connect({}, fragment);
        const std::string data = Noise(32 << 20);
        RunOn(*reactor_, [&] { std::memcpy(volume_->data(), data.data(), data.size()); });
        for (const uint32_t length : {1, 511, 4096, 1 << 20, 32 << 20}) {
            std::string back;
            EXPECT_EQ(client.Ask(wire::kCmdRead, 0, length, "", &back), 0U);
            EXPECT_TRUE(back == data.substr(0, length)) << length;
        }
    }
}

// Its payload is decrypted into place piece by piece: each is progress.
TEST_P(ConnectionTlsTest, AClientThatGivesItsPayloadSlowlyIsNotStalled) {
    constexpr uint32_t kBytes = 4 << 20, kPart = 128 << 10;
    ConnectionLimits limits;
    limits.host_bytes_max = 6 << 20;
    limits.stall_ms_max = 800;
    Start(limits);
    Client& slow = Connect();
    Client& other = Connect();
    const std::string data = Noise(kBytes);
    slow.Send(RequestHeader(wire::kCmdWrite, 0, kBytes, 1) + data.substr(0, kPart));
    while (RunOn(*reactor_, [&] { return host_->bytes_in_flight(); }) < kBytes) {
        std::this_thread::yield();
    }
    other.Send(RequestHeader(wire::kCmdRead, 0, kBytes, 2));  // it waits for memory
    // Over the least that counts as progress, in the time that a client may stall.
    for (uint32_t at = kPart; at < kBytes; at += kPart) {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        slow.Send(std::string_view(data).substr(at, kPart));
    }
    uint32_t error = 0;
    EXPECT_EQ(slow.Next(&error), 1U);
    EXPECT_EQ(error, 0U);
    EXPECT_TRUE(Content(0, kBytes) == data);
    std::string back;
    EXPECT_EQ(other.Next(&error, kBytes, &back), 2U);
    EXPECT_EQ(back.size(), size_t{kBytes});
}

/// There is no such thing in TLS 1.2.
class KeyUpdateTest : public ConnectionTlsTest {};
INSTANTIATE_TEST_SUITE_P(Versions, KeyUpdateTest, testing::Values(tls::Version::k13));

TEST_P(KeyUpdateTest, KeysChangeOnTheWay) {
    Client& client = Connect({}, 16384, 5);
    for (int round = 0; round < 20; ++round) {
        const auto update = client.records().SealKeyUpdate();
        client.SendRaw({reinterpret_cast<const char*>(update.data()), update.size()});
        WriteAndReadBack(client, 3, 16384, 1 << 20);
    }
}

TEST_P(ConnectionTlsTest, StructuredRepliesAndWhatArrivedEarly) {
    TransmissionOptions options;
    options.structured_replies = true;
    const std::string early = RequestHeader(wire::kCmdRead, 0, 65536, 1);
    options.received.assign(reinterpret_cast<const std::byte*>(early.data()),
                            reinterpret_cast<const std::byte*>(early.data() + 20));
    tls::Records other(OtherSide(MakeAgreement(GetParam(), 16384)));
    std::string rest;
    other.SealCopy(std::string_view(early).substr(20), rest);
    options.tls_received = rest.substr(0, 9);
    RunOn(*reactor_, [&] {
        volume_->data()[5] = std::byte{5};
        volume_->Map(0, 4096, true);
    });
    Client& client = Connect(std::move(options));
    client.SendRaw(rest.substr(9));
    const std::string data = client.Receive(kDataBytes + 4096);
    EXPECT_EQ(data.at(kDataBytes + 5), '\5');
    EXPECT_EQ(client.Receive(kHoleBytes).size(), kHoleBytes);
}

TEST_P(ConnectionTlsTest, AnEndIsSaidByBothSides) {
    Client& client = Connect();
    const std::string request = client.Seal(RequestHeader(wire::kCmdRead, 0, 4096, 1));
    client.SendRaw(request + client.records().SealAlert(tls::Alert::kCloseNotify) + "behind it");
    uint32_t error = 0;
    std::string data;
    EXPECT_EQ(client.Next(&error, 4096, &data), 1U);
    EXPECT_TRUE(client.AtEnd());
    EXPECT_TRUE(client.records().closed());
    WaitUntilEnded();

    Client& other = Connect();
    other.Send(RequestHeader(wire::kCmdRead, 0, 4096, 1) +
               RequestHeader(wire::kCmdDisconnect, 0, 0, 2));
    EXPECT_EQ(other.Next(&error, 4096, &data), 1U);
    EXPECT_TRUE(other.AtEnd());
    EXPECT_TRUE(other.records().closed());
    EXPECT_FALSE(other.records().broken());
    WaitUntilEnded();
}

TEST_P(ConnectionTlsTest, AnEndWithPausedRequestsComesBehindThem) {
    ConnectionLimits limits;
    limits.requests_max = 1;
    Start(limits);
    RunOn(*reactor_, [&] { volume_->hold = true; });
    Client& client = Connect();
    std::string stream;
    for (uint64_t i = 0; i < 10; ++i) stream += RequestHeader(wire::kCmdRead, 0, 512, i);
    const std::string requests = client.Seal(stream);
    client.SendRaw(requests + client.records().SealAlert(tls::Alert::kCloseNotify));
    while (RunOn(*reactor_, [&] { return volume_->running(); }) == 0) std::this_thread::yield();
    RunOn(*reactor_, [&] { volume_->Release(); });
    for (uint64_t i = 0; i < 10; ++i) {
        uint32_t error = 0;
        std::string data;
        EXPECT_EQ(client.Next(&error, 512, &data), i);
    }
    EXPECT_TRUE(client.AtEnd());
    WaitUntilEnded();
}

TEST_P(ConnectionTlsTest, AWriteCutOffInARecordIsNotWritten) {
    for (const uint32_t length : {4096, 1 << 20}) {
        Client& client = Connect();
        const std::string sealed =
            client.Seal(RequestHeader(wire::kCmdWrite, 0, length, 1) + Noise(length));
        client.SendRaw(sealed.substr(0, sealed.size() - 1 - dice_() % 100));
        client.HalfClose();
        EXPECT_TRUE(client.AtEnd());
        WaitUntilEnded();
        EXPECT_EQ(RunOn(*reactor_, [&] { return volume_->calls["write"]; }), 0U);
    }
}

TEST_P(ConnectionTlsTest, AChangedRecordIsNotWrittenAndTheClientIsTold) {
    for (const uint32_t length : {4096, 1 << 20}) {
        Client& client = Connect();
        std::string sealed =
            client.Seal(RequestHeader(wire::kCmdWrite, 0, length, 1) + Noise(length));
        sealed[sealed.size() - 1 - dice_() % 40] ^= 1;
        client.SendRaw(sealed + std::string(20000, 'x'));
        EXPECT_TRUE(client.AtEnd());
        EXPECT_TRUE(client.records().closed());  // by an alert
        WaitUntilEnded();
        EXPECT_EQ(RunOn(*reactor_, [&] { return volume_->calls["write"]; }), 0U);
    }
}

TEST_P(ConnectionTlsTest, PlaintextEndsTheConnection) {
    Client& client = Connect();
    EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 512, "", nullptr), 0U);
    EXPECT_EQ(client.Receive(512).size(), 512U);
    client.SendRaw(RequestHeader(wire::kCmdWrite, 0, 512, 1) + std::string(512, 'x'));
    EXPECT_TRUE(client.AtEnd());
    WaitUntilEnded();
    EXPECT_EQ(RunOn(*reactor_, [&] { return volume_->calls["write"]; }), 0U);
}

TEST_P(ConnectionTlsTest, AReadOnlyListenersClientChangesNothing) {
    TransmissionOptions options;
    options.read_only = true;
    Client& client = Connect(std::move(options));
    EXPECT_EQ(client.Ask(wire::kCmdWrite, 0, 512, std::string(512, 'x')), wire::kErrorPermission);
    EXPECT_EQ(client.Ask(wire::kCmdTrim, 0, 4096), wire::kErrorPermission);
    EXPECT_EQ(client.Ask(wire::kCmdWriteZeroes, 0, 4096), wire::kErrorPermission);
    EXPECT_EQ(client.Ask(wire::kCmdFlush, 0, 0), 0U);
}

TEST_P(ConnectionTlsTest, HalfARecordIsHeldAndCountedWhileItLasts) {
    Client& client = Connect();
    const std::string sealed = client.Seal(RequestHeader(wire::kCmdRead, 0, 512, 1), 1000);
    client.SendRaw(sealed.substr(0, sealed.size() - 1));
    const auto received = [&] {
        return RunOn(*reactor_, [&] { return host_->bytes_in_flight(); });
    };
    while (received() == 0) std::this_thread::yield();
    client.SendRaw(sealed.substr(sealed.size() - 1));
    uint32_t error = 0;
    std::string data;
    EXPECT_EQ(client.Next(&error, 512, &data), 1U);
    while (received() > 0) std::this_thread::yield();
}

TEST_P(ConnectionTlsTest, ClientsThatLeaveAtAnyPointLeaveNothingBehind) {
    for (int round = 0; round < 30; ++round) {
        Client& client = Connect();
        std::string stream;
        for (uint64_t i = 0; i < 20; ++i) {
            stream += RequestHeader(wire::kCmdRead, 0, 1 << 20, i);
            stream += RequestHeader(wire::kCmdWrite, i << 20, 100'000, 100 + i) +
                      std::string(100'000, 'w');
        }
        const std::string sealed = client.Seal(stream);
        std::future<void> sending = std::async(std::launch::async, [&] {
            client.SendRaw(sealed.substr(0, dice_() % sealed.size()));
            client.HalfClose();
        });
        for (size_t n = client.records().fragment_max() * (round % 3); n > 0; n -= 16384) {
            client.Receive(16384);
        }
        if (round % 2) RunOn(*reactor_, [&] { host_->EndAll(); });
        while (round % 5 && client.Receive(1 << 20).size() == 1 << 20) {
        }
        sending.get();
        client.Close();  // the server may still be sending
        WaitUntilEnded();
    }
    EXPECT_EQ(RunOn(*reactor_, [&] { return host_->bytes_in_flight(); }), 0U);
}

}  // namespace
}  // namespace varve::nbdserver
