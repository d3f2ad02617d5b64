// What varve attach keeps in files: the table of disks to attach at boot, and records of devices.
// The kernel's side is shown in a guest: tests/e2e/attach_test.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "attach/record.h"
#include "attach/table.h"

namespace varve::attach {
namespace {

constexpr const char* kPath = "/etc/varve/attach";
using Words = std::vector<std::string>;

TEST(AttachTable, GivesTheWordsBehindTheName) {
    const char* text =
        "# comment\n\n database nbd://host/db --connections 2 # two are enough\nother x\n";
    EXPECT_EQ(FindInTable(text, "database", kPath).value(),
              (Words{"nbd://host/db", "--connections", "2"}));
    EXPECT_EQ(FindInTable(text, "other", kPath).value(), Words{"x"});
}

TEST(AttachTable, SaysWhatIsMissing) {
    const auto none = FindInTable("database x\n", "data", kPath);
    ASSERT_FALSE(none.ok());
    EXPECT_EQ(none.error().kind, ErrorKind::kNotFound);
    const auto bare = FindInTable("x y\ndata # soon\n", "data", kPath);
    ASSERT_FALSE(bare.ok());
    EXPECT_EQ(bare.error().kind, ErrorKind::kInvalid);
    EXPECT_NE(bare.error().message.find("line 2"), std::string::npos) << bare.error().message;
}

class AttachRecords : public testing::Test {
  protected:
    ~AttachRecords() override { std::filesystem::remove_all(directory_); }

    const std::string directory_ =
        testing::TempDir() + "varve-records-" + std::to_string(::getpid());
    const Records records_{directory_};
};

TEST_F(AttachRecords, AreReadAsTheyWereWritten) {
    Record record;
    record.index = 12;
    record.name = "database";
    record.uri = "nbd+unix:///a%20b?socket=/x";
    record.size = uint64_t{1} << 57;
    record.block_size = 512;
    record.connections = 4;
    record.dead = 3;
    record.error = "connect: \"no\"";
    record.pid = 77;
    ASSERT_TRUE(records_.Write(record).ok());
    record.index = 3;
    ASSERT_TRUE(records_.Write(record).ok());
    const std::vector<Record> all = records_.All();
    ASSERT_EQ(all.size(), 2u);
    EXPECT_EQ(all[0].index, 3u);
    EXPECT_EQ(ToJson(all[0]), ToJson(record));
    EXPECT_EQ(all[1].device(), "/dev/nbd12");
    EXPECT_STREQ(all[1].state(), "degraded");
    records_.Remove(3);
    EXPECT_EQ(records_.Read(3).error().kind, ErrorKind::kNotFound);
}

TEST_F(AttachRecords, WhatIsNoneIsRefused) {
    for (const char* text : {"", "{", "[]", "{}", R"({"index":5})", R"({"index":"5"})"}) {
        std::ofstream(directory_ + "/nbd5.json") << text;
        const Result<Record> record = records_.Read(5);
        ASSERT_FALSE(record.ok()) << text;
        EXPECT_EQ(record.error().kind, ErrorKind::kDamaged) << text;
    }
    EXPECT_TRUE(records_.All().empty());
}

TEST_F(AttachRecords, ADeviceHasOneSupervisor) {
    const int held = records_.Lock(0, false);
    ASSERT_GE(held, 0);
    EXPECT_EQ(records_.Lock(0, false), -1);
    ::close(held);
    const int next = records_.Lock(0, false);
    EXPECT_GE(next, 0);
    ::close(next);
}

}  // namespace
}  // namespace varve::attach
