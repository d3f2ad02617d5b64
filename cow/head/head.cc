#include "cow/head/head.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "cow/format/runs.h"
#include "cow/mutants.h"
#include "cow/volume/block_sum.h"

namespace varve::cow {
namespace {

/// Segments of one large request that are under way together: 8 MiB.
constexpr uint64_t kSegmentsTogether = 32;
/// Blocks of the first lease, and how much larger the next ones are, up to a region's: what a disk
/// holds is in proportion to what it has written lately. After six a disk that is busy has regions
/// to itself.
constexpr uint64_t kLeaseFirst = 8;
constexpr uint64_t kLeaseGrowth = 4;
/// With less in hand, or half of the last lease, the next one is fetched ahead: 4 MiB.
constexpr uint64_t kLeaseLow = 1024;
/// A lease of a tight region may be smaller than what a write needs: 64 blocks at most.
constexpr unsigned kLeaseTries = 64;
/// What a write to a chunk, or unmapping some of it, costs the lane in units of Turns; and what
/// each of its runs adds to that.
constexpr uint64_t kSegmentCost = 64;
constexpr uint64_t kRunCost = 4;

alignas(kBlockBytes) std::byte zeros[kChunkBytes];  // never written

/// The blocks of its chunk that bytes [offset, offset + length) touch.
struct BlockRange {
    ChunkIndex chunk;
    uint32_t first = 0, end = 0;
    uint64_t mask = 0;

    BlockRange(uint64_t offset, uint64_t length) : chunk{offset / kChunkBytes} {
        const uint64_t at = offset % kChunkBytes;
        first = static_cast<uint32_t>(at / kBlockBytes);
        end = static_cast<uint32_t>((at + length + kBlockBytes - 1) / kBlockBytes);
        mask = MaskOf(first, end);
    }
    uint64_t offset() const { return chunk.value * kChunkBytes + first * kBlockBytes; }
    uint64_t bytes() const { return (end - first) * kBlockBytes; }
};

/// Appends the checksum of each block of fresh stretches. The chunk begins `at` bytes after
/// `memory`, which may be before it; the blocks themselves lie behind.
template <typename Stretches, typename Sums>
void SumFresh(const Stretches& stretches, uint64_t at, const std::byte* memory, Sums& sums) {
    for (const auto& stretch : stretches) {
        for (uint64_t i = 0; stretch.fresh && i < stretch.count; ++i) {
            sums.push_back(BlockSum(memory + (at + (stretch.first + i) * kBlockBytes)));
        }
    }
}

/// Entries from which on a round begins by itself: they, and the data they speak of, are what a
/// snapshot has to sync before it is answered. 4 MiB of single blocks.
constexpr uint64_t kEntriesSoft = 1024;
/// Blocks that were given up from which on a round gives them back: 64 MiB.
constexpr uint64_t kReleasedSoft = 16 << 10;
/// Entries from which on writers wait for a round. What they map is read by recovery.
constexpr uint64_t kEntriesHard = 16 << 10;
/// Changed chunks of a lane from which on they are folded: 1 GiB of disk that is written at random,
/// some 16 MiB of memory. They bound what recovery has to do.
constexpr uint64_t kUnfoldedSoftMax = 4096;
/// Metadata that a lane may come to owe for each of them: the rows, notes and marks of two, 2 KiB
/// each at most.
constexpr uint64_t kOwedForChunk = 4096;
/// A pass takes 32 rounds, so each folds at most 128 chunks: some 0.2 ms of encoding on the lane
/// and 1 ms of the home thread, for which a flush or a snapshot may have to wait.
constexpr uint64_t kRoundsOfPass = 32;

/// What was reserved and is appended, or not needed.
void GiveBack(LaneJournal& journal, uint64_t units) {
    journal.Return(units);
    if (!journal.room().empty()) journal.room().WakeAll();  // it was more than what it took
}

}  // namespace

HeadLimits HeadLimits::Of(uint64_t cache_bytes, uint64_t owed) {
    HeadLimits limits;
    limits.unfolded_soft = std::clamp<uint64_t>(
        std::min(cache_bytes / (16 << 10), owed / kOwedForChunk), 2, kUnfoldedSoftMax);
    limits.unfolded_hard = 2 * limits.unfolded_soft;
    limits.fold_together = std::max<uint64_t>(1, limits.unfolded_soft / kRoundsOfPass);
    return limits;
}

Head::Head(Core& core, LaneState& lane, HeadHost& host, DiskId disk, Place place)
    : MappedVolume(core, lane, place.line, place.size),
      host_(host),
      disk_(disk),
      branch_(place.line.front().branch),
      writers_gone_(lane.executor),
      unheld_(lane.executor),
      refilled_(lane.executor),
      room_sought_(lane.executor),
      synced_(lane.executor),
      round_done_(lane.executor),
      limits_(HeadLimits::Of(lane.shared.chunks.total(), core.owed_by_lane)) {
    generation_ = place.generation;
}

Head::~Head() {
    // After a failure there may be changes that will never be committed.
    for (const auto* list : {&dirty_, &folding_, &sealed_, &stranded_}) {
        for (Chunk* chunk : *list) --chunk->pins;
    }
    for (Chunk* chunk : aging_) --chunk->pins;
    lane_.RemoveUnfolded(unfolded_);
    std::erase(lane_.unfolded_heads, this);
    FoldedBelow(kNoEntry);  // nobody will ask for them
    std::erase(lane_.journaled_heads, this);
}

void Head::Rebase(Place place) {
    VARVE_CHECK(unfolded_ == 0 && first_entry_ == kNoEntry && !unsynced_ && aging_.empty());
    VARVE_CHECK(!cut_ && !sealed_open_ && writers_[0] + writers_[1] == 0);
    branch_ = place.line.front().branch;
    generation_ = place.generation;
    if (!Mutated(Mutant::kRestoreKeepsMap)) Reset(std::move(place.line), place.size);
}

// ---- locks

Task<Errno> Head::Lock(ChunkIndex index, uint64_t mask, Requester* requester, Chunk** chunk) {
    while (!(*chunk = Find(index))) {
        const Loaded loaded = co_await Load(index);
        if (loaded.error != 0) co_return loaded.error;
        if (Gone(requester)) co_return ECANCELED;
    }
    if (TryLock(**chunk, mask)) co_return 0;
    LockWait wait(**chunk, mask, lane_.executor, requester);
    const bool locked = co_await wait;
    co_return locked ? 0 : ECANCELED;
}

// ---- space

/// Blocks from `first` on, and whether they may be overwritten in place.
Piece Head::OursAt(const Chunk& chunk, uint32_t first, uint32_t end, bool* ours) const {
    Piece piece = PieceAt(chunk.runs, first, end);
    *ours = piece.mapped && piece.birth == generation_;
    if (!*ours || chunk.young == 0 || Mutated(Mutant::kYoungOverwritten)) return piece;
    const uint64_t young = chunk.young >> first;
    *ours = (young & 1) == 0;
    const int alike = *ours ? std::countr_zero(young) : std::countr_one(young);
    piece.count = std::min(piece.count, static_cast<uint32_t>(alike));
    return piece;
}

uint64_t Head::FreshNeeded(const Chunk& chunk, uint32_t first, uint32_t end) const {
    uint64_t needed = 0;
    while (first < end) {
        bool ours = false;
        const Piece piece = OursAt(chunk, first, end, &ours);
        if (!ours) needed += piece.count;
        first += piece.count;
    }
    return needed;
}

/// Whether the map may grow, as far as metadata goes: 0, ENOSPC, or ECANCELED.
Task<Errno> Head::Growable(Requester* requester) {
    if (!core_.metadata().full()) co_return 0;
    ++room_seekers_;
    if (!seeking_room_) Spawn(SeekRoom());
    const uint64_t mine = room_searches_ + (seeking_room_ ? 1 : 0);
    while (room_searches_ < mine && !Gone(requester)) {
        WaitFor searched(room_sought_, requester);
        co_await searched;
    }
    --room_seekers_;
    if (Gone(requester)) co_return ECANCELED;
    co_return core_.metadata().full() ? ENOSPC : 0;
}

/// One search for all who wait: as long as deletions are under way and somebody waits, but not
/// for ever, as a client has its own patience.
Task<void> Head::SeekRoom() {
    seeking_room_ = true;
    const Deadline deadline(core_.environment.clock, kSpacePatienceUs);
    bool more = true;
    do {
        more = co_await host_.FreeMetadata(lane_.executor);
    } while (more && core_.metadata().full() && room_seekers_ > 0 && !deadline.over());
    seeking_room_ = false;
    ++room_searches_;
    room_sought_.WakeAll();
}

Task<Errno> Head::EnsureLease(const Chunk& chunk, uint32_t first, uint32_t end,
                              Requester* requester) {
    // The generation may change while this waits, and with it what is needed. In a pool that is
    // almost full, disks may take the last blocks from each other for a while.
    for (unsigned tries = 0; FreshNeeded(chunk, first, end) > lease_blocks_; ++tries) {
        if (tries == kLeaseTries) co_return ENOSPC;
        const uint64_t needed = FreshNeeded(chunk, first, end);
        const Errno error = co_await Refilled(needed, requester);
        if (error != 0) co_return error;
    }
    co_return 0;
}

/// The next refill is over; one is begun if need be.
Task<Errno> Head::Refilled(uint64_t needed, Requester* requester) {
    const bool joined = refilling_;
    if (!joined) Spawn(Refill(needed, true));
    const uint64_t mine = refills_ + (joined || refilling_ ? 1 : 0);
    while (refills_ < mine) {
        if (Gone(requester)) co_return ECANCELED;
        WaitFor refilled(refilled_, requester);
        co_await refilled;
    }
    // What a refill ahead could not get, an urgent one still may.
    co_return refill_error_ == EAGAIN ? 0 : refill_error_;
}

Task<void> Head::Refill(uint64_t needed, bool urgent) {
    refilling_ = true;
    const uint64_t larger = lease_size_ == 0 ? kLeaseFirst : lease_size_ * kLeaseGrowth;
    const uint64_t size = std::clamp(larger, std::min(needed, kRegionBlocks), kRegionBlocks);
    Result<std::vector<Extent>> lease =
        co_await host_.LeaseBlocks(disk_, lane_.executor, size, urgent);
    refilling_ = false;
    ++refills_;
    refill_error_ = 0;
    if (lease.ok()) {
        for (const Extent& extent : lease.value()) {
            lease_.push_back(extent);
            lease_blocks_ += extent.count;
        }
        has_lease_ = true;
        lease_size_ = size;
    } else if (!urgent) {
        refill_error_ = EAGAIN;
    } else {
        refill_error_ = lease.error().kind == ErrorKind::kNoSpace ? ENOSPC : EIO;
    }
    refill_ahead_ = lease.ok();
    refilled_.WakeAll();
}

Extent Head::Allocate(uint64_t most) {
    VARVE_CHECK(!lease_.empty());
    Extent& front = lease_.front();
    const Extent taken{front.place, std::min(most, front.count)};
    front.place += taken.count;
    front.count -= taken.count;
    if (front.count == 0) lease_.pop_front();
    lease_blocks_ -= taken.count;
    if (lease_blocks_ == 0) has_lease_ = false;
    allocations_.store(allocations_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    return taken;
}

void Head::Plan(const Chunk& chunk, uint32_t first, uint32_t end, Stretches& stretches) {
    while (first < end) {
        bool ours = false;
        const Piece piece = OursAt(chunk, first, end, &ours);
        if (ours || (piece.mapped && Mutated(Mutant::kHeldBlockOverwritten))) {
            stretches.push_back({first, piece.count, piece.place, false});
            first += piece.count;
            continue;
        }
        const Extent extent = Allocate(piece.count);
        const auto count = static_cast<uint32_t>(extent.count);
        stretches.push_back({first, count, extent.place, true});
        first += count;
    }
    const bool low = lease_blocks_ < std::min(kLeaseLow, lease_size_ / 2);
    if (low && refill_ahead_ && !refilling_) Spawn(Refill(0, false));
}

std::vector<Extent> Head::TakeLease() {
    lease_blocks_ = lease_size_ = 0;
    has_lease_ = false;
    std::vector<Extent> extents(lease_.begin(), lease_.end());
    lease_.clear();
    return extents;
}

// ---- writes

/// Whether there is enough for a round that none has begun with.
bool Head::RoundDue() const {
    const bool many = released_blocks_ >= kReleasedSoft && !round_active_;
    return many || entries_ >= kEntriesSoft;
}

/// Whether an answer has to wait, or somebody has to be told that there is work.
bool Head::Laden() const {
    return hold_ || RoundDue() || ManyUnfolded();
}

/// Whether the lane shall fold.
bool Head::ManyUnfolded() const {
    return lane_.unfolded > limits_.unfolded_soft || lane_.crowded(lane_.shared.unfolded_soft);
}

/// Whether writers must wait until this head has less that is not folded.
bool Head::Overladen() const {
    if (core_.failed) return false;
    const bool many =
        lane_.unfolded > limits_.unfolded_hard || lane_.crowded(2 * lane_.shared.unfolded_soft);
    return (many && unfolded_ > 0) || entries_ > kEntriesHard;
}

/// What was answered outlives the process: so what the request has changed is written first.
/// `last`: the number after the last entry that says so.
Task<Errno> Head::Answerable(Errno error, Requester* requester, uint64_t last) {
    if (!Mutated(Mutant::kAnsweredUnwritten)) co_await lane_.journal.Written(last);
    if (Laden()) co_await Relieved(requester);
    co_return error == 0 && core_.failed ? EIO : error;
}

Task<void> Head::Relieved(Requester* requester) {
    while (hold_ && !Gone(requester)) {
        WaitFor unheld(unheld_, requester);
        co_await unheld;
    }
    if (RoundDue()) RequestRound();
    if (ManyUnfolded()) FoldLane(lane_);
    while (Overladen() && !Gone(requester)) {
        const uint64_t done = rounds_done_;
        RequestRound();
        if (ManyUnfolded()) FoldLane(lane_);
        // A round that has nothing to commit is over by now.
        if (rounds_done_ != done) continue;
        WaitFor round(round_done_, requester);
        co_await round;
    }
}

void Head::FoldLane(LaneState& lane) {
    std::vector<Head*> heads = lane.unfolded_heads;
    heads.insert(heads.end(), lane.journaled_heads.begin(), lane.journaled_heads.end());
    bool any = false;
    for (Head* head : heads) {
        const bool some = head->unfolded_ > 0 || head->first_entry_ < head->FoldableEnd();
        any |= some;
        if (some && !head->pass_ && !head->pass_wanted_) head->RequestFold();
    }
    if (!any) lane.journal.FoldLater();
}

Task<Errno> Head::Write(uint64_t offset, std::span<const std::byte> buffer, Requester* requester) {
    if (!InRange(offset, buffer.size())) co_return EINVAL;
    if (core_.failed) co_return EIO;
    if (buffer.empty()) co_return 0;
    const LoadMeter::Request counted(lane_.load);
    Errno error = 0;
    uint64_t last = 0;
    if (offset / kChunkBytes == (offset + buffer.size() - 1) / kChunkBytes) {
        error = co_await WriteSegment(offset, buffer, requester, &last);
    } else {
        error = co_await WriteMany(offset, buffer.size(), buffer.data(), requester, &last);
    }
    if (!Laden() && last <= lane_.journal.written()) co_return error;
    co_return co_await Answerable(error, requester, last);
}

Task<void> Head::WriteCounted(uint64_t offset, std::span<const std::byte> buffer,
                              Requester* requester, uint64_t* last, Errno* error, Join* join) {
    const Errno result = co_await WriteSegment(offset, buffer, requester, last);
    if (result != 0) *error = result;
    join->Done();
}

Task<Errno> Head::WriteMany(uint64_t offset, uint64_t length, const std::byte* data,
                            Requester* requester, uint64_t* last) {
    Errno error = 0;
    while (length > 0 && error == 0) {
        const uint64_t stop = (offset / kChunkBytes + kSegmentsTogether) * kChunkBytes;
        const uint64_t end = std::min(offset + length, stop);
        Join join(static_cast<uint32_t>((end - 1) / kChunkBytes - offset / kChunkBytes + 1));
        while (offset < end) {
            const uint64_t part = std::min(end - offset, kChunkBytes - offset % kChunkBytes);
            const std::span<const std::byte> bytes(data ? data : zeros, part);
            Spawn(WriteCounted(offset, bytes, requester, last, &error, &join));
            offset += part;
            length -= part;
            if (data) data += part;
        }
        co_await join;
        if (length == 0 || error != 0) break;
        if (Laden()) co_await Relieved(requester);
        if (Gone(requester)) co_return ECANCELED;
        if (lane_.turns.Spend(kSegmentsTogether * kSegmentCost)) {
            co_await Turns::Next(lane_.turns);
        }
    }
    co_return error;
}

/// What a write needs that maps new blocks: room for them in metadata and in the journal, and the
/// blocks. `*reserved`: of the journal, to be given back.
Task<Errno> Head::Prepared(Chunk& chunk, uint32_t first, uint32_t end, Requester* requester,
                           uint64_t* reserved) {
    Errno error = 0;
    if (core_.metadata().full()) error = co_await Growable(requester);
    const uint64_t units = lane_.journal.UnitsFor(end - first) + 1;  // it may have to be recalled
    if (error == 0) error = co_await ReserveJournal(units, requester);
    if (error == 0) {
        *reserved = units;
        error = co_await EnsureLease(chunk, first, end, requester);
    }
    if (error != ENOSPC || chunk.young == 0) co_return error;
    // A young block needs no other place once it is settled.
    error = co_await Settle();
    if (error == 0 && FreshNeeded(chunk, first, end) > 0) error = ENOSPC;
    co_return error;
}

/// Waits until there is room in the journal.
Task<Errno> Head::ReserveJournal(uint64_t units, Requester* requester) {
    while (!lane_.journal.Reserve(units)) {
        if (core_.failed) co_return EIO;
        if (Gone(requester)) co_return ECANCELED;
        const Waits::Scope waiting(core_.waits, "room in the journal");
        WaitFor room(lane_.journal.room(), requester);
        co_await room;
    }
    co_return 0;
}

/// `*last`: the number after the entry that it adds to the journal, if it does.
Task<Errno> Head::WriteSegment(uint64_t offset, std::span<const std::byte> buffer,
                               Requester* requester, uint64_t* last) {
    const BlockRange blocks(offset, buffer.size());
    Chunk* chunk = Find(blocks.chunk);
    Errno error = 0;
    if (!chunk || !TryLock(*chunk, blocks.mask)) {
        error = co_await Lock(blocks.chunk, blocks.mask, requester, &chunk);
        if (error != 0) co_return error;
    }
    uint64_t reserved = 0;
    if (FreshNeeded(*chunk, blocks.first, blocks.end) > 0) {
        error = co_await Prepared(*chunk, blocks.first, blocks.end, requester, &reserved);
    }
    if (Gone(requester)) error = ECANCELED;
    if (error != 0) {
        GiveBack(lane_.journal, reserved);
        Unlock(*chunk, blocks.mask);
        co_return error;
    }
    // From here to the start of the transfer there is no suspension: the write belongs to the
    // generation that is present now.
    const Generation generation = generation_;
    const unsigned era = era_;
    ++writers_[era];
    Stretches stretches;
    Plan(*chunk, blocks.first, blocks.end, stretches);
    const bool part_of_first = offset != blocks.offset() && stretches.front().fresh;
    const bool part_of_last =
        offset + buffer.size() != blocks.offset() + blocks.bytes() && stretches.back().fresh;
    const auto address = reinterpret_cast<uintptr_t>(buffer.data());
    const bool aligned = ((offset | buffer.size() | address) & (lane_.blocks.alignment() - 1)) == 0;
    const bool early = Mutated(Mutant::kMappedBeforeWritten);
    Announcement announcement;
    if (aligned && !part_of_first && !part_of_last) {
        IoPieces pieces;
        for (const Stretch& stretch : stretches) {
            const uint64_t begin = blocks.chunk.value * kChunkBytes + stretch.first * kBlockBytes;
            const uint64_t from = std::max(begin, offset);
            const uint64_t to =
                std::min(begin + stretch.count * kBlockBytes, offset + buffer.size());
            auto* memory = const_cast<std::byte*>(&buffer[from - offset]);
            AppendPiece(pieces, stretch.place * kBlockBytes + (from - begin), memory, to - from);
        }
        Sums sums;
        SumFresh(stretches, blocks.chunk.value * kChunkBytes - offset, buffer.data(), sums);
        Announce(blocks.chunk, generation, stretches, sums, &announcement);
        if (early) MapStretches(*chunk, generation, stretches, announcement.end);
        error = co_await TransferAll(lane_.blocks, BlockIo::Kind::kWrite, pieces);
    } else {
        error = co_await WriteDetour(*chunk, generation, stretches, offset, buffer, requester,
                                     &announcement);
        if (early && error == 0) MapStretches(*chunk, generation, stretches, announcement.end);
    }
    // Even if it failed: what it overwrote in part must not change any more under a snapshot.
    unsynced_ |= stretches.front().fresh || !Mutated(Mutant::kInPlaceWriteNotSynced);
    if (error == 0 || (Mutated(Mutant::kFailedWriteMapped) && announcement.end > 0)) {
        if (!early) MapStretches(*chunk, generation, stretches, announcement.end);
    } else {
        if (announcement.end > 0) co_await Recall(generation, &announcement);
        GiveUp(stretches);
    }
    if (announcement.end > 0) lane_.journal.End(announcement.entries, announced_);
    *last = std::max(*last, announcement.end);
    GiveBack(lane_.journal, reserved);
    if (--writers_[era] == 0) writers_gone_.WakeAll();
    Unlock(*chunk, blocks.mask);
    co_return error;
}

Task<Errno> Head::WriteDetour(const Chunk& chunk, Generation generation, const Stretches& stretches,
                              uint64_t offset, std::span<const std::byte> buffer,
                              Requester* requester, Announcement* announcement) {
    const BlockRange blocks(offset, buffer.size());
    const Buffer detour = lane_.detours.Take(blocks.bytes());
    if (!detour) co_return ENOMEM;
    // The blocks at the edges that are written in part keep the rest of their old content.
    IoPieces old;
    FrozenList frozen;  // the damage of a block must not become part of a new one
    const auto keep = [&](uint32_t block) {
        std::byte* memory = detour.data() + (block - blocks.first) * kBlockBytes;
        const Piece piece = PieceAt(chunk.runs, block, block + 1);
        if (piece.mapped && !Mutated(Mutant::kPartOfBlockLosesRest)) {
            AppendPiece(old, piece.place * kBlockBytes, memory, kBlockBytes);
            const bool present = piece.birth == generation || Mutated(Mutant::kDamageLaundered);
            if (!present) frozen.push_back({piece.place, 1, piece.birth, memory});
        } else {
            std::memset(memory, 0, kBlockBytes);
        }
    };
    const bool first_part = offset != blocks.offset();
    const bool last_part = offset + buffer.size() != blocks.offset() + blocks.bytes();
    if (first_part) keep(blocks.first);
    if (last_part && (!first_part || blocks.end - blocks.first > 1)) keep(blocks.end - 1);
    const Errno error = co_await ReadVerified(core_, lane_, old, frozen);
    if (error != 0) co_return error;
    if (Gone(requester)) co_return ECANCELED;
    std::memcpy(detour.data() + (offset - blocks.offset()), buffer.data(), buffer.size());
    IoPieces pieces;
    for (const Stretch& stretch : stretches) {
        AppendPiece(pieces, stretch.place * kBlockBytes,
                    detour.data() + (stretch.first - blocks.first) * kBlockBytes,
                    stretch.count * kBlockBytes);
    }
    Sums sums;
    SumFresh(stretches, -(blocks.first * kBlockBytes), detour.data(), sums);
    Announce(blocks.chunk, generation, stretches, sums, announcement);
    co_return co_await TransferAll(lane_.blocks, BlockIo::Kind::kWrite, pieces);
}

// ---- trims and zeroes

/// The metadata is full: what leaves nothing of a chunk makes its row shorter, in the end; a hole
/// makes it longer.
Task<Errno> Head::RoomToUnmap(bool whole, Requester* requester) {
    if (shrinking_) co_return 0;
    if (core_.metadata().exhausted()) co_return ENOSPC;
    if (whole) co_return 0;
    co_return co_await Growable(requester);
}

Task<Errno> Head::UnmapBlocks(uint64_t begin_block, uint64_t end_block, Requester* requester) {
    ChunkIndex nothing_from, nothing_to;  // nothing is stored in between
    uint64_t settled = 0;
    while (begin_block < end_block) {
        if (Gone(requester)) co_return ECANCELED;
        const ChunkIndex index{begin_block / kChunkBlocks};
        const uint64_t stop = std::min(end_block, (index.value + 1) * kChunkBlocks);
        const auto first = static_cast<uint32_t>(begin_block % kChunkBlocks);
        const auto end = static_cast<uint32_t>(stop - index.value * kChunkBlocks);
        begin_block = stop;
        uint64_t cost = 1;
        const Chunk* chunk = Find(index);
        const bool absent = index >= nothing_from && index < nothing_to && settled == settled_;
        if (!chunk && !absent) {
            const Loaded loaded = co_await Load(index);
            if (loaded.error != 0) co_return loaded.error;
            nothing_from = GroupEnd(index);
            nothing_to = loaded.next;
            settled = loaded.settled;
        }
        if (chunk || !absent) {
            const Errno error = co_await UnmapChunk(index, first, end, requester, &cost);
            if (error != 0) co_return error;
        } else {
            const ChunkIndex last{end_block / kChunkBlocks + 1};
            const ChunkIndex next = NextHeld(index, std::min(nothing_to, last), &cost);
            begin_block = std::min(end_block, next.value * kChunkBlocks);
        }
        if (lane_.turns.Spend(cost)) co_await Turns::Next(lane_.turns);
        if (Laden()) co_await Relieved(requester);
    }
    co_return 0;
}

/// Adds what it cost, in units of Turns.
Task<Errno> Head::UnmapChunk(ChunkIndex index, uint32_t first, uint32_t end, Requester* requester,
                             uint64_t* cost) {
    const uint64_t mask = MaskOf(first, end);
    Chunk* chunk = Find(index);
    if (!chunk || !TryLock(*chunk, mask)) {
        const Errno error = co_await Lock(index, mask, requester, &chunk);
        if (error != 0) co_return error;
    }
    const bool mapped = MappedBlocks(chunk->runs) > 0;
    Errno error = 0;
    if (mapped && core_.metadata().full()) {
        error = co_await RoomToUnmap(end - first == kChunkBlocks, requester);
    }
    if (Gone(requester)) error = ECANCELED;
    const uint64_t units = lane_.journal.UnitsFor(1);
    if (error == 0 && mapped) error = co_await ReserveJournal(units, requester);
    *cost += chunk->runs.size();
    if (error == 0 && mapped) {
        *cost += kSegmentCost + kRunCost * chunk->runs.size();
        UnmapNow(*chunk, first, end);
        GiveBack(lane_.journal, units);
    }
    Unlock(*chunk, mask);
    co_return error;
}

Task<Errno> Head::Trim(uint64_t offset, uint64_t length, Requester* requester) {
    if (!InRange(offset, length)) co_return EINVAL;
    if (core_.failed) co_return EIO;
    const LoadMeter::Request counted(lane_.load);
    const uint64_t begin = (offset + kBlockBytes - 1) / kBlockBytes;
    const uint64_t end = (offset + length) / kBlockBytes;
    Errno error = 0;
    if (begin < end) error = co_await UnmapBlocks(begin, end, requester);
    co_return co_await Answerable(error, requester, last_entry_);
}

Task<Errno> Head::ClearTail() {
    const uint64_t begin = size();
    const uint64_t end = (begin + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    if (begin == end) co_return 0;
    Errno error = co_await ZeroPart(begin, end - begin, nullptr);
    co_await lane_.journal.Written(last_entry_);
    if (error == 0) error = co_await Flush();
    co_return error;
}

Task<Errno> Head::TrimFrom(uint64_t from) {
    shrinking_ = true;
    const Errno error = co_await UnmapFrom(from);
    shrinking_ = false;
    co_return error;
}

Task<Errno> Head::UnmapFrom(uint64_t from) {
    const uint64_t first_block = (from + kBlockBytes - 1) / kBlockBytes;
    const uint64_t end = kDiskBytesMax / kChunkBytes;
    uint64_t next_stored = 0;  // after the group that was loaded last
    for (uint64_t index = first_block / kChunkBlocks; index < end;) {
        if (core_.closing) co_return ECANCELED;
        const ChunkIndex chunk{index};
        if (!Find(chunk)) {
            const Loaded loaded = co_await Load(chunk);
            if (loaded.error != 0) co_return loaded.error;
            next_stored = loaded.next.value;
            continue;
        }
        const uint64_t begin = std::max(first_block, index * kChunkBlocks);
        const Errno error = co_await UnmapBlocks(begin, (index + 1) * kChunkBlocks, nullptr);
        if (error != 0) co_return error;
        if (Laden()) co_await Relieved(nullptr);
        ++index;
        if (index == GroupEnd(chunk).value) index = std::max(index, next_stored);
    }
    co_return 0;
}

Task<Errno> Head::ZeroPart(uint64_t offset, uint64_t length, Requester* requester) {
    const BlockRange blocks(offset, length);
    if (!Find(blocks.chunk)) {
        const Loaded loaded = co_await Load(blocks.chunk);
        if (loaded.error != 0) co_return loaded.error;
    }
    const Chunk* chunk = Find(blocks.chunk);
    if (chunk && !PieceAt(chunk->runs, blocks.first, blocks.end).mapped) co_return 0;
    const std::span<const std::byte> bytes(zeros, length);
    uint64_t last = 0;  // who asks waits for all that the head has appended
    co_return co_await WriteSegment(offset, bytes, requester, &last);
}

Task<Errno> Head::WriteZeroes(uint64_t offset, uint64_t length, bool allocate,
                              Requester* requester) {
    if (!InRange(offset, length)) co_return EINVAL;
    if (core_.failed) co_return EIO;
    if (length == 0) co_return 0;
    const LoadMeter::Request counted(lane_.load);
    Errno error = 0;
    if (allocate) {
        uint64_t last = 0;
        error = co_await WriteMany(offset, length, nullptr, requester, &last);
        co_return co_await Answerable(error, requester, last);
    }
    const uint64_t end = offset + length;
    const uint64_t first_whole = (offset + kBlockBytes - 1) / kBlockBytes * kBlockBytes;
    const uint64_t last_whole = end / kBlockBytes * kBlockBytes;
    if (offset < first_whole && !Mutated(Mutant::kZeroesMissTheEdges)) {
        error = co_await ZeroPart(offset, std::min(first_whole, end) - offset, requester);
    }
    if (error == 0 && first_whole < last_whole) {
        error =
            co_await UnmapBlocks(first_whole / kBlockBytes, last_whole / kBlockBytes, requester);
    }
    if (error == 0 && last_whole < end && last_whole >= first_whole) {
        error = co_await ZeroPart(last_whole, end - last_whole, requester);
    }
    co_return co_await Answerable(error, requester, last_entry_);
}

}  // namespace varve::cow
