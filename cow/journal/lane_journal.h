// LaneJournal: what a lane appends to the ring, and how far that is written, durable and folded.
// Not a disk's: all disks of a lane share one, so that one frame and one sync serve all.
//
// Belongs to its lane. Entries are counted from 0 on; all positions here are such numbers, and mean
// the entries below.
//
//   appended   in memory: a map change is announced before its data is written, so that both are
//              written side by side
//   written    in the page cache, or beyond: they outlive the process. What is appended in a turn
//              is a frame; some are under way at a time
//   completed  the data that they speak of has been written, or they have been called void
//   synced     durable, and so is that data
//   settled    known to be synced by a frame that is itself durable: their blocks may be
//              overwritten in place, for nobody will ask any more what was in them
//
// Whoever will append reserves room first, so that what was appended can always be written: a fold
// needs no ring, and a writer that waits for ring holds nothing that a fold waits for. Room is
// counted in units, the least that a frame takes of the file.
#pragma once

#include <algorithm>
#include <atomic>
#include <boost/intrusive/list.hpp>
#include <deque>
#include <functional>
#include <span>
#include <string>
#include <utility>
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

    /// Units to reserve for changes of so many blocks of a chunk, however they lie, that are
    /// appended in one go. For a void one is enough.
    uint64_t UnitsFor(uint64_t blocks) const;
    /// False if there is no room now: room() is woken when there may be.
    bool Reserve(uint64_t units);
    void Return(uint64_t units);
    WaitList& room() { return room_; }

    /// Returns the number after it. REQUIRES: as FrameWriter::Add; room for it is reserved.
    uint64_t Append(const MapOwner& owner, const MapChange& change, std::span<const uint32_t> sums);
    /// Entries from `first` on, so many, have not happened.
    uint64_t AppendVoid(const MapOwner& owner, uint64_t first, uint64_t count);

    /// Entries whose data is being written: what is appended from Begin() on, until End().
    struct Announced {
        uint64_t first = 0;
        boost::intrusive::list_member_hook<> in_lane, in_disk;
    };
    using LaneAnnounced = boost::intrusive::list<
        Announced, boost::intrusive::member_hook<Announced, boost::intrusive::list_member_hook<>,
                                                 &Announced::in_lane>>;
    using DiskAnnounced = boost::intrusive::list<
        Announced, boost::intrusive::member_hook<Announced, boost::intrusive::list_member_hook<>,
                                                 &Announced::in_disk>>;
    /// `disk`: those of the same disk, which keeps them.
    void Begin(Announced& announced, DiskAnnounced& disk) {
        announced.first = appended_;
        announced_.push_back(announced);
        disk.push_back(announced);
    }
    void End(Announced& announced, DiskAnnounced& disk) {
        announced_.erase(announced_.iterator_to(announced));
        disk.erase(disk.iterator_to(announced));
        if (std::exchange(fold_later_, false)) AskToFold();
    }
    /// There was nothing to fold, though there will be: fold() is called again when some data has
    /// been written.
    void FoldLater() { fold_later_ = !announced_.empty(); }

    /// Whether something is appended and not written.
    bool pending() const { return written_ != appended_; }
    /// Returns when what is below `number` is written, or the pool has failed.
    Task<void> Written(uint64_t number);
    /// Returns when nothing is under way.
    Task<void> Idle();

    uint64_t appended() const { return appended_; }
    uint64_t written() const { return written_; }
    uint64_t completed() const { return CompletedOf(announced_); }
    /// Of those in `list`: of one disk, what others are writing does not count.
    template <typename List>
    uint64_t CompletedOf(const List& list) const {
        return list.empty() ? appended_ : list.front().first;
    }
    uint64_t synced() const { return synced_; }
    uint64_t settled() const { return settled_; }

    /// Writes what is known of earlier syncs and folds, if no frame has told.
    Task<void> Tell();
    /// What a sync covers that begins now.
    struct Covered {
        uint64_t written, completed, marked, told;
    };
    Covered Covers() const;
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
    /// The last one may be in the making; the others are on their way.
    struct Frame {
        explicit Frame(Executor& executor) : written(executor) {}
        Buffer memory;
        uint64_t offset = 0;
        uint64_t end = 0;               // of its entries
        uint64_t marked = 0, told = 0;  // what it says is synced, and is folded
        enum { kOpen, kClosed, kUnderWay, kWritten } state = kOpen;
        WaitList written;
    };

    uint64_t Units(uint64_t bytes) const { return (bytes + unit_ - 1) / unit_; }
    uint64_t Room() const;
    void PrepareEntry();
    uint64_t EndEntry();
    void NextSegment();
    void Close(FrameWriter& writer, size_t unit, Frame& frame);
    void CloseFrame();
    void StartFrames();
    bool SlotDue() const;
    Task<void> Write(const Frame& frame);
    Task<void> WriteFrame(Frame& frame);
    void TakeWritten();

    Core& core_;
    Executor& executor_;
    BlockStore& blocks_;
    const uint64_t unit_;  // the file is written by multiples of so many bytes
    const uint32_t index_;
    Ring* ring_ = nullptr;
    std::function<void()> fold_all_;
    Call fold_, tell_, write_;
    WaitList room_, idle_;

    BufferPool memory_{64 << 10};
    FrameWriter writer_, slot_;
    std::deque<Frame> frames_;
    unsigned under_way_ = 0;  // of them
    bool writing_slot_ = false;
    LaneAnnounced announced_;
    bool fold_later_ = false;
    std::deque<Segment> segments_;  // that hold what is not folded; the last one is written to
    std::vector<uint32_t> spare_;
    uint64_t at_ = 0;        // bytes of the last segment that have frames: whole units
    uint64_t reserved_ = 0;  // units
    uint64_t appended_ = 0, framed_ = 0, written_ = 0, synced_ = 0, settled_ = 0;
    uint64_t folded_ = 0;
    uint64_t marked_ = 0, told_ = 0;  // what is written says is synced, and is folded
};

}  // namespace varve::cow
