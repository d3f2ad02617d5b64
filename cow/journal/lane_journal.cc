#include "cow/journal/lane_journal.h"

#include <algorithm>

#include "base/check.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Of each segment, what the next entry may not fit in; and the head of its first frame.
constexpr uint64_t kSlack = kEntryBytesMax + kFrameHeaderBytes;

}  // namespace

LaneJournal::LaneJournal(Core& core, const Lane& lane, uint32_t index)
    : core_(core),
      executor_(*lane.executor),
      blocks_(*lane.blocks),
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
        call->journal->WriteAndTell();
    };
}

LaneJournal::~LaneJournal() {
    VARVE_CHECK(!fold_.made && !tell_.made && !write_.made);
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
    at_ = filled_ = 0;
}

uint64_t LaneJournal::Append(const MapOwner& owner, const MapChange& change,
                             std::span<const uint32_t> sums) {
    const bool fits =
        !segments_.empty() && at_ + frame_.bytes() + kEntryBytesMax <= ring_->segment_bytes();
    if (!fits) {
        WriteFrame();
        NextSegment();
    }
    frame_.Add(owner, change, sums);
    ++appended_;
    write_.Make(executor_);
    return appended_;
}

/// Writes what was appended, if anything was.
void LaneJournal::WriteFrame() {
    if (frame_.empty()) return;
    const uint64_t end = at_ + frame_.bytes();
    // Blocks are written whole when they are begun: else the system would read them first.
    filled_ = std::max(filled_, (end + kBlockBytes - 1) / kBlockBytes * kBlockBytes);
    Write(frame_, ring_->offset(segments_.back().index) + at_, filled_ - end);
    at_ = end;
    written_ = appended_;
    segments_.back().end = appended_;
}

void LaneJournal::WriteSlot() {
    Write(slot_, ring_->slot(index_), 0);
}

/// With so many zeros behind it.
void LaneJournal::Write(FrameWriter& frame, uint64_t offset, uint64_t zeros) {
    FrameHeader header;
    header.tag = ring_->tag();
    header.lane = index_;
    header.first = written_;
    header.durable = synced_;
    header.oldest = folded_;
    const std::string_view bytes = frame.Finish(header, zeros);
    const Errno error =
        core_.failed ? EIO : blocks_.WriteNow(offset, std::as_bytes(std::span(bytes)));
    if (error != 0) core_.Fail(SystemError(error, "writing the journal failed").message);
    frame.Clear();
    marked_ = header.durable;
    told_ = header.oldest;
}

void LaneJournal::WriteAndTell() {
    WriteFrame();
    wrote_.WakeAll();
}

Task<void> LaneJournal::Written() {
    const uint64_t mine = appended_;
    while (written_ < mine) co_await wrote_.Wait();
}

LaneJournal::Covered LaneJournal::BeginSync() {
    if (marked_ < synced_ || (told_ < folded_ && HoldsFolded())) WriteSlot();
    return {written_, marked_, told_};
}

void LaneJournal::EndSync(const Covered& covered) {
    synced_ = std::max(synced_, covered.written);
    settled_ = std::max(settled_, covered.marked);
    while (segments_.size() > 1 && segments_.front().end <= covered.told) {
        ring_->Give(segments_.front().index);
        segments_.pop_front();
    }
}

}  // namespace varve::cow
