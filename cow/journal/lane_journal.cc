#include "cow/journal/lane_journal.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Of each segment, what the next entry may not fit in; and the head of its first frame.
constexpr uint64_t kSlack = kEntryBytesMax + kFrameHeaderBytes;

/// Through the page cache. Without it whole blocks are written: a file system may take locks, and
/// read, for less.
constexpr uint64_t kUnitInCache = 512;

}  // namespace

LaneJournal::LaneJournal(Core& core, const Lane& lane, uint32_t index)
    : core_(core),
      executor_(*lane.executor),
      blocks_(*lane.blocks),
      unit_(blocks_.alignment() > 1 ? kBlockBytes : kUnitInCache),
      index_(index),
      room_(executor_),
      wrote_(executor_) {
    for (Call* call : {&fold_, &tell_, &write_}) call->journal = this;
    fold_.run = [](Runnable* self) {
        auto* call = static_cast<Call*>(self);
        call->made = false;
        call->journal->fold_all_();
    };
    tell_.run = [](Runnable* self) {
        auto* call = static_cast<Call*>(self);
        call->made = false;
        call->journal->room_.WakeAll();
    };
    write_.run = [](Runnable* self) {
        auto* call = static_cast<Call*>(self);
        call->made = false;
        if (!call->journal->writing_) Spawn(call->journal->WriteFrames());
    };
}

LaneJournal::~LaneJournal() {
    VARVE_CHECK(!fold_.made && !tell_.made && !write_.made && !writing_ && !writing_slot_);
}

void LaneJournal::Open(Ring& ring, std::function<void()> fold) {
    ring_ = &ring;
    fold_all_ = std::move(fold);
    ring.Join(*this);
}

/// Bytes that entries may still take, of segments that the lane has.
uint64_t LaneJournal::Room() const {
    const uint64_t whole = ring_->segment_bytes() - kSlack;
    uint64_t room = spare_.size() * whole;
    if (!segments_.empty()) {
        const uint64_t used = at_ + frame_.bytes();
        room += used < whole ? whole - used : 0;
    }
    return room;
}

bool LaneJournal::Reserve(uint64_t bytes) {
    while (Room() < reserved_ + bytes) {
        const std::optional<uint32_t> segment = ring_->Take(*this);
        if (!segment) return false;
        spare_.push_back(*segment);
        if (ring_->crowded()) AskToFold();
    }
    reserved_ += bytes;
    return true;
}

void LaneJournal::NextSegment() {
    VARVE_CHECK(!spare_.empty());
    segments_.push_back({spare_.back(), appended_});
    spare_.pop_back();
    at_ = 0;
    tail_.clear();
}

uint64_t LaneJournal::Append(const MapOwner& owner, const MapChange& change,
                             std::span<const uint32_t> sums) {
    const bool fits =
        !segments_.empty() && at_ + frame_.bytes() + kEntryBytesMax <= ring_->segment_bytes();
    if (!fits) {
        CloseFrame();
        NextSegment();
    }
    frame_.Add(owner, change, sums);
    ++appended_;
    write_.Make(executor_);
    return appended_;
}

/// Ends it. `before`: what the unit that it begins in holds already. Zeros are behind it.
LaneJournal::Closed LaneJournal::Close(FrameWriter& frame, std::string_view before,
                                       uint64_t offset) {
    FrameHeader header;
    header.tag = ring_->tag();
    header.lane = index_;
    header.first = framed_;
    header.durable = synced_;
    header.oldest = folded_;
    const std::string_view bytes = frame.Finish(header);
    const uint64_t used = before.size() + bytes.size();
    const uint64_t whole = (used + unit_ - 1) / unit_ * unit_;
    Closed closed{memory_.Take(whole), offset, appended_, synced_, folded_};
    VARVE_CHECK(closed.memory);  // 256 KiB at most
    auto* memory = reinterpret_cast<char*>(closed.memory.data());
    before.copy(memory, before.size());
    bytes.copy(memory + before.size(), bytes.size());
    std::memset(memory + used, 0, whole - used);
    frame.Clear();
    return closed;
}

/// What was appended, if anything was, is to be written as one frame.
void LaneJournal::CloseFrame() {
    if (frame_.empty()) return;
    Segment& segment = segments_.back();
    const uint64_t end = at_ + frame_.bytes();
    const uint64_t begin = at_ - tail_.size();
    closed_.push_back(Close(frame_, tail_, ring_->offset(segment.index) + begin));
    const uint64_t whole = end / unit_ * unit_;
    tail_.assign(reinterpret_cast<const char*>(closed_.back().memory.data()) + (whole - begin),
                 end - whole);
    at_ = end;
    framed_ = segment.end = appended_;
}

Task<void> LaneJournal::Write(const Closed& frame) {
    const iovec bytes{frame.memory.data(), frame.memory.size()};
    Errno error = EIO;
    if (!core_.failed) {
        error = co_await Transfer(blocks_, BlockIo::Kind::kAppend, frame.offset, &bytes, 1);
    }
    if (error != 0) co_return core_.Fail(SystemError(error, "writing the journal failed").message);
    marked_ = std::max(marked_, frame.marked);
    told_ = std::max(told_, frame.told);
}

/// One after the other: they may share a block.
Task<void> LaneJournal::WriteFrames() {
    writing_ = true;
    CloseFrame();
    while (!closed_.empty()) {
        co_await Write(closed_.front());
        written_ = closed_.front().end;
        closed_.pop_front();
        wrote_.WakeAll();
    }
    writing_ = false;
    if (pending()) write_.Make(executor_);  // with all that completes in this turn
}

Task<void> LaneJournal::Written(uint64_t number) {
    while (written_ < number) co_await wrote_.Wait();
}

Task<void> LaneJournal::Idle() {
    while (pending() || writing_ || writing_slot_) co_await wrote_.Wait();
}

bool LaneJournal::SlotDue() const {
    if (core_.failed) return false;
    return marked_ < synced_ || (told_ < folded_ && HoldsFolded());
}

Task<void> LaneJournal::Tell() {
    while (writing_slot_) co_await wrote_.Wait();
    if (!SlotDue()) co_return;
    writing_slot_ = true;
    const Closed slot = Close(slot_, "", ring_->slot(index_));
    co_await Write(slot);
    writing_slot_ = false;
    wrote_.WakeAll();
}

void LaneJournal::EndSync(const Covered& covered) {
    synced_ = std::max(synced_, covered.written);
    settled_ = std::max(settled_, covered.marked);
    // A disk that is gone has no entries to be folded, though some may be on their way here.
    const uint64_t over = std::min(covered.told, covered.written);
    while (segments_.size() > 1 && segments_.front().end <= over) {
        ring_->Give(segments_.front().index);
        segments_.pop_front();
    }
}

}  // namespace varve::cow
