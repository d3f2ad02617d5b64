#include "cow/volume/checksums.h"

#include "base/check.h"
#include "base/endian.h"
#include "cow/format/codec.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

constexpr uint8_t kSumsFormat = 1;
/// What an entry costs beside its vectors: itself, its links, heap headers, its slot in the index.
constexpr uint64_t kEntryOverhead = 192;
/// Rows that are dropped without letting others run: about 0.5 ms.
constexpr uint64_t kDropTogether = 2048;

}  // namespace

SumsRow::SumsRow(const Slots& slots) {
    for (uint8_t i = 0; i < slots.size(); ++i) {
        const Slot& slot = slots[i];
        if (slot.birth.value == 0) continue;
        const bool goes_on = !groups_.empty() && groups_.back().birth == slot.birth &&
                             groups_.back().first + groups_.back().count == i;
        if (!goes_on) groups_.push_back({i, 0, slot.birth});
        ++groups_.back().count;
        sums_.push_back(slot.sum);
    }
    groups_.shrink_to_fit();
    sums_.shrink_to_fit();
}

SumsRow::Slots SumsRow::Unpack() const {
    Slots slots{};
    size_t next = 0;
    for (const Group& group : groups_) {
        for (size_t i = 0; i < group.count; ++i) {
            slots[group.first + i] = {group.birth, sums_[next++]};
        }
    }
    return slots;
}

std::optional<uint32_t> SumsRow::Find(uint64_t place, Generation birth) const {
    const uint64_t slot = place % kSumsRowBlocks;
    size_t before = 0;
    for (const Group& group : groups_) {
        if (slot < group.first) break;
        if (slot < uint64_t{group.first} + group.count) {
            const bool ours = group.birth == birth || Mutated(Mutant::kSumOfAnotherBirth);
            if (!ours) break;
            return sums_[before + (slot - group.first)];
        }
        before += group.count;
    }
    return std::nullopt;
}

std::string SumsRow::Encode() const {
    std::string value(1, static_cast<char>(kSumsFormat));
    value.push_back(static_cast<char>(groups_.size()));
    for (const Group& group : groups_) {
        value.push_back(static_cast<char>(group.first));
        value.push_back(static_cast<char>(group.count));
        AppendVarint(value, group.birth.value);
    }
    for (const uint32_t sum : sums_) AppendBig(value, sum);
    return value;
}

std::optional<SumsRow> SumsRow::Decode(std::string_view value) {
    Decoder in(value);
    if (in.Byte() != kSumsFormat) return std::nullopt;
    const unsigned count = in.Byte();
    SumsRow row;
    unsigned at = 0;
    size_t blocks = 0;
    for (unsigned i = 0; i < count && in.ok(); ++i) {
        Group group;
        group.first = in.Byte();
        group.count = in.Byte();
        group.birth.value = in.Varint();
        const unsigned end = unsigned{group.first} + group.count;
        const bool sound =
            group.first >= at && group.count > 0 && end <= kSumsRowBlocks && group.birth.value > 0;
        if (!sound) return std::nullopt;
        at = end;
        blocks += group.count;
        row.groups_.push_back(group);
    }
    if (!in.ok() || in.rest().size() != blocks * sizeof(uint32_t)) return std::nullopt;
    row.sums_.reserve(blocks);
    for (size_t i = 0; i < blocks; ++i) {
        row.sums_.push_back(LoadBig<uint32_t>(in.rest().data() + i * sizeof(uint32_t)));
    }
    return row;
}

const SumsRow* SumsCache::Find(uint64_t row) {
    const auto found = index_.find(row);
    if (found == index_.end()) return nullptr;
    entries_.splice(entries_.begin(), entries_, found->second);
    return &found->second->sums;
}

void SumsCache::Put(uint64_t row, SumsRow sums, uint64_t version) {
    if (version != version_ || index_.contains(row)) return;
    const uint64_t bytes = kEntryOverhead + sums.heap_bytes();
    if (bytes > share_.budget().total()) return;
    entries_.push_front({row, std::move(sums), bytes});
    index_[row] = entries_.begin();
    used_ += bytes;
    while (!share_.Fits(used_)) Drop(std::prev(entries_.end()));
}

void SumsCache::GiveBack(uint64_t limit) {
    for (uint64_t rows = kDropTogether; used_ > limit && rows > 0; --rows) {
        Drop(std::prev(entries_.end()));
    }
    share_.Lower(limit, used_);
}

void SumsCache::Forget(const std::vector<uint64_t>& rows) {
    ++version_;
    if (Mutated(Mutant::kSumsStayUnknown)) return;
    for (const uint64_t row : rows) {
        const auto found = index_.find(row);
        if (found != index_.end()) Drop(found->second);
    }
}

void SumsCache::Drop(std::list<Entry>::iterator entry) {
    used_ -= entry->bytes;
    index_.erase(entry->row);
    entries_.erase(entry);
}

}  // namespace varve::cow
