// What changed between two states of a disk: random histories against a model of what was written.
// Not the wire: changed_exports_test has the contexts.
#include <fmt/format.h>

#include <set>

#include "cow/format/format.h"
#include "tests/engine_fixture.h"
#include "tests/simulation/dice.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::Base;
using cow::Delta;
using cow::kBlockBytes;
using cow::kChunkBytes;

constexpr uint64_t kUnit = 512;

class ChangesTest : public EngineTest {
  protected:
    explicit ChangesTest(uint64_t seed = 1) : EngineTest(2, 256 * kMiB, seed) {}

    /// The power fails; all that was flushed is there afterwards.
    void Crash(cow::PoolOptions options = {}) {
        media.Cut();
        for (const auto& [name, e] : exports) Detach(e);
        exports.clear();
        (void)machine->Stop();
        machine.reset();
        media.Restore();
        Start(options);
    }
    Errno Trim(const std::string& name, uint64_t offset, uint64_t length) {
        cow::Volume& v = Volume(name);
        return Await(scheduler, v.executor(), v.Trim(offset, length));
    }
    Errno Zero(const std::string& name, uint64_t offset, uint64_t length, bool allocate) {
        cow::Volume& v = Volume(name);
        return Await(scheduler, v.executor(), v.WriteZeroes(offset, length, allocate));
    }
    cow::Export Open(const std::string& view, const std::string& base) {
        auto opened = machine->Do(pool().OpenExport(view, {base}, nullptr));
        EXPECT_TRUE(opened.ok()) << opened.error().message;
        return opened.value();
    }
    /// The whole of it, in questions of `length` bytes with answers of `most` stretches.
    std::vector<Delta> Changes(const std::string& view, const std::string& base,
                               uint64_t length = cow::kDiskBytesMax, uint32_t most = 1000) {
        const cow::Export opened = Open(view, base);
        cow::Volume& v = *opened.volume;
        std::vector<Delta> all;
        for (uint64_t at = 0; at < v.size();) {
            std::vector<Delta> some;
            const uint64_t asked = std::min(length, v.size() - at);
            EXPECT_EQ(0,
                      Await(scheduler, v.executor(),
                            v.Changes(opened.bases.at(0).get(), at, asked, most, &some, nullptr)));
            uint64_t told = 0;
            for (const Delta& delta : some) told += delta.length;
            EXPECT_TRUE(told > 0 && told <= asked && some.size() <= most);
            if (told == 0) break;
            at += told;
            all.insert(all.end(), some.begin(), some.end());
        }
        Detach(opened);
        return all;
    }
    /// "8192..12288 data": what changed, joined.
    static std::string Text(const std::vector<Delta>& deltas) {
        std::string text;
        uint64_t at = 0;
        for (const Delta& delta : deltas) {
            if (delta.changed) {
                text += fmt::format("{}{}+{} {}", text.empty() ? "" : ", ", at / kBlockBytes,
                                    delta.length / kBlockBytes, delta.zero ? "zero" : "data");
            }
            at += delta.length;
        }
        return text;
    }
    void Snapshot(const std::string& name) { Ok(pool().CreateSnapshots({name})); }
};

TEST_F(ChangesTest, WrittenTrimmedAndGrownBlocksDiffer) {
    Ok(pool().CreateDisk("d", kMiB));
    Write("d", 0, 64 * kBlockBytes, 'a');
    Snapshot("d@s");
    EXPECT_EQ("", Text(Changes("d", "s")));
    Write("d", 2 * kBlockBytes, kBlockBytes, 'b');
    Write("d", 100 * kBlockBytes + 512, 512, 'b');
    Trim("d", 8 * kBlockBytes, 2 * kBlockBytes);
    Trim("d", 200 * kBlockBytes, 2 * kBlockBytes);  // nothing was there
    EXPECT_EQ("2+1 data, 8+2 zero, 100+1 data", Text(Changes("d", "s")));
    Close("d");
    Ok(pool().ResizeDisk("d", 2 * kMiB, false, false));
    EXPECT_EQ("2+1 data, 8+2 zero, 100+1 data, 256+256 zero", Text(Changes("d", "s")));
    Snapshot("d@t");
    EXPECT_EQ("2+1 data, 8+2 zero, 100+1 data, 256+256 zero", Text(Changes("d@t~s", "s")));
    EXPECT_EQ("", Text(Changes("d", "t")));
    EXPECT_EQ("2+1 data, 8+2 data, 100+1 zero", Text(Changes("d@s", "t")));
}

TEST_F(ChangesTest, ARestoreBringsOldBlocksBack) {
    Ok(pool().CreateDisk("d", kMiB));
    Write("d", 0, 8 * kBlockBytes, 'a');
    Snapshot("d@s");
    Write("d", 0, kBlockBytes, 'b');
    Snapshot("d@t");
    Close("d");
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, false, false));
    EXPECT_EQ("", Text(Changes("d", "s")));
    EXPECT_EQ("0+1 data", Text(Changes("d", "t")));
    Write("d", 4 * kBlockBytes, kBlockBytes, 'c');
    EXPECT_EQ("0+1 data, 4+1 data", Text(Changes("d", "t")));
    Snapshot("d@u");
    EXPECT_EQ("0+1 data, 4+1 data", Text(Changes("d@u", "t")));
    EXPECT_EQ("0+1 data, 4+1 data", Text(Changes("d@t", "u")));
}

TEST_F(ChangesTest, ABookmarkKeepsTheNameAndNoData) {
    Ok(pool().CreateDisk("d", kMiB));
    Write("d", 0, 64 * kBlockBytes, 'a');
    Write("d", 128 * kBlockBytes, kBlockBytes, 'a');
    Snapshot("d@s");
    Write("d", 0, 32 * kBlockBytes, 'b');
    Trim("d", 32 * kBlockBytes, 8 * kBlockBytes);
    Snapshot("d@t");
    Ok(pool().DeleteSnapshot("d@s", false, true));
    Reclaim();
    EXPECT_EQ(57 * kBlockBytes, Used());
    EXPECT_EQ("0+32 data, 32+8 zero", Text(Changes("d@t~s", "s")));
    EXPECT_EQ("0+32 data, 32+8 zero", Text(Changes("d", "s")));
    EXPECT_EQ(ErrorKind::kNotFound, machine->Do(pool().OpenExport("d@s")).error().kind);
    EXPECT_EQ(ErrorKind::kNotFound, Fails(pool().CloneSnapshot("d@s", "clone")));
    EXPECT_EQ(ErrorKind::kExists, Fails(pool().CreateSnapshots({"d@s"})));
    EXPECT_EQ(ErrorKind::kExists, Fails(pool().RenameSnapshot("d@t", "s")));
    EXPECT_EQ(ErrorKind::kExists, Fails(pool().DeleteSnapshot("d@s", false, true)));
    Stop();
    Start();
    ASSERT_EQ(1u, pool().ListBookmarks("d").value().size());
    EXPECT_EQ(kMiB, pool().ListBookmarks("d").value().at(0).size);
    Ok(pool().RenameSnapshot("d@s", "mark"));
    EXPECT_EQ("0+32 data, 32+8 zero", Text(Changes("d", "mark")));
    Ok(pool().DeleteSnapshot("d@mark", false));
    EXPECT_TRUE(pool().ListBookmarks("d").value().empty());
    EXPECT_EQ(ErrorKind::kNotFound, Fails(pool().DeleteSnapshot("d@mark", false)));
}

TEST_F(ChangesTest, ABookmarkThatWasUndoneTellsNothing) {
    Ok(pool().CreateDisk("d", 2 * kChunkBytes));
    Write("d", 0, kBlockBytes, 'a');
    Snapshot("d@s");
    Write("d", kBlockBytes, kBlockBytes, 'b');
    Snapshot("d@t");
    Ok(pool().DeleteSnapshot("d@t", false, true));
    EXPECT_EQ("", Text(Changes("d", "t")));
    Close("d");
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, false, false));
    EXPECT_EQ("0+1 data, 1+127 zero", Text(Changes("d", "t")));
    EXPECT_EQ("", Text(Changes("d", "s")));
}

// A bookmark keeps its branch: without it, a view above would look as if it came from elsewhere.
TEST_F(ChangesTest, ABookmarkKeepsItsBranch) {
    Ok(pool().CreateDisk("d", kChunkBytes));
    Write("d", 0, kBlockBytes, 'a');
    Snapshot("d@s");
    Ok(pool().CloneSnapshot("d@s", "clone"));
    Snapshot("clone@a");
    Ok(pool().CloneSnapshot("clone@a", "other"));
    Close("d");
    Ok(pool().RestoreSnapshot("d@s", std::nullopt, false, false));
    Snapshot("d@a");
    Ok(pool().RestoreSnapshot("d@a", std::nullopt, false, false));
    Write("d", kBlockBytes, kBlockBytes, 'b');
    Ok(pool().DeleteSnapshot("d@a", false, true));
    Ok(pool().DeleteDisk("clone", true, false));
    Reclaim();
    Close("d");
    Stop();
    Start();
    EXPECT_EQ("1+1 data, 2+62 zero", Text(Changes("d", "a")));
    Ok(pool().DeleteDisk("d", true, true));
    Ok(pool().DeleteDisk("other", true, true));
}

// A program that does not know of bookmarks may use their names, and remove what they name.
TEST_F(ChangesTest, BookmarksThatAnotherProgramLeftBehindDoNoHarm) {
    Ok(pool().CreateDisk("d", kChunkBytes));
    Write("d", 0, kBlockBytes, 'a');
    for (const char* name : {"d@gone", "d@used", "d@branch"}) {
        Snapshot(name);
        Ok(pool().DeleteSnapshot(name, false, true));
    }
    Snapshot("d@other");
    Stop();
    auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
    for (auto& [key, value] : *rows) {
        cow::SnapshotRecord record;
        if (key[0] != 'O' || !cow::Decode(value, &record)) continue;
        if (record.name == "gone") record.disk = DiskId{99};
        if (record.name == "used") record.name = "other";
        if (record.name == "branch") record.branch = BranchId{99};
        value = cow::Encode(record);
    }
    media.SetMetadata(std::move(rows));
    Start();
    ASSERT_EQ(1u, pool().ListBookmarks("d").value().size());
    EXPECT_EQ("0+1 data, 1+63 zero", Text(Changes("d", "branch")));
    EXPECT_EQ("", Text(Changes("d", "other")));
    Ok(pool().DeleteSnapshot("d@branch", false));
    Ok(pool().DeleteSnapshot("d@other", false));
    Ok(pool().DeleteDisk("d", true, true));
}

TEST_F(ChangesTest, WhoComparesHoldsTheSnapshotAsItsReadersDo) {
    Ok(pool().CreateDisk("d", kMiB));
    Snapshot("d@s");
    Snapshot("d@t");
    const cow::Export diff = Open("d@t~s", "s");
    EXPECT_EQ("d@t~s", pool().ExportName(diff.id));
    EXPECT_EQ(ErrorKind::kBusy, Fails(pool().DeleteSnapshot("d@s", false)));
    EXPECT_EQ(ErrorKind::kBusy, Fails(pool().DeleteSnapshot("d@s", false, true)));
    EXPECT_EQ(ErrorKind::kBusy, Fails(pool().DeleteSnapshot("d@t", false)));
    std::vector<uint64_t> cut_off;
    bool done = false;
    pool().SetDisconnector([&](const std::vector<uint64_t>& ids) {
        cut_off = ids;
        for (const uint64_t id : ids) {
            Spawn(DetachTask(&machine->home(), &machine->pool(), id, &done));
        }
    });
    Ok(pool().DeleteSnapshot("d@s", true));
    EXPECT_EQ(std::vector<uint64_t>{diff.id}, cut_off);
    Ok(pool().DeleteSnapshot("d@t", false));
    pool().SetDisconnector({});
}

TEST_F(ChangesTest, NamesOfDiffExports) {
    Ok(pool().CreateDisk("d", kMiB));
    Ok(pool().CreateDisk("e", kMiB));
    for (const char* name : {"d@a", "d@b", "e@c"}) Snapshot(name);
    EXPECT_EQ("b", pool().DescribeExport("d").value().base);
    EXPECT_EQ("a", pool().DescribeExport("d@b").value().base);
    EXPECT_EQ("", pool().DescribeExport("d@a").value().base);
    const auto diff = pool().DescribeExport("d@b~a");
    ASSERT_TRUE(diff.ok());
    EXPECT_TRUE(diff.value().diff && diff.value().read_only);
    EXPECT_EQ("d@b~a", diff.value().name);
    EXPECT_TRUE(pool().HasBase("d@b~a", "a") && pool().HasBase("d", "a"));
    EXPECT_FALSE(pool().HasBase("d@b~a", "b") || pool().HasBase("d", "c"));
    for (const char* name : {"d~a", "d@b~c", "d@b~", "d@b~a~a", "d@b~d@a", "~", "d@~a", "@b~a"}) {
        EXPECT_FALSE(pool().DescribeExport(name).ok()) << name;
        EXPECT_FALSE(machine->Do(pool().OpenExport(name)).ok()) << name;
    }
    for (const cow::ExportEntry& entry : *machine->Do(pool().ListExports())) {
        EXPECT_EQ(std::string::npos, entry.name.find('~'));
    }
}

TEST_F(ChangesTest, DepthsCountLiveSnapshots) {
    Ok(pool().CreateDisk("d", kMiB));
    for (unsigned i = 0; i < 4; ++i) {
        Write("d", i * kBlockBytes, kBlockBytes, 'a');
        if (i < 3) Snapshot("d@s" + std::to_string(i));
    }
    const auto depths = [this](const std::string& name) {
        const auto opened = machine->Do(pool().OpenExport(name));
        const auto layers = pool().LayersOf(opened.value().id);
        cow::Volume& v = *opened.value().volume;
        std::vector<cow::Allocation> map;
        EXPECT_EQ(0, Await(scheduler, v.executor(),
                           v.Status(0, 5 * kBlockBytes, 9, layers.get(), &map, nullptr)));
        std::string text;
        for (const cow::Allocation& part : map) {
            text.append(part.length / kBlockBytes, static_cast<char>('0' + part.depth));
        }
        Detach(opened.value());
        return text;
    };
    EXPECT_EQ("43210", depths("d"));
    EXPECT_EQ("32100", depths("d@s2"));
    Ok(pool().DeleteSnapshot("d@s1", false));
    EXPECT_EQ("32210", depths("d"));
    Ok(pool().DeleteSnapshot("d@s2", false));
    EXPECT_EQ("22210", depths("d"));  // of no generation that is going on
    Ok(pool().CloneSnapshot("d@s0", "clone"));
    EXPECT_EQ("20000", depths("clone"));
    Ok(pool().FlattenDisk("clone"));
    EXPECT_EQ("20000", depths("clone"));
    Snapshot("clone@x");
    EXPECT_EQ("30000", depths("clone"));
}

// Of so many generations that marks are no help, and after rows of them were deleted.
TEST_F(ChangesTest, ManyGenerations) {
    Ok(pool().CreateDisk("d", 100 * kChunkBytes));
    media.remembers_deleted = true;
    Write("d", 0, 100 * kChunkBytes, 'a');
    for (unsigned i = 0; i < 100; ++i) {
        Snapshot("d@s" + std::to_string(i));
        Write("d", i * kChunkBytes + i % 63 * kBlockBytes, kBlockBytes, 'b');
    }
    std::string all, late;
    for (unsigned i = 0; i < 100; ++i) {
        const std::string one = fmt::format("{}+1 data", i * 64 + i % 63);
        all += (i == 0 ? "" : ", ") + one;
        if (i >= 95) late += (i == 95 ? "" : ", ") + one;
    }
    EXPECT_EQ(all, Text(Changes("d", "s0")));
    EXPECT_EQ(late, Text(Changes("d", "s95")));
    for (unsigned i = 1; i < 95; ++i) {
        Ok(pool().DeleteSnapshot("d@s" + std::to_string(i), false));
    }
    Reclaim();
    EXPECT_EQ(all, Text(Changes("d", "s0")));
    EXPECT_EQ(late, Text(Changes("d", "s95")));
}

// More than one step takes: what it has of one generation ends where it has of another.
TEST_F(ChangesTest, ManyMarks) {
    constexpr uint64_t kChunks = 4000;
    Ok(pool().CreateDisk("d", kChunks * kChunkBytes));
    Snapshot("d@s");
    std::set<uint64_t> written;
    for (uint64_t generation = 1; generation <= 3; ++generation) {
        for (uint64_t i = generation * 300; i < kChunks; i += generation) {
            const uint64_t block = i * 64 + generation * 2;
            Write("d", block * kBlockBytes, kBlockBytes, 'a');
            written.insert(block);
        }
        Snapshot("d@s" + std::to_string(generation));
    }
    for (const char* view : {"d", "d@s3"}) {
        std::set<uint64_t> told;
        uint64_t at = 0;
        for (const Delta& delta : Changes(view, "s", cow::kDiskBytesMax, 100'000)) {
            for (uint64_t b = 0; delta.changed && b < delta.length / kBlockBytes; ++b) {
                told.insert(at / kBlockBytes + b);
            }
            at += delta.length;
        }
        EXPECT_TRUE(written == told);
    }
}

// What a question costs does not depend on how large the disk is.
TEST_F(ChangesTest, OnlyWhatChangedIsLookedAt) {
    constexpr uint64_t kTiB = uint64_t{1} << 40;
    Ok(pool().CreateDisk("d", kTiB));
    for (uint64_t i = 0; i < 2000; ++i) Write("d", i * kChunkBytes, kBlockBytes, 'a');
    Snapshot("d@s");
    for (uint64_t i = 0; i < 4; ++i) Write("d", i * kTiB / 4, kBlockBytes, 'b');
    Snapshot("d@t");
    const uint64_t before = media.seeks + media.steps;
    EXPECT_EQ("0+1 data, 67108864+1 data, 134217728+1 data, 201326592+1 data",
              Text(Changes("d@t~s", "s")));
    EXPECT_LT(media.seeks + media.steps - before, 100u);
}

TEST_F(ChangesTest, ADamagedRowIsAnError) {
    Ok(pool().CreateDisk("d", kMiB));
    Write("d", 0, kBlockBytes, 'a');
    Snapshot("d@s");
    Write("d", 0, kBlockBytes, 'b');
    Snapshot("d@t");
    Used();  // all is in rows
    auto rows = std::make_shared<std::map<std::string, std::string>>(*media.metadata());
    for (auto& [key, value] : *rows) {
        if (key[0] == 'M') value = "rubbish";
    }
    media.SetMetadata(std::move(rows));
    const cow::Export opened = Open("d@t", "s");
    std::vector<Delta> deltas;
    cow::Volume& v = *opened.volume;
    EXPECT_EQ(EIO, Await(scheduler, v.executor(),
                         v.Changes(opened.bases[0].get(), 0, kMiB, 9, &deltas, nullptr)));
    Detach(opened);
    for (const auto& [name, e] : exports) Detach(e);
    exports.clear();
    (void)machine->Stop();
    machine.reset();
}

TEST_F(ChangesTest, DifferencesAreToldInParts) {
    constexpr uint64_t kPieces = 10'000;
    Ok(pool().CreateDisk("d", 100 * kMiB));
    Snapshot("d@s");
    for (uint64_t i = 0; i < kPieces; ++i) Write("d", i * 2 * kBlockBytes, kBlockBytes, 'a');
    Snapshot("d@t");
    std::vector<cow::Difference::Extent> all;
    unsigned parts = 0;
    for (std::optional<uint64_t> at = 0; at; ++parts) {
        auto part = machine->Do(pool().Diff("d@s", "d@t", *at));
        ASSERT_TRUE(part.ok()) << part.error().message;
        at = part.value().next;
        all.insert(all.end(), part.value().extents.begin(), part.value().extents.end());
    }
    EXPECT_EQ(kPieces, all.size());
    EXPECT_LT(1u, parts);
    EXPECT_EQ(2 * kBlockBytes, all.at(1).offset);
    EXPECT_EQ(ErrorKind::kNotFound, machine->Do(pool().Diff("d@x", "d@t", 0)).error().kind);
    EXPECT_EQ(ErrorKind::kInvalid, machine->Do(pool().Diff("d@s", "e@t", 0)).error().kind);
    EXPECT_EQ(ErrorKind::kInvalid, machine->Do(pool().Diff("d@s", "d", 0)).error().kind);
}

Task<void> DiffTask(Executor* home, cow::Pool* pool, unsigned* done) {
    co_await Hop(*home);
    (void)co_await pool->Diff("d@s", "d@t", 0);
    ++*done;
}

TEST_F(ChangesTest, APoolIsClosedAfterDifferencesThatAreUnderWay) {
    Ok(pool().CreateDisk("d", 100 * kChunkBytes));
    Snapshot("d@s");
    for (uint64_t i = 0; i < 100; ++i) Write("d", i * kChunkBytes, kBlockBytes, 'a');
    Snapshot("d@t");
    unsigned done = 0;
    for (unsigned i = 0; i < 20; ++i) {
        Spawn(DiffTask(&machine->home(), &pool(), &done));
        for (unsigned steps = i; steps > 0; --steps) scheduler.Step();
    }
    Stop();
    EXPECT_EQ(20u, done);
}

// ---- random histories

/// States of disks, each with what was written since the one that it comes from.
class Model {
  public:
    struct State {
        int parent = -1;
        std::vector<uint32_t> units;  // what each holds; 0: zeros
        std::set<uint64_t> touched;   // blocks, since the parent
        uint64_t bytes() const { return units.size() * kUnit; }
        uint32_t At(uint64_t unit) const { return unit < units.size() ? units[unit] : 0; }
    };

    int Add(int parent, uint64_t bytes) {
        State state;
        state.parent = parent;
        if (parent >= 0) state.units = states_[static_cast<size_t>(parent)].units;
        state.units.resize(bytes / kUnit);
        states_.push_back(std::move(state));
        return static_cast<int>(states_.size() - 1);
    }
    int From(int parent) { return Add(parent, Get(parent).bytes()); }
    const State& Get(int id) const { return states_.at(static_cast<size_t>(id)); }

    void Fill(int id, uint64_t offset, uint64_t length, uint32_t with) {
        State& state = states_.at(static_cast<size_t>(id));
        for (uint64_t u = offset / kUnit; u < (offset + length) / kUnit; ++u) state.units[u] = with;
        if (length > 0) Touch(state, offset, offset + length);
    }
    void Resize(int id, uint64_t bytes) {
        State& state = states_.at(static_cast<size_t>(id));
        const uint64_t old = state.bytes();
        if (bytes < old) Touch(state, bytes, old + kBlockBytes);
        // What lies in the last block beyond the end is cleared before, also if nothing is added.
        if (bytes >= old && old % kBlockBytes != 0) Touch(state, old, old + 1);
        state.units.resize(bytes / kUnit);
    }
    bool ComesFrom(int id, int from) const {
        while (id >= 0 && id != from) id = Get(id).parent;
        return id == from;
    }
    /// Blocks that were written on the ways between two states.
    std::set<uint64_t> Between(int a, int b) const {
        std::set<uint64_t> blocks;
        for (auto [from, other] : {std::pair(a, b), std::pair(b, a)}) {
            for (int at = from; at >= 0 && !ComesFrom(other, at); at = Get(at).parent) {
                blocks.insert(Get(at).touched.begin(), Get(at).touched.end());
            }
        }
        return blocks;
    }

  private:
    static void Touch(State& state, uint64_t from, uint64_t to) {
        for (uint64_t b = from / kBlockBytes; b * kBlockBytes < to; ++b) state.touched.insert(b);
    }
    std::vector<State> states_;
};

/// By its seed.
class RandomHistory : public ChangesTest, public testing::WithParamInterface<uint64_t> {
  protected:
    RandomHistory() : ChangesTest(GetParam()), dice(GetParam()) {}

    struct Disk {
        int head = 0;
        std::map<std::string, int> snapshots, bookmarks;
    };
    std::map<std::string, Disk> disks;
    Model model;
    Dice dice;
    std::string told;  // what was done
    bool flattened = false;
    uint32_t writes = 0;
    unsigned names = 0;

    uint64_t Draw(uint64_t below) { return dice.Draw(below); }
    std::pair<const std::string, Disk>& AnyDisk() {
        return *std::next(disks.begin(), static_cast<std::ptrdiff_t>(Draw(disks.size())));
    }
    template <typename T>
    std::string Any(const std::map<std::string, T>& map) {
        return std::next(map.begin(), static_cast<std::ptrdiff_t>(Draw(map.size())))->first;
    }
    std::string NewName() { return "n" + std::to_string(names++); }
    void Note(const std::string& what) { told += what + "\n"; }
    void CloseAll() {
        for (const auto& [name, e] : exports) Detach(e);
        exports.clear();
    }
    uint64_t DrawSize() { return (1 + Draw(40)) * 8 * kBlockBytes - Draw(3) * 7 * kUnit; }

    void WriteSome(const std::string& name, Disk& disk) {
        const uint64_t size = model.Get(disk.head).bytes();
        const uint64_t fine = Draw(2) ? kUnit : kBlockBytes;
        const uint64_t offset = Draw(size / fine) * fine;
        const uint64_t length = std::min((1 + Draw(24)) * fine, (size - offset) / fine * fine);
        const uint32_t with = 1 + writes++ % 120;
        switch (Draw(6)) {
            case 0: {
                const uint64_t from = (offset + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
                const uint64_t to = (offset + length) / kBlockBytes * kBlockBytes;
                if (from >= to) return;
                Note(fmt::format("trim {} {} {}", name, from, to - from));
                ASSERT_EQ(0, Trim(name, from, to - from));
                return model.Fill(disk.head, from, to - from, 0);
            }
            case 1: {
                const bool allocate = Draw(2) != 0;
                Note(fmt::format("zero {} {} {} {}", name, offset, length, allocate));
                ASSERT_EQ(0, Zero(name, offset, length, allocate));
                return model.Fill(disk.head, offset, length, 0);
            }
            default:
                Note(fmt::format("write {} {} {}", name, offset, length));
                ASSERT_EQ(0, Write(name, offset, length, static_cast<char>(with)));
                return model.Fill(disk.head, offset, length, with);
        }
    }
    void TakeSnapshot(const std::string& name, Disk& disk) {
        const std::string snapshot = NewName();
        Note(fmt::format("snapshot {}@{}", name, snapshot));
        Snapshot(name + "@" + snapshot);
        disk.snapshots[snapshot] = disk.head;
        disk.head = model.From(disk.head);
    }
    void Restore(const std::string& name, Disk& disk) {
        const std::string from = Any(disk.snapshots);
        std::optional<std::string> keep_as;
        if (Draw(2)) keep_as = NewName();
        Note(fmt::format("restore {}@{} {}", name, from, keep_as.value_or("")));
        CloseAll();
        Ok(pool().RestoreSnapshot(name + "@" + from, keep_as, false, false));
        if (keep_as) disk.snapshots[*keep_as] = disk.head;
        disk.head = model.From(disk.snapshots.at(from));
    }
    void CloneSome(const std::string& name, const Disk& disk) {
        const std::string from = Any(disk.snapshots), to = NewName();
        Note(fmt::format("clone {}@{} {}", name, from, to));
        Ok(pool().CloneSnapshot(name + "@" + from, to));
        disks[to].head = model.From(disk.snapshots.at(from));
    }
    void ResizeSome(const std::string& name, Disk& disk) {
        const uint64_t size = DrawSize();
        Note(fmt::format("resize {} {}", name, size));
        CloseAll();
        Ok(pool().ResizeDisk(name, size, true, false));
        model.Resize(disk.head, size);
    }
    void DeleteSome(const std::string& name, Disk& disk) {
        const std::string snapshot = Any(disk.snapshots);
        const bool bookmark = Draw(2) != 0;
        Note(fmt::format("delete {}@{} {}", name, snapshot, bookmark));
        Ok(pool().DeleteSnapshot(name + "@" + snapshot, false, bookmark));
        if (bookmark) disk.bookmarks[snapshot] = disk.snapshots.at(snapshot);
        disk.snapshots.erase(snapshot);
    }
    void Reopen() {
        const bool crash = Draw(2) != 0;
        Note(crash ? "crash" : "restart");
        for (const auto& [name, disk] : disks) ASSERT_EQ(0, Flush(name));
        if (crash) return Crash();
        Stop();
        Start();
    }
    void Step() {
        auto& [name, disk] = AnyDisk();
        const bool some = !disk.snapshots.empty();
        switch (Draw(20)) {
            case 0:
            case 1:
            case 2:
                return TakeSnapshot(name, disk);
            case 3:
                return some ? Restore(name, disk) : TakeSnapshot(name, disk);
            case 4:
                if (some && disks.size() < 3) CloneSome(name, disk);
                return;
            case 5:
                return ResizeSome(name, disk);
            case 6:
            case 7:
                if (disk.snapshots.size() > 1) DeleteSome(name, disk);
                return;
            case 8:
                if (Draw(3) == 0) Reopen();
                return;
            case 9:
                Note("reclaim");
                return Reclaim();
            case 10:
                if (Draw(4) != 0) return;
                Note("flatten " + name);
                Ok(pool().FlattenDisk(name));
                flattened = true;
                return;
            case 11:
                Note("fold");
                Used();
                return;
            case 12:
                if (disk.bookmarks.size() > 2) {
                    const std::string bookmark = Any(disk.bookmarks);
                    Note("forget " + bookmark);
                    Ok(pool().DeleteSnapshot(name + "@" + bookmark, false));
                    disk.bookmarks.erase(bookmark);
                }
                return;
            default:
                return WriteSome(name, disk);
        }
    }

    void CheckPair(const std::string& view, int view_id, const std::string& base, int base_id,
                   bool bookmark) {
        const Model::State& now = model.Get(view_id);
        const Model::State& then = model.Get(base_id);
        const bool known = !bookmark || model.ComesFrom(view_id, base_id);
        const std::set<uint64_t> written = model.Between(view_id, base_id);
        std::set<uint64_t> written_chunks;
        for (const uint64_t block : written) written_chunks.insert(block / 64);
        const bool diff = view.find('@') != std::string::npos && Draw(2);
        const std::vector<Delta> deltas =
            Changes(diff ? view + "~" + base : view, base,
                    Draw(2) ? cow::kDiskBytesMax : (1 + Draw(900)) * kUnit,
                    Draw(2) ? 1000 : 1 + static_cast<uint32_t>(Draw(5)));
        uint64_t unit = 0;
        for (const Delta& delta : deltas) {
            for (uint64_t i = 0; i < delta.length / kUnit; ++i, ++unit) {
                const uint64_t block = unit * kUnit / kBlockBytes;
                const bool beyond = unit >= then.units.size();
                const bool differs = beyond || now.At(unit) != then.At(unit);
                ASSERT_TRUE(delta.changed || !differs)
                    << view << " from " << base << " differs at " << unit * kUnit;
                if (!delta.changed) continue;
                if (delta.zero) {
                    ASSERT_EQ(0u, now.At(unit))
                        << view << " from " << base << " at " << unit * kUnit;
                }
                const bool end_grew =
                    (block + 1) * kBlockBytes > then.bytes() && now.bytes() > then.bytes();
                bool may = !known || written.contains(block) || end_grew;
                // Of a bookmark, also zeros beside what was written.
                if (bookmark && delta.zero) may |= flattened || written_chunks.contains(block / 64);
                ASSERT_TRUE(may) << view << " from " << base << " tells more than was written at "
                                 << unit * kUnit;
            }
        }
        EXPECT_EQ(now.units.size(), unit);
    }
    void CheckAll() {
        for (const auto& [name, disk] : disks) {
            std::map<std::string, int> views{{name, disk.head}};
            for (const auto& [snapshot, id] : disk.snapshots) views[name + "@" + snapshot] = id;
            for (const auto& [view, view_id] : views) {
                for (const auto& [base, id] : disk.snapshots) {
                    CheckPair(view, view_id, base, id, false);
                    if (HasFatalFailure()) return;
                }
                for (const auto& [base, id] : disk.bookmarks) {
                    CheckPair(view, view_id, base, id, true);
                    if (HasFatalFailure()) return;
                }
            }
        }
    }
};

TEST_P(RandomHistory, EveryChangeIsToldAndNothingElse) {
    const uint64_t size = DrawSize();
    Ok(pool().CreateDisk("d", size));
    disks["d"].head = model.Add(-1, size);
    Note(fmt::format("create d {}", size));
    for (unsigned steps = 20 + static_cast<unsigned>(Draw(60)); steps > 0; --steps) {
        Step();
        if (Draw(25) == 0) CheckAll();
        if (HasFailure()) break;
    }
    if (!HasFailure()) CheckAll();
    if (HasFailure()) FAIL() << "after\n" << told;
}
INSTANTIATE_TEST_SUITE_P(Seeds, RandomHistory, testing::Range<uint64_t>(1, 201));

}  // namespace
}  // namespace varve
