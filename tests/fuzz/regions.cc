// Fuzz target: the allocator's rows and the book it keeps, against an array of blocks. A row is
// taken as written or refused as damaged; nothing is leased that is in use or leased already; what
// is encoded means the same to the next allocator.
// Input: for each of three regions a kind of row and its bytes, then actions of three bytes.
#include <array>
#include <map>

#include "cow/space/allocator.h"
#include "tests/fuzz/fuzz.h"

namespace varve::cow {
namespace {

constexpr uint64_t kRegions = 3;
constexpr uint64_t kBlocks = kRegions * kRegionBlocks;

using Rows = std::map<std::string, std::string>;

class RowsView : public MetadataView {
  public:
    explicit RowsView(const Rows& rows) : rows_(rows) {}
    Result<std::optional<std::string>> Get(std::string_view key) override {
        const auto found = rows_.find(std::string(key));
        if (found == rows_.end()) return std::optional<std::string>();
        return std::optional<std::string>(found->second);
    }
    std::unique_ptr<Cursor> Range(std::string_view, std::string_view, uint64_t) override {
        return nullptr;
    }

  private:
    const Rows& rows_;
};

struct RowsStore : MetadataStore {
    Rows rows;
    std::unique_ptr<MetadataView> View() override { return std::make_unique<RowsView>(rows); }
    Status Commit(const Batch& batch) override {
        for (const Batch::Op& op : batch.ops()) {
            if (op.value) {
                rows[op.key] = *op.value;
            } else {
                rows.erase(op.key);
            }
        }
        return Status();
    }
};

struct AnySpace : SpaceStore {
    Status Provision(uint64_t, uint64_t) override { return Status(); }
    void Discard(uint64_t, uint64_t) override {}
    uint64_t Capacity(uint64_t provisioned) override { return provisioned; }
};

enum class State : uint8_t { kFree, kLeased, kUsed, kResting };

class Book {
  public:
    /// Puts rows that the input chooses; those that are refused are none from then on.
    void TakeRows(fuzz::Input& input) {
        for (uint64_t region = 0; region < kRegions; ++region) {
            const std::optional<std::string> row = Row(input);
            if (row) store_.rows[RegionKey(region)] = *row;
            if (allocator_.Learn(region, row).ok()) {
                Expect(region, row);
            } else {
                VARVE_CHECK(row && !WellFormed(*row));
                store_.rows.erase(RegionKey(region));
                VARVE_CHECK(allocator_.Learn(region, std::nullopt).ok());
            }
        }
        for (const State state : blocks_) pool_.used_blocks += state == State::kUsed ? 1 : 0;
        if (blocks_[0] == State::kFree) blocks_[0] = State::kLeased;  // the superblock's
    }

    void Act(uint8_t action, const Extent& extent) {
        switch (action % 8) {
            case 0:
                return Lease(allocator_.FindReady(), extent);
            case 1:
                return Lease(allocator_.FindTight(), extent);
            case 2:
                return Claim(extent);
            case 3:
                if (All(extent, State::kLeased)) {
                    VARVE_CHECK(allocator_.MarkUsed(extent).ok());
                    Set(extent, State::kUsed);
                }
                return;
            case 4: {
                if (extent.place == 0) return;
                const bool used = All(extent, State::kUsed);
                VARVE_CHECK(allocator_.MarkFree(extent).ok() == used);
                if (used) Set(extent, State::kResting);
                return;
            }
            case 5:
            case 6:
                if (All(extent, action % 8 == 5 ? State::kLeased : State::kResting)) {
                    allocator_.Release(extent);
                    Set(extent, State::kFree);
                }
                return;
            default:
                return action & 8 ? Commit() : Provision();
        }
    }

    /// What is stored means the same after a restart: only used blocks are in use.
    void Restart() {
        Commit();
        Allocator again(store_, space_, pool_, 0);
        uint64_t used = blocks_[0] == State::kUsed ? 1 : 0;
        for (uint64_t place = 1, end = 1; place < kBlocks; place = end) {
            const bool expected = blocks_[place] == State::kUsed;
            while (end < kBlocks && (blocks_[end] == State::kUsed) == expected) ++end;
            const Extent extent = {place, end - place};
            if (expected) {
                used += extent.count;
                VARVE_CHECK(IsRenewed(place) || !again.Claim({place, 1}).ok());
                VARVE_CHECK(IsRenewed(end - 1) || !again.Claim({end - 1, 1}).ok());
                VARVE_CHECK(again.MarkFree(extent).ok());
                pool_.used_blocks += extent.count;
            } else {
                VARVE_CHECK(again.Claim(extent).ok());
            }
        }
        VARVE_CHECK(pool_.used_blocks == used);
        VARVE_CHECK(!again.Claim({0, 1}).ok());
    }

  private:
    static bool IsFull(const std::string& row) { return row == "F" || row == "f"; }
    static bool WellFormed(const std::string& row) {
        const bool bitmap = row.size() == 1 + kRegionBlocks / 8;
        return IsFull(row) || (bitmap && (row[0] == 'B' || row[0] == 'b'));
    }
    /// Whether the block's region was renewed when it was stored last: what is used there may be
    /// claimed once more.
    bool IsRenewed(uint64_t place) const {
        const auto row = store_.rows.find(RegionKey(place / kRegionBlocks));
        return row != store_.rows.end() && (row->second[0] == 'f' || row->second[0] == 'b');
    }

    static std::optional<std::string> Row(fuzz::Input& input) {
        const uint8_t kind = input.Byte();
        const bool renewed = (kind & 4) != 0;
        switch (kind % 4) {
            case 0:
                return std::nullopt;
            case 1:
                return renewed ? "f" : "F";
            case 2:
                return std::string(input.Bytes(input.Byte()));
            default:
                break;
        }
        std::string row(1 + kRegionBlocks / 8, static_cast<char>(input.Byte()));
        row[0] = renewed ? 'b' : 'B';
        for (uint8_t changes = input.Byte() % 16; changes > 0; --changes) {
            const size_t at = 1 + input.Number(2) % (row.size() - 1);
            const char bits = static_cast<char>(input.Byte());
            for (size_t i = at; i < row.size() && i < at + 40; ++i) row[i] = bits;
        }
        return row;
    }

    void Expect(uint64_t region, const std::optional<std::string>& row) {
        for (uint64_t i = 0; i < kRegionBlocks && row; ++i) {
            const bool used = IsFull(*row) || ((*row)[1 + i / 8] >> i % 8 & 1) != 0;
            if (used) blocks_[region * kRegionBlocks + i] = State::kUsed;
        }
    }

    bool All(const Extent& extent, State state) const {
        for (uint64_t i = 0; i < extent.count; ++i) {
            const uint64_t block = extent.place + i;
            if (block == 0 || block >= kBlocks || blocks_[block] != state) return false;
        }
        return true;
    }
    void Set(const Extent& extent, State state) {
        for (uint64_t i = 0; i < extent.count; ++i) blocks_[extent.place + i] = state;
    }

    void Lease(std::optional<uint64_t> region, const Extent& like) {
        if (!region) return;
        const uint64_t most = 1 + like.place % kRegionBlocks;
        uint64_t taken = 0;
        for (const Extent& extent : allocator_.Take(*region, most)) {
            taken += extent.count;
            VARVE_CHECK(extent.count > 0 && All(extent, State::kFree));
            Set(extent, State::kLeased);
        }
        VARVE_CHECK(taken > 0 && taken <= most);
    }

    /// Recovery ends if a claim is refused, so only a single block may be: its rest would be taken.
    void Claim(const Extent& extent) {
        const bool free = All(extent, State::kFree);
        if (!free && (extent.count > 1 || IsRenewed(extent.place))) return;
        VARVE_CHECK(allocator_.Claim(extent).ok() == free);
        if (free) Set(extent, State::kLeased);
    }

    void Provision() {
        const std::optional<uint64_t> bare = allocator_.FindBare();
        if (!bare) return;
        const Extent region = {*bare * kRegionBlocks, kRegionBlocks};
        VARVE_CHECK(All(region, State::kFree));
        allocator_.Provisioned(*bare);
    }

    void Commit() {
        Batch batch;
        allocator_.Encode(batch);
        VARVE_CHECK(store_.Commit(batch).ok());
    }

    RowsStore store_;
    AnySpace space_;
    PoolRecord pool_{.region_count = kRegions};
    Allocator allocator_{store_, space_, pool_, 0};
    std::array<State, kBlocks> blocks_ = {};
};

}  // namespace
}  // namespace varve::cow

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    varve::fuzz::Input input(data, size);
    varve::cow::Book book;
    book.TakeRows(input);
    while (!input.empty()) {
        const uint8_t action = input.Byte();
        const uint64_t place = input.Number(2) % (varve::cow::kBlocks + 8);
        book.Act(action, {place, 1U + (action / 8) * (action / 8)});
    }
    book.Restart();
    return 0;
}
