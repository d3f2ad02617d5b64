#include "cow/journal/lane_journal.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

/// Frames under way together: the device takes them beside each other, and what it is slow with is
/// written as fewer, larger ones.
constexpr unsigned kFramesTogether = 16;

}  // namespace

LaneJournal::LaneJournal(Core& core, const Lane& lane, uint32_t index)
    : core_(core),
      executor_(*lane.executor),
      blocks_(*lane.blocks),
      unit_(blocks_.alignment() > 1 ? kBlockBytes : kFrameUnitLeast),
      index_(index),
      room_(executor_),
      idle_(executor_) {
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
        call->journal->StartFrames();
    };
}

LaneJournal::~LaneJournal() {
    VARVE_CHECK(!fold_.made && !tell_.made && !write_.made && frames_.empty() && !writing_slot_);
}

void LaneJournal::Open(Ring& ring, std::function<void()> fold) {
    ring_ = &ring;
    fold_all_ = std::move(fold);
    ring.Join(*this);
}

/// They may lie in two frames if a segment ends between them, but for a single one.
uint64_t LaneJournal::UnitsFor(uint64_t blocks) const {
    constexpr uint64_t kEachBytesMax = kMapBytesMax + 4;
    return Units(kFrameHeaderBytes + kOwnerBytesMax + kEachBytesMax * blocks) +
           (blocks > 1 ? 1 : 0);
}

/// Units that frames may still take, of segments that the lane has.
uint64_t LaneJournal::Room() const {
    uint64_t room = spare_.size() * (ring_->segment_bytes() / unit_);
    if (!segments_.empty()) room += (ring_->segment_bytes() - at_) / unit_;
    return room - (writer_.empty() ? 0 : Units(writer_.bytes()));
}

bool LaneJournal::Reserve(uint64_t units) {
    while (Room() < reserved_ + units) {
        const std::optional<uint32_t> segment = ring_->Take(*this);
        if (!segment) return false;
        spare_.push_back(*segment);
        if (ring_->crowded()) AskToFold();
    }
    reserved_ += units;
    return true;
}

/// Segments that were taken for what was reserved and not needed are for all lanes again.
void LaneJournal::Return(uint64_t units) {
    reserved_ -= units;
    const uint64_t whole = ring_->segment_bytes() / unit_;
    while (spare_.size() > 1 && Room() >= reserved_ + whole) {
        ring_->Give(spare_.back());
        spare_.pop_back();
    }
}

void LaneJournal::NextSegment() {
    VARVE_CHECK(!spare_.empty());
    segments_.push_back({spare_.back(), appended_});
    spare_.pop_back();
    at_ = 0;
}

/// There is a frame in the making that has room for another entry.
void LaneJournal::PrepareEntry() {
    const bool fits =
        !segments_.empty() && at_ + writer_.bytes() + kEntryBytesMax <= ring_->segment_bytes();
    if (!fits) {
        CloseFrame();
        NextSegment();
    }
    if (writer_.empty()) frames_.emplace_back(executor_);
}

uint64_t LaneJournal::EndEntry() {
    frames_.back().end = ++appended_;
    write_.Make(executor_);
    return appended_;
}

uint64_t LaneJournal::Append(const MapOwner& owner, const MapChange& change,
                             std::span<const uint32_t> sums) {
    PrepareEntry();
    writer_.Add(owner, change, sums);
    return EndEntry();
}

uint64_t LaneJournal::AppendVoid(const MapOwner& owner, uint64_t first, uint64_t count) {
    PrepareEntry();
    writer_.AddVoid(owner, first, count);
    return EndEntry();
}

/// Whole units of the file: a frame shares none with another, so that they are written at once.
/// `unit`: what it takes itself is a multiple of it.
void LaneJournal::Close(FrameWriter& writer, size_t unit, Frame& frame) {
    FrameHeader header;
    header.tag = ring_->tag();
    header.lane = index_;
    header.first = framed_;
    header.durable = frame.marked = synced_;
    header.oldest = frame.told = folded_;
    const std::string_view bytes = writer.Finish(header, unit);
    frame.memory = memory_.Take(Units(bytes.size()) * unit_);
    VARVE_CHECK(frame.memory);  // 256 KiB at most
    std::memcpy(frame.memory.data(), bytes.data(), bytes.size());
    std::memset(frame.memory.data() + bytes.size(), 0, frame.memory.size() - bytes.size());
    writer.Clear();
}

/// What was appended, if anything was, is to be written as one frame.
void LaneJournal::CloseFrame() {
    if (writer_.empty()) return;
    Frame& frame = frames_.back();
    Close(writer_, unit_, frame);
    frame.state = Frame::kClosed;
    Segment& segment = segments_.back();
    frame.offset = ring_->offset(segment.index) + at_;
    at_ += frame.memory.size();
    framed_ = segment.end = appended_;
}

void LaneJournal::StartFrames() {
    if (under_way_ < kFramesTogether) CloseFrame();
    while (under_way_ < kFramesTogether) {
        const auto frame = std::find_if(frames_.begin(), frames_.end(),
                                        [](const Frame& f) { return f.state == Frame::kClosed; });
        if (frame == frames_.end()) break;
        frame->state = Frame::kUnderWay;
        ++under_way_;
        Spawn(WriteFrame(*frame));  // may end at once, and others with it
    }
}

Task<void> LaneJournal::Write(const Frame& frame) {
    const iovec bytes{frame.memory.data(), frame.memory.size()};
    Errno error = EIO;
    if (!core_.failed) {
        error = co_await Transfer(blocks_, BlockIo::Kind::kAppend, frame.offset, &bytes, 1);
    }
    if (error != 0) core_.Fail(SystemError(error, "writing the journal failed").message);
}

Task<void> LaneJournal::WriteFrame(Frame& frame) {
    co_await Write(frame);
    --under_way_;
    frame.state = Frame::kWritten;
    TakeWritten();
    const bool more = !frames_.empty() && frames_.back().state <= Frame::kClosed;
    if (more) write_.Make(executor_);  // with all that completes in this turn
}

/// A frame counts once all before it do: whoever reads them stops at a hole.
void LaneJournal::TakeWritten() {
    while (!frames_.empty() && frames_.front().state == Frame::kWritten) {
        Frame& frame = frames_.front();
        written_ = frame.end;
        if (!core_.failed) {
            marked_ = std::max(marked_, frame.marked);
            told_ = std::max(told_, frame.told);
        }
        frame.written.WakeAll();
        frames_.pop_front();
    }
    if (!pending()) idle_.WakeAll();
}

Task<void> LaneJournal::Written(uint64_t number) {
    while (written_ < number) {
        const auto frame = std::find_if(frames_.begin(), frames_.end(),
                                        [number](const Frame& f) { return f.end >= number; });
        VARVE_CHECK(frame != frames_.end());
        co_await frame->written.Wait();
    }
}

Task<void> LaneJournal::Idle() {
    while (pending() || writing_slot_) co_await idle_.Wait();
}

bool LaneJournal::SlotDue() const {
    if (core_.failed) return false;
    return marked_ < synced_ || (told_ < folded_ && HoldsFolded());
}

Task<void> LaneJournal::Tell() {
    while (writing_slot_) co_await idle_.Wait();
    if (!SlotDue()) co_return;
    writing_slot_ = true;
    Frame slot(executor_);
    Close(slot_, 1, slot);  // its sums are in its first sector
    slot.offset = ring_->slot(index_);
    co_await Write(slot);
    if (!core_.failed) {
        marked_ = std::max(marked_, slot.marked);
        told_ = std::max(told_, slot.told);
    }
    writing_slot_ = false;
    idle_.WakeAll();
}

LaneJournal::Covered LaneJournal::Covers() const {
    const bool all = Mutated(Mutant::kAnnouncedSynced);
    return {written_, all ? written_ : std::min(written_, completed()), marked_, told_};
}

void LaneJournal::EndSync(const Covered& covered) {
    synced_ = std::max(synced_, covered.completed);
    settled_ = std::max(settled_, covered.marked);
    // A disk that is gone has no entries to be folded, though some may be on their way here.
    const uint64_t over = std::min(covered.told, covered.written);
    while (segments_.size() > 1 && segments_.front().end <= over) {
        ring_->Give(segments_.front().index);
        segments_.pop_front();
    }
}

}  // namespace varve::cow
