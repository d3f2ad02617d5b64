// Connection: each command, flag, limit and way to misbehave, over socket pairs, against a volume
// in memory.
#include "nbdserver/connection/connection.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <libnbd.h>
#include <linux/sockios.h>
#include <malloc.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <deque>
#include <filesystem>
#include <future>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "nbdserver/connection/memory_pot.h"
#include "nbdserver/wire/wire.h"
#include "tests/fake_volume.h"
#include "tests/polling.h"
#include "tests/raw_nbd.h"
#include "tests/run_on.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kSize = 64 << 20;
constexpr uint32_t kMiB = 1 << 20;

/// What came back for one request; chunks of a structured reply are put together.
struct Answer {
    uint64_t cookie = 0;
    uint32_t error = 0;
    std::string data;                                   // with holes filled in
    std::vector<std::pair<uint16_t, uint64_t>> chunks;  // type, length of what it describes
    std::vector<std::pair<uint32_t, uint32_t>> extents;
    std::map<uint32_t, std::vector<std::pair<uint32_t, uint32_t>>> by_context;
    uint32_t context = 0;
};

/// The client's end of a connection, byte by byte.
class Client : public ClientEnd {
  public:
    explicit Client(int fd, bool structured) : ClientEnd(fd), structured_(structured) {}

    void SendBytes(const std::string& bytes) {
        size_t at = 0;
        while (at < bytes.size()) {
            const ssize_t n = send(fd(), bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
            if (n <= 0) return;  // the server hung up: the reading side will tell
            at += static_cast<size_t>(n);
        }
    }

    /// Sends one request and returns its answer.
    Answer Ask(uint16_t type, uint64_t offset, uint32_t length, uint16_t flags = 0,
               const std::string& payload = "") {
        const uint64_t cookie = ++cookie_;
        expected_[cookie] = {type, offset, length};
        SendBytes(RequestHeader(type, offset, length, cookie, flags) + payload);
        const Answer answer = Next();
        EXPECT_EQ(answer.cookie, cookie);
        return answer;
    }
    std::string Prepare(uint16_t type, uint64_t offset, uint32_t length, uint64_t cookie,
                        uint16_t flags = 0) {
        expected_[cookie] = {type, offset, length};
        return RequestHeader(type, offset, length, cookie, flags);
    }

    /// The next whole answer, whichever request it belongs to.
    Answer Next() {
        Answer answer;
        for (;;) {
            const std::string magic = Receive(4);
            if (magic.size() < 4) {
                ADD_FAILURE() << "the connection ended in place of a reply";
                return answer;
            }
            if (LoadBig<uint32_t>(magic.data()) == wire::kSimpleReplyMagic) {
                TakeSimple(answer);
                return answer;
            }
            EXPECT_EQ(LoadBig<uint32_t>(magic.data()), wire::kStructuredReplyMagic);
            EXPECT_TRUE(structured_);
            if (TakeChunk(answer)) return answer;
        }
    }

    /// Whether the server has closed without sending anything more.
    bool AtEnd() { return Receive(1).empty(); }

  private:
    struct Expected {
        uint16_t type;
        uint64_t offset;
        uint32_t length;
    };

    std::string Receive(size_t bytes) {
        std::string out(bytes, 0);
        size_t at = 0;
        while (at < bytes) {
            const ssize_t n = recv(fd(), out.data() + at, bytes - at, 0);
            if (n <= 0) {
                EXPECT_TRUE(n == 0 || errno == ECONNRESET) << std::strerror(errno);
                out.resize(at);
                return out;
            }
            at += static_cast<size_t>(n);
        }
        return out;
    }

    void TakeSimple(Answer& answer) {
        const std::string rest = Receive(sizeof(wire::SimpleReply) - 4);
        answer.error = LoadBig<uint32_t>(rest.data());
        answer.cookie = LoadBig<uint64_t>(rest.data() + 4);
        const Expected expected = expected_[answer.cookie];
        if (expected.type != wire::kCmdRead) return;
        EXPECT_FALSE(structured_) << "a READ must be answered in chunks";
        if (!answer.error) answer.data = Receive(expected.length);
    }

    /// Returns whether it was the last.
    bool TakeChunk(Answer& answer) {
        const std::string rest = Receive(sizeof(wire::Chunk) - 4);
        const bool last = LoadBig<uint16_t>(rest.data()) & wire::kChunkDone;
        const uint16_t type = LoadBig<uint16_t>(rest.data() + 2);
        answer.cookie = LoadBig<uint64_t>(rest.data() + 4);
        const std::string body = Receive(LoadBig<uint32_t>(rest.data() + 12));
        const Expected expected = expected_[answer.cookie];
        if (type == wire::kChunkError) {
            answer.error = LoadBig<uint32_t>(body.data());
            EXPECT_TRUE(last);
        } else if (type == wire::kChunkOffsetData || type == wire::kChunkOffsetHole) {
            const uint64_t offset = LoadBig<uint64_t>(body.data());
            EXPECT_EQ(offset, expected.offset + answer.data.size()) << "in order, without gaps";
            if (type == wire::kChunkOffsetData) {
                answer.data += body.substr(8);
                answer.chunks.emplace_back(type, body.size() - 8);
            } else {
                answer.data.append(LoadBig<uint32_t>(body.data() + 8), '\0');
                answer.chunks.emplace_back(type, LoadBig<uint32_t>(body.data() + 8));
            }
        } else if (type == wire::kChunkBlockStatus) {
            answer.context = LoadBig<uint32_t>(body.data());
            answer.extents.clear();
            for (size_t at = 4; at < body.size(); at += 8) {
                answer.extents.emplace_back(LoadBig<uint32_t>(body.data() + at),
                                            LoadBig<uint32_t>(body.data() + at + 4));
            }
            answer.by_context[answer.context] = answer.extents;
        } else {
            EXPECT_EQ(type, wire::kChunkNone);
        }
        if (last && expected.type == wire::kCmdRead && !answer.error) {
            EXPECT_EQ(answer.data.size(), expected.length);
        }
        return last;
    }

    const bool structured_;
    uint64_t cookie_ = 1000;
    std::map<uint64_t, Expected> expected_;
};

class ConnectionTest : public testing::Test {
  protected:
    ~ConnectionTest() override {
        clients_.clear();
        RunOn(*reactor_, [&] {
            volume_->Release();
            host_->EndAll();
        });
        for (Served& served : served_) served.ended.get_future().wait();
        reactor_->Stop();
    }

    void SetUp() override { Start({}); }
    void Start(ConnectionLimits limits, ReactorOptions options = {},
               std::shared_ptr<MemoryPot> pot = nullptr) {
        if (reactor_) reactor_->Stop();
        host_.reset();
        Result<std::unique_ptr<Reactor>> reactor = Reactor::Start(std::move(options));
        ASSERT_TRUE(reactor.ok()) << reactor.error().message;
        volume_.reset();
        reactor_ = std::move(reactor.value());
        volume_ = std::make_unique<FakeVolume>(*reactor_, kSize);
        host_ = std::make_unique<ConnectionHost>(*reactor_, limits, std::move(pot));
    }

    struct Served {
        std::promise<void> ended;
        std::shared_ptr<ConnectionCounters> counters = std::make_shared<ConnectionCounters>();
        Connection* connection = nullptr;
        std::atomic<bool> over{false};
    };

    /// Gives one end of a socket pair to the host, returns the other.
    int Serve(TransmissionOptions options) {
        int fds[2];
        EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
        Served& served = served_.emplace_back();
        options.counters = served.counters;
        RunOn(*reactor_, [&] {
            served.connection = host_->Start(fds[0], std::move(options), *volume_, [&served] {
                served.over = true;
                served.ended.set_value();
            });
        });
        return fds[1];
    }
    /// Twenty batches of a hundred requests take few entries into the kernel.
    void ExpectFewEntersForBatches() {
        Client& client = Connect();
        const uint64_t before = reactor_->enters();
        for (int round = 0; round < 20; ++round) {
            std::string batch;
            for (uint64_t i = 0; i < 100; ++i) {
                batch += client.Prepare(wire::kCmdRead, i * 512, 512, round * 100 + i);
            }
            client.SendBytes(batch);
            for (int i = 0; i < 100; ++i) EXPECT_EQ(client.Next().error, 0u);
        }
        EXPECT_LT(reactor_->enters() - before, 20u * 10);
    }
    Client& Connect(TransmissionOptions options = {}) {
        const bool structured = options.structured_replies;
        return clients_.emplace_back(Serve(std::move(options)), structured);
    }
    static TransmissionOptions Structured() {
        TransmissionOptions options;
        options.structured_replies = true;
        options.contexts = {{.id = 77, .kind = ContextKind::kAllocation}};
        return options;
    }
    void WaitUntilEnded(size_t index) {
        served_[index].ended.get_future().wait();
        served_[index].ended = {};
        served_[index].ended.set_value();
    }
    template <typename F>
    auto On(F function) {
        return RunOn(*reactor_, std::move(function));
    }
    /// Waits until `condition` holds on the reactor.
    template <typename F>
    void Until(F condition) {
        while (!On(condition)) std::this_thread::yield();
    }

    static Task<void> Await(ConnectionHost* host, FakeVolume* volume, LeaverWait* wait,
                            std::shared_ptr<std::promise<bool>> over) {
        co_await Hop(volume->executor());
        const bool nothing_lands = co_await host->AwaitLeavers(*volume, *wait);
        over->set_value(nothing_lands);
    }
    /// Ready when nothing of clients that have left the volume can land any more: true then.
    std::future<bool> AwaitLeavers() { return AwaitLeavers(waits_.emplace_back()); }
    std::future<bool> AwaitLeavers(LeaverWait& wait) {
        auto over = std::make_shared<std::promise<bool>>();
        std::future<bool> result = over->get_future();
        Spawn(Await(host_.get(), volume_.get(), &wait, std::move(over)));
        return result;
    }

    std::unique_ptr<Reactor> reactor_;
    std::unique_ptr<FakeVolume> volume_;
    std::unique_ptr<ConnectionHost> host_;
    std::deque<Served> served_;
    std::deque<Client> clients_;
    std::deque<LeaverWait> waits_;
};

std::string Pattern(size_t bytes, uint32_t seed) {
    std::mt19937 random(seed);
    std::string out(bytes, 0);
    for (size_t i = 0; i < bytes; ++i) out[i] = static_cast<char>(random());
    return out;
}

// ---- each command

TEST_F(ConnectionTest, WritesAndReadsBack) {
    Client& client = Connect();
    uint32_t seed = 0;
    for (const uint32_t length : {1u, 512u, 4096u, 4097u, 70'000u, kMiB, 32 * kMiB}) {
        const std::string text = Pattern(length, ++seed);
        EXPECT_EQ(client.Ask(wire::kCmdWrite, 12'345, length, 0, text).error, 0u);
        const Answer read = client.Ask(wire::kCmdRead, 12'345, length);
        EXPECT_EQ(read.error, 0u);
        EXPECT_TRUE(read.data == text) << length;
    }
    const ConnectionCounters& counters = *served_[0].counters;
    EXPECT_EQ(counters.requests, 14u);
    EXPECT_EQ(counters.bytes_read, counters.bytes_written);
    EXPECT_EQ(counters.errors, 0u);
}

TEST_F(ConnectionTest, FlushTrimZeroAndCacheReachTheVolume) {
    Client& client = Connect();
    const std::string text = Pattern(16'384, 1);
    client.Ask(wire::kCmdWrite, 0, 16'384, 0, text);
    EXPECT_EQ(client.Ask(wire::kCmdFlush, 0, 0).error, 0u);
    EXPECT_EQ(client.Ask(wire::kCmdTrim, 4096, 4096).error, 0u);
    EXPECT_EQ(client.Ask(wire::kCmdWriteZeroes, 8192, 100).error, 0u);
    EXPECT_FALSE(On([&] { return volume_->last_allocate; }));
    EXPECT_EQ(client.Ask(wire::kCmdWriteZeroes, 12'288, 100, wire::kFlagNoHole).error, 0u);
    EXPECT_TRUE(On([&] { return volume_->last_allocate; }));
    EXPECT_EQ(client.Ask(wire::kCmdWriteZeroes, 12'300, 10, wire::kFlagFastZero).error, 0u);
    EXPECT_EQ(client.Ask(wire::kCmdCache, 0, 16'384).error, 0u);
    std::string expected = text;
    expected.replace(4096, 4096, 4096, '\0');
    expected.replace(8192, 100, 100, '\0');
    expected.replace(12'288, 100, 100, '\0');
    EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 16'384).data, expected);
    EXPECT_EQ(On([&] { return volume_->calls; }),
              (std::map<std::string, uint64_t>{
                  {"write", 1}, {"flush", 1}, {"trim", 1}, {"zero", 3}, {"read", 1}}));
}

TEST_F(ConnectionTest, FuaFlushesAfterChangesAndIsAcceptedEverywhere) {
    Client& client = Connect(Structured());
    const auto flushes = [&] { return On([&] { return volume_->calls["flush"]; }); };
    const uint16_t fua = wire::kFlagFua;
    EXPECT_EQ(client.Ask(wire::kCmdWrite, 0, 4, fua, "text").error, 0u);
    EXPECT_EQ(flushes(), 1u);
    EXPECT_EQ(client.Ask(wire::kCmdTrim, 0, 4096, fua).error, 0u);
    EXPECT_EQ(flushes(), 2u);
    EXPECT_EQ(client.Ask(wire::kCmdWriteZeroes, 0, 4096, fua).error, 0u);
    EXPECT_EQ(flushes(), 3u);
    EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 4096, fua).error, 0u);
    EXPECT_EQ(client.Ask(wire::kCmdCache, 0, 4096, fua).error, 0u);
    EXPECT_EQ(client.Ask(wire::kCmdBlockStatus, 0, 4096, fua).error, 0u);
    EXPECT_EQ(flushes(), 3u);
    EXPECT_EQ(client.Ask(wire::kCmdFlush, 0, 0, fua).error, 0u);
    EXPECT_EQ(flushes(), 4u);
    On([&] { volume_->errors["flush"] = EIO; });
    EXPECT_EQ(client.Ask(wire::kCmdWrite, 0, 4, fua, "text").error, wire::kErrorIo);
    On([&] {
        volume_->errors.clear();
        volume_->errors["write"] = ENOSPC;
    });
    EXPECT_EQ(client.Ask(wire::kCmdWrite, 0, 4, fua, "text").error, wire::kErrorNoSpace);
    EXPECT_EQ(flushes(), 5u) << "no flush after a failed write";
}

TEST_F(ConnectionTest, WrongRequestsGetTheProtocolsErrorsAndTheStreamGoesOn) {
    struct Case {
        uint16_t type;
        uint16_t flags;
        uint64_t offset;
        uint32_t length;
        uint32_t error;
    };
    const uint64_t far = uint64_t{0} - 4096;
    const Case cases[] = {
        {wire::kCmdRead, 0, kSize, 1, wire::kErrorInvalid},
        {wire::kCmdRead, 0, kSize - 1, 2, wire::kErrorInvalid},
        {wire::kCmdRead, 0, far, 8192, wire::kErrorInvalid},
        {wire::kCmdRead, 0, 0, 32 * kMiB + 1, wire::kErrorInvalid},
        {wire::kCmdRead, 0, 0, 0xffffffff, wire::kErrorInvalid},
        {wire::kCmdRead, wire::kFlagDf, 0, 4096, wire::kErrorInvalid},  // not negotiated
        {wire::kCmdRead, wire::kFlagNoHole, 0, 4096, wire::kErrorInvalid},
        {wire::kCmdWrite, 0, kSize, 1, wire::kErrorNoSpace},
        {wire::kCmdWrite, 0, far, 8192, wire::kErrorNoSpace},
        {wire::kCmdWrite, wire::kFlagFastZero, 0, 4096, wire::kErrorInvalid},
        {wire::kCmdWrite, 1 << 15, 0, 4096, wire::kErrorInvalid},
        {wire::kCmdWrite, 0, 0, 32 * kMiB + 1, wire::kErrorInvalid},
        {wire::kCmdFlush, wire::kFlagReqOne, 0, 0, wire::kErrorInvalid},
        {wire::kCmdTrim, 0, kSize, 4096, wire::kErrorInvalid},
        {wire::kCmdTrim, wire::kFlagNoHole, 0, 4096, wire::kErrorInvalid},
        {wire::kCmdCache, 0, kSize, 4096, wire::kErrorInvalid},
        {wire::kCmdCache, wire::kFlagDf, 0, 4096, wire::kErrorInvalid},
        {wire::kCmdWriteZeroes, 0, kSize - 4096, 8192, wire::kErrorNoSpace},
        {wire::kCmdWriteZeroes, 0, 4096, 0xffffffff, wire::kErrorNoSpace},
        {wire::kCmdWriteZeroes, wire::kFlagDf, 0, 4096, wire::kErrorInvalid},
        {wire::kCmdWriteZeroes, wire::kFlagFastZero | wire::kFlagNoHole, 0, 4096,
         wire::kErrorNotSupported},
        {wire::kCmdBlockStatus, 0, 0, 4096, wire::kErrorInvalid},  // no context
        {8, 0, 0, 4096, wire::kErrorInvalid},
        {0xffff, 0xffff, far, 0xffffffff, wire::kErrorInvalid},
    };
    Client& client = Connect();
    for (const Case& c : cases) {
        const std::string payload(c.type == wire::kCmdWrite ? c.length : 0, 'p');
        const Answer answer = client.Ask(c.type, c.offset, c.length, c.flags, payload);
        EXPECT_EQ(answer.error, c.error) << c.type << " " << c.flags << " " << c.offset;
        EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 4).data, std::string(4, '\0'));
    }
    const std::map<std::string, uint64_t> only_reads = {{"read", std::size(cases)}};
    EXPECT_EQ(On([&] { return volume_->calls; }), only_reads);
    EXPECT_EQ(served_[0].counters->errors, std::size(cases));
}

TEST_F(ConnectionTest, ChangesToAReadOnlyExportAreRefused) {
    On([&] { volume_->read_only_export = true; });
    Client& client = Connect();
    EXPECT_EQ(client.Ask(wire::kCmdWrite, 0, 4096, 0, Pattern(4096, 1)).error,
              wire::kErrorPermission);
    EXPECT_EQ(client.Ask(wire::kCmdTrim, 0, 4096).error, wire::kErrorPermission);
    EXPECT_EQ(client.Ask(wire::kCmdWriteZeroes, 0, 4096).error, wire::kErrorPermission);
    EXPECT_EQ(client.Ask(wire::kCmdFlush, 0, 0).error, 0u);
    EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 4096).data, std::string(4096, '\0'));
}

TEST_F(ConnectionTest, ZeroLengthSucceeds) {
    for (const bool structured : {false, true}) {
        Client& client = Connect(structured ? Structured() : TransmissionOptions{});
        for (const uint16_t type : {wire::kCmdRead, wire::kCmdWrite, wire::kCmdTrim,
                                    wire::kCmdCache, wire::kCmdWriteZeroes}) {
            EXPECT_EQ(client.Ask(type, 0, 0).error, 0u);
            EXPECT_EQ(client.Ask(type, kSize, 0).error, 0u);
        }
    }
    EXPECT_TRUE(On([&] { return volume_->calls.empty(); }));
}

TEST_F(ConnectionTest, TheVolumesErrorsBecomeTheProtocols) {
    const std::pair<Errno, uint32_t> cases[] = {{EPERM, wire::kErrorPermission},
                                                {EROFS, wire::kErrorPermission},
                                                {EIO, wire::kErrorIo},
                                                {ENOMEM, wire::kErrorMemory},
                                                {EINVAL, wire::kErrorInvalid},
                                                {ENOSPC, wire::kErrorNoSpace},
                                                {EDQUOT, wire::kErrorNoSpace},
                                                {EFBIG, wire::kErrorNoSpace},
                                                {ESHUTDOWN, wire::kErrorShutdown},
                                                {EBADF, wire::kErrorIo}};
    Client& simple = Connect();
    Client& structured = Connect(Structured());
    for (const auto& [error, wire_error] : cases) {
        On([&, e = error] {
            for (const char* call : {"read", "write", "status", "trim", "zero", "flush"}) {
                volume_->errors[call] = e;
            }
        });
        for (Client* client : {&simple, &structured}) {
            EXPECT_EQ(client->Ask(wire::kCmdRead, 0, 4096).error, wire_error);
            EXPECT_EQ(client->Ask(wire::kCmdWrite, 0, 4, 0, "text").error, wire_error);
            EXPECT_EQ(client->Ask(wire::kCmdTrim, 0, 4096).error, wire_error);
            EXPECT_EQ(client->Ask(wire::kCmdWriteZeroes, 0, 4096).error, wire_error);
            EXPECT_EQ(client->Ask(wire::kCmdFlush, 0, 0).error, wire_error);
        }
        EXPECT_EQ(structured.Ask(wire::kCmdBlockStatus, 0, 4096).error, wire_error);
    }
}

// ---- structured replies

TEST_F(ConnectionTest, HolesAreSentAsHoles) {
    Client& client = Connect(Structured());
    const std::string text = Pattern(8192, 3);
    client.Ask(wire::kCmdWrite, 65'536, 8192, 0, text);
    using Chunks = std::vector<std::pair<uint16_t, uint64_t>>;
    const uint16_t data = wire::kChunkOffsetData, hole = wire::kChunkOffsetHole;

    Answer answer = client.Ask(wire::kCmdRead, 0, 131'072);
    EXPECT_EQ(answer.chunks, (Chunks{{hole, 65'536}, {data, 8192}, {hole, 57'344}}));
    EXPECT_EQ(answer.data, std::string(65'536, '\0') + text + std::string(57'344, '\0'));

    answer = client.Ask(wire::kCmdRead, 0, 131'072, wire::kFlagDf);
    EXPECT_EQ(answer.chunks, (Chunks{{data, 131'072}}));
    EXPECT_EQ(answer.data, std::string(65'536, '\0') + text + std::string(57'344, '\0'));

    EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 4096).chunks, (Chunks{{hole, 4096}}));
    EXPECT_EQ(client.Ask(wire::kCmdRead, 65'536, 4096).chunks, (Chunks{{data, 4096}}));
    // A hole too short for a chunk is sent with the data beside it.
    EXPECT_EQ(client.Ask(wire::kCmdRead, 65'000, 1000).chunks, (Chunks{{data, 1000}}));
}

TEST_F(ConnectionTest, AScatteredReadHasABoundedNumberOfChunks) {
    Client& client = Connect(Structured());
    const std::string text = Pattern(32 * kMiB, 4);
    client.Ask(wire::kCmdWrite, 0, 32 * kMiB, 0, text);
    On([&] {
        for (uint64_t b = 0; b < 32 * kMiB; b += 8192) {
            volume_->Map(b, 4096, false);
            std::memset(volume_->data() + b, 0, 4096);
        }
    });
    const Answer answer = client.Ask(wire::kCmdRead, 0, 32 * kMiB);
    EXPECT_EQ(answer.chunks.size(), 256u);
    ASSERT_EQ(answer.data.size(), 32u * kMiB);
    EXPECT_TRUE(
        On([&] { return std::memcmp(volume_->data(), answer.data.data(), 32 * kMiB) == 0; }));
}

TEST_F(ConnectionTest, BlockStatusTellsHolesAndData) {
    Client& client = Connect(Structured());
    On([&] {
        volume_->Map(4096, 4096, true);
        volume_->Map(16'384, 8192, true);
    });
    using Extents = std::vector<std::pair<uint32_t, uint32_t>>;
    const uint32_t hole = wire::kAllocationHole | wire::kAllocationZero;
    Answer answer = client.Ask(wire::kCmdBlockStatus, 0, 65'536);
    EXPECT_EQ(answer.context, 77u);
    EXPECT_EQ(answer.extents,
              (Extents{{4096, hole}, {4096, 0}, {8192, hole}, {8192, 0}, {40'960, hole}}));
    answer = client.Ask(wire::kCmdBlockStatus, 4096, 61'440, wire::kFlagReqOne);
    EXPECT_EQ(answer.extents, (Extents{{4096, 0}}));
    answer = client.Ask(wire::kCmdBlockStatus, 20'480, 4096);
    EXPECT_EQ(answer.extents, (Extents{{4096, 0}}));
    EXPECT_EQ(client.Ask(wire::kCmdBlockStatus, kSize, 1).error, wire::kErrorInvalid);
    EXPECT_EQ(client.Ask(wire::kCmdBlockStatus, 0, 0).error, wire::kErrorInvalid);

    TransmissionOptions without = Structured();
    without.contexts.clear();
    EXPECT_EQ(Connect(std::move(without)).Ask(wire::kCmdBlockStatus, 0, 4096).error,
              wire::kErrorInvalid);
}

namespace {

Task<std::shared_ptr<const cow::Layers>> GiveLayers() {
    auto layers = std::make_shared<cow::Layers>();
    layers->newest = Generation{9};
    layers->below = {Generation{5}, Generation{7}};
    co_return layers;
}

std::shared_ptr<const cow::Base> BaseOf(uint64_t generation) {
    auto base = std::make_shared<cow::Base>();
    base->generation = Generation{generation};
    return base;
}

/// All contexts there are: 2 and 3 are bitmaps, the first of every second block, the other of every
/// second four.
TransmissionOptions AllContexts() {
    TransmissionOptions options;
    options.structured_replies = true;
    options.contexts = {{.id = 0, .kind = ContextKind::kAllocation},
                        {.id = 1, .kind = ContextKind::kDepth},
                        {.id = 2, .kind = ContextKind::kBitmap, .base = 0},
                        {.id = 3, .kind = ContextKind::kBitmap, .base = 1}};
    options.bases = {BaseOf(0), BaseOf(2)};
    options.layers = GiveLayers;
    return options;
}

using Extents = std::vector<std::pair<uint32_t, uint32_t>>;

uint64_t BytesOf(const Extents& extents) {
    uint64_t bytes = 0;
    for (const auto& [length, flags] : extents) bytes += length;
    return bytes;
}

}  // namespace

TEST_F(ConnectionTest, ContextsOfOneReplyCoverTheSameBytes) {
    Client& client = Connect(AllContexts());
    On([&] { volume_->Map(4096, 12'288, true); });
    const uint32_t hole = wire::kAllocationHole | wire::kAllocationZero;
    const Answer answer = client.Ask(wire::kCmdBlockStatus, 0, 32'768);
    ASSERT_EQ(answer.by_context.size(), 4u);
    EXPECT_EQ(answer.by_context.at(0), (Extents{{4096, hole}, {12'288, 0}, {16'384, hole}}));
    EXPECT_EQ(answer.by_context.at(1), (Extents{{4096, 0}, {12'288, 3}, {16'384, 0}}));
    EXPECT_EQ(answer.by_context.at(2).size(), 8u);
    EXPECT_EQ(answer.by_context.at(2).at(1), (std::pair<uint32_t, uint32_t>(4096, 1)));
    EXPECT_EQ(answer.by_context.at(3), (Extents{{16'384, 0}, {16'384, 1}}));

    const Answer one = client.Ask(wire::kCmdBlockStatus, 8192, 24'576, wire::kFlagReqOne);
    EXPECT_EQ(one.by_context.at(0), (Extents{{4096, 0}}));
    EXPECT_EQ(one.by_context.at(3), (Extents{{4096, 0}}));

    // Far more stretches than an answer may have: it ends for all where it does for one.
    const Answer cut = client.Ask(wire::kCmdBlockStatus, 512, kSize - 1024);
    EXPECT_EQ(cut.by_context.at(2).size(), 2048u);
    for (const auto& [id, extents] : cut.by_context) {
        EXPECT_EQ(BytesOf(extents), BytesOf(cut.by_context.at(2))) << id;
    }
}

// What did not change is no hole that reads as zeros: whoever writes zeros there would lose it.
TEST_F(ConnectionTest, ADiffExportTellsWhatChangedAsAllocation) {
    TransmissionOptions options;
    options.structured_replies = true;
    options.contexts = {{.id = 5, .kind = ContextKind::kDiffAllocation},
                        {.id = 6, .kind = ContextKind::kBitmap}};
    options.bases = {BaseOf(1)};
    Client& client = Connect(std::move(options));
    On([&] { volume_->Map(8192, 4096, true); });
    const Answer answer = client.Ask(wire::kCmdBlockStatus, 0, 16'384);
    EXPECT_EQ(answer.by_context.at(5),
              (Extents{{8192, wire::kAllocationHole},
                       {4096, 0},
                       {4096, wire::kAllocationHole | wire::kAllocationZero}}));
    EXPECT_EQ(answer.by_context.at(6), (Extents{{8192, 0}, {8192, 1}}));
}

TEST_F(ConnectionTest, AContextThatCannotBeToldFailsTheWholeRequest) {
    Client& client = Connect(AllContexts());
    On([&] { volume_->errors["changes"] = EIO; });
    EXPECT_EQ(client.Ask(wire::kCmdBlockStatus, 0, 4096).error, wire::kErrorIo);
    On([&] { volume_->errors.clear(); });
    EXPECT_EQ(client.Ask(wire::kCmdBlockStatus, 0, 4096).error, 0u);
}

namespace {

/// A client that speaks extended headers, as the specification has them.
class ExtendedClient : public ClientEnd {
  public:
    using ClientEnd::ClientEnd;

    struct Chunk {
        uint16_t flags = 0, type = 0;
        uint64_t cookie = 0, offset = 0;
        std::string body;
        uint32_t error() const { return LoadBig<uint32_t>(body.data()); }
    };

    static std::string Request(uint16_t type, uint64_t offset, uint64_t length, uint16_t flags = 0,
                               uint64_t cookie = 9) {
        std::string out;
        AppendBig<uint32_t>(out, 0x21e41c71);
        AppendBig(out, flags);
        AppendBig(out, type);
        AppendBig(out, cookie);
        AppendBig(out, offset);
        AppendBig(out, length);
        return out;
    }
    /// A BLOCK_STATUS of some contexts only.
    static std::string StatusOf(uint64_t length, const std::vector<uint32_t>& ids) {
        std::string payload;
        AppendBig(payload, length);
        for (const uint32_t id : ids) AppendBig(payload, id);
        return Request(7, 0, payload.size(), kPayload) + payload;
    }
    Chunk Next() {
        const std::string head = Receive(fd(), 32);
        EXPECT_EQ(head.size(), 32u);
        EXPECT_EQ(LoadBig<uint32_t>(head.data()), 0x6e8a278cu);
        Chunk chunk;
        chunk.flags = LoadBig<uint16_t>(head.data() + 4);
        chunk.type = LoadBig<uint16_t>(head.data() + 6);
        chunk.cookie = LoadBig<uint64_t>(head.data() + 8);
        chunk.offset = LoadBig<uint64_t>(head.data() + 16);
        chunk.body = Receive(fd(), LoadBig<uint64_t>(head.data() + 24));
        return chunk;
    }
    Chunk Ask(const std::string& request) {
        SendAll(fd(), request);
        return Next();
    }
    /// Asks, and expects that it fails so.
    void Fails(const std::string& request, uint32_t error) {
        const Chunk chunk = Ask(request);
        EXPECT_EQ(chunk.type, 0x8001);
        EXPECT_EQ(chunk.error(), error);
    }
    /// The answers to a BLOCK_STATUS: "id:length/flags,length/flags".
    std::string Statuses(const std::string& request) {
        SendAll(fd(), request);
        std::string text;
        for (Chunk chunk;;) {
            chunk = Next();
            EXPECT_EQ(chunk.type, 6);
            const auto count = LoadBig<uint32_t>(chunk.body.data() + 4);
            EXPECT_EQ(chunk.body.size(), 8 + 16 * size_t{count});
            text += (text.empty() ? "" : " ") + std::to_string(chunk.error()) + ":";
            for (size_t at = 8; at < chunk.body.size(); at += 16) {
                text += (at > 8 ? "," : "") +
                        std::to_string(LoadBig<uint64_t>(chunk.body.data() + at)) + "/" +
                        std::to_string(LoadBig<uint64_t>(chunk.body.data() + at + 8));
            }
            if (chunk.flags & 1) return text;
        }
    }

    static constexpr uint16_t kPayload = 1 << 5;
};

}  // namespace

TEST_F(ConnectionTest, ExtendedRepliesAreAllChunks) {
    TransmissionOptions options = AllContexts();
    options.extended_headers = true;
    ExtendedClient client(Serve(std::move(options)));
    using C = ExtendedClient;
    const std::string data(8192, 'x');
    for (const uint16_t flags : {C::kPayload, uint16_t{0}}) {  // who forgets it is understood
        const C::Chunk written = client.Ask(C::Request(1, 4096, 8192, flags, 77) + data);
        EXPECT_EQ(written.type, 0);
        EXPECT_EQ(written.flags, 1);
        EXPECT_EQ(written.cookie, 77u);
        EXPECT_EQ(written.offset, 4096u);
        EXPECT_TRUE(written.body.empty());
    }
    const C::Chunk hole = client.Ask(C::Request(0, 0, 16'384));
    EXPECT_EQ(hole.type, 2);
    const C::Chunk read = client.Next();
    EXPECT_EQ(read.type, 1);
    EXPECT_EQ(read.offset, 0u);  // of the request; that of the data is in front of it
    EXPECT_EQ(LoadBig<uint64_t>(read.body.data()), 4096u);
    EXPECT_EQ(read.body.substr(8), data);
    EXPECT_EQ(client.Next().flags, 1);
    EXPECT_EQ(client.Ask(C::Request(0, 0, 0)).type, 0);
    for (const uint16_t type : {3, 4, 5, 6})
        EXPECT_EQ(client.Ask(C::Request(type, 0, 4096)).type, 0);
    client.Fails(C::Request(99, 0, 4096), wire::kErrorInvalid);
    client.Fails(C::Request(4, 0, uint64_t{1} << 40), wire::kErrorInvalid);
    client.Fails(C::Request(6, 4096, ~uint64_t{0} - 4095), wire::kErrorNoSpace);
    client.Fails(C::Request(0, 0, uint64_t{33} << 20), wire::kErrorInvalid);
    EXPECT_EQ(client.Ask(C::Request(6, 0, kSize)).type, 0);
}

TEST_F(ConnectionTest, APayloadTellsWhichContextsAreAskedFor) {
    TransmissionOptions options = AllContexts();
    options.extended_headers = true;
    ExtendedClient client(Serve(std::move(options)));
    using C = ExtendedClient;
    EXPECT_EQ(client.Statuses(C::StatusOf(32'768, {3})), "3:16384/0,16384/1");
    EXPECT_EQ(client.Statuses(C::StatusOf(8192, {2, 0})), "0:8192/3 2:4096/0,4096/1");
    EXPECT_EQ(client.Statuses(C::Request(7, 0, 4096)), "0:4096/3 1:4096/0 2:4096/0 3:4096/0");
    On([&] { EXPECT_EQ(volume_->calls["status"], 2u); });  // what nobody asks for is not looked for
    for (const std::vector<uint32_t>& ids :
         std::vector<std::vector<uint32_t>>{{4}, {0, 0}, {}, {0, 1, 2, 3, 3}, {77}}) {
        client.Fails(C::StatusOf(4096, ids), wire::kErrorInvalid);
    }
    client.Fails(C::StatusOf(kSize + 1, {0}), wire::kErrorInvalid);
    client.Fails(C::StatusOf(0, {0}), wire::kErrorInvalid);
    client.Fails(C::Request(7, 0, 11, C::kPayload) + std::string(11, 'x'), wire::kErrorInvalid);
    client.Fails(C::Request(7, 0, 0, C::kPayload), wire::kErrorInvalid);
    EXPECT_EQ(client.Statuses(C::StatusOf(4096, {1})), "1:4096/0");
}

TEST_F(ConnectionTest, AStrayPayloadIsTakenAndRefused) {
    TransmissionOptions options;
    options.structured_replies = options.extended_headers = true;
    ExtendedClient client(Serve(std::move(options)));
    using C = ExtendedClient;
    for (const uint16_t type : {0, 3, 4, 5, 6, 7, 8}) {
        client.Fails(C::Request(type, 0, 4096, C::kPayload) + std::string(4096, 'x'),
                     wire::kErrorInvalid);
    }
    // One byte at a time, in one with the next.
    const std::string bytes =
        C::Request(4, 0, 5, C::kPayload) + "stray" + C::Request(1, 0, 3, C::kPayload, 5) + "abc";
    for (const char byte : bytes) SendAll(client.fd(), std::string(1, byte));
    EXPECT_EQ(client.Next().error(), wire::kErrorInvalid);
    EXPECT_EQ(client.Next().cookie, 5u);
    On([&] { EXPECT_EQ(std::memcmp(volume_->data(), "abc", 3), 0); });
    // Far too long to be taken: the end.
    SendAll(client.fd(), C::Request(4, 0, uint64_t{1} << 50, C::kPayload));
    EXPECT_TRUE(Receive(client.fd(), 1).empty());
}

TEST_F(ConnectionTest, ACompactHeaderBreaksAnExtendedStream) {
    TransmissionOptions options;
    options.structured_replies = options.extended_headers = true;
    ExtendedClient client(Serve(std::move(options)));
    SendAll(client.fd(), RequestHeader(wire::kCmdRead, 0, 512) + "1234");
    EXPECT_TRUE(Receive(client.fd(), 1).empty());
}

TEST_F(ConnectionTest, BlockStatusOfAScatteredDiskIsShort) {
    Client& client = Connect(Structured());
    On([&] {
        for (uint64_t b = 0; b < kSize; b += 8192) volume_->Map(b, 4096, true);
    });
    const Answer answer = client.Ask(wire::kCmdBlockStatus, 0, kSize);
    EXPECT_EQ(answer.extents.size(), 8192u);
    EXPECT_EQ(client.Ask(wire::kCmdBlockStatus, 0, kSize).extents, answer.extents);
}

// ---- the stream

TEST_F(ConnectionTest, RequestsMayArriveInAnyPieces) {
    const uint32_t seed = std::random_device()();
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    Client& client = Connect();
    std::string stream, expected(kMiB, '\0');
    uint64_t cookie = 0;
    for (int i = 0; i < 200; ++i) {
        const uint32_t length = random() % 3 ? random() % 5000 : random() % 200'000;
        const uint64_t offset = random() % (kMiB - length);
        const std::string text = Pattern(length, random());
        stream += client.Prepare(wire::kCmdWrite, offset, length, ++cookie) + text;
        expected.replace(offset, length, text);
        // Overlapping writes run in the order of arrival in this volume.
    }
    std::thread sender([&] {
        for (size_t at = 0; at < stream.size();) {
            const size_t piece = random() % 4 ? 1 + random() % 40 : 1 + random() % 300'000;
            client.SendBytes(stream.substr(at, piece));
            at += piece;
        }
    });
    for (int i = 0; i < 200; ++i) EXPECT_EQ(client.Next().error, 0u);
    sender.join();
    EXPECT_TRUE(client.Ask(wire::kCmdRead, 0, kMiB).data == expected);
}

TEST_F(ConnectionTest, RepliesOfABatchLeaveTogether) {
    ExpectFewEntersForBatches();
}

TEST_F(ConnectionTest, TheReactorPollsForAClientWithOneRequestAtATime) {
    Start({}, {.poll_nanoseconds = kHour});
    Client& client = Connect();
    for (int i = 0; i < 20; ++i) EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 512).error, 0u);
    ExpectPolling(*reactor_);
    EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 512).error, 0u);
}

TEST_F(ConnectionTest, TheReactorPollsForWhatFollowsAFlush) {
    Start({}, {.poll_nanoseconds = kHour});
    Client& client = Connect();
    EXPECT_EQ(client.Ask(wire::kCmdFlush, 0, 0).error, 0u);
    ExpectPolling(*reactor_);
    EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 512).error, 0u);
}

/// Clients send a header and its payload one after the other.
TEST_F(ConnectionTest, TheReactorPollsForThePayloadOfAHeader) {
    Start({}, {.poll_nanoseconds = kHour});
    Client& client = Connect();
    for (int i = 0; i < 20; ++i) EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 512).error, 0u);
    client.SendBytes(client.Prepare(wire::kCmdWrite, 0, 512, 1));
    for (int unread = 1; unread > 0;) {
        ASSERT_EQ(ioctl(client.fd(), SIOCOUTQ, &unread), 0);
        std::this_thread::yield();
    }
    ExpectPolling(*reactor_);
    client.SendBytes(std::string(512, 'a'));
    EXPECT_EQ(client.Next().error, 0u);
}

TEST_F(ConnectionTest, TheReactorDoesNotPollForAClientWithManyRequests) {
    Start({}, {.poll_nanoseconds = kHour});
    ExpectFewEntersForBatches();
}

/// A client that does not read what it gets, while each request comes when the one before has been
/// answered: the connection rests before each receive, and must wake up by itself.
TEST_F(ConnectionTest, AClientThatIsBehindWithReadingIsServed) {
    Client& client = Connect();
    constexpr uint64_t kRequests = 200;
    const uint64_t reply_bytes = 4096 + sizeof(wire::SimpleReply);
    for (uint64_t i = 0; i < kRequests; ++i) {
        client.SendBytes(client.Prepare(wire::kCmdRead, i * 4096, 4096, i));
        int waiting = 0;
        while (waiting < static_cast<int>((i + 1) * reply_bytes)) {
            ASSERT_EQ(ioctl(client.fd(), FIONREAD, &waiting), 0);
            std::this_thread::yield();
        }
    }
    for (uint64_t i = 0; i < kRequests; ++i) EXPECT_EQ(client.Next().cookie, i);
}

TEST_F(ConnectionTest, RequestsThatCameWithTheLastOptionAreServedFirst) {
    TransmissionOptions options;
    std::string early = RequestHeader(wire::kCmdWrite, 0, 4096, 1) + Pattern(4096, 9);
    early += RequestHeader(wire::kCmdRead, 0, 4096, 2).substr(0, 10);
    const std::byte* bytes = reinterpret_cast<const std::byte*>(early.data());
    options.received.assign(bytes, bytes + early.size());
    Client& client = Connect(std::move(options));
    const std::string second = client.Prepare(wire::kCmdRead, 0, 4096, 2);
    EXPECT_EQ(client.Next().cookie, 1u);
    client.SendBytes(second.substr(10));
    EXPECT_EQ(client.Next().data, Pattern(4096, 9));
}

TEST_F(ConnectionTest, ARefusedPayloadIsConsumedUpToABound) {
    Client& client = Connect();
    const uint32_t length = 100 * kMiB;
    EXPECT_EQ(client.Ask(wire::kCmdWrite, 0, length, 0, std::string(length, 'x')).error,
              wire::kErrorInvalid);
    EXPECT_EQ(client.Ask(wire::kCmdFlush, 0, 0).error, 0u);
    client.SendBytes(RequestHeader(wire::kCmdWrite, 0, 0xffffffff, 1));
    EXPECT_TRUE(client.AtEnd());
    WaitUntilEnded(0);
}

TEST_F(ConnectionTest, ABadMagicNumberEndsThisConnectionOnly) {
    Client& good = Connect();
    Client& bad = Connect();
    std::string request = RequestHeader(wire::kCmdRead, 0, 4096, 1);
    request[0] = 0;
    bad.SendBytes(request);
    EXPECT_TRUE(bad.AtEnd());
    WaitUntilEnded(1);
    EXPECT_EQ(good.Ask(wire::kCmdFlush, 0, 0).error, 0u);
}

TEST_F(ConnectionTest, NoiseHurtsNobody) {
    const uint32_t seed = std::random_device()();
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    Client& good = Connect(Structured());
    good.Ask(wire::kCmdWrite, kSize - 4096, 4096, 0, Pattern(4096, 5));
    On([&] { volume_->errors["write"] = volume_->errors["zero"] = volume_->errors["trim"] = EIO; });
    for (int i = 0; i < 200; ++i) {
        Client& noisy = Connect(random() % 2 ? Structured() : TransmissionOptions{});
        std::string noise = Pattern(random() % 3000, random());
        for (size_t at = 0; at + 28 < noise.size() && random() % 8; at += 28) {
            const std::string header =
                RequestHeader(random() % 10, random(), random() % 2 ? 0 : random() % 100'000,
                              random(), random() % 4 ? 0 : random() % 64);
            noise.replace(at, 28, header);
        }
        noisy.SendBytes(noise);
        if (random() % 2) noisy.HalfClose();
        noisy.Close();
    }
    for (size_t i = 1; i <= 200; ++i) WaitUntilEnded(i);
    EXPECT_EQ(good.Ask(wire::kCmdRead, kSize - 4096, 4096).data, Pattern(4096, 5));
    EXPECT_EQ(On([&] { return host_->bytes_in_flight(); }), 0u);
}

// ---- the end

TEST_F(ConnectionTest, DisconnectFinishesWhatIsOutstanding) {
    Client& client = Connect();
    On([&] { volume_->hold = true; });
    std::string stream;
    for (uint64_t i = 1; i <= 10; ++i) stream += client.Prepare(wire::kCmdRead, 0, 4096, i);
    stream += RequestHeader(wire::kCmdDisconnect, 0, 0, 11);
    stream += RequestHeader(wire::kCmdRead, 0, 4096, 12);  // not allowed, not served
    client.SendBytes(stream);
    Until([&] { return volume_->running() == 10; });
    EXPECT_FALSE(served_[0].over);
    On([&] { volume_->Release(); });
    for (int i = 0; i < 10; ++i) EXPECT_EQ(client.Next().error, 0u);
    EXPECT_TRUE(client.AtEnd());
    WaitUntilEnded(0);
    EXPECT_EQ(On([&] { return volume_->calls["read"]; }), 10u);
}

TEST_F(ConnectionTest, AClientThatClosedItsSendingSideStillGetsItsReplies) {
    Client& client = Connect();
    On([&] { volume_->hold = true; });
    client.SendBytes(client.Prepare(wire::kCmdRead, 0, 4096, 1));
    client.HalfClose();
    Until([&] { return volume_->running() == 1; });
    On([&] { volume_->Release(); });
    EXPECT_EQ(client.Next().cookie, 1u);
    EXPECT_TRUE(client.AtEnd());
    WaitUntilEnded(0);
}

TEST_F(ConnectionTest, AWriteCutOffByTheEndOfTheStreamIsNotExecuted) {
    for (const uint32_t length : {4096u, kMiB}) {
        Client& client = Connect();
        client.SendBytes(RequestHeader(wire::kCmdWrite, 0, length, 1) +
                         std::string(length - 1, 'x'));
        client.Close();
        WaitUntilEnded(served_.size() - 1);
    }
    EXPECT_EQ(On([&] { return volume_->calls["write"]; }), 0u);
    EXPECT_EQ(On([&] { return host_->bytes_in_flight(); }), 0u);
}

TEST_F(ConnectionTest, AVanishedClientsRequestsAreFinishedFirst) {
    Client& client = Connect();
    On([&] { volume_->hold = true; });
    std::string stream;
    for (uint64_t i = 0; i < 20; ++i) {
        stream += RequestHeader(wire::kCmdWrite, i * 4096, 4096, i) + Pattern(4096, i);
    }
    client.SendBytes(stream);
    Until([&] { return volume_->running() == 20; });
    client.Close();
    EXPECT_FALSE(served_[0].over);
    On([&] { volume_->Release(); });
    WaitUntilEnded(0);
    EXPECT_EQ(On([&] { return volume_->running(); }), 0u);
}

TEST_F(ConnectionTest, WhoComesNextWaitsUntilNothingOfAVanishedClientCanLand) {
    for (const bool disconnects : {false, true}) {
        Client& client = Connect();
        const size_t index = served_.size() - 1;
        On([&] { volume_->hold = true; });
        client.SendBytes(RequestHeader(wire::kCmdWrite, 0, 4096, 1) + Pattern(4096, 1));
        Until([&] { return volume_->running() == 1; });
        if (disconnects) client.SendBytes(RequestHeader(wire::kCmdDisconnect, 0, 0, 2));
        client.Close();
        std::future<bool> nothing_lands = AwaitLeavers();
        Until([&] { return disconnects || volume_->abandoned() == 1; });
        EXPECT_FALSE(served_[index].over);
        EXPECT_NE(nothing_lands.wait_for(std::chrono::seconds(0)), std::future_status::ready);
        On([&] { volume_->Release(); });
        nothing_lands.wait();
        EXPECT_TRUE(served_[index].over);
        // Without DISC nobody had a right to it any more.
        EXPECT_EQ(served_[index].counters->given_up, disconnects ? 0u : 1u);
        WaitUntilEnded(index);
    }
    EXPECT_EQ(std::memcmp(volume_->data(), Pattern(4096, 1).data(), 4096), 0);
}

TEST_F(ConnectionTest, WhoComesNextDoesNotWaitForClientsThatAreThere) {
    Client& client = Connect();
    Connect();
    On([&] { volume_->hold = true; });
    client.SendBytes(client.Prepare(wire::kCmdWrite, 0, 4096, 1) + Pattern(4096, 1));
    Until([&] { return volume_->running() == 1; });
    EXPECT_TRUE(AwaitLeavers().get());
    EXPECT_FALSE(served_[0].over);
    On([&] { volume_->Release(); });
    EXPECT_EQ(client.Next().error, 0u);
}

TEST_F(ConnectionTest, WhoWaitsForLeaversMayGiveUp) {
    Client& client = Connect();
    On([&] { volume_->hold = true; });
    client.SendBytes(RequestHeader(wire::kCmdWrite, 0, 4096, 1) + Pattern(4096, 1));
    Until([&] { return volume_->running() == 1; });
    client.Close();
    LeaverWait impatient, patient, too_late;
    std::future<bool> given_up = AwaitLeavers(impatient);
    std::future<bool> stays = AwaitLeavers(patient);
    Until([&] { return host_->peers_asked() == 2; });
    On([&] { impatient.GiveUp(); });
    EXPECT_FALSE(given_up.get());
    On([&] { too_late.GiveUp(); });
    EXPECT_FALSE(AwaitLeavers(too_late).get());
    EXPECT_FALSE(served_[0].over);
    On([&] { volume_->Release(); });
    EXPECT_TRUE(stays.get());
    EXPECT_TRUE(served_[0].over);
    WaitUntilEnded(0);
}

// Each who waits asks the system once about each connection, and once more when those have ended
// that had left: not at each end.
TEST_F(ConnectionTest, EndsOfManyLeaversCostNoMoreThanTheirNumber) {
    constexpr size_t kLeavers = 40, kWaiters = 20;
    On([&] { volume_->hold = true; });
    for (size_t i = 0; i < kLeavers; ++i) {
        Client& client = Connect();
        client.SendBytes(RequestHeader(wire::kCmdRead, 0, 512, i));
        Until([&] { return volume_->running() == i + 1; });
        client.Close();
    }
    std::deque<std::future<bool>> waits;
    for (size_t i = 0; i < kWaiters; ++i) waits.push_back(AwaitLeavers());
    Until([&] { return host_->peers_asked() == kLeavers * kWaiters; });
    for (size_t i = 0; i < kLeavers; ++i) {
        On([&] { volume_->ReleaseOne(); });
        WaitUntilEnded(i);
    }
    for (std::future<bool>& wait : waits) EXPECT_TRUE(wait.get());
    EXPECT_EQ(On([&] { return host_->peers_asked(); }), kLeavers * kWaiters);
    On([&] { volume_->Release(); });
}

TEST_F(ConnectionTest, OfAReadOnlyVolumeNotEndlesslyManyLeaversHang) {
    On([&] { volume_->hold = volume_->read_only_export = true; });
    const auto leave = [&](size_t already) {
        Client& client = Connect();
        client.SendBytes(RequestHeader(wire::kCmdRead, 0, 512, already));
        Until([&] { return volume_->running() == already + 1; });
        client.Close();
    };
    for (size_t i = 0; i < 64; ++i) leave(i);
    EXPECT_TRUE(AwaitLeavers().get());
    leave(64);
    std::future<bool> waits;
    // Once the server has noticed.
    do {
        waits = AwaitLeavers(waits_.emplace_back());
        On([] { return true; });
    } while (waits.wait_for(std::chrono::seconds(0)) == std::future_status::ready);
    On([&] { volume_->Release(); });
    EXPECT_TRUE(waits.get());
}

TEST_F(ConnectionTest, WhatALeaverHasNotFinishedInTimeIsGivenUp) {
    ConnectionLimits limits;
    limits.leave_ms_max = 50;
    Start(limits);
    Client& client = Connect();
    On([&] { volume_->hold = true; });
    std::string stream;
    for (uint64_t i = 0; i < 20; ++i) stream += RequestHeader(wire::kCmdTrim, 0, 32 * kMiB, i);
    stream += RequestHeader(wire::kCmdDisconnect, 0, 0, 20);
    client.SendBytes(stream);
    client.HalfClose();
    Until([&] { return volume_->running() == 2; });
    std::future<bool> nothing_lands = AwaitLeavers();
    // Those that have not begun go at once; the others end at the volume.
    Until([&] { return served_[0].counters->given_up == 18u; });
    On([&] { volume_->Release(); });
    nothing_lands.wait();
    WaitUntilEnded(0);
    EXPECT_EQ(served_[0].counters->given_up, 20u);
    EXPECT_EQ(On([&] { return volume_->calls["trim"]; }), 2u);
}

TEST_F(ConnectionTest, RequestsThatWorkOnMuchRunFewAtATimeAndInOrder) {
    ConnectionLimits limits;
    limits.work_bytes_max = 2 * kMiB;
    Start(limits);
    Client& client = Connect();
    Client& other = Connect();
    On([&] { volume_->hold = true; });
    std::string stream;
    for (uint64_t i = 0; i < 300; ++i) {
        stream += client.Prepare(wire::kCmdWriteZeroes, 0, 3 * kMiB, i, wire::kFlagNoHole);
    }
    stream += client.Prepare(wire::kCmdRead, 0, 512, 300);
    client.SendBytes(stream);
    Until([&] { return volume_->calls["read"] == 1; });
    EXPECT_EQ(On([&] { return volume_->calls["zero"]; }), 1u);
    other.SendBytes(other.Prepare(wire::kCmdTrim, 0, 4096, 1));
    Until([&] { return volume_->calls["trim"] == 1; });
    On([&] { volume_->Release(); });
    EXPECT_EQ(other.Next().error, 0u);
    uint64_t next = 0;
    for (int i = 0; i < 301; ++i) {
        const Answer answer = client.Next();
        EXPECT_EQ(answer.error, 0u);
        if (answer.cookie == 300) continue;
        EXPECT_EQ(answer.cookie, next);
        ++next;
    }
}

TEST_F(ConnectionTest, AClientThatBreaksOffIsNoticedWhileNothingIsReceived) {
    ConnectionLimits limits;
    limits.requests_max = 4;
    Start(limits);
    Client& client = Connect();
    // A reply that the client does not read makes its close a reset.
    client.SendBytes(client.Prepare(wire::kCmdRead, 0, 4096, 0));
    int there = 0;
    while (ioctl(client.fd(), FIONREAD, &there) == 0 && there < 4096) std::this_thread::yield();
    On([&] { volume_->hold = true; });
    std::string stream;
    for (uint64_t i = 1; i < 10; ++i) stream += RequestHeader(wire::kCmdTrim, 0, 4096, i);
    client.SendBytes(stream);
    Until([&] { return volume_->running() == 4 && host_->bytes_received() > 0; });
    client.Close();
    EXPECT_FALSE(served_[0].over);
    Until([&] { return host_->bytes_received() == 0; });  // it gave up what it had not begun
    On([&] { volume_->Release(); });
    WaitUntilEnded(0);
    EXPECT_EQ(served_[0].counters->given_up, 4u);
    EXPECT_EQ(On([&] { return volume_->calls["trim"]; }), 4u);
}

TEST_F(ConnectionTest, EndFinishesRunningRequestsAndDropsTheRest) {
    Client& client = Connect();
    Client& other = Connect();
    On([&] { volume_->hold = true; });
    std::string stream;
    for (uint64_t i = 0; i < 5; ++i) {
        stream += RequestHeader(wire::kCmdWrite, i * 4096, 4096, i) + Pattern(4096, i);
    }
    stream += RequestHeader(wire::kCmdWrite, 0, kMiB, 9) + std::string(1000, 'x');
    client.SendBytes(stream);
    Until([&] { return volume_->running() == 5; });
    On([&] {
        End(served_[0].connection);
        End(served_[0].connection);
    });
    EXPECT_TRUE(client.AtEnd());
    EXPECT_FALSE(served_[0].over) << "requests are still running";
    On([&] { volume_->Release(); });
    WaitUntilEnded(0);
    EXPECT_EQ(On([&] { return volume_->calls["write"]; }), 5u);
    EXPECT_EQ(other.Ask(wire::kCmdFlush, 0, 0).error, 0u);
}

TEST_F(ConnectionTest, EndFreesAConnectionWhoseClientNeverReads) {
    Client& client = Connect();
    std::string stream;
    for (uint64_t i = 0; i < 10; ++i) stream += RequestHeader(wire::kCmdRead, 0, kMiB, i);
    client.SendBytes(stream);
    Until([&] { return volume_->calls["read"] == 10; });
    On([&] { End(served_[0].connection); });
    WaitUntilEnded(0);
    EXPECT_EQ(On([&] { return host_->bytes_in_flight(); }), 0u);
}

// ---- limits

TEST_F(ConnectionTest, NoMoreRequestsRunThanAllowedAndNoneIsLost) {
    ConnectionLimits limits;
    limits.requests_max = 4;
    Start(limits);
    Client& client = Connect();
    On([&] { volume_->hold = true; });
    std::string stream;
    constexpr uint64_t kRequests = 500;
    for (uint64_t i = 0; i < kRequests; ++i) {
        stream += client.Prepare(wire::kCmdWrite, i * 100, 100, i) + Pattern(100, i);
    }
    std::thread sender([&] { client.SendBytes(stream); });
    Until([&] { return volume_->running() == 4; });
    On([&] { volume_->Release(); });
    std::vector<bool> answered(kRequests);
    for (uint64_t i = 0; i < kRequests; ++i) answered[client.Next().cookie] = true;
    sender.join();
    EXPECT_EQ(std::count(answered.begin(), answered.end(), true), 500);
    EXPECT_LE(On([&] { return volume_->running_max; }), 4u);
    std::string expected;
    for (uint64_t i = 0; i < kRequests; ++i) expected += Pattern(100, i);
    EXPECT_TRUE(client.Ask(wire::kCmdRead, 0, kRequests * 100).data == expected);
}

TEST_F(ConnectionTest, AClientThatNeverReadsHoldsABoundedAmount) {
    ConnectionLimits limits;
    limits.bytes_max = 4 * kMiB;
    Start(limits);
    Client& client = Connect();
    On([&] { volume_->hold = true; });
    std::string stream;
    for (uint64_t i = 0; i < 100; ++i) stream += client.Prepare(wire::kCmdRead, i * 4096, kMiB, i);
    client.SendBytes(stream);
    Until([&] { return volume_->running() == 4; });
    const uint64_t most = 4 * kMiB + 100'000;  // payloads, and what keeping them takes
    EXPECT_LE(On([&] { return host_->bytes_in_flight(); }), most);
    On([&] { volume_->Release(); });
    // Now it does read: everything arrives.
    for (int i = 0; i < 100; ++i) {
        EXPECT_EQ(client.Next().data.size(), kMiB);
        EXPECT_LE(On([&] { return host_->bytes_in_flight(); }), most);
    }
}

TEST_F(ConnectionTest, ManyClientsThatNeverReadHoldABoundedAmountTogether) {
    ConnectionLimits limits;
    limits.host_bytes_max = 4 * kMiB;
    Start(limits);
    constexpr int kClients = 100;
    std::string stream;  // without payload, but more requests than one connection may have
    for (uint64_t i = 0; i < 8000; ++i) stream += RequestHeader(wire::kCmdFlush, 0, 0, i);
    On([&] { volume_->hold = true; });
    for (int c = 0; c < kClients; ++c) {
        Client& client = Connect();
        const int flags = fcntl(client.fd(), F_GETFL);
        ASSERT_EQ(fcntl(client.fd(), F_SETFL, flags | O_NONBLOCK), 0);
        client.SendBytes(stream);
    }
    // Every client has at least one request running.
    Until([&] { return volume_->running() >= kClients; });
    EXPECT_LE(On([&] { return host_->bytes_in_flight(); }), 6u * kMiB);
}

TEST_F(ConnectionTest, StuckClientsDoNotStopOthers) {
    ConnectionLimits limits;
    limits.host_bytes_max = 8 * kMiB;
    limits.stall_ms_max = 1000;
    Start(limits);
    for (int stuck = 0; stuck < 3; ++stuck) {
        Client& client = Connect();
        std::string stream;
        for (uint64_t i = 0; i < 10; ++i) stream += RequestHeader(wire::kCmdRead, 0, kMiB, i);
        client.SendBytes(stream);
    }
    Until([&] { return volume_->calls["read"] >= 3; });
    Client& client = Connect();
    std::string stream;
    for (uint64_t i = 0; i < 10; ++i) stream += client.Prepare(wire::kCmdRead, 0, kMiB, i);
    client.SendBytes(stream);
    for (int i = 0; i < 10; ++i) EXPECT_EQ(client.Next().data.size(), kMiB);
    EXPECT_LE(On([&] { return host_->bytes_in_flight(); }), 9u * kMiB);
}

TEST_F(ConnectionTest, SmallRequestsDoNotWaitForMemoryThatStuckClientsHold) {
    ConnectionLimits limits;
    limits.host_bytes_max = 8 * kMiB;
    limits.stall_ms_max = 3'600'000;  // nobody is closed
    Start(limits);
    for (int stuck = 0; stuck < 40; ++stuck) {
        std::string stream;
        for (uint64_t i = 0; i < 10; ++i) stream += RequestHeader(wire::kCmdRead, 0, kMiB, i);
        Connect().SendBytes(stream);
    }
    Until([&] { return host_->bytes_in_flight() > 2 * kMiB; });
    Client& client = Connect(Structured());
    const std::string text = Pattern(16 << 10, 6);
    for (int i = 0; i < 50; ++i) {
        EXPECT_EQ(client.Ask(wire::kCmdWrite, 0, 16 << 10, 0, text).error, 0u);
        EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 16 << 10).data, text);
    }
    for (size_t i = 0; i < 40; ++i) EXPECT_FALSE(served_[i].over);
}

TEST_F(ConnectionTest, AnnouncedPayloadsThatDoNotComeHoldABoundedAmountAndAreGivenUp) {
    ConnectionLimits limits;
    limits.host_bytes_max = 64 * kMiB;
    limits.stall_ms_max = 1000;
    Start(limits);
    constexpr uint64_t kStuck = 4;
    for (uint64_t i = 0; i < kStuck; ++i) {
        Client& client = Connect();
        client.SendBytes(RequestHeader(wire::kCmdWrite, 0, 32 * kMiB, 1));
        if (i % 2) client.SendBytes(std::string(50'000, 'x'));
    }
    Client& client = Connect();
    for (uint32_t i = 0; i < 100; ++i) {
        EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 4096).error, 0u);
        EXPECT_LE(On([&] { return host_->bytes_in_flight(); }), 66u * kMiB);
    }
    const std::string text = Pattern(32 * kMiB, 7);
    EXPECT_EQ(client.Ask(wire::kCmdWrite, 0, 32 * kMiB, 0, text).error, 0u);
    EXPECT_TRUE(client.Ask(wire::kCmdRead, 0, 32 * kMiB).data == text);
    EXPECT_EQ(On([&] { return volume_->calls["write"]; }), 1u);
}

TEST_F(ConnectionTest, WhatIsReceivedButNotBegunIsBoundedForAllTogether) {
    ConnectionLimits limits;
    limits.host_bytes_max = 16 * kMiB;
    limits.requests_max = 1;
    Start(limits);
    constexpr uint64_t kClients = 200;
    for (uint64_t i = 0; i < kClients; ++i) Connect();
    Until([&] { return host_->connections() == kClients; });
    On([&] { volume_->hold = true; });
    std::string stream;
    for (uint64_t i = 0; i < 6000; ++i) stream += RequestHeader(wire::kCmdFlush, 0, 0, i);
    for (Client& client : clients_) {
        ASSERT_EQ(fcntl(client.fd(), F_SETFL, fcntl(client.fd(), F_GETFL) | O_NONBLOCK), 0);
        client.SendBytes(stream);
    }
    Until([&] { return volume_->running() == kClients; });
    // A request and 8 KiB for each, and an eighth of the memory.
    EXPECT_LE(On([&] { return host_->bytes_in_flight(); }), kClients * (10 << 10) + 2 * kMiB);
}

TEST_F(ConnectionTest, AHeaderInTwoPartsMayWaitForRoomThroughManyReplies) {
    ConnectionLimits limits;
    limits.bytes_max = kMiB;
    Start(limits);
    Client& client = Connect();
    On([&] { volume_->hold = true; });
    std::string requests;
    for (uint64_t i = 0; i < 8; ++i) {
        requests += client.Prepare(wire::kCmdRead, i * 4096, kMiB / 8, i);
    }
    const std::string waits = client.Prepare(wire::kCmdRead, 0, kMiB, 8);
    client.SendBytes(requests + waits.substr(0, 10));
    Until([&] { return volume_->calls["read"] == 8; });
    client.SendBytes(waits.substr(10));
    Until([&] { return host_->bytes_received() == 0; });  // no receive any more
    On([&] { volume_->Release(); });
    for (int i = 0; i < 9; ++i) EXPECT_EQ(client.Next().error, 0u);
    Client& other = Connect();
    EXPECT_EQ(other.Ask(wire::kCmdRead, 0, 512).error, 0u);
    // No more than the two next receives may bring.
    EXPECT_LE(On([&] { return host_->bytes_received(); }), 2 * (256u << 10));
}

size_t ThreadsOfThisProcess() {
    size_t threads = 0;
    for ([[maybe_unused]] const auto& task :
         std::filesystem::directory_iterator("/proc/self/task")) {
        ++threads;
    }
    return threads;
}

/// False if it takes very long.
bool WaitUntilReceived(const Client& client) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    int unread = 1;
    while (ioctl(client.fd(), SIOCOUTQ, &unread) == 0 && unread > 0) {
        if (std::chrono::steady_clock::now() > end) return false;
        std::this_thread::yield();
    }
    return true;
}

TEST_F(ConnectionTest, ClientsThatSendByteByByteTakeNoThreads) {
    constexpr size_t kClients = 100;
    constexpr uint32_t kBytes = 64 << 10;
    const std::string payload = Pattern(kBytes, 4);
    for (size_t i = 0; i < kClients; ++i) {
        Connect().SendBytes(RequestHeader(wire::kCmdWrite, i * kBytes, kBytes, i));
    }
    const size_t before = ThreadsOfThisProcess();
    // More steps than the kernel tries before it gives an operation to a thread: 128.
    constexpr size_t kSteps = 150;
    for (size_t step = 0; step < kSteps; ++step) {
        for (Client& client : clients_) client.SendBytes(payload.substr(step, 1));
        for (const Client& client : clients_) ASSERT_TRUE(WaitUntilReceived(client));
    }
    EXPECT_EQ(ThreadsOfThisProcess(), before);
    for (Client& client : clients_) client.SendBytes(payload.substr(kSteps));
    for (Client& client : clients_) EXPECT_EQ(client.Next().error, 0u);
    for (size_t i = 0; i < kClients; ++i) {
        EXPECT_EQ(std::memcmp(volume_->data() + i * kBytes, payload.data(), kBytes), 0);
    }
}

TEST_F(ConnectionTest, UrgentDataTakesNoThreads) {
    constexpr size_t kClients = 20;
    for (size_t i = 0; i < kClients; ++i) Connect();
    const size_t before = ThreadsOfThisProcess();
    for (size_t step = 0; step < 200; ++step) {
        for (const Client& client : clients_) {
            // Until a header of them is no request.
            const ssize_t sent = send(client.fd(), "!", 1, MSG_OOB | MSG_NOSIGNAL);
            ASSERT_TRUE(sent == 1 || errno == EPIPE) << errno;
            ASSERT_TRUE(WaitUntilReceived(client));
        }
    }
    EXPECT_EQ(ThreadsOfThisProcess(), before);
    for (Client& client : clients_) EXPECT_TRUE(client.AtEnd());
}

TEST_F(ConnectionTest, AClientThatTakesItsRepliesSlowlyIsNotStalled) {
    ConnectionLimits limits;
    limits.host_bytes_max = 8 * kMiB;
    limits.stall_ms_max = 400;
    Start(limits);
    Client& slow = Connect();
    Client& other = Connect();
    slow.SendBytes(slow.Prepare(wire::kCmdRead, 0, 4 * kMiB, 1));
    int there = 0;
    while (ioctl(slow.fd(), FIONREAD, &there) == 0 && there == 0) std::this_thread::yield();
    other.SendBytes(other.Prepare(wire::kCmdRead, 0, 4 * kMiB, 2));
    // One part in 40 ms: over the least that counts as progress, and less than a send in the time
    // that a client may stall.
    std::string part(128 << 10, 0);
    size_t came = 0;
    for (ssize_t n = 1; n > 0 && came < 4 * kMiB + sizeof(wire::SimpleReply);) {
        const auto next = std::chrono::steady_clock::now() + std::chrono::milliseconds(40);
        n = recv(slow.fd(), part.data(), part.size(), 0);
        came += static_cast<size_t>(std::max<ssize_t>(n, 0));
        std::this_thread::sleep_until(next);
    }
    EXPECT_EQ(came, 4 * kMiB + sizeof(wire::SimpleReply));
    EXPECT_EQ(other.Next().error, 0u);
}

TEST_F(ConnectionTest, AClientWaitsForMemoryOnAnotherReactorAndWhoStallsThereIsClosed) {
    ConnectionLimits limits;
    limits.stall_ms_max = 200;
    auto pot = std::make_shared<MemoryPot>(32 * kMiB, 2);
    Start(limits, {}, pot);
    Client& hoarder = Connect();
    hoarder.SendBytes(RequestHeader(wire::kCmdRead, 0, 16 * kMiB, 1));
    int there = 0;
    while (ioctl(hoarder.fd(), FIONREAD, &there) == 0 && there == 0) std::this_thread::yield();

    Result<std::unique_ptr<Reactor>> reactor = Reactor::Start({});
    ASSERT_TRUE(reactor.ok()) << reactor.error().message;
    FakeVolume volume(*reactor.value(), kSize);
    ConnectionHost host(*reactor.value(), limits, pot);
    int fds[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    std::promise<void> ended;
    RunOn(*reactor.value(),
          [&] { host.Start(fds[0], TransmissionOptions(), volume, [&] { ended.set_value(); }); });
    Client client(fds[1], false);
    EXPECT_EQ(client.Ask(wire::kCmdRead, 0, 16 * kMiB).error, 0u);
    WaitUntilEnded(0);
    client.Close();
    ended.get_future().wait();
    reactor.value()->Stop();
}

TEST_F(ConnectionTest, ConnectionsShareTheHostsMemoryWhenThereIsLittle) {
    ConnectionLimits limits;
    limits.host_bytes_max = kMiB;
    Start(limits);
    constexpr int kClients = 8;
    std::vector<std::thread> threads;
    std::vector<Client*> clients;
    for (int c = 0; c < kClients; ++c) clients.push_back(&Connect());
    for (int c = 0; c < kClients; ++c) {
        threads.emplace_back([client = clients[c], c] {
            std::string stream;
            for (uint64_t i = 0; i < 50; ++i) {
                stream += client->Prepare(wire::kCmdRead, c * kMiB, 200'000, i);
            }
            client->SendBytes(stream);
            for (int i = 0; i < 50; ++i) EXPECT_EQ(client->Next().error, 0u);
        });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(On([&] { return host_->bytes_in_flight(); }), 0u);
}

TEST_F(ConnectionTest, LargeRepliesAndPayloadsLeaveAndArriveInPieces) {
    Client& client = Connect(Structured());
    On([&] { volume_->Map(0, 12 * kMiB, true); });
    std::string expected = Pattern(12 * kMiB, 8);
    On([&] { std::memcpy(volume_->data(), expected.data(), expected.size()); });
    // Whole pieces, a little more and a little less; holes between.
    for (const uint32_t length : {2 * kMiB - 28, 2 * kMiB, 2 * kMiB + 1, 5 * kMiB + 77}) {
        EXPECT_TRUE(client.Ask(wire::kCmdRead, 4096, length).data == expected.substr(4096, length));
    }
    for (const uint32_t length : {kMiB, kMiB + 28, kMiB + 40'000, 3 * kMiB + 5}) {
        const std::string text = Pattern(length, length);
        EXPECT_EQ(client.Ask(wire::kCmdWrite, 777, length, 0, text).error, 0u);
        expected.replace(777, length, text);
    }
    On([&] {
        for (uint64_t at = 0; at < 8 * kMiB; at += 2 * kMiB) {
            volume_->Map(at, kMiB, false);
            std::memset(volume_->data() + at, 0, kMiB);
        }
    });
    for (uint64_t at = 0; at < 8 * kMiB; at += 2 * kMiB) expected.replace(at, kMiB, kMiB, '\0');
    EXPECT_TRUE(client.Ask(wire::kCmdRead, 0, 11 * kMiB).data == expected.substr(0, 11 * kMiB));
}

TEST_F(ConnectionTest, AnIdleConnectionCostsLittle) {
    constexpr size_t kConnections = 1000;
    Connect().Ask(wire::kCmdWrite, 0, kMiB, 0, Pattern(kMiB, 1));
    const size_t before = mallinfo2().uordblks;
    for (size_t i = 0; i < kConnections; ++i) {
        // Not quite unused: each has written and read once.
        Client& client = Connect();
        client.Ask(wire::kCmdWrite, i * 4096, 4096, 0, Pattern(4096, 1));
        client.Ask(wire::kCmdRead, i * 4096, 4096);
    }
    const size_t after = mallinfo2().uordblks;
    EXPECT_LT((after - before) / kConnections, 16u << 10);
}

// ---- a client of flesh and blood

/// Negotiates as a server that has one export, just enough for libnbd.
void Negotiate(int fd, bool structured) {
    const auto receive = [fd](void* to, size_t bytes) {
        ASSERT_EQ(recv(fd, to, bytes, MSG_WAITALL), static_cast<ssize_t>(bytes));
    };
    const auto reply = [fd](uint32_t option, uint32_t type, const std::string& data) {
        wire::OptionReply header;
        header.option = option;
        header.type = type;
        header.length = static_cast<uint32_t>(data.size());
        std::string out(reinterpret_cast<const char*>(&header), sizeof header);
        out += data;
        ASSERT_EQ(write(fd, out.data(), out.size()), static_cast<ssize_t>(out.size()));
    };
    wire::Greeting greeting;
    greeting.flags = wire::kHandshakeFixedNewstyle | wire::kHandshakeNoZeroes;
    ASSERT_EQ(write(fd, &greeting, sizeof greeting), static_cast<ssize_t>(sizeof greeting));
    wire::U32 client_flags;
    receive(&client_flags, sizeof client_flags);
    for (;;) {
        wire::OptionHeader header;
        receive(&header, sizeof header);
        std::string data(header.length, 0);
        if (!data.empty()) receive(data.data(), data.size());
        const uint32_t option = header.option;
        if (option == wire::kOptStructuredReply && structured) {
            reply(option, wire::kRepAck, "");
        } else if (option == wire::kOptSetMetaContext) {
            std::string context;
            AppendBig(context, uint32_t{77});
            reply(option, wire::kRepMetaContext, context + "base:allocation");
            reply(option, wire::kRepAck, "");
        } else if (option == wire::kOptGo) {
            wire::InfoExport info;
            info.size = kSize;
            info.flags = TransmissionFlags(false, structured);
            reply(option, wire::kRepInfo,
                  std::string(reinterpret_cast<const char*>(&info), sizeof info));
            return reply(option, wire::kRepAck, "");
        } else {
            reply(option, wire::kRepErrUnsupported, "");
        }
    }
}

class LibnbdTest : public ConnectionTest {
  protected:
    ~LibnbdTest() override {
        if (nbd_) nbd_close(nbd_);
    }
    nbd_handle* ConnectLibnbd(bool structured) {
        int fds[2];
        EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
        std::thread server([&] { Negotiate(fds[0], structured); });
        nbd_ = nbd_create();
        nbd_add_meta_context(nbd_, LIBNBD_CONTEXT_BASE_ALLOCATION);
        nbd_set_strict_mode(nbd_, 0);
        EXPECT_EQ(nbd_connect_socket(nbd_, fds[1]), 0) << nbd_get_error();
        server.join();
        Served& served = served_.emplace_back();
        TransmissionOptions options = structured ? Structured() : TransmissionOptions{};
        On([&] {
            served.connection = host_->Start(fds[0], std::move(options), *volume_,
                                             [&served] { served.ended.set_value(); });
        });
        return nbd_;
    }
    nbd_handle* nbd_ = nullptr;
};

TEST_F(LibnbdTest, EveryCommandWorks) {
    for (const bool structured : {false, true}) {
        nbd_handle* nbd = ConnectLibnbd(structured);
        const std::string text = Pattern(3 * kMiB, 11);
        std::string read(text.size(), 0);
        EXPECT_EQ(nbd_pwrite(nbd, text.data(), text.size(), kMiB, LIBNBD_CMD_FLAG_FUA), 0)
            << nbd_get_error();
        EXPECT_EQ(nbd_pread(nbd, read.data(), read.size(), kMiB, 0), 0) << nbd_get_error();
        EXPECT_TRUE(read == text);
        EXPECT_EQ(nbd_flush(nbd, 0), 0);
        EXPECT_EQ(nbd_cache(nbd, kMiB, 0, 0), 0);
        EXPECT_EQ(nbd_zero(nbd, kMiB, kMiB, LIBNBD_CMD_FLAG_FAST_ZERO), 0);
        EXPECT_EQ(nbd_zero(nbd, 4096, 2 * kMiB, LIBNBD_CMD_FLAG_NO_HOLE), 0);
        EXPECT_EQ(nbd_trim(nbd, 4096, 3 * kMiB, 0), 0);
        EXPECT_EQ(nbd_pread(nbd, read.data(), read.size(), kMiB, 0), 0) << nbd_get_error();
        EXPECT_TRUE(read.substr(0, kMiB) == std::string(kMiB, '\0'));
        EXPECT_TRUE(read.substr(2 * kMiB + 4096) == text.substr(2 * kMiB + 4096));
        EXPECT_EQ(nbd_pread(nbd, read.data(), 4096, kSize, 0), -1);
        EXPECT_EQ(nbd_get_errno(), EINVAL);
        EXPECT_EQ(nbd_pwrite(nbd, text.data(), 4096, kSize, 0), -1);
        EXPECT_EQ(nbd_get_errno(), ENOSPC);
        EXPECT_EQ(nbd_zero(nbd, 4096, 0, LIBNBD_CMD_FLAG_FAST_ZERO | LIBNBD_CMD_FLAG_NO_HOLE), -1);
        EXPECT_EQ(nbd_get_errno(), ENOTSUP);
        EXPECT_EQ(nbd_shutdown(nbd, 0), 0) << nbd_get_error();
        WaitUntilEnded(served_.size() - 1);
        nbd_close(std::exchange(nbd_, nullptr));
    }
}

TEST_F(LibnbdTest, BlockStatusCoversTheDisk) {
    nbd_handle* nbd = ConnectLibnbd(true);
    On([&] {
        for (uint64_t b = 0; b < kSize; b += 3 * 4096) volume_->Map(b, 4096, true);
    });
    uint64_t offset = 0, data = 0;
    struct Sum {
        uint64_t* offset;
        uint64_t* data;
    } sum{&offset, &data};
    const auto add = [](void* user, const char*, uint64_t, uint32_t* entries, size_t count,
                        int*) -> int {
        Sum* s = static_cast<Sum*>(user);
        for (size_t i = 0; i < count; i += 2) {
            *s->offset += entries[i];
            if (entries[i + 1] == 0) *s->data += entries[i];
        }
        return 0;
    };
    while (offset < kSize) {
        nbd_extent_callback callback{};
        callback.callback = add;
        callback.user_data = &sum;
        ASSERT_EQ(nbd_block_status(nbd, kSize - offset, offset, callback, 0), 0) << nbd_get_error();
    }
    EXPECT_EQ(offset, kSize);
    EXPECT_EQ(data, (kSize / 4096 + 2) / 3 * 4096);
}

}  // namespace
}  // namespace varve::nbdserver
