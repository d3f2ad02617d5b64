// Looking up map rows in a store that was not compacted lately. Work is counted, never timed.
#include "cow/volume/map_reader.h"

#include <gtest/gtest.h>

#include "cow/format/format.h"
#include "cow/format/runs.h"
#include "tests/simulation/world.h"

namespace varve::simulation {
namespace {

using cow::kHead;

class MapReaderTest : public testing::Test {
  protected:
    static constexpr uint64_t kDeleted = 200'000;  // a disk of 50 GiB was trimmed
    static constexpr BranchId kBranch{1};

    Scheduler scheduler{1};
    Media media{scheduler, 1 << 20};
    SimMetadata store{media};
    const cow::Line line{{kBranch, Generation{0}, kHead}};

    void SetUp() override {
        media.remembers_deleted = true;
        for (uint64_t chunk = 0; chunk < kDeleted; ++chunk) {
            media.deleted_rows.insert(cow::MapKey(kBranch, ChunkIndex{chunk}, Generation{5}));
        }
    }
    void Put(uint64_t chunk) {
        cow::Batch batch;
        const cow::Runs runs{{.place = 7 + chunk, .first = 0, .count = 1, .birth = Generation{6}}};
        batch.Put(cow::MapKey(kBranch, ChunkIndex{chunk}, Generation{6}),
                  cow::EncodeRuns(runs, Generation{6}));
        ASSERT_TRUE(store.Commit(batch).ok());
    }
    cow::MapRows ReadFrom(uint64_t first) {
        const auto view = store.View();
        auto rows = cow::ReadMap(*view, line, ChunkIndex{first}, ChunkIndex{first + 16});
        EXPECT_TRUE(rows.ok());
        return rows.value();
    }
};

TEST_F(MapReaderTest, ALookupPassesABoundedNumberOfDeletedRows) {
    const uint64_t before = media.steps;
    EXPECT_TRUE(ReadFrom(1000).rows.empty());
    EXPECT_LE(media.steps - before, 8'000u);
}

TEST_F(MapReaderTest, WhatIsThereIsFoundBehindDeletedRows) {
    Put(3);
    Put(9'000);
    Put(150'000);
    EXPECT_EQ(1u, ReadFrom(0).rows.size());
    std::vector<uint64_t> found;
    uint64_t lookups = 0;
    for (uint64_t from = 0; from < kDeleted * 2; ++lookups) {
        const cow::MapRows rows = ReadFrom(from);
        for (const cow::MapRow& row : rows.rows) found.push_back(row.chunk.value);
        ASSERT_GE(rows.next.value, from + 16);
        from = rows.next.value;
    }
    EXPECT_EQ((std::vector<uint64_t>{3, 9'000, 150'000}), found);
    EXPECT_LE(lookups, 60u);  // a GiB each, where there is nothing
}

TEST_F(MapReaderTest, NothingIsFoundInOneLookupWhereNothingWas) {
    media.deleted_rows.clear();
    EXPECT_EQ(~uint64_t{0}, ReadFrom(0).next.value);
}

}  // namespace
}  // namespace varve::simulation
