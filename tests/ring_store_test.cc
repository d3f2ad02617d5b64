// RingStore: files through the ring and in memory, short transfers, alignment, errors.
#include "nbdserver/storage/ring_store.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <future>
#include <random>
#include <string>
#include <vector>

#include "base/buffers.h"
#include "tests/run_on.h"

namespace varve::nbdserver {
namespace {

using Kind = cow::BlockIo::Kind;

/// A reactor and a store on `fd`.
class Fixture {
  public:
    Fixture(int fd, FileTraits traits, int64_t quick_sync_nanoseconds = 0) : fd_(fd) {
        Result<std::unique_ptr<Reactor>> reactor = Reactor::Start({});
        VARVE_CHECK(reactor.ok());
        reactor_ = std::move(reactor.value());
        std::shared_ptr<const FileMapping> mapping;
        if (traits.in_memory) {
            mapping = FileMapping::Map(fd);
            EXPECT_TRUE(mapping);
        }
        store_ =
            std::make_unique<RingStore>(*reactor_, fd, traits, mapping, quick_sync_nanoseconds);
    }
    ~Fixture() {
        reactor_->Stop();
        EXPECT_EQ(store_->in_flight(), 0u);
        store_.reset();
        close(fd_);
    }

    struct Waited : cow::BlockIo {
        std::promise<Errno> promise;
        bool starting = false;
    };
    /// Starts all of `ios` in one go, and posts `then`; returns their errors.
    std::vector<Errno> Run(std::vector<Waited>& ios, Runnable* then = nullptr) {
        RunOn(*reactor_, [&] {
            for (Waited& io : ios) {
                io.done = [](cow::BlockIo* self) {
                    Waited* waited = static_cast<Waited*>(self);
                    EXPECT_FALSE(waited->starting) << "completed inside Submit";
                    waited->promise.set_value(waited->error);
                };
                io.starting = true;
                if (store_->DoNow(io)) {
                    io.promise.set_value(io.error);
                } else {
                    store_->Submit(io);
                }
                io.starting = false;
            }
            if (then) reactor_->Post(then);
        });
        std::vector<Errno> errors;
        for (Waited& io : ios) errors.push_back(io.promise.get_future().get());
        RunOn(*reactor_, [] {});  // the last set_value has returned
        return errors;
    }
    bool DoNow(Kind kind, uint64_t offset, iovec memory) {
        cow::BlockIo io;
        io.kind = kind;
        io.offset = offset;
        io.vectors = &memory;
        io.vector_count = 1;
        bool now = false;
        RunOn(*reactor_, [&] { now = store_->DoNow(io); });
        EXPECT_EQ(io.error, 0);
        return now;
    }
    uint64_t syncs_done_now() const { return store_->syncs_done_now(); }
    uint64_t transfers_done_here() const { return store_->transfers_done_here(); }
    Errno Run(Kind kind, uint64_t offset, std::vector<iovec> vectors) {
        std::vector<Waited> ios(1);
        ios[0].kind = kind;
        ios[0].offset = offset;
        ios[0].vectors = vectors.data();
        ios[0].vector_count = static_cast<uint32_t>(vectors.size());
        return Run(ios)[0];
    }

    /// Writes pieces of zeros side by side in one turn; returns how many transfers the ring has
    /// then.
    uint64_t HandedOver(size_t pieces, size_t bytes) {
        struct Look : Runnable {
            Reactor* reactor = nullptr;
            uint64_t in_flight = 0;
        } look;
        look.reactor = reactor_.get();
        look.run = [](Runnable* self) {
            auto* it = static_cast<Look*>(self);
            it->in_flight = it->reactor->in_flight();
        };
        std::string zeros(bytes, 0);
        iovec memory{zeros.data(), bytes};
        std::vector<Waited> ios(pieces);
        for (size_t i = 0; i < pieces; ++i) {
            ios[i].kind = Kind::kWrite;
            ios[i].offset = i * bytes;
            ios[i].vectors = &memory;
            ios[i].vector_count = 1;
        }
        // What is posted after them runs when they have started.
        EXPECT_EQ(Run(ios, &look), std::vector<Errno>(pieces, 0));
        return look.in_flight;
    }

  private:
    const int fd_;
    std::unique_ptr<Reactor> reactor_;
    std::unique_ptr<RingStore> store_;
};

int TemporaryFile(int flags) {
    char path[] = "/tmp/varve-store-XXXXXX";
    const int made = mkstemp(path);
    EXPECT_GE(made, 0);
    const int fd = open(path, O_RDWR | O_CLOEXEC | flags);
    EXPECT_GE(fd, 0) << std::strerror(errno);
    close(made);
    unlink(path);
    return fd;
}

FileTraits Probe(int fd, bool direct) {
    Result<FileTraits> traits = ProbeFile(fd, direct);
    EXPECT_TRUE(traits.ok()) << traits.error().message;
    return traits.value();
}

/// Writes and reads 200 blocks in parallel, in vectors of their own, and as one long transfer.
void CheckTransfers(int fd, FileTraits traits) {
    Fixture fixture(fd, traits);
    BufferPool pool(0);
    constexpr size_t kBlocks = 200;
    Buffer written = pool.Take(kBlocks * 4096);
    Buffer read = pool.Take(kBlocks * 4096);
    std::mt19937 random(7);
    for (size_t i = 0; i < written.size(); ++i) written.data()[i] = std::byte(random());

    std::vector<Fixture::Waited> ios(kBlocks);
    std::vector<iovec> vectors(kBlocks);
    for (size_t i = 0; i < kBlocks; ++i) {
        vectors[i] = {written.data() + i * 4096, 4096};
        ios[i].kind = Kind::kWrite;
        ios[i].offset = (kBlocks - 1 - i) * 4096;  // mirrored
        ios[i].vectors = &vectors[i];
        ios[i].vector_count = 1;
    }
    EXPECT_EQ(fixture.Run(ios), std::vector<Errno>(kBlocks, 0));
    EXPECT_EQ(fixture.Run(Kind::kSync, 0, {}), 0);

    std::vector<iovec> mirrored(kBlocks);
    for (size_t i = 0; i < kBlocks; ++i) {
        mirrored[i] = {read.data() + (kBlocks - 1 - i) * 4096, 4096};
    }
    EXPECT_EQ(fixture.Run(Kind::kRead, 0, mirrored), 0);
    EXPECT_EQ(std::memcmp(written.data(), read.data(), written.size()), 0);

    EXPECT_EQ(fixture.Run(Kind::kWrite, 8192, {{written.data(), written.size()}}), 0);
    std::memset(read.data(), 0, read.size());
    EXPECT_EQ(fixture.Run(Kind::kRead, 8192, {{read.data(), read.size()}}), 0);
    EXPECT_EQ(std::memcmp(written.data(), read.data(), written.size()), 0);

    EXPECT_EQ(fixture.Run(Kind::kAppend, 4096, {{written.data(), 16384}}), 0);
    EXPECT_EQ(fixture.Run(Kind::kRead, 4096, {{read.data(), 16384}}), 0);
    EXPECT_EQ(std::memcmp(written.data(), read.data(), 16384), 0);

    // Behind the end there is nothing to be read.
    EXPECT_EQ(fixture.Run(Kind::kRead, (kBlocks + 2) * 4096, {{read.data(), 4096}}), EIO);
    EXPECT_EQ(fixture.Run(Kind::kRead, (kBlocks + 1) * 4096, {{read.data(), 8192}}), EIO);
}

TEST(RingStore, TransfersThroughThePageCache) {
    const int fd = TemporaryFile(0);
    CheckTransfers(fd, Probe(fd, false));
}

TEST(RingStore, TransfersDirectly) {
    const int fd = TemporaryFile(O_DIRECT);
    const FileTraits traits = Probe(fd, true);
    if (!traits.in_memory) {
        EXPECT_GE(traits.alignment, 512u);
    }
    CheckTransfers(fd, traits);
}

TEST(RingStore, TransfersInMemory) {
    const int fd = memfd_create("varve", MFD_CLOEXEC);
    const FileTraits traits = Probe(fd, false);
    EXPECT_TRUE(traits.in_memory);
    EXPECT_EQ(traits.alignment, 1u);
    CheckTransfers(fd, traits);
}

TEST(RingStore, AFileInMemoryMayGrowAndShrinkUnderItsMapping) {
    const int fd = memfd_create("varve", MFD_CLOEXEC);
    ASSERT_EQ(ftruncate(fd, 4096), 0);
    Fixture fixture(fd, Probe(fd, false));
    std::string read(8192, 'r');
    EXPECT_EQ(fixture.Run(Kind::kRead, 0, {{read.data(), 4096}}), 0);
    EXPECT_EQ(read, std::string(4096, 0) + std::string(4096, 'r'));

    const std::string written(8192, 'w');
    ASSERT_EQ(pwrite(fd, written.data(), 8192, 1 << 20), 8192);
    EXPECT_EQ(fixture.Run(Kind::kRead, 1 << 20, {{read.data(), 1}, {&read[1], 8191}}), 0);
    EXPECT_EQ(read, written);

    ASSERT_EQ(ftruncate(fd, 4096), 0);
    for (int i = 0; i < 3; ++i) {
        EXPECT_EQ(fixture.Run(Kind::kRead, 1 << 20, {{read.data(), 4096}}), EIO);
        EXPECT_EQ(fixture.Run(Kind::kRead, 0, {{read.data(), 4096}, {&read[4096], 4096}}), EIO);
    }
    EXPECT_EQ(fixture.Run(Kind::kRead, uint64_t{1} << 60, {{read.data(), 4096}}), EIO);
    EXPECT_EQ(fixture.Run(Kind::kRead, 0, {{read.data(), 4096}}), 0);
    EXPECT_EQ(read.substr(0, 4096), std::string(4096, 0));
}

TEST(RingStore, OnlyReadsOfWhatIsMappedAreDoneAtOnce) {
    for (const bool in_memory : {false, true}) {
        const int fd = in_memory ? memfd_create("varve", MFD_CLOEXEC) : TemporaryFile(0);
        ASSERT_EQ(pwrite(fd, "text", 4, 0), 4);
        Fixture fixture(fd, Probe(fd, false));
        std::string got = "....";
        const iovec memory{got.data(), 4};
        EXPECT_EQ(fixture.DoNow(Kind::kRead, 0, memory), in_memory);
        EXPECT_EQ(got, in_memory ? "text" : "....");
        EXPECT_FALSE(fixture.DoNow(Kind::kRead, 1 << 20, memory));
        EXPECT_FALSE(fixture.DoNow(Kind::kWrite, 0, memory));
        EXPECT_FALSE(fixture.DoNow(Kind::kSync, 0, memory));
    }
}

TEST(RingStore, OnlyLargeWritesToMemoryAreHandedOver) {
    const int fd = memfd_create("varve", MFD_CLOEXEC);
    Fixture fixture(fd, Probe(fd, false));
    EXPECT_EQ(fixture.HandedOver(1, 4096), 0u);
    EXPECT_EQ(fixture.HandedOver(1, 32 << 10), 0u);
    EXPECT_EQ(fixture.HandedOver(1, 64 << 10), 1u);
    EXPECT_EQ(fixture.HandedOver(1, 1 << 20), 1u);
    EXPECT_EQ(fixture.HandedOver(4, 256 << 10), 4u);
    EXPECT_EQ(fixture.HandedOver(3, 64 << 10), 1u);
    EXPECT_EQ(fixture.HandedOver(64, 4096), 0u);  // they leave together, and at once
}

/// A store on a file whose syncs may be done at once, which is so after as many as it needs to
/// know.
class DirectSyncs : public Fixture {
  public:
    explicit DirectSyncs(int64_t quick = INT64_MAX, uint32_t alignment = 512)
        : DirectSyncs(TemporaryFile(0), quick, alignment) {}
    int fd() const { return fd_; }

    /// How many of `syncs` syncs, one after the other, do not go through the ring.
    uint64_t Sync(unsigned syncs) {
        const uint64_t before = syncs_done_now();
        for (unsigned i = 0; i < syncs; ++i) EXPECT_EQ(Run(Kind::kSync, 0, {}), 0);
        return syncs_done_now() - before;
    }
    /// The same of a sync and a write in one turn, in this order.
    uint64_t Together(Kind first, Kind second) {
        const uint64_t before = syncs_done_now();
        alignas(512) char block[512] = {};
        iovec vector{block, sizeof block};
        std::vector<Waited> ios(2);
        ios[0].kind = first;
        ios[1].kind = second;
        for (Waited& io : ios) {
            io.vectors = &vector;
            io.vector_count = io.kind == Kind::kWrite ? 1 : 0;
        }
        EXPECT_EQ(Run(ios), std::vector<Errno>(2, 0));
        return syncs_done_now() - before;
    }

  private:
    static FileTraits Aligned(uint32_t alignment) {
        FileTraits traits;
        traits.alignment = alignment;
        return traits;
    }
    DirectSyncs(int fd, int64_t quick, uint32_t alignment)
        : Fixture(fd, Aligned(alignment), quick), fd_(fd) {}
    const int fd_;
};

TEST(RingStore, OnlyQuickSyncsOfADeviceAreDoneAtOnce) {
    EXPECT_EQ(DirectSyncs().Sync(RingStore::kQuickSyncs + 36), 36u);
    EXPECT_EQ(DirectSyncs(-1).Sync(100), 0u);            // never quick
    EXPECT_EQ(DirectSyncs(INT64_MAX, 1).Sync(100), 0u);  // the page cache may hold much
}

TEST(RingStore, ASyncBesideAnotherTransferGoesThroughTheRing) {
    DirectSyncs store;
    store.Sync(RingStore::kQuickSyncs);
    EXPECT_EQ(store.Together(Kind::kWrite, Kind::kSync), 0u);
    EXPECT_EQ(store.Together(Kind::kSync, Kind::kWrite), 0u);
    EXPECT_EQ(store.Sync(1), 1u);
    EXPECT_EQ(store.Together(Kind::kSync, Kind::kSync), 1u);  // they are one
}

TEST(RingStore, AfterAFailedSyncNoneSucceeds) {
    int fds[2];
    ASSERT_EQ(pipe2(fds, O_CLOEXEC), 0);  // which cannot be synced
    DirectSyncs store;
    const int file = dup(store.fd());
    ASSERT_GE(dup2(fds[1], store.fd()), 0);
    EXPECT_EQ(store.Run(Kind::kSync, 0, {}), EINVAL);
    ASSERT_GE(dup2(file, store.fd()), 0);
    EXPECT_EQ(store.Run(Kind::kSync, 0, {}), EINVAL);
    EXPECT_EQ(store.syncs_done_now(), 0u);
    for (const int fd : {file, fds[0], fds[1]}) close(fd);
}

/// A loop device that has no room for what its page cache takes.
class FullDevice {
  public:
    FullDevice() {
        char place[] = "/tmp/varve-full-XXXXXX";
        place_ = mkdtemp(place);
        Run("mount -t tmpfs -o size=1m varve-test " + place_);
        Run("truncate --size 8M " + place_ + "/image");
        device_ = Run("losetup --find --show " + place_ + "/image");
    }
    ~FullDevice() {
        Run("losetup --detach " + device_);
        Run("umount " + place_);
        rmdir(place_.c_str());
    }
    const std::string& path() const { return device_; }

  private:
    static std::string Run(const std::string& command) {
        std::string output;
        FILE* pipe = popen(command.c_str(), "r");
        for (int c = getc(pipe); c != EOF && c != '\n'; c = getc(pipe)) {
            output += static_cast<char>(c);
        }
        EXPECT_EQ(pclose(pipe), 0) << command;
        return output;
    }
    std::string place_, device_;
};

TEST(RingStore, ADeviceIsNotInMemoryThoughItsNodeIs) {
    FullDevice device;
    for (const bool direct : {false, true}) {
        const int flags = O_RDWR | O_CLOEXEC | (direct ? O_DIRECT : 0);
        const int fd = open(device.path().c_str(), flags);
        const FileTraits traits = Probe(fd, direct);
        EXPECT_FALSE(traits.in_memory);
        EXPECT_GE(traits.alignment, direct ? 512u : 1u);
        close(fd);
    }
}

TEST(RingStore, SyncsAtTheSameTimeShareALostWrite) {
    FullDevice device;
    const int fd = open(device.path().c_str(), O_RDWR | O_CLOEXEC);
    ASSERT_GE(fd, 0) << std::strerror(errno);
    Fixture fixture(fd, FileTraits{});
    std::string bytes(4 << 20, 'x');
    EXPECT_EQ(fixture.Run(Kind::kWrite, 0, {{bytes.data(), bytes.size()}}), 0);
    std::vector<Fixture::Waited> syncs(4);
    for (Fixture::Waited& sync : syncs) sync.kind = Kind::kSync;
    const std::vector<Errno> errors = fixture.Run(syncs);
    for (const Errno error : errors) EXPECT_NE(error, 0);
    EXPECT_EQ(fdatasync(fd), 0);  // the system has told it
    EXPECT_NE(fixture.Run(Kind::kSync, 0, {}), 0);
}

TEST(RingStore, AFailedSyncIsReportedHoweverItIsDone) {
    int fds[2];
    ASSERT_EQ(pipe2(fds, O_CLOEXEC), 0);  // which cannot be synced
    for (const bool direct : {false, true}) {
        DirectSyncs store;
        if (direct) store.Sync(RingStore::kQuickSyncs);
        ASSERT_GE(dup2(fds[1], store.fd()), 0);
        EXPECT_EQ(store.Run(Kind::kSync, 0, {}), EINVAL);
        EXPECT_EQ(store.syncs_done_now(), direct ? 1u : 0u);
    }
    close(fds[0]);
    close(fds[1]);
}

TEST(RingStoreDeathTest, ABusErrorElsewhereEndsTheProgramAsUsual) {
    const int fd = memfd_create("varve", MFD_CLOEXEC);
    ASSERT_EQ(ftruncate(fd, 4096), 0);
    const std::shared_ptr<FileMapping> mapping = FileMapping::Map(fd);
    ASSERT_TRUE(mapping);
    char byte = 0;
    EXPECT_FALSE(mapping->Read(8192, &byte, 1));
    const auto* stray =
        static_cast<const volatile char*>(mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 4096));
    ASSERT_NE(static_cast<const volatile void*>(stray), MAP_FAILED);
    const auto touch_stray_page = [stray] {
        struct rlimit no_core {};
        setrlimit(RLIMIT_CORE, &no_core);
        (void)*stray;
    };
    EXPECT_EXIT(touch_stray_page(), testing::KilledBySignal(SIGBUS), "");
}

TEST(RingStore, MoreVectorsThanTheSystemTakesAtOnce) {
    for (const bool in_memory : {false, true}) {
        const int fd = in_memory ? memfd_create("varve", MFD_CLOEXEC) : TemporaryFile(0);
        Fixture fixture(fd, Probe(fd, false));
        std::string written(2500 * 3, 0), read(2500 * 3, 0);
        for (size_t i = 0; i < written.size(); ++i) written[i] = static_cast<char>(i * 7);
        std::vector<iovec> out, in;
        for (size_t i = 0; i < 2500; ++i) {
            out.push_back({written.data() + i * 3, 3});
            in.push_back({read.data() + i * 3, 3});
        }
        EXPECT_EQ(fixture.Run(Kind::kWrite, 5, out), 0);
        EXPECT_EQ(fixture.Run(Kind::kRead, 5, in), 0);
        EXPECT_EQ(read, written);
    }
}

TEST(RingStore, ReportsTheSystemsErrors) {
    char path[] = "/tmp/varve-store-XXXXXX";
    close(mkstemp(path));
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    unlink(path);
    std::string text = "text";
    Fixture fixture(fd, FileTraits{});
    EXPECT_EQ(fixture.Run(Kind::kWrite, 0, {{text.data(), 4}}), EBADF);
}

/// In a process of its own that may have no more threads: a sync, which the ring gives to one.
int SyncWithoutMoreThreads() {
    Fixture fixture(TemporaryFile(0), FileTraits());
    if (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0) return 2;  // root is not limited
    const rlimit none{0, 0};
    if (setrlimit(RLIMIT_NPROC, &none) != 0) return 3;
    std::string text(4096, 't');
    for (int round = 0; round < 3; ++round) {
        if (fixture.Run(Kind::kWrite, 0, {{text.data(), text.size()}}) != 0) return 4;
        if (fixture.Run(Kind::kSync, 0, {}) != 0) return 5;
    }
    return fixture.transfers_done_here() >= 3 ? 0 : 6;
}

TEST(RingStoreDeathTest, WhatTheRingFindsNoThreadForIsDoneAllTheSame) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    EXPECT_EXIT(_exit(SyncWithoutMoreThreads()), testing::ExitedWithCode(0), "");
}

TEST(RingStore, AWriteBeyondTheFileSizeLimitFails) {
    const int fd = memfd_create("varve", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    ASSERT_EQ(ftruncate(fd, 4096), 0);
    ASSERT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW), 0);
    std::string text(8192, 't');
    Fixture fixture(fd, Probe(fd, false));
    EXPECT_EQ(fixture.Run(Kind::kWrite, 4096, {{text.data(), text.size()}}), EPERM);
    EXPECT_EQ(fixture.Run(Kind::kWrite, 0, {{text.data(), 4096}}), 0);
}

std::vector<Fixture::Waited> SideBySide(Kind kind, std::vector<iovec>& vectors) {
    std::vector<Fixture::Waited> ios(vectors.size());
    uint64_t offset = 0;
    for (size_t i = 0; i < ios.size(); ++i) {
        ios[i].kind = kind;
        ios[i].offset = offset;
        ios[i].vectors = &vectors[i];
        ios[i].vector_count = 1;
        offset += vectors[i].iov_len;
    }
    return ios;
}

TEST(RingStore, NeighboursLeaveAsOneTransfer) {
    int fds[2];
    ASSERT_EQ(pipe2(fds, O_DIRECT), 0);  // each write is a packet
    std::string first(512, 'a'), second(1024, 'b'), apart(512, 'c');
    std::vector<iovec> vectors = {{first.data(), 512}, {second.data(), 1024}, {apart.data(), 512}};
    Fixture fixture(fds[1], FileTraits{});
    std::vector<Fixture::Waited> ios = SideBySide(Kind::kWrite, vectors);
    ios[2].offset += 512;
    EXPECT_EQ(fixture.Run(ios), std::vector<Errno>(3, 0));
    std::string packet(4096, 0);
    EXPECT_EQ(read(fds[0], packet.data(), packet.size()), 1536);
    EXPECT_EQ(packet.substr(0, 1536), first + second);
    EXPECT_EQ(read(fds[0], packet.data(), packet.size()), 512);
    close(fds[0]);
}

TEST(RingStore, OfNeighboursOnlyThoseFailThatAreConcerned) {
    std::string written(4 * 4096, 'w'), got(4 * 4096, 0);
    std::vector<iovec> in, out;
    for (size_t i = 0; i < 4; ++i) {
        out.push_back({&written[i * 4096], 4096});
        in.push_back({&got[i * 4096], 4096});
    }
    const std::vector<Errno> no_growth = {0, 0, EPERM, EPERM}, at_the_end = {0, 0, EIO, EIO};
    {
        const int fd = memfd_create("varve", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        ASSERT_EQ(ftruncate(fd, 2 * 4096), 0);
        ASSERT_EQ(fcntl(fd, F_ADD_SEALS, F_SEAL_GROW), 0);
        Fixture fixture(fd, Probe(fd, false));
        std::vector<Fixture::Waited> writes = SideBySide(Kind::kWrite, out);
        EXPECT_EQ(fixture.Run(writes), no_growth);
        std::vector<Fixture::Waited> reads = SideBySide(Kind::kRead, in);
        EXPECT_EQ(fixture.Run(reads), at_the_end);
        EXPECT_EQ(got.substr(0, 2 * 4096), written.substr(0, 2 * 4096));
    }
    const int fd = TemporaryFile(0);
    ASSERT_EQ(write(fd, written.data(), 2 * 4096), 2 * 4096);
    Fixture fixture(fd, Probe(fd, false));
    got.assign(got.size(), 0);
    std::vector<Fixture::Waited> reads = SideBySide(Kind::kRead, in);
    EXPECT_EQ(fixture.Run(reads), at_the_end);
    EXPECT_EQ(got.substr(0, 2 * 4096), written.substr(0, 2 * 4096));
}

/// A pipe of packets in the place of the file gives short reads: one packet for each. The store
/// then must ask for the rest from an aligned place on.
TEST(RingStore, ContinuesShortTransfersAtAlignedPlaces) {
    int fds[2];
    ASSERT_EQ(pipe2(fds, O_DIRECT), 0);
    const std::string first(700, 'a'), second(512, 'b'), third(1024, 'c');
    for (const std::string& packet : {first, second, third}) {
        ASSERT_EQ(write(fds[1], packet.data(), packet.size()), static_cast<ssize_t>(packet.size()));
    }
    FileTraits traits;
    traits.alignment = 512;
    Fixture fixture(fds[0], traits);
    BufferPool pool(0);
    Buffer memory = pool.Take(2048);
    // 700 bytes count as 512; then 512; then the last 1024, the first half in another vector.
    EXPECT_EQ(fixture.Run(Kind::kRead, 0, {{memory.data(), 1536}, {memory.data() + 1536, 512}}), 0);
    const std::string_view got(reinterpret_cast<char*>(memory.data()), 2048);
    EXPECT_EQ(got, std::string(512, 'a') + second + third);

    // A packet shorter than a sector is no progress at all.
    ASSERT_EQ(write(fds[1], first.data(), 100), 100);
    EXPECT_EQ(fixture.Run(Kind::kRead, 0, {{memory.data(), 2048}}), EIO);
    close(fds[1]);
}

}  // namespace
}  // namespace varve::nbdserver
