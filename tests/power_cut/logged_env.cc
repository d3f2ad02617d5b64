#include "tests/power_cut/logged_env.h"

#include <rocksdb/file_system.h>

#include <filesystem>
#include <utility>

namespace varve::power_cut {
namespace {

using rocksdb::FSDirectory;
using rocksdb::FSWritableFile;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

std::string NameOf(const std::string& path) {
    return std::filesystem::path(path).filename().string();
}

class LoggedFile : public rocksdb::FSWritableFileOwnerWrapper {
  public:
    LoggedFile(std::unique_ptr<FSWritableFile> file, FileLog& log, FileLog::FileId id,
               uint64_t size, bool lying)
        : FSWritableFileOwnerWrapper(std::move(file)),
          log_(log),
          id_(id),
          size_(size),
          lying_(lying) {}

    IOStatus Append(const Slice& data, const IOOptions& options, IODebugContext* debug) override {
        const IOStatus status = target()->Append(data, options, debug);
        if (!status.ok()) return status;
        log_.Write(id_, size_, {data.data(), data.size()});
        size_ += data.size();
        return status;
    }
    IOStatus Append(const Slice& data, const IOOptions& options,
                    const rocksdb::DataVerificationInfo&, IODebugContext* debug) override {
        return Append(data, options, debug);
    }
    IOStatus PositionedAppend(const Slice& data, uint64_t offset, const IOOptions& options,
                              IODebugContext* debug) override {
        const IOStatus status = target()->PositionedAppend(data, offset, options, debug);
        if (status.ok()) log_.Write(id_, offset, {data.data(), data.size()});
        return status;
    }
    IOStatus PositionedAppend(const Slice&, uint64_t, const IOOptions&,
                              const rocksdb::DataVerificationInfo&, IODebugContext*) override {
        return IOStatus::NotSupported("nothing asks for it");
    }
    IOStatus Truncate(uint64_t, const IOOptions&, IODebugContext*) override {
        return IOStatus::NotSupported("only O_DIRECT needs it");
    }
    IOStatus Sync(const IOOptions&, IODebugContext*) override {
        if (!lying_) log_.Sync(id_, log_.position());
        return IOStatus::OK();
    }
    IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
        return Sync(options, debug);
    }
    /// A hint: nothing is durable by it.
    IOStatus RangeSync(uint64_t, uint64_t, const IOOptions&, IODebugContext*) override {
        return IOStatus::OK();
    }

  private:
    FileLog& log_;
    const FileLog::FileId id_;
    uint64_t size_;
    const bool lying_;
};

class LoggedDirectory : public rocksdb::FSDirectoryWrapper {
  public:
    LoggedDirectory(std::unique_ptr<FSDirectory> directory, FileLog& log)
        : FSDirectoryWrapper(std::move(directory)), log_(log) {}

    IOStatus Fsync(const IOOptions&, IODebugContext*) override {
        log_.SyncNames(log_.position());
        return IOStatus::OK();
    }
    IOStatus FsyncWithDirOptions(const IOOptions& options, IODebugContext* debug,
                                 const rocksdb::DirFsyncOptions&) override {
        return Fsync(options, debug);
    }

  private:
    FileLog& log_;
};

class LoggedFileSystem : public rocksdb::FileSystemWrapper {
  public:
    LoggedFileSystem(FileLog& log, bool lying)
        : FileSystemWrapper(rocksdb::FileSystem::Default()), log_(log), lying_(lying) {}

    const char* Name() const override { return "LoggedFileSystem"; }

    IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                             std::unique_ptr<FSWritableFile>* result,
                             IODebugContext* debug) override {
        std::unique_ptr<FSWritableFile> file;
        const IOStatus status = target()->NewWritableFile(path, options, &file, debug);
        if (!status.ok()) return status;
        const FileLog::FileId id = log_.Create(NameOf(path));
        *result = std::make_unique<LoggedFile>(std::move(file), log_, id, 0, lying_);
        return status;
    }
    IOStatus ReopenWritableFile(const std::string&, const rocksdb::FileOptions&,
                                std::unique_ptr<FSWritableFile>*, IODebugContext*) override {
        return IOStatus::NotSupported("nothing is written twice");
    }
    IOStatus ReuseWritableFile(const std::string&, const std::string&, const rocksdb::FileOptions&,
                               std::unique_ptr<FSWritableFile>*, IODebugContext*) override {
        return IOStatus::NotSupported("logs are not recycled");
    }
    IOStatus NewRandomRWFile(const std::string&, const rocksdb::FileOptions&,
                             std::unique_ptr<rocksdb::FSRandomRWFile>*, IODebugContext*) override {
        return IOStatus::NotSupported("nothing is written twice");
    }
    IOStatus NewDirectory(const std::string& path, const IOOptions& options,
                          std::unique_ptr<FSDirectory>* result, IODebugContext* debug) override {
        std::unique_ptr<FSDirectory> directory;
        const IOStatus status = target()->NewDirectory(path, options, &directory, debug);
        if (!status.ok()) return status;
        *result = std::make_unique<LoggedDirectory>(std::move(directory), log_);
        return status;
    }
    IOStatus DeleteFile(const std::string& path, const IOOptions& options,
                        IODebugContext* debug) override {
        const IOStatus status = target()->DeleteFile(path, options, debug);
        if (status.ok()) log_.Remove(NameOf(path));
        return status;
    }
    IOStatus RenameFile(const std::string& from, const std::string& to, const IOOptions& options,
                        IODebugContext* debug) override {
        const IOStatus status = target()->RenameFile(from, to, options, debug);
        if (status.ok()) log_.Rename(NameOf(from), NameOf(to));
        return status;
    }
    IOStatus LinkFile(const std::string&, const std::string&, const IOOptions&,
                      IODebugContext*) override {
        return IOStatus::NotSupported("nothing is linked");
    }

  private:
    FileLog& log_;
    const bool lying_;
};

}  // namespace

std::unique_ptr<rocksdb::Env> NewLoggedEnv(FileLog& log, bool lying) {
    return rocksdb::NewCompositeEnv(std::make_shared<LoggedFileSystem>(log, lying));
}

}  // namespace varve::power_cut
