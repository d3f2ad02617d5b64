// Descriptors that are kept for RocksDB: with none left for anybody else it goes on.
#include "cow/store/rocks_descriptors.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <rocksdb/file_system.h>
#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "cow/store/files.h"
#include "cow/store/rocks_store.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;

class DescriptorsTest : public testing::Test {
  protected:
    DescriptorsTest() { fs::create_directories(root_); }
    ~DescriptorsTest() override {
        EXPECT_EQ(0, ::setrlimit(RLIMIT_NOFILE, &before_));
        fs::remove_all(root_);
    }
    /// From now on no descriptor is given to anybody.
    void TakeAll() {
        ASSERT_EQ(0, ::getrlimit(RLIMIT_NOFILE, &before_));
        rlimit none = before_;
        none.rlim_cur = 512;
        ASSERT_EQ(0, ::setrlimit(RLIMIT_NOFILE, &none));
        for (;;) {
            File file = OpenFile("/dev/null", O_RDONLY);
            if (!file.valid()) break;
            taken_.push_back(std::move(file));
        }
        ASSERT_EQ(EMFILE, errno);
    }
    void GiveAll() { taken_.clear(); }

    const fs::path root_ =
        fs::path(testing::TempDir()) / ("varve-descriptors-" + std::to_string(::getpid()));
    std::vector<File> taken_;
    rlimit before_{};
};

TEST_F(DescriptorsTest, FilesAreOpenedAsLongAsSomeAreKept) {
    constexpr size_t kSpare = 5;
    const std::unique_ptr<rocksdb::Env> env =
        NewSpareDescriptorsEnv(*rocksdb::Env::Default(), kSpare);
    const std::string path = root_ / "file";
    std::vector<std::unique_ptr<rocksdb::WritableFile>> files(kSpare + 1);
    for (unsigned round = 0; round < 2; ++round) {
        ASSERT_NO_FATAL_FAILURE(TakeAll());
        for (size_t i = 0; i <= kSpare; ++i) {
            const rocksdb::Status status = env->NewWritableFile(path, &files[i], {});
            EXPECT_EQ(i < kSpare, status.ok()) << status.ToString();
        }
        GiveAll();
        for (auto& file : files) file.reset();
        ASSERT_TRUE(env->NewWritableFile(path, &files[0], {}).ok());  // it takes them back
        files[0].reset();
    }
}

// Others hold all descriptors while memtables become tables.
TEST_F(DescriptorsTest, AStoreGoesOnWithoutADescriptorToBeHad) {
    RocksOptions options;
    options.create = true;
    options.buffer_bytes = 256 << 10;
    auto store = OpenRocksStore(root_ / "meta", options);
    ASSERT_TRUE(store.ok()) << store.error().message;
    const std::string value(4096, 'v');
    unsigned rows = 0;
    const auto commit = [&] {
        Batch batch;
        batch.Put("key" + std::to_string(rows++), value);
        const Status s = store.value()->Commit(batch);
        EXPECT_TRUE(s.ok()) << rows << ": " << s.error().message;
        return s.ok();
    };
    ASSERT_TRUE(commit());
    ASSERT_NO_FATAL_FAILURE(TakeAll());
    while (rows < 200 && commit()) {  // three memtables
    }
    GiveAll();
    while (rows < 400 && commit()) {
    }
    for (unsigned row = 0; row < rows; ++row) {
        EXPECT_EQ(value, store.value()->View()->Get("key" + std::to_string(row)).value()) << row;
    }
}

}  // namespace
}  // namespace varve::cow
