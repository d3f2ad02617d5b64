#include "cow/volume/verified_read.h"

#include <fmt/format.h>

#include "base/log.h"
#include "cow/format/format.h"
#include "cow/volume/block_sum.h"

namespace varve::cow {
namespace {

/// What it costs to compare a block, in units of Turns.
constexpr uint64_t kCompareCost = 12;

/// What must be found once the read is done.
struct Expected {
    uint64_t place = 0;
    Generation birth;
    const std::byte* memory = nullptr;
    uint32_t sum = 0;
};
using ExpectedList = boost::container::small_vector<Expected, 4>;
using Rows = boost::unordered_flat_map<uint64_t, SumsRow>;

/// What is known of `frozen`. Rows that are neither in `loaded` nor in the cache go to `missing`.
void LookUp(LaneState& lane, const FrozenList& frozen, const Rows& loaded, ExpectedList& expected,
            std::vector<uint64_t>& missing) {
    expected.clear();
    missing.clear();
    for (const FrozenBlocks& blocks : frozen) {
        const SumsRow* row = nullptr;
        uint64_t known = ~uint64_t{0};  // the row's index
        for (uint64_t i = 0; i < blocks.count; ++i) {
            const uint64_t place = blocks.place + i;
            const uint64_t index = place / kSumsRowBlocks;
            if (index != known) {
                known = index;
                const auto found = loaded.find(index);
                row = found != loaded.end() ? &found->second : lane.sums.Find(index);
                if (!row) missing.push_back(index);
            }
            const std::optional<uint32_t> sum = row ? row->Find(place, blocks.birth) : std::nullopt;
            if (!sum) continue;
            expected.push_back({place, blocks.birth, blocks.memory + i * kBlockBytes, *sum});
        }
    }
}

/// An unreadable row is as good as none: the data may be sound. `varve check` reports it.
SumsRow ReadRow(MetadataView& view, uint64_t index) {
    Result<std::optional<std::string>> value = view.Get(SumsKey(index));
    if (value.ok() && !value.value()) return SumsRow();
    std::optional<SumsRow> row;
    if (value.ok()) row = SumsRow::Decode(*value.value());
    if (row) return std::move(*row);
    Log(LogLevel::kError,
        fmt::format("checksum row {} is unreadable; its blocks are not verified", index));
    return SumsRow();
}

Task<void> Load(Core& core, LaneState& lane, const std::vector<uint64_t>& missing, Rows* loaded) {
    const uint64_t version = lane.sums.version();
    co_await Hop(core.loader());
    const std::unique_ptr<MetadataView> view = core.metadata().View();
    for (const uint64_t index : missing) {
        if (!loaded->contains(index)) loaded->emplace(index, ReadRow(*view, index));
    }
    co_await Hop(lane.executor);
    for (const uint64_t index : missing) lane.sums.Put(index, loaded->at(index), version);
}

/// The order matters: what is not known before the read begins may become known of newer data.
Task<void> Expect(Core& core, LaneState& lane, const FrozenList& frozen, ExpectedList* expected) {
    Rows loaded;  // kept here: the cache may be too small for all of them
    std::vector<uint64_t> missing;
    LookUp(lane, frozen, loaded, *expected, missing);
    while (!missing.empty()) {
        co_await Load(core, lane, missing, &loaded);
        LookUp(lane, frozen, loaded, *expected, missing);
    }
}

}  // namespace

Task<Errno> ReadVerified(Core& core, LaneState& lane, const IoPieces& pieces,
                         const FrozenList& frozen) {
    ExpectedList expected;
    co_await Expect(core, lane, frozen, &expected);
    Errno error = co_await TransferAll(lane.blocks, BlockIo::Kind::kRead, pieces);
    if (error != 0) co_return error;
    for (const Expected& block : expected) {
        const bool first = &block == &expected.front();
        if (!first && lane.turns.Spend(kCompareCost)) co_await Turns::Next(lane.turns);
        if (BlockSum(block.memory) == block.sum) continue;
        error = EIO;
        core.FoundDamage(block.place, block.birth,
                         fmt::format("a read met damage in block {} of the data file and was "
                                     "answered with an I/O error; 'varve scrub' names the "
                                     "snapshots that see it",
                                     block.place));
    }
    co_return error;
}

}  // namespace varve::cow
