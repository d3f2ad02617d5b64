// The ring: frames, the segments that lanes share, what is read again.
#include <gtest/gtest.h>

#include <set>

#include "cow/journal/lane_journal.h"
#include "cow/journal/ring_reader.h"
#include "tests/simulation/world.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::FrameEntry;
using cow::FrameHeader;
using cow::MapChange;
using cow::MapOwner;

constexpr uint64_t kTag = 77;
constexpr uint64_t kRingPlace = 3;  // blocks
const MapOwner kOwner{DiskId{4}, BranchId{5}, Generation{6}};

MapChange ChangeOf(uint64_t chunk, uint64_t first, uint64_t count, uint64_t place) {
    return cow::MapChangeOf(ChunkIndex{chunk}, first, count, place);
}

std::vector<uint32_t> SumsOf(const MapChange& change) {
    std::vector<uint32_t> sums;
    for (uint64_t i = 0; change.place != 0 && i < change.count; ++i) {
        sums.push_back(static_cast<uint32_t>(change.chunk.value * 1000 + i));
    }
    return sums;
}

/// An entry without the frame that it lies in.
struct Seen {
    MapOwner owner;
    uint64_t number;
    MapChange change;
    std::vector<uint32_t> sums;
    bool durable;

    Seen(const FrameEntry& entry, bool known)
        : owner(entry.owner), number(entry.number), change(entry.change), durable(known) {
        for (uint64_t i = 0; i < entry.sums.size() / 4; ++i) sums.push_back(entry.sum(i));
    }
};

TEST(FrameTest, WhatIsWrittenIsRead) {
    const std::vector<MapChange> changes = {ChangeOf(7, 0, 64, 1), ChangeOf(0, 63, 1, 0),
                                            ChangeOf(7, 3, 2, (uint64_t{1} << 48) - 2),
                                            ChangeOf(cow::kChunksMax - 1, 10, 1, 12345)};
    cow::FrameWriter writer;
    MapOwner owner = kOwner;
    for (const MapChange& change : changes) {
        writer.Add(owner, change, SumsOf(change));
        ++owner.generation.value;
        owner.branch.value = ~uint64_t{0} - owner.generation.value;
    }
    FrameHeader header;
    header.tag = kTag;
    header.first = 100;
    header.durable = 50;
    header.oldest = 20;
    header.lane = 3;
    const std::string frame(writer.Finish(header));
    const auto read = cow::ReadFrame(frame + "more", kTag);
    ASSERT_TRUE(read.has_value());
    EXPECT_EQ(frame.size(), read->bytes);
    EXPECT_EQ(4u, read->count);
    EXPECT_EQ(100u, read->first);
    EXPECT_EQ(50u, read->durable);
    EXPECT_EQ(20u, read->oldest);
    EXPECT_EQ(3u, read->lane);
    std::vector<Seen> seen;
    EXPECT_TRUE(cow::ForEachEntry(frame, [&](const FrameEntry& e) { seen.emplace_back(e, true); }));
    ASSERT_EQ(changes.size(), seen.size());
    for (size_t i = 0; i < changes.size(); ++i) {
        EXPECT_EQ(changes[i], seen[i].change);
        EXPECT_EQ(SumsOf(changes[i]), seen[i].sums);
        EXPECT_EQ(100 + i, seen[i].number);
        EXPECT_EQ(kOwner.generation.value + i, seen[i].owner.generation.value);
    }
    EXPECT_FALSE(cow::ReadFrame(frame, kTag + 1).has_value());
    for (size_t at = 0; at < frame.size(); ++at) {
        std::string broken = frame;
        broken[at] = static_cast<char>(broken[at] ^ 0x10);
        EXPECT_FALSE(cow::ReadFrame(broken, kTag).has_value()) << at;
        EXPECT_FALSE(cow::ReadFrame(frame.substr(0, at), kTag).has_value()) << at;
    }
}

TEST(FrameTest, RecordsOfTheRingAreReadAgain) {
    cow::RingRecord ring{kTag, 64, {{1, 4095}, {8192, 128}}}, read;
    EXPECT_TRUE(cow::Decode(Encode(ring), &read));
    EXPECT_EQ(ring, read);
    EXPECT_FALSE(cow::Decode(Encode(ring) + "x", &read));
    ring.segment_blocks = 0;
    EXPECT_FALSE(cow::Decode(Encode(ring), &read));
}

/// Two lanes on a ring of 8 segments.
class RingTest : public testing::Test {
  protected:
    static constexpr uint64_t kSegment = 64 << 10;
    struct OneLane {
        OneLane(Media& media, cow::Core& core, Executor& executor, uint32_t index)
            : store(media, executor, {}), journal(core, {&executor, &store}, index) {}
        SimBlockStore store;
        cow::LaneJournal journal;
        uint64_t asked = 0;  // to fold
    };

    RingTest() : core(cow::Environment{}) {
        for (uint32_t i = 0; i < 2; ++i) {
            executors.push_back(&scheduler.NewLane());
            lanes.push_back(std::make_unique<OneLane>(media, core, *executors[i], i));
            lanes[i]->journal.Open(ring, [this, i] { ++lanes[i]->asked; });
        }
    }
    ~RingTest() override { scheduler.RunAll(); }

    cow::LaneJournal& journal(size_t i = 0) { return lanes[i]->journal; }
    /// In a turn of its own. False if there is no room.
    bool Append(const MapChange& change, size_t i = 0) {
        const uint64_t units = journal(i).UnitsFor(1);
        if (!journal(i).Reserve(units)) return false;
        journal(i).Append(kOwner, change, SumsOf(change));
        journal(i).Return(units);
        scheduler.RunAll();
        return true;
    }
    void Sync(size_t i = 0) {
        EXPECT_EQ(0, Await(scheduler, *executors[i], SyncTask(lanes[i].get())));
    }
    static Task<void> WaitForWritten(cow::LaneJournal* journal, bool* written) {
        co_await journal->Written(journal->appended());
        *written = true;
    }
    static Task<void> WaitForRoom(WaitList* room, bool* told) {
        co_await room->Wait();
        *told = true;
    }
    static Task<Errno> SyncTask(OneLane* lane) {
        co_await lane->journal.Tell();
        const auto covered = lane->journal.Covers();
        const Errno error =
            co_await cow::Transfer(lane->store, cow::BlockIo::Kind::kSync, 0, nullptr, 0);
        if (error == 0) lane->journal.EndSync(covered);
        co_return error;
    }
    std::string BytesAt(uint64_t offset, uint64_t length) {
        std::string bytes;
        for (uint64_t at = 0; at < length; at += kSector) {
            bytes += media.ReadSector((offset + at) / kSector).bytes();
        }
        return bytes;
    }
    Status Read(std::vector<Seen>* seen, const std::set<uint64_t>& without = {}) {
        cow::RingReader reader(kTag);
        for (uint64_t i = 0; i < ring.segments(); ++i) {
            if (!without.contains(i)) reader.AddSegment(BytesAt(ring.offset(i), kSegment));
        }
        for (uint32_t i = 0; i < 2; ++i) reader.AddSlot(BytesAt(ring.slot(i), cow::kSlotBytes));
        return reader.ForEach([seen](const FrameEntry& e, bool d) { seen->emplace_back(e, d); });
    }

    Scheduler scheduler{1};
    Media media{scheduler, 64 << 20};
    cow::Core core;
    cow::Ring ring{cow::RingRecord{kTag, 16, {{kRingPlace, 16 * 9 + 1}}}, 2};  // 8, and the slots
    std::vector<Executor*> executors;
    std::vector<std::unique_ptr<OneLane>> lanes;
};

TEST_F(RingTest, WhatIsAppendedInOneTurnIsOneFrameAndReadInOrder) {
    for (uint64_t chunk = 0; chunk < 3; ++chunk) {
        ASSERT_TRUE(journal().Reserve(1));
        const MapChange change = ChangeOf(chunk, 0, 2, 1000 + chunk);
        journal().Append(kOwner, change, SumsOf(change));
        EXPECT_TRUE(journal().pending());
        journal().Return(1);
    }
    const uint64_t before = media.operations();
    scheduler.RunAll();
    EXPECT_EQ(before + 2, media.operations());  // its submission, and its end
    EXPECT_FALSE(journal().pending());
    ASSERT_TRUE(Append(ChangeOf(9, 1, 3, 0)));
    std::vector<Seen> seen;
    ASSERT_TRUE(Read(&seen).ok());
    ASSERT_EQ(4u, seen.size());
    for (uint64_t i = 0; i < 4; ++i) EXPECT_EQ(i, seen[i].number);
    EXPECT_EQ(ChangeOf(9, 1, 3, 0), seen[3].change);
    EXPECT_EQ(SumsOf(seen[1].change), seen[1].sums);
    EXPECT_FALSE(seen[0].durable);
}

// The device takes them beside each other, and ends them in any order.
TEST_F(RingTest, FramesAreUnderWayTogetherAndCountInTheirOrder) {
    constexpr uint64_t kEntries = 100;
    std::vector<std::unique_ptr<bool>> written;
    for (uint64_t n = 0; n < kEntries; ++n) {
        const MapChange change = ChangeOf(n, 0, 1, 1000);
        ASSERT_TRUE(journal().Reserve(1));
        journal().Append(kOwner, change, SumsOf(change));
        journal().Return(1);
        written.push_back(std::make_unique<bool>(false));
        Spawn(WaitForWritten(&journal(), written.back().get()));
        scheduler.Step();
    }
    bool late = false;  // one was written before an earlier one was
    while (journal().pending()) {
        const uint64_t counted = journal().written();
        late |= scheduler.Step() && journal().written() > counted + 1;
        for (uint64_t n = 0; n < kEntries; ++n) {
            EXPECT_TRUE(!*written[n] || n < journal().written()) << n;
        }
    }
    scheduler.RunAll();
    for (uint64_t n = 0; n < kEntries; ++n) EXPECT_TRUE(*written[n]) << n;
    EXPECT_TRUE(late);
    std::vector<Seen> seen;
    ASSERT_TRUE(Read(&seen).ok());
    EXPECT_EQ(kEntries, seen.size());
}

// What a sync finds written is not durable as long as its data is under way.
TEST_F(RingTest, WhatIsAnnouncedIsNotCompleted) {
    cow::LaneJournal::Announced first, second;
    cow::LaneJournal::DiskAnnounced disk1, disk2, disk3;
    journal().Begin(first, disk1);
    ASSERT_TRUE(Append(ChangeOf(1, 0, 1, 100)));
    journal().Begin(second, disk2);
    ASSERT_TRUE(Append(ChangeOf(2, 0, 1, 200)));
    EXPECT_EQ(0u, journal().completed());
    // What a disk folds does not wait for what others are writing: it would never be done.
    EXPECT_EQ(0u, journal().CompletedOf(disk1));
    EXPECT_EQ(1u, journal().CompletedOf(disk2));
    EXPECT_EQ(2u, journal().CompletedOf(disk3));
    journal().End(second, disk2);
    EXPECT_EQ(2u, journal().CompletedOf(disk2));
    Sync();
    EXPECT_EQ(2u, journal().written());
    EXPECT_EQ(0u, journal().synced());
    journal().End(first, disk1);
    Sync();
    EXPECT_EQ(2u, journal().synced());
    // The second did not happen, and a sync came before that was told.
    journal().AppendVoid(kOwner, 1, 1);
    scheduler.RunAll();
    std::vector<Seen> seen;
    ASSERT_TRUE(Read(&seen).ok());
    ASSERT_EQ(1u, seen.size());
    EXPECT_EQ(0u, seen[0].number);
}

TEST_F(RingTest, WhatWasReservedAndNotNeededIsForTheOtherLane) {
    std::vector<uint64_t> taken;
    const uint64_t many = journal(0).UnitsFor(64);
    while (journal(0).Reserve(many)) taken.push_back(many);
    EXPECT_FALSE(journal(1).Reserve(many));
    for (const uint64_t units : taken) journal(0).Return(units);
    EXPECT_TRUE(journal(1).Reserve(many));
    journal(1).Return(many);
}

// All of it is folded, for its disk is gone; some of it is still on its way to the file.
TEST_F(RingTest, ASegmentIsNotFreeBeforeItsFramesAreWritten) {
    const uint64_t units = journal().UnitsFor(1);
    uint64_t n = 0;
    for (; n < 600; ++n) {  // two segments full
        const MapChange change = ChangeOf(n, 0, 64, 1000);
        ASSERT_TRUE(journal().Reserve(units));
        journal().Append(kOwner, change, SumsOf(change));
        journal().Return(units);
    }
    journal().Folded(n);
    EXPECT_TRUE(journal().HoldsFolded());
    journal().EndSync({journal().written(), n, n, n});
    EXPECT_TRUE(journal().HoldsFolded());
    scheduler.RunAll();
    Sync();
    EXPECT_FALSE(journal().HoldsFolded());
}

// Else two under way would share a block, and the system would read the rest of it first.
TEST_F(RingTest, AFrameTakesWholeBlocks) {
    const std::string rubbish = BytesAt(ring.offset(0) + 3 * cow::kBlockBytes, kSector);
    for (uint64_t chunk = 0; chunk < 3; ++chunk) {
        ASSERT_TRUE(Append(ChangeOf(chunk, 0, 20, 1000 + 20 * chunk)));
    }
    for (uint64_t block = 0; block < 3; ++block) {
        const std::string bytes =
            BytesAt(ring.offset(0) + block * cow::kBlockBytes, cow::kBlockBytes);
        const auto frame = cow::ReadFrame(bytes, kTag);
        ASSERT_TRUE(frame.has_value());
        EXPECT_EQ(cow::kBlockBytes, frame->bytes);
        EXPECT_EQ(block, frame->first);
    }
    EXPECT_EQ(rubbish, BytesAt(ring.offset(0) + 3 * cow::kBlockBytes, kSector));
}

TEST_F(RingTest, OnlyTheNextFrameTellsWhatASyncCovered) {
    ASSERT_TRUE(Append(ChangeOf(1, 0, 1, 100)));
    Sync();
    EXPECT_EQ(1u, journal().synced());
    EXPECT_EQ(0u, journal().settled());  // no durable frame says so
    ASSERT_TRUE(Append(ChangeOf(2, 0, 1, 200)));
    std::vector<Seen> seen;
    ASSERT_TRUE(Read(&seen).ok());
    EXPECT_TRUE(seen[0].durable);
    EXPECT_FALSE(seen[1].durable);
    Sync();
    EXPECT_EQ(1u, journal().settled());
    Sync();  // it writes the lane's slot
    EXPECT_EQ(2u, journal().settled());
    seen.clear();
    ASSERT_TRUE(Read(&seen).ok());
    EXPECT_TRUE(seen[1].durable);
}

// Round and round: what is folded makes room, and only what is not is read.
TEST_F(RingTest, SegmentsAreUsedAgainOnceTheyAreFolded) {
    constexpr uint64_t kEntries = 5000, kBehind = 16;
    for (uint64_t n = 0; n < kEntries; ++n) {
        const size_t lane = n % 3 == 0 ? 1 : 0;
        ASSERT_TRUE(Append(ChangeOf(n, 0, 1 + n % 64, 1000), lane)) << n;
        if (journal(lane).appended() > kBehind) {
            journal(lane).Folded(journal(lane).appended() - kBehind);
        }
        if (journal(lane).HoldsFolded()) Sync(lane);
        if (n % 487 != 0) continue;
        std::vector<Seen> seen;
        ASSERT_TRUE(Read(&seen).ok()) << n;
        uint64_t next[2] = {0, 0};
        for (const Seen& entry : seen) {
            const size_t which = entry.change.chunk.value % 3 == 0 ? 1 : 0;
            if (next[which] != 0) {
                EXPECT_EQ(next[which], entry.number);
            }
            next[which] = entry.number + 1;
            EXPECT_EQ(SumsOf(entry.change), entry.sums);
        }
        for (size_t i = 0; i < 2; ++i) EXPECT_EQ(journal(i).appended(), next[i]) << n;
        EXPECT_LE(seen.size(), 2 * kBehind + 2 * ring.segment_bytes() / 100);
    }
}

TEST_F(RingTest, AFullRingAsksAllLanesToFoldAndTellsWhoWaits) {
    uint64_t appended = 0;
    while (Append(ChangeOf(appended, 0, 64, 1000))) ++appended;
    EXPECT_EQ(ring.segments() * (ring.segment_bytes() / cow::kBlockBytes), appended);
    scheduler.RunAll();
    EXPECT_LT(0u, lanes[0]->asked);
    EXPECT_LT(0u, lanes[1]->asked);
    EXPECT_FALSE(Append(ChangeOf(0, 0, 1, 5), 1));  // none is left for the other
    // What is reserved can be appended nevertheless, and all of it is read.
    std::vector<Seen> seen;
    ASSERT_TRUE(Read(&seen).ok());
    EXPECT_EQ(appended, seen.size());
    bool told = false;
    Spawn(WaitForRoom(&journal(1).room(), &told));
    scheduler.RunAll();
    EXPECT_FALSE(told);
    journal(0).Folded(appended);
    scheduler.RunAll();
    EXPECT_FALSE(told);  // nothing durable says so
    Sync();
    scheduler.RunAll();
    EXPECT_TRUE(told);
    EXPECT_TRUE(Append(ChangeOf(0, 0, 1, 5), 1));
}

TEST_F(RingTest, ATornTailIsForgottenAndDurableEntriesThatAreGoneAreDamage) {
    uint64_t n = 0;
    while (n < 60) ASSERT_TRUE(Append(ChangeOf(n++, 0, 64, 9)));
    // The lane is in its third segment by now: without it, what it holds was never written.
    std::vector<Seen> seen;
    ASSERT_TRUE(Read(&seen, {2}).ok());
    const size_t left = seen.size();
    EXPECT_LT(20u, left);
    EXPECT_GT(60u, left);
    seen.clear();
    ASSERT_TRUE(Read(&seen, {1}).ok());  // nothing behind a hole counts
    EXPECT_LT(seen.size(), left);
    Sync();
    ASSERT_TRUE(Append(ChangeOf(n, 0, 64, 9)));
    seen.clear();
    const Status gone = Read(&seen, {1});
    ASSERT_FALSE(gone.ok());
    EXPECT_EQ(ErrorKind::kDamaged, gone.error().kind);
    // Folded, they are not missed.
    journal().Folded(60);
    Sync();
    seen.clear();
    ASSERT_TRUE(Read(&seen, {0, 1}).ok());
    EXPECT_EQ(1u, seen.size());
}

TEST_F(RingTest, AKillLeavesWhatWasWrittenAndAPowerCutWhatWasSynced) {
    ASSERT_TRUE(Append(ChangeOf(1, 0, 1, 100)));
    Sync();
    ASSERT_TRUE(Append(ChangeOf(2, 0, 1, 200)));
    media.Kill();
    media.Restore();
    std::vector<Seen> seen;
    ASSERT_TRUE(Read(&seen).ok());
    EXPECT_EQ(2u, seen.size());
    unsigned lost = 0, kept = 0;
    for (unsigned i = 0; i < 20; ++i) {
        ASSERT_TRUE(Append(ChangeOf(3 + i, 0, 1, 300)));
        media.Cut();
        media.Restore();
        seen.clear();
        ASSERT_TRUE(Read(&seen).ok());
        ++(seen.size() == journal().appended() ? kept : lost);
        ASSERT_LE(1u, seen.size());
        if (seen.size() != journal().appended()) break;
    }
    EXPECT_EQ(1u, lost);
}

TEST_F(RingTest, AnErrorFailsThePool) {
    media.faults.append_error = 1;
    ASSERT_TRUE(Append(ChangeOf(1, 0, 1, 100)));
    EXPECT_TRUE(core.failed);
    EXPECT_FALSE(journal().pending());
}

}  // namespace
}  // namespace varve
