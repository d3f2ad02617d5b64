#include "cow/store/rocks_files.h"

#include <rocksdb/file_system.h>

#include <string>
#include <utility>

namespace varve::cow {
namespace {

using rocksdb::FSWritableFile;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

class LogFile : public rocksdb::FSWritableFileOwnerWrapper {
  public:
    explicit LogFile(std::unique_ptr<FSWritableFile> file)
        : FSWritableFileOwnerWrapper(std::move(file)) {}

    IOStatus Append(const Slice& data, const IOOptions& options, IODebugContext* debug) override {
        IOStatus status = target()->PositionedAppend(data, written_, options, debug);
        if (status.ok()) written_ += data.size();
        return status;
    }
    IOStatus Append(const Slice& data, const IOOptions& options,
                    const rocksdb::DataVerificationInfo&, IODebugContext* debug) override {
        return Append(data, options, debug);
    }
    IOStatus Sync(const IOOptions& options, IODebugContext* debug) override {
        GrowIfNeeded(options, debug);
        return target()->Sync(options, debug);
    }
    IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
        GrowIfNeeded(options, debug);
        return target()->Fsync(options, debug);
    }
    uint64_t GetFileSize(const IOOptions&, IODebugContext*) override { return written_; }

  private:
    void GrowIfNeeded(const IOOptions& options, IODebugContext* debug) {
        const uint64_t commit = written_ - std::exchange(before_, written_);
        if (written_ <= end_) return;
        end_ = written_;
        if (commit >= kLogAheadBytes || !ahead_) return;
        static const std::string zeros(kLogAheadBytes, '\0');
        ahead_ = target()->PositionedAppend(zeros, end_, options, debug).ok();
        if (ahead_) end_ += zeros.size();
    }

    uint64_t written_ = 0;  // bytes of the log
    uint64_t before_ = 0;   // at the latest sync
    uint64_t end_ = 0;      // up to here the file has bytes for certain
    bool ahead_ = true;     // no use once there was no room
};

/// The list of files. Each append is a record, or a part of a long one, and RocksDB syncs several
/// together: then a crash could leave later ones whole and lose a sector of the first, which looks
/// like damage.
class ListFile : public rocksdb::FSWritableFileOwnerWrapper {
  public:
    explicit ListFile(std::unique_ptr<FSWritableFile> file)
        : FSWritableFileOwnerWrapper(std::move(file)) {}

    IOStatus Append(const Slice& data, const IOOptions& options, IODebugContext* debug) override {
        if (unsynced_) {
            IOStatus status = Sync(options, debug);
            if (!status.ok()) return status;
        }
        unsynced_ = true;
        return target()->Append(data, options, debug);
    }
    IOStatus Append(const Slice& data, const IOOptions& options,
                    const rocksdb::DataVerificationInfo&, IODebugContext* debug) override {
        return Append(data, options, debug);
    }
    IOStatus Sync(const IOOptions& options, IODebugContext* debug) override {
        unsynced_ = false;
        return target()->Sync(options, debug);
    }
    IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
        unsynced_ = false;
        return target()->Fsync(options, debug);
    }

  private:
    bool unsynced_ = false;
};

class OverwritingFileSystem : public rocksdb::FileSystemWrapper {
  public:
    using FileSystemWrapper::FileSystemWrapper;

    const char* Name() const override { return "OverwritingFileSystem"; }

    IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                             std::unique_ptr<FSWritableFile>* result,
                             IODebugContext* debug) override {
        std::unique_ptr<FSWritableFile> file;
        IOStatus status = target()->NewWritableFile(path, options, &file, debug);
        if (!status.ok()) return status;
        if (path.ends_with(".log")) {
            file = std::make_unique<LogFile>(std::move(file));
        } else if (path.substr(path.rfind('/') + 1).starts_with("MANIFEST-")) {
            file = std::make_unique<ListFile>(std::move(file));
        }
        *result = std::move(file);
        return status;
    }
};

}  // namespace

std::unique_ptr<rocksdb::Env> NewOverwritingEnv(rocksdb::Env& base) {
    return rocksdb::NewCompositeEnv(std::make_shared<OverwritingFileSystem>(base.GetFileSystem()));
}

}  // namespace varve::cow
