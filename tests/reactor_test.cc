// Reactor: posting from everywhere, operations of every kind, small queues, a clean stop.
#include "base/reactor.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <filesystem>
#include <future>
#include <numeric>
#include <thread>
#include <vector>

#include "base/buffers.h"
#include "tests/polling.h"
#include "tests/run_on.h"

namespace varve {
namespace {

std::unique_ptr<Reactor> StartReactor(ReactorOptions options = {}) {
    Result<std::unique_ptr<Reactor>> reactor = Reactor::Start(std::move(options));
    if (!reactor.ok()) {
        ADD_FAILURE() << reactor.error().message;
        std::abort();
    }
    return std::move(reactor.value());
}

/// An operation whose result a test's thread can wait for.
template <typename Base>
struct Waited : Base {
    std::promise<int32_t> promise;
    bool starting = false;

    Waited() {
        this->done = [](Op* op, int32_t result) {
            Waited* self = static_cast<Waited*>(op);
            EXPECT_FALSE(self->starting) << "completed inside the call that started it";
            self->promise.set_value(result);
        };
    }
    int32_t Result() { return promise.get_future().get(); }
};
using WaitedOp = Waited<Op>;
using WaitedTimer = Waited<TimerOp>;

struct SocketPair {
    int ours = -1;
    int theirs = -1;
    SocketPair() {
        int fds[2];
        EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, fds), 0);
        ours = fds[0];
        theirs = fds[1];
    }
    SocketPair(const SocketPair&) = delete;
    ~SocketPair() {
        close(ours);
        if (theirs >= 0) close(theirs);
    }
    void CloseTheirs() { close(std::exchange(theirs, -1)); }
};

/// Receives with lent memory until the peer has sent its last byte.
struct Collector : ReceiveOp {
    Reactor& reactor;
    const int fd;
    std::string received;
    std::promise<void> finished;

    Collector(Reactor& r, int f) : reactor(r), fd(f) {
        done = [](Op* op, int32_t result) {
            Collector& self = *static_cast<Collector*>(op);
            EXPECT_GE(result, 0);
            if (result <= 0) return self.finished.set_value();
            const auto bytes = self.reactor.Received(self);
            self.received.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
            self.reactor.ReturnReceived(self);
            self.Next();
        };
    }
    void Next() { reactor.Receive(*this, fd, 0); }
};

struct Append : Runnable {
    std::vector<int>* to = nullptr;
    int value = 0;
    Append() {
        run = [](Runnable* self) {
            Append* a = static_cast<Append*>(self);
            a->to->push_back(a->value);
        };
    }
};

TEST(Reactor, RunsWhatIsPostedInOrderOfEachThread) {
    auto reactor = StartReactor();
    constexpr int kThreads = 4;
    constexpr int kPosts = 20'000;
    std::vector<int> ran;
    std::vector<Append> posts(kThreads * kPosts);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&, t] {
            for (int i = t * kPosts; i < (t + 1) * kPosts; ++i) {
                posts[i].to = &ran;
                posts[i].value = i;
                reactor->Post(&posts[i]);
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
    reactor->Stop();
    ASSERT_EQ(ran.size(), posts.size());
    std::vector<int> next(kThreads);
    for (const int value : ran) EXPECT_EQ(value % kPosts, next[value / kPosts]++);
}

TEST(Reactor, PostFromItsOwnThreadRunsLaterAndInOrder) {
    auto reactor = StartReactor();
    std::vector<int> ran;
    std::array<Append, 3> posts;
    RunOn(*reactor, [&] {
        EXPECT_TRUE(reactor->InThread());
        for (int i = 0; i < 3; ++i) {
            posts[i].to = &ran;
            posts[i].value = i;
            reactor->Post(&posts[i]);
        }
        EXPECT_TRUE(ran.empty());
    });
    EXPECT_FALSE(reactor->InThread());
    reactor->Stop();
    EXPECT_EQ(ran, (std::vector<int>{0, 1, 2}));
}

TEST(Reactor, AQueueOfFourEntriesTakesAnyNumberOfOperations) {
    ReactorOptions options;
    options.queue_entries = 4;
    options.completion_entries = 8;
    auto reactor = StartReactor(options);
    char path[] = "/tmp/varve-reactor-XXXXXX";
    const int fd = mkstemp(path);
    ASSERT_GE(fd, 0);
    unlink(path);
    constexpr size_t kOps = 300;
    std::deque<WaitedOp> ops(kOps);
    std::vector<uint64_t> values(kOps);
    std::vector<iovec> vectors(kOps);
    std::iota(values.begin(), values.end(), 1000);
    const auto run = [&](auto start) {
        RunOn(*reactor, [&] {
            for (size_t i = 0; i < kOps; ++i) {
                vectors[i] = {&values[i], sizeof values[i]};
                ops[i].promise = {};
                ops[i].starting = true;
                start(i);
                ops[i].starting = false;
            }
        });
        for (WaitedOp& op : ops) EXPECT_EQ(op.Result(), 8);
    };
    run([&](size_t i) { reactor->Write(ops[i], fd, &vectors[i], 1, i * 8); });
    std::fill(values.begin(), values.end(), 0);
    run([&](size_t i) { reactor->Read(ops[i], fd, &vectors[i], 1, i * 8); });
    for (size_t i = 0; i < kOps; ++i) EXPECT_EQ(values[i], 1000 + i);
    reactor->Stop();
    close(fd);
}

TEST(Reactor, ReadsAndWritesSeveralVectorsAndSyncs) {
    auto reactor = StartReactor();
    char path[] = "/tmp/varve-reactor-XXXXXX";
    const int fd = mkstemp(path);
    ASSERT_GE(fd, 0);
    unlink(path);
    std::string a = "first ", b = "second";
    const iovec out[2] = {{a.data(), 6}, {b.data(), 6}};
    WaitedOp write, sync, read, bad;
    RunOn(*reactor, [&] { reactor->Write(write, fd, out, 2, 100); });
    EXPECT_EQ(write.Result(), 12);
    RunOn(*reactor, [&] { reactor->DataSync(sync, fd); });
    EXPECT_EQ(sync.Result(), 0);
    std::string c(5, 0), d(20, 0);
    const iovec in[2] = {{c.data(), 5}, {d.data(), 20}};
    RunOn(*reactor, [&] { reactor->Read(read, fd, in, 2, 100); });
    EXPECT_EQ(read.Result(), 12);
    EXPECT_EQ(c + d.substr(0, 7), "first second");
    RunOn(*reactor, [&] { reactor->Read(bad, -1, in, 1, 0); });
    EXPECT_EQ(bad.Result(), -EBADF);
    reactor->Stop();
    close(fd);
}

TEST(Reactor, TransfersAreUnderWayWhileOthersArePrepared) {
    auto reactor = StartReactor();
    const int fd = memfd_create("varve", MFD_CLOEXEC);
    ASSERT_EQ(ftruncate(fd, 4096), 0);
    std::deque<WaitedOp> ops(10);
    char byte = 0;
    iovec vector{&byte, 1};
    std::vector<uint64_t> entered;
    uint64_t turn = 0;
    RunOn(*reactor, [&] {
        const uint64_t before = reactor->enters();
        turn = reactor->turn();
        for (WaitedOp& op : ops) {
            reactor->Read(op, fd, &vector, 1, 0);
            entered.push_back(reactor->enters() - before);
        }
        EXPECT_EQ(reactor->turn(), turn);
    });
    EXPECT_EQ(entered, (std::vector<uint64_t>{0, 0, 0, 1, 1, 1, 1, 2, 2, 2}));
    for (WaitedOp& op : ops) EXPECT_EQ(op.Result(), 1);
    RunOn(*reactor, [&] { EXPECT_GT(reactor->turn(), turn); });  // what completes has another
    reactor->Stop();
    close(fd);
}

TEST(Reactor, FewLentBuffersServeManySockets) {
    ReactorOptions options;
    options.receive_buffers = 2;
    options.receive_buffer_bytes = 4096;
    auto reactor = StartReactor(options);
    constexpr int kSockets = 40;
    std::deque<SocketPair> pairs(kSockets);
    std::deque<Collector> collectors;
    for (SocketPair& pair : pairs) collectors.emplace_back(*reactor, pair.ours);
    const std::string text(20'000, 'x');
    // All have data before the first receive, so that all want a buffer at once.
    for (int i = 0; i < kSockets; ++i) {
        const std::string numbered = text + std::to_string(i);
        ASSERT_EQ(write(pairs[i].theirs, numbered.data(), numbered.size()),
                  static_cast<ssize_t>(numbered.size()));
        pairs[i].CloseTheirs();
    }
    RunOn(*reactor, [&] {
        for (Collector& collector : collectors) collector.Next();
    });
    for (int i = 0; i < kSockets; ++i) {
        collectors[i].finished.get_future().wait();
        EXPECT_EQ(collectors[i].received, text + std::to_string(i));
    }
    reactor->Stop();
}

TEST(Reactor, ReceiveTakesNoMoreThanAsked) {
    auto reactor = StartReactor();
    SocketPair pair;
    ASSERT_EQ(write(pair.theirs, "headerpayload", 13), 13);
    Waited<ReceiveOp> header;
    RunOn(*reactor, [&] { reactor->Receive(header, pair.ours, 6); });
    EXPECT_EQ(header.Result(), 6);
    RunOn(*reactor, [&] {
        EXPECT_EQ(std::memcmp(reactor->Received(header).data(), "header", 6), 0);
        reactor->ReturnReceived(header);
    });
    std::string payload(7, 0);
    WaitedOp rest;
    RunOn(*reactor, [&] {
        reactor->ReceiveSome(rest, pair.ours, std::as_writable_bytes(std::span(payload)));
    });
    EXPECT_EQ(rest.Result(), 7);
    EXPECT_EQ(payload, "payload");
    reactor->Stop();
}

TEST(Reactor, ReceiveSomeEndsWithWhatIsThereAndTellsTheEndOfTheStream) {
    auto reactor = StartReactor();
    SocketPair pair;
    std::string memory(1 << 20, 0);
    for (const std::string sent : {"abc", "d"}) {
        WaitedOp some;
        RunOn(*reactor, [&] {
            reactor->ReceiveSome(some, pair.ours, std::as_writable_bytes(std::span(memory)));
        });
        ASSERT_EQ(write(pair.theirs, sent.data(), sent.size()), static_cast<ssize_t>(sent.size()));
        EXPECT_EQ(some.Result(), static_cast<int32_t>(sent.size()));
        EXPECT_EQ(memory.substr(0, sent.size()), sent);
    }
    pair.CloseTheirs();
    WaitedOp end;
    RunOn(*reactor,
          [&] { reactor->ReceiveSome(end, pair.ours, std::as_writable_bytes(std::span(memory))); });
    EXPECT_EQ(end.Result(), 0);
    reactor->Stop();
}

TEST(Reactor, SendSomeSendsWhatThereIsRoomForAndWaitsForSome) {
    auto reactor = StartReactor();
    SocketPair pair;
    std::string a(5 << 20, 'a'), b(3 << 20, 'b');
    iovec vectors[2] = {{a.data(), a.size()}, {b.data(), b.size()}};
    msghdr message{};
    message.msg_iov = vectors;
    message.msg_iovlen = 2;
    WaitedOp first;
    RunOn(*reactor, [&] { reactor->SendSome(first, pair.ours, message); });
    const int32_t sent = first.Result();
    EXPECT_GT(sent, 0);
    EXPECT_LT(sent, static_cast<int32_t>(a.size()));
    WaitedOp second;  // there is no room
    RunOn(*reactor, [&] { reactor->SendSome(second, pair.ours, message); });
    std::string received(static_cast<size_t>(sent), 0);
    for (size_t at = 0; at < received.size();) {
        const ssize_t n = read(pair.theirs, received.data() + at, received.size() - at);
        ASSERT_GT(n, 0);
        at += static_cast<size_t>(n);
    }
    EXPECT_EQ(received, a.substr(0, received.size()));
    EXPECT_GT(second.Result(), 0);
    pair.CloseTheirs();
    WaitedOp broken;
    RunOn(*reactor, [&] { reactor->SendSome(broken, pair.ours, message); });
    EXPECT_EQ(broken.Result(), -EPIPE);
    reactor->Stop();
}

TEST(Reactor, TimersFireAndCanBeCancelled) {
    auto reactor = StartReactor();
    WaitedTimer soon, late;
    RunOn(*reactor, [&] {
        reactor->StartTimer(soon, 1'000'000);
        reactor->StartTimer(late, kHour);
        EXPECT_EQ(reactor->in_flight(), 2u);
    });
    EXPECT_EQ(soon.Result(), 0);
    RunOn(*reactor, [&] {
        reactor->Cancel(late);
        reactor->Cancel(soon);  // is over: nothing happens
    });
    EXPECT_EQ(late.Result(), -ECANCELED);
    reactor->Stop();
}

TEST(Reactor, AWaitingReceiveCanBeCancelled) {
    auto reactor = StartReactor();
    SocketPair pair;
    Waited<ReceiveOp> receive;
    RunOn(*reactor, [&] { reactor->Receive(receive, pair.ours, 0); });
    RunOn(*reactor, [&] { reactor->Cancel(receive); });
    EXPECT_EQ(receive.Result(), -ECANCELED);
    reactor->Stop();
}

TEST(Reactor, HooksRunOncePerTurnAfterEverythingElse) {
    auto reactor = StartReactor();
    struct Log : BatchHook, Runnable {
        std::vector<std::string> lines;
        Reactor* reactor = nullptr;
    } log;
    log.reactor = reactor.get();
    log.BatchHook::run = [](BatchHook* hook) { static_cast<Log*>(hook)->lines.push_back("hook"); };
    log.Runnable::run = [](Runnable* self) {
        Log* l = static_cast<Log*>(self);
        l->lines.push_back("posted");
        l->reactor->AtBatchEnd(*l);
    };
    RunOn(*reactor, [&] {
        reactor->AtBatchEnd(log);
        reactor->AtBatchEnd(log);
        reactor->Post(&log);
    });
    reactor->Stop();
    EXPECT_EQ(log.lines, (std::vector<std::string>{"posted", "hook"}));
}

/// With a poll that would last for an hour, whatever is not noticed hangs.
TEST(Reactor, APollEndsWithWhatComesFirst) {
    auto reactor = StartReactor({.poll_nanoseconds = kHour});
    SocketPair pair;
    Waited<ReceiveOp> receive;
    RunOn(*reactor, [&] {
        reactor->Receive(receive, pair.ours, 0);
        reactor->ExpectSoon();
    });
    EXPECT_EQ(write(pair.theirs, "a", 1), 1);
    EXPECT_EQ(receive.Result(), 1);
    WaitedTimer timer;
    RunOn(*reactor, [&] {
        reactor->ReturnReceived(receive);
        reactor->StartTimer(timer, 1'000'000);
        reactor->ExpectSoon();
    });
    EXPECT_EQ(timer.Result(), 0);
    RunOn(*reactor, [&] { reactor->ExpectSoon(); });
    RunOn(*reactor, [&] { reactor->ExpectSoon(); });
    reactor->Stop();
}

TEST(Reactor, APollForAPostEndsWithIt) {
    auto reactor = StartReactor({.poll_nanoseconds = kHour});
    RunOn(*reactor, [&] { reactor->ExpectPost(); });
    ExpectPolling(*reactor);
    RunOn(*reactor, [] {});
    WaitedTimer timer;
    RunOn(*reactor, [&] {
        reactor->StartTimer(timer, 1'000'000);
        reactor->ExpectPost();
    });
    EXPECT_EQ(timer.Result(), 0);
    reactor->Stop();
}

void ExpectPollsToBecomeRare(void (*expect)(Reactor&)) {
    auto reactor = StartReactor({.poll_nanoseconds = 1'000'000});
    for (int i = 0; i < 127; ++i) {
        WaitedTimer timer;
        RunOn(*reactor, [&] {
            reactor->StartTimer(timer, 4'000'000);
            expect(*reactor);
        });
        EXPECT_EQ(timer.Result(), 0);
    }
    EXPECT_GE(reactor->polls(), 1u);
    EXPECT_LE(reactor->polls(), 40u);  // 7, if all of them last as long as they should
    reactor->Stop();
}

TEST(Reactor, PollsThatFindNothingBecomeRare) {
    ExpectPollsToBecomeRare([](Reactor& reactor) { reactor.ExpectSoon(); });
    ExpectPollsToBecomeRare([](Reactor& reactor) { reactor.ExpectPost(); });
}

/// What comes meanwhile, each 100 us for a second, does not give a poll of 1 ms another one.
TEST(Reactor, APollThatIsInterruptedEndsInTime) {
    auto reactor = StartReactor({.poll_nanoseconds = 1'000'000});
    struct Ticking : TimerOp {
        Reactor* reactor = nullptr;
        int left = 10'000;
        std::promise<void> over;
    } ticking;
    ticking.reactor = reactor.get();
    ticking.done = [](Op* op, int32_t) {
        auto* self = static_cast<Ticking*>(op);
        if (--self->left == 0) return self->over.set_value();
        self->reactor->StartTimer(*self, 100'000);
    };
    RunOn(*reactor, [&] {
        reactor->StartTimer(ticking, 100'000);
        reactor->ExpectPost();
    });
    ticking.over.get_future().wait();
    EXPECT_LT(reactor->enters(), 40'000u);  // two for each tick, and those of the poll
    reactor->Stop();
}

/// A thread that was told of a receive and of a post, and got both, sleeps: else the polls, of an
/// hour, would go on.
TEST(Reactor, WhatHasComeIsNotExpectedAnyMore) {
    auto reactor = StartReactor({.poll_nanoseconds = kHour});
    SocketPair pair;
    Waited<ReceiveOp> receive;
    EXPECT_EQ(write(pair.theirs, "a", 1), 1);
    RunOn(*reactor, [&] {
        reactor->Receive(receive, pair.ours, 0);
        reactor->ExpectSoon();
        reactor->ExpectPost();
    });
    EXPECT_EQ(receive.Result(), 1);
    RunOn(*reactor, [&] { reactor->ReturnReceived(receive); });
    WaitedTimer timer;
    RunOn(*reactor, [&] { reactor->StartTimer(timer, 50'000'000); });
    const uint64_t before = reactor->enters();
    EXPECT_EQ(timer.Result(), 0);
    EXPECT_LE(reactor->enters() - before, 10u);
    reactor->Stop();
}

TEST(Reactor, ASleepingReactorEntersTheKernelOnlyWhenThereIsWork) {
    auto reactor = StartReactor();
    SocketPair pair;
    Waited<ReceiveOp> receive;
    RunOn(*reactor, [&] { reactor->Receive(receive, pair.ours, 0); });
    RunOn(*reactor, [] {});
    const uint64_t before = reactor->enters();
    for (int i = 0; i < 100; ++i) RunOn(*reactor, [] {});
    EXPECT_LE(reactor->enters() - before, 300u);
    pair.CloseTheirs();
    EXPECT_EQ(receive.Result(), 0);
    reactor->Stop();
}

TEST(Reactor, StopWaitsForWhatIsInFlight) {
    auto reactor = StartReactor();
    struct Restarted : TimerOp {
        Reactor* reactor = nullptr;
        int left = 3;
    } timer;
    timer.reactor = reactor.get();
    timer.done = [](Op* op, int32_t) {
        Restarted* self = static_cast<Restarted*>(op);
        if (--self->left) self->reactor->StartTimer(*self, 1'000'000);
    };
    RunOn(*reactor, [&] { reactor->StartTimer(timer, 1'000'000); });
    reactor->Stop();
    EXPECT_EQ(timer.left, 0);
}

/// In a child: makes io_uring_setup fail with `error`, then says why a reactor cannot start.
[[noreturn]] void StartWithoutUring(int error) {
    sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | static_cast<uint32_t>(error)),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const sock_fprog program = {4, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, 2, &program)) _exit(2);
    Result<std::unique_ptr<Reactor>> reactor = Reactor::Start({});
    if (reactor.ok()) _exit(3);
    std::fprintf(stderr, "%s\n", reactor.error().message.c_str());
    _exit(1);
}

TEST(Reactor, ClosesWhatItOpened) {
    const auto descriptors = [] {
        return std::distance(std::filesystem::directory_iterator("/proc/self/fd"),
                             std::filesystem::directory_iterator());
    };
    const auto before = descriptors();
    Result<std::unique_ptr<Reactor>> reactor = Reactor::Start({});
    ASSERT_TRUE(reactor.ok());
    EXPECT_GT(descriptors(), before);
    reactor.value().reset();
    EXPECT_EQ(descriptors(), before);
}

TEST(ReactorDeathTest, SaysWhyIoUringCannotBeUsed) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    EXPECT_EXIT(StartWithoutUring(ENOSYS), testing::ExitedWithCode(1),
                "io_uring cannot be used: this kernel has none, or a seccomp.*Linux 6.1 or later");
    EXPECT_EXIT(StartWithoutUring(EPERM), testing::ExitedWithCode(1),
                "io_uring cannot be used: (a seccomp filter|it is switched off)");
    EXPECT_EXIT(StartWithoutUring(EINVAL), testing::ExitedWithCode(1), "Linux 6.1 or later");
}

}  // namespace
}  // namespace varve
