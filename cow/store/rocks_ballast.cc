#include "cow/store/rocks_ballast.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <rocksdb/db.h>
#include <rocksdb/file_system.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string_view>
#include <thread>
#include <utility>

#include "base/log.h"

namespace varve::cow {
namespace {

using rocksdb::FSWritableFile;
using rocksdb::IODebugContext;
using rocksdb::IOOptions;
using rocksdb::IOStatus;
using rocksdb::Slice;

/// What is given up for one write at least: the file system rounds, and others take some.
constexpr uint64_t kPieceBytes = 1 << 20;

/// A quota that is used up is "no space" too. RocksDB only takes over what the system calls it.
IOStatus Understood(IOStatus status) {
    if (!status.IsIOError() || status.IsNoSpace() || !status.getState()) return status;
    const std::string_view text = status.getState();
    if (!text.ends_with(std::strerror(EDQUOT))) return status;
    IOStatus full = IOStatus::NoSpace(Slice(text.data(), text.size()));
    full.SetRetryable(true);  // as RocksDB does where the file system is full
    return full;
}

int SystemAllocate(int fd, off_t from, off_t bytes) {
    int failed = 0;
    do {
        failed = ::fallocate(fd, 0, from, bytes);
    } while (failed != 0 && errno == EINTR);
    return failed == 0 ? 0 : errno;
}

class BallastFile : public rocksdb::FSWritableFileOwnerWrapper {
  public:
    BallastFile(std::unique_ptr<FSWritableFile> file, Ballast& ballast)
        : FSWritableFileOwnerWrapper(std::move(file)), ballast_(ballast) {}
    ~BallastFile() override { Compacted(); }

    IOStatus Append(const Slice& data, const IOOptions& options, IODebugContext* debug) override {
        const uint64_t at = end_;
        IOStatus status =
            Understood(positioned_ ? target()->PositionedAppend(data, at, options, debug)
                                   : target()->Append(data, options, debug));
        while (status.IsNoSpace() && Give(data.size())) {
            // A part may have been written already, so from now on each place is named.
            positioned_ = true;
            status = Understood(target()->PositionedAppend(data, at, options, debug));
        }
        if (status.ok()) SetEnd(at + data.size());
        return status;
    }
    IOStatus Append(const Slice& data, const IOOptions& options,
                    const rocksdb::DataVerificationInfo&, IODebugContext* debug) override {
        return Append(data, options, debug);
    }
    IOStatus PositionedAppend(const Slice& data, uint64_t offset, const IOOptions& options,
                              IODebugContext* debug) override {
        IOStatus status = Understood(target()->PositionedAppend(data, offset, options, debug));
        while (status.IsNoSpace() && Give(data.size())) {
            status = Understood(target()->PositionedAppend(data, offset, options, debug));
        }
        if (status.ok()) SetEnd(std::max(end_, offset + data.size()));
        return status;
    }
    IOStatus PositionedAppend(const Slice& data, uint64_t offset, const IOOptions& options,
                              const rocksdb::DataVerificationInfo&,
                              IODebugContext* debug) override {
        return PositionedAppend(data, offset, options, debug);
    }
    IOStatus Truncate(uint64_t size, const IOOptions& options, IODebugContext* debug) override {
        IOStatus status = Understood(target()->Truncate(size, options, debug));
        if (status.ok()) SetEnd(std::min(end_, size));
        return status;
    }
    IOStatus Flush(const IOOptions& options, IODebugContext* debug) override {
        return Understood(target()->Flush(options, debug));
    }
    IOStatus Sync(const IOOptions& options, IODebugContext* debug) override {
        return Understood(target()->Sync(options, debug));
    }
    IOStatus Fsync(const IOOptions& options, IODebugContext* debug) override {
        return Understood(target()->Fsync(options, debug));
    }
    IOStatus Close(const IOOptions& options, IODebugContext* debug) override {
        Compacted();
        return Understood(target()->Close(options, debug));
    }
    void SetIOPriority(rocksdb::Env::IOPriority priority) override {
        compaction_ = priority == rocksdb::Env::IO_LOW;
        target()->SetIOPriority(priority);
    }

  private:
    bool Give(uint64_t bytes) {
        const uint64_t keep = compaction_ ? ballast_.bytes() / 2 : 0;
        return ballast_.Give(std::max(kPieceBytes, bytes), keep);
    }
    void SetEnd(uint64_t end) {
        if (compaction_) ballast_.compacting += end - end_;
        end_ = end;
    }
    /// From now on RocksDB tells of it.
    void Compacted() {
        if (std::exchange(compaction_, false)) ballast_.compacting -= end_;
    }

    Ballast& ballast_;
    uint64_t end_ = 0;  // of what was written
    bool positioned_ = false;
    bool compaction_ = false;
};

class BallastFileSystem : public rocksdb::FileSystemWrapper {
  public:
    BallastFileSystem(const std::shared_ptr<rocksdb::FileSystem>& base, Ballast& ballast)
        : FileSystemWrapper(base), ballast_(ballast) {}

    const char* Name() const override { return "BallastFileSystem"; }

    IOStatus NewWritableFile(const std::string& path, const rocksdb::FileOptions& options,
                             std::unique_ptr<FSWritableFile>* result,
                             IODebugContext* debug) override {
        std::unique_ptr<FSWritableFile> file;
        IOStatus status = Understood(target()->NewWritableFile(path, options, &file, debug));
        while (status.IsNoSpace() && ballast_.Give(kPieceBytes, 0)) {
            status = Understood(target()->NewWritableFile(path, options, &file, debug));
        }
        if (status.ok()) *result = std::make_unique<BallastFile>(std::move(file), ballast_);
        return status;
    }
    IOStatus CreateDirIfMissing(const std::string& path, const IOOptions& options,
                                IODebugContext* debug) override {
        return Understood(target()->CreateDirIfMissing(path, options, debug));
    }
    IOStatus RenameFile(const std::string& from, const std::string& to, const IOOptions& options,
                        IODebugContext* debug) override {
        return Understood(target()->RenameFile(from, to, options, debug));
    }

  private:
    Ballast& ballast_;
};

}  // namespace

Ballast::Ballast(std::string path, uint64_t bytes, Allocate allocate)
    : path_(std::move(path)),
      bytes_(bytes),
      allocate_(allocate ? std::move(allocate) : SystemAllocate) {
    if (bytes_ == 0) return;
    file_ = OpenFile(path_, O_RDWR | O_CREAT);
    struct stat about;
    if (!file_.valid() || ::fstat(file_.fd(), &about) != 0) return;
    // A copy of a pool may have brought it along as a hole.
    const auto size = static_cast<uint64_t>(about.st_size);
    const bool whole = uint64_t{512} * static_cast<uint64_t>(about.st_blocks) >= size;
    held_ = whole ? std::min(size, bytes_) : 0;
    if (held_ != size && ::ftruncate(file_.fd(), static_cast<off_t>(held())) != 0) held_ = 0;
}

bool Ballast::Give(uint64_t bytes, uint64_t keep) {
    const std::lock_guard lock(mutex_);
    if (held() <= keep) return false;
    const uint64_t less = held() - std::min(bytes, held() - keep);
    if (::ftruncate(file_.fd(), static_cast<off_t>(less)) != 0) return false;
    if (held() == bytes_) {
        Log(LogLevel::kWarning,
            fmt::format("the file system of {} is full: going on from the reserve; make room there",
                        path_));
    }
    held_ = less;
    return true;
}

/// In pieces: where a quota ends, each try takes the rest of it for a moment, which a log may need.
void Ballast::Refill(uint64_t free) {
    const std::lock_guard lock(mutex_);
    const uint64_t missing = bytes_ - held();
    if (!file_.valid() || missing == 0 || free / 2 < missing) return;
    int error = 0;
    while (held() < bytes_ && error == 0) {
        const auto from = static_cast<off_t>(held());
        const uint64_t piece = std::min(kPieceBytes, bytes_ - held());
        error = allocate_(file_.fd(), from, static_cast<off_t>(piece));
        if (error == 0) {
            held_ = held() + piece;
        } else if (::ftruncate(file_.fd(), from) != 0) {
            // Then it ends with a hole, of which nothing is expected.
        }
    }
    const bool refused = error == ENOSPC || error == EDQUOT;
    if (refused && !refused_) {
        Log(LogLevel::kWarning,
            fmt::format("{} cannot be made whole although the file system has room (a quota?): no "
                        "new metadata until it can: {}",
                        path_, std::strerror(error)));
    }
    refused_ = refused;
}

std::unique_ptr<rocksdb::Env> NewBallastEnv(rocksdb::Env& base, Ballast& ballast) {
    return rocksdb::NewCompositeEnv(
        std::make_shared<BallastFileSystem>(base.GetFileSystem(), ballast));
}

rocksdb::Status WriteBesideErrors(rocksdb::DB& db, const rocksdb::WriteOptions& options,
                                  rocksdb::WriteBatch& batch) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(kMemtableMsMax);
    for (;;) {
        rocksdb::Status status = db.Write(options, &batch);
        if (!status.IsIncomplete() || std::chrono::steady_clock::now() > end) return status;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // nobody tells of the end
    }
}

}  // namespace varve::cow
