// LaneJournal: what a lane appends to the ring, and how far that is written, durable and folded.
// Not a disk's: all disks of a lane share one, so that one frame and one sync serve all.
//
// Belongs to its lane. Entries are counted from 0 on; all positions here are such numbers, and mean
// the entries below.
//
//   appended   in memory
//   written    in the page cache: they outlive the process. What is appended in a turn, or while
//              a frame is being written, is the next frame: one is under way at a time
//   synced     durable, and so is the data that they speak of
//   settled    known to be synced by a frame that is itself durable: their blocks may be
//              overwritten in place, for nobody will ask any more what was in them
//
// Whoever will append reserves room first, so that what was appended can always be written: a fold
// needs no ring, and a writer that waits for ring holds nothing that a fold waits for.
#pragma once

#include <algorithm>
#include <atomic>
#include <deque>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/buffers.h"
#include "base/sync.h"
#include "cow/core/core.h"
#include "cow/format/frame.h"
#include "cow/journal/ring.h"

namespace varve::cow {

class LaneJournal {
  public:
    LaneJournal(Core& core, const Lane& lane, uint32_t index);
    LaneJournal(const LaneJournal&) = delete;
    ~LaneJournal();

    /// Before the first append; on any thread. `fold` is called on the lane when the ring is full:
    /// all that the lane's disks have in it is to be folded.
    void Open(Ring& ring, std::function<void()> fold);
    uint64_t tag() const { return ring_->tag(); }

    /// Bytes to reserve for changes of so many blocks of a chunk, however they lie.
    static constexpr uint64_t BytesFor(uint64_t blocks) { return 80 + 27 * blocks; }
    /// False if there is no room now: room() is woken when there may be.
    bool Reserve(uint64_t bytes);
    void Return(uint64_t bytes) { reserved_ -= bytes; }
    WaitList& room() { return room_; }

    /// Returns the number after it. REQUIRES: as FrameWriter::Add; its bytes are reserved.
    uint64_t Append(const MapOwner& owner, const MapChange& change, std::span<const uint32_t> sums);
    /// Whether something is appended and not written.
    bool pending() const { return written_ != appended_; }
    /// Returns when what is below `number` is written, or the pool has failed.
    Task<void> Written(uint64_t number);
    /// Returns when nothing is under way.
    Task<void> Idle();

    uint64_t appended() const { return appended_; }
    uint64_t written() const { return written_; }
    uint64_t synced() const { return synced_; }
    uint64_t settled() const { return settled_; }

    /// Writes what is known of earlier syncs and folds, if no frame has told.
    Task<void> Tell();
    /// What a sync covers that begins now.
    struct Covered {
        uint64_t written, marked, told;
    };
    Covered Covers() const { return {written_, marked_, told_}; }
    /// It ended without error.
    void EndSync(const Covered& covered);

    /// Entries below `number` are in map rows: the segments that hold no others are free after a
    /// sync that begins later.
    void Folded(uint64_t number) { folded_ = std::max(folded_, number); }
    /// There are such.
    bool HoldsFolded() const { return segments_.size() > 1 && segments_.front().end <= folded_; }
    /// Less than half of the ring is free; somebody waits for some of it.
    bool crowded() const { return ring_->crowded(); }
    bool hungry() const { return ring_->hungry(); }

    // ---- for the ring; any thread
    void AskToFold() { fold_.Make(executor_); }
    void TellOfRoom() { tell_.Make(executor_); }

  private:
    /// Something that is to be done on the lane, once however often it was asked for.
    struct Call : Runnable {
        LaneJournal* journal = nullptr;
        std::atomic<bool> made = false;
        void Make(Executor& executor) {
            if (!made.exchange(true)) executor.Post(this);
        }
    };
    struct Segment {
        uint32_t index;
        uint64_t end;  // of its entries
    };
    struct Closed {     // a frame that is not written yet
        Buffer memory;  // whole units of the file, with what they hold already
        uint64_t offset;
        uint64_t end;           // of its entries
        uint64_t marked, told;  // what it says is synced, and is folded
    };

    uint64_t Room() const;
    void NextSegment();
    Closed Close(FrameWriter& frame, std::string_view before, uint64_t offset);
    void CloseFrame();
    bool SlotDue() const;
    Task<void> Write(const Closed& frame);
    Task<void> WriteFrames();

    Core& core_;
    Executor& executor_;
    BlockStore& blocks_;
    const uint64_t unit_;  // the file is written by multiples of so many bytes
    const uint32_t index_;
    Ring* ring_ = nullptr;
    std::function<void()> fold_all_;
    Call fold_, tell_, write_;
    WaitList room_, wrote_;

    BufferPool memory_{64 << 10};
    FrameWriter frame_, slot_;
    std::deque<Closed> closed_;
    bool writing_ = false, writing_slot_ = false;
    std::deque<Segment> segments_;  // that hold what is not folded; the last one is written to
    std::vector<uint32_t> spare_;
    uint64_t at_ = 0;        // bytes of the last segment that have frames
    std::string tail_;       // those of them in the last unit
    uint64_t reserved_ = 0;  // bytes
    uint64_t appended_ = 0, framed_ = 0, written_ = 0, synced_ = 0, settled_ = 0;
    uint64_t folded_ = 0;
    uint64_t marked_ = 0, told_ = 0;  // what is written says is synced, and is folded
};

}  // namespace varve::cow
