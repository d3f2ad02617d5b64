#include "cow/journal/ring_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <tuple>

#include "cow/mutants.h"

namespace varve::cow {

/// A segment's frames follow each other; behind the last one there may be some of an earlier use.
void RingReader::AddSegment(std::string segment) {
    const size_t before = frames_.size();
    size_t offset = 0;
    for (;;) {
        const std::string_view rest = std::string_view(segment).substr(offset);
        const std::optional<FrameHeader> header = ReadFrame(rest, tag_);
        if (!header) break;
        if (frames_.size() > before) {
            const FrameHeader& last = frames_.back().header;
            const bool goes_on =
                header->lane == last.lane && header->first == last.first + last.count;
            if (!goes_on) break;
        }
        frames_.push_back({*header, segments_.size(), offset});
        offset += header->bytes;
    }
    if (frames_.size() > before) segments_.push_back(std::move(segment));
}

void RingReader::AddSlot(std::string_view slot) {
    const std::optional<FrameHeader> header = ReadFrame(slot, tag_);
    if (header && header->count == 0) frames_.push_back({*header, 0, 0});
}

Status RingReader::ForEach(const Each& each) {
    std::sort(frames_.begin(), frames_.end(), [](const Frame& a, const Frame& b) {
        const auto key = [](const FrameHeader& h) { return std::tuple(h.lane, h.first, h.count); };
        return key(a.header) < key(b.header);
    });
    for (auto begin = frames_.cbegin(); begin != frames_.cend();) {
        const auto end = std::find_if(begin, frames_.cend(), [begin](const Frame& frame) {
            return frame.header.lane != begin->header.lane;
        });
        if (Status s = ForEachOfLane(begin, end, each); !s.ok()) return s;
        begin = end;
    }
    return Status();
}

Status RingReader::ForEachOfLane(Frames::const_iterator begin, Frames::const_iterator end,
                                 const Each& each) const {
    const uint32_t lane = begin->header.lane;
    uint64_t oldest = 0, durable = 0;
    for (auto frame = begin; frame != end; ++frame) {
        oldest = std::max(oldest, frame->header.oldest);
        durable = std::max(durable, frame->header.durable);
    }
    uint64_t next = oldest;
    std::set<uint64_t> voids;
    const auto keep = [&](const FrameEntry& entry) {
        for (uint64_t i = 0; i < entry.void_count; ++i) voids.insert(entry.void_first + i);
    };
    std::vector<std::string_view> read;
    for (auto frame = begin; frame != end && frame->header.first <= next; ++frame) {
        const uint64_t after = frame->header.first + frame->header.count;
        if (after <= next) continue;
        read.push_back(std::string_view(segments_[frame->segment]).substr(frame->offset));
        if (!ForEachEntry(read.back(), keep)) {
            return MakeError(ErrorKind::kDamaged,
                             fmt::format("a frame of the journal (lane {}, entry {}) makes no "
                                         "sense; restore the pool from a copy",
                                         lane, frame->header.first));
        }
        next = after;
        if (Mutated(Mutant::kReaderStopsEarly)) break;
    }
    const auto tell = [&](const FrameEntry& entry) {
        if (entry.number < oldest || entry.void_count > 0 || voids.contains(entry.number)) return;
        each(entry, entry.number < durable);
    };
    for (const std::string_view frame : read) ForEachEntry(frame, tell);
    if (next >= durable) return Status();
    return MakeError(ErrorKind::kDamaged,
                     fmt::format("the journal in the data file is damaged: entries from {} to {} "
                                 "of lane {} were durable and are gone; restore the pool from a "
                                 "copy",
                                 next, durable, lane));
}

}  // namespace varve::cow
