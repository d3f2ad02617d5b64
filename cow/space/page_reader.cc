#include "cow/space/page_reader.h"

#include <algorithm>
#include <memory>
#include <string>

#include "cow/format/format.h"
#include "cow/space/allocator.h"

namespace varve::cow {
namespace {

constexpr int64_t kReadOnUs = 1'000'000;
/// As many bitmaps are in a block of the store's, all of which a bad sector spoils.
constexpr uint64_t kFirstStep = 16;

}  // namespace

void PageReader::Read(MetadataView& view, Clock* clock) {
    std::optional<Deadline> deadline;
    while (!done() && !(deadline && deadline->over())) {
        if (!Step(view) && !deadline) deadline.emplace(clock, kReadOnUs);
    }
}

/// False if it failed.
bool PageReader::Step(MetadataView& view) {
    const bool many = next_ < states_.size();
    const Status s = many ? ReadMany(view) : ReadOne(view);
    if (!s.ok() && why_.ok()) why_ = s;
    if (next_ < states_.size()) return s.ok();
    while (left_ > 0 && states_[left_ - 1]) --left_;
    return s.ok();
}

/// What one cursor can read.
Status PageReader::ReadMany(MetadataView& view) {
    const uint64_t begin = next_;
    const std::string end = RegionKey(first() + states_.size());
    const std::unique_ptr<Cursor> cursor = view.Range(RegionKey(first() + begin), end);
    const auto bare_until = [this](uint64_t region) {
        for (; next_ < region; ++next_) states_[next_] = RegionState::kBare;
    };
    for (cursor->Seek(RegionKey(first() + begin)); cursor->valid(); cursor->Next()) {
        const uint64_t region = KeyNumber(cursor->key(), 0) - first();
        if (region < next_ || region >= states_.size()) continue;
        bare_until(region);
        states_[next_++] = Allocator::StateOf(cursor->value());
    }
    const Status s = cursor->status();
    if (s.ok()) bare_until(states_.size());
    if (s.ok()) return s;
    step_ = next_ > begin || step_ == 0 ? kFirstStep : 2 * step_;
    next_ = std::min(next_ + step_, states_.size());
    return s;
}

/// The last row that was left out. REQUIRES: !done(). From the back: a cursor has read what is
/// behind.
Status PageReader::ReadOne(MetadataView& view) {
    std::optional<RegionState>& state = states_[--left_];
    state = RegionState::kUnknown;
    const Result<std::optional<std::string>> row = view.Get(RegionKey(first() + left_));
    if (!row.ok()) return row.error();
    state = row.value() ? Allocator::StateOf(*row.value()) : RegionState::kBare;
    return Status();
}

uint64_t PageReader::untried() const {
    return static_cast<uint64_t>(std::count(states_.begin(), states_.end(), std::nullopt));
}

uint64_t PageReader::rows() const {
    return states_.size() -
           static_cast<uint64_t>(std::count(states_.begin(), states_.end(), RegionState::kBare));
}

}  // namespace varve::cow
