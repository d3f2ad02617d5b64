// The check of a pool's metadata: what it finds, and what it costs for large families.
// Work is counted, in seeks and cursors of the metadata store; no test looks at a clock.
#include "cow/format/format.h"
#include "cow/format/runs.h"
#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::kChunkBytes;

class CheckTest : public EngineTest {
  protected:
    using Rows = std::map<std::string, std::string>;
    cow::CheckReport Check() {
        const auto report = machine->Do(pool().Check());
        EXPECT_TRUE(report.ok());
        return report.value();
    }
    /// What a check says of the rows as `change` leaves them. They are as before afterwards.
    std::string FaultOf(const std::function<void(Rows&)>& change) {
        const auto before = media.metadata();
        auto rows = std::make_shared<Rows>(*before);
        change(*rows);
        media.SetMetadata(std::move(rows));
        const auto report = cow::CheckMetadata(machine->metadata());
        media.SetMetadata(before);
        EXPECT_TRUE(report.ok());
        return report.value().errors.empty() ? "" : report.value().errors[0];
    }
    /// The rows whose key begins with that letter, in their order.
    static std::vector<std::string> KeysOf(const Rows& rows, char letter) {
        std::vector<std::string> keys;
        for (const auto& [key, value] : rows) {
            if (key[0] == letter) keys.push_back(key);
        }
        return keys;
    }
};

TEST_F(CheckTest, AThousandBranchesNeedNoMoreCursorsThanTwo) {
    for (const unsigned clones : {100u, 1000u}) {
        Ok(pool().CreateDisk("golden", 40 * kChunkBytes));
        for (uint64_t c = 0; c < 40; ++c) Write("golden", c * kChunkBytes, 4096, 'g');
        Ok(pool().CreateSnapshots({"golden@s"}));
        for (unsigned i = 0; i < clones; ++i) {
            const std::string name = "c" + std::to_string(i);
            Ok(pool().CloneSnapshot("golden@s", name));
            Write(name, i % 40 * kChunkBytes, 4096, 'c');
            Close(name);
        }
        Close("golden");
        Reclaim();
        // Notes of others that were deleted lately lie behind all branches.
        constexpr uint64_t kDeleted = 2'000;
        for (uint64_t i = 0; i < kDeleted; ++i) {
            media.deleted_rows.insert(
                cow::NoteKey(BranchId{uint64_t{1} << 40}, ChunkIndex{i}, Generation{1}, i));
        }
        media.cursors_most = media.cursors;
        const uint64_t cursors = media.cursors, before = media.seeks, steps = media.steps;
        const cow::CheckReport report = Check();
        EXPECT_TRUE(report.ok()) << report.errors[0];
        EXPECT_EQ(clones + 40, report.map_rows);
        EXPECT_LE(media.cursors_most - cursors, 4u);
        // Rows and notes of each branch from its first on, and once more for a window with some.
        EXPECT_LE(media.seeks - before, 4 * (clones + 20u));
        EXPECT_LE(media.steps - steps, 8 * (clones + 40u) + 100 + 4 * kDeleted);
        media.deleted_rows.clear();
        for (unsigned i = 0; i < clones; ++i) {
            Ok(pool().DeleteDisk("c" + std::to_string(i), false, false));
        }
        Ok(pool().DeleteDisk("golden", true, false));
        Reclaim();
    }
}

TEST_F(CheckTest, ALongLineIsCountedRight) {
    Ok(pool().CreateDisk("d", 4 * kChunkBytes));
    for (unsigned i = 0; i < 300; ++i) {
        const std::string name = "d@s" + std::to_string(i);
        Write("d", i % 4 * kChunkBytes + i % 16 * 4096, 4096, 'x');
        Close("d");
        Ok(pool().CreateSnapshots({name}));
        Ok(pool().RestoreSnapshot(name, std::nullopt, false, false));
    }
    Reclaim();
    const cow::CheckReport report = Check();
    EXPECT_TRUE(report.ok()) << report.errors[0];
    EXPECT_EQ(300u, report.snapshots);
}

TEST_F(CheckTest, ABlockThatTwoFamiliesOwnIsFound) {
    for (const char* name : {"a", "b"}) {
        Ok(pool().CreateDisk(name, kChunkBytes));
        EXPECT_EQ(0, Write(name, 0, 4096, *name));
    }
    Ok(pool().CreateSnapshots({"a@s", "b@s"}));
    Reclaim();
    const std::string fault = FaultOf([](Rows& rows) {
        const std::vector<std::string> keys = KeysOf(rows, 'M');
        ASSERT_EQ(2u, keys.size());
        const auto generation = [](const std::string& key) {
            return Generation{~cow::KeyNumber(key, 2)};
        };
        cow::Runs first = *cow::DecodeRuns(rows[keys[0]], generation(keys[0]));
        cow::Runs second = *cow::DecodeRuns(rows[keys[1]], generation(keys[1]));
        second[0].place = first[0].place;
        rows[keys[1]] = cow::EncodeRuns(second, generation(keys[1]));
    });
    EXPECT_NE(std::string::npos, fault.find("has another owner too")) << fault;
}

TEST_F(CheckTest, AChunkThatAFlattenedBranchLacksIsFound) {
    Ok(pool().CreateDisk("d", 64 * kChunkBytes));
    for (uint64_t c = 0; c < 64; c += 7) Write("d", c * kChunkBytes, 4096, 'd');
    Ok(pool().CreateSnapshots({"d@s"}));
    Ok(pool().CloneSnapshot("d@s", "c"));
    Ok(pool().FlattenDisk("c"));
    Reclaim();
    EXPECT_TRUE(Check().ok());
    const std::string fault = FaultOf([](Rows& rows) {
        const std::vector<std::string> keys = KeysOf(rows, 'M');
        rows.erase(keys[keys.size() / 2 + 3]);  // the second half is the clone's
    });
    EXPECT_NE(std::string::npos, fault.find("is flattened, but lacks chunk 21")) << fault;
}

TEST_F(CheckTest, ARowThatNobodyReadsIsFound) {
    Ok(pool().CreateDisk("d", 4 * kChunkBytes));
    Write("d", 0, 4096, 'a');
    Ok(pool().CreateSnapshots({"d@s"}));
    Reclaim();
    Write("d", 0, 4096, 'b');
    Ok(pool().CreateSnapshots({"d@t"}));
    Reclaim();
    const std::string fault = FaultOf([](Rows& rows) {
        // A row of the first generation again, under an older one.
        const std::string key = KeysOf(rows, 'M').back();
        const Generation old{~cow::KeyNumber(key, 2) - 1};
        const cow::Runs runs = *cow::DecodeRuns(rows[key], Generation{~cow::KeyNumber(key, 2)});
        cow::Runs older = runs;
        older[0].birth = old;
        rows[cow::MapKey(BranchId{cow::KeyNumber(key, 0)}, ChunkIndex{0}, old)] =
            cow::EncodeRuns(older, old);
    });
    EXPECT_NE("", fault);
}

}  // namespace
}  // namespace varve
