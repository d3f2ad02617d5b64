#include "cow/store/rocks_descriptors.h"

#include <fcntl.h>
#include <rocksdb/file_system.h>

#include <cerrno>
#include <cstring>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cow/store/files.h"

namespace varve::cow {
namespace {

using rocksdb::FileOptions;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;

/// RocksDB ends its text with the system's.
bool NoneLeft(const IOStatus& status) {
    if (!status.IsIOError() || !status.getState()) return false;
    const std::string_view text = status.getState();
    return text.ends_with(std::strerror(EMFILE)) || text.ends_with(std::strerror(ENFILE));
}

/// Any thread.
class Spares {
  public:
    explicit Spares(size_t most) : most_(most) { Refill(); }

    bool Give() {
        const std::lock_guard lock(mutex_);
        if (files_.empty()) return false;
        files_.pop_back();
        return true;
    }
    void Refill() {
        const std::lock_guard lock(mutex_);
        while (files_.size() < most_) {
            File file = OpenFile("/dev/null", O_RDONLY);
            if (!file.valid()) return;
            files_.push_back(std::move(file));
        }
    }

  private:
    const size_t most_;
    std::mutex mutex_;
    std::vector<File> files_;
};

class SpareDescriptors : public rocksdb::FileSystemWrapper {
  public:
    SpareDescriptors(const std::shared_ptr<rocksdb::FileSystem>& base, size_t spare)
        : FileSystemWrapper(base), spares_(spare) {}

    const char* Name() const override { return "SpareDescriptors"; }

    IOStatus NewSequentialFile(const std::string& path, const FileOptions& options,
                               std::unique_ptr<rocksdb::FSSequentialFile>* result,
                               IODebugContext* debug) override {
        return Open([&] { return target()->NewSequentialFile(path, options, result, debug); });
    }
    IOStatus NewRandomAccessFile(const std::string& path, const FileOptions& options,
                                 std::unique_ptr<rocksdb::FSRandomAccessFile>* result,
                                 IODebugContext* debug) override {
        return Open([&] { return target()->NewRandomAccessFile(path, options, result, debug); });
    }
    IOStatus NewWritableFile(const std::string& path, const FileOptions& options,
                             std::unique_ptr<rocksdb::FSWritableFile>* result,
                             IODebugContext* debug) override {
        return Open([&] { return target()->NewWritableFile(path, options, result, debug); });
    }
    IOStatus ReuseWritableFile(const std::string& path, const std::string& before,
                               const FileOptions& options,
                               std::unique_ptr<rocksdb::FSWritableFile>* result,
                               IODebugContext* debug) override {
        return Open(
            [&] { return target()->ReuseWritableFile(path, before, options, result, debug); });
    }
    IOStatus NewDirectory(const std::string& path, const IOOptions& options,
                          std::unique_ptr<rocksdb::FSDirectory>* result,
                          IODebugContext* debug) override {
        return Open([&] { return target()->NewDirectory(path, options, result, debug); });
    }
    IOStatus GetChildren(const std::string& path, const IOOptions& options,
                         std::vector<std::string>* result, IODebugContext* debug) override {
        return Open([&] { return target()->GetChildren(path, options, result, debug); });
    }

  private:
    template <typename F>
    IOStatus Open(F open) {
        IOStatus status = open();
        if (!NoneLeft(status)) {
            if (status.ok()) spares_.Refill();
            return status;
        }
        // Others may be quicker to take what was given up.
        while (NoneLeft(status) && spares_.Give()) status = open();
        return status;
    }

    Spares spares_;
};

}  // namespace

std::unique_ptr<rocksdb::Env> NewSpareDescriptorsEnv(rocksdb::Env& base, size_t spare) {
    return rocksdb::NewCompositeEnv(
        std::make_shared<SpareDescriptors>(base.GetFileSystem(), spare));
}

}  // namespace varve::cow
