#include "cow/pool/pool_creation.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "base/log.h"
#include "cow/store/rocks_store.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;

constexpr uint8_t kRowVersion = 1;
constexpr size_t kRowHeader = 1 + sizeof(Uuid);  // version, uuid; the data file's path follows
constexpr size_t kBlankBytes = 128 << 10;        // of a device, before it is taken for unused
constexpr uint64_t kLockPauseMs = 10;

/// One creation, perhaps begun before.
class Creation {
  public:
    explicit Creation(const PoolCreation& given)
        : given_(given),
          intent_path_(given.path + "/creating"),
          data_path_(given.elsewhere.empty() ? given.path + "/data" : given.elsewhere) {}

    Status Run() {
        Status status = ReadIntent();
        if (status.ok()) status = OpenExisting();
        if (status.ok() && data_.valid()) status = CheckUnused();
        if (status.ok() && !begun_) status = WriteIntent();
        if (status.ok()) status = MakeData();
        if (status.ok()) status = MakeMetadata();
        return status.ok() ? TidyCreation(given_.path) : status;
    }

  private:
    Status ReadIntent();
    Status OpenExisting();
    Status CheckUnused() const;
    Status WriteIntent();
    Status MakeData();
    Status MakeMetadata();
    bool MadeHere(std::string_view bytes) const;

    const PoolCreation& given_;
    const std::string intent_path_;
    const std::string data_path_;
    bool begun_ = false;  // by an earlier one, of which intent_ is
    Superblock superblock_;
    std::string intent_;  // superblock_, encoded
    bool device_ = false;
    File data_;
};

/// What cannot be decoded was not durable yet, so that no data file was touched.
Status Creation::ReadIntent() {
    const File file = OpenFile(intent_path_, O_RDONLY);
    if (!file.valid() && errno == ENOENT) return Status();
    if (!file.valid()) return SystemError(errno, fmt::format("cannot open {}", intent_path_));
    Result<std::string> bytes = ReadAt(file, 0, kSuperblockBytes, intent_path_);
    if (!bytes.ok()) return bytes.error();
    const Result<Superblock> superblock = DecodeSuperblock(bytes.value(), intent_path_);
    if (!superblock.ok()) return Status();
    begun_ = true;
    superblock_ = superblock.value();
    intent_ = std::move(bytes.value());
    // The one who wrote it may have ended before its name was durable.
    const Status status = SyncFile(file, intent_path_);
    return status.ok() ? SyncDirectory(given_.path) : status;
}

Status Creation::OpenExisting() {
    struct stat about;
    const bool exists = ::stat(data_path_.c_str(), &about) == 0;
    device_ = exists && S_ISBLK(about.st_mode);
    if (!exists) return Status();
    if (!device_ && !S_ISREG(about.st_mode)) {
        return MakeError(ErrorKind::kExists,
                         fmt::format("cannot make the data file {}: it exists already and is no "
                                     "file",
                                     data_path_));
    }
    // For a device, O_EXCL means: not mounted and not used by another driver.
    data_ = OpenFile(data_path_, device_ ? O_RDWR | O_EXCL : O_RDWR);
    if (!data_.valid() && errno == EBUSY) {
        return MakeError(ErrorKind::kBusy, fmt::format("{} is mounted or in use", data_path_));
    }
    if (!data_.valid()) return SystemError(errno, fmt::format("cannot open {}", data_path_));
    return LockData(data_, data_path_, given_.lock_wait_ms);
}

/// Whether a superblock and no data follow from this creation. In a directory without metadata,
/// that of an older one that kept no note is as good: there is no data that it could be of.
bool Creation::MadeHere(std::string_view bytes) const {
    if (!begun_ && !given_.elsewhere.empty()) return false;
    const auto blank = [](std::string_view part) {
        return std::all_of(part.begin(), part.end(), [](char c) { return c == 0; });
    };
    if (blank(bytes)) return true;
    if (bytes.size() < kSuperblockBytes) return false;
    const std::string_view block = bytes.substr(0, kSuperblockBytes);
    if (!blank(bytes.substr(kSuperblockBytes))) return false;
    if (begun_ && block == intent_) return true;
    return given_.elsewhere.empty() && DecodeSuperblock(block, data_path_).ok();
}

/// A file must be empty, a device blank: a file system, a partition table or a pool would show at
/// its beginning. What this creation has made does not count.
Status Creation::CheckUnused() const {
    const size_t most = device_ ? kBlankBytes : kSuperblockBytes + 1;
    const Result<std::string> begin = ReadAt(data_, 0, most, data_path_);
    if (!begin.ok()) return begin.error();
    const std::string& bytes = begin.value();
    if (bytes.empty()) return Status();
    if ((device_ || bytes.size() <= kSuperblockBytes) && MadeHere(bytes)) return Status();
    if (!device_) {
        return MakeError(ErrorKind::kExists,
                         fmt::format("cannot make the data file {}: it exists already; give "
                                     "another path, or remove it if nothing needs it",
                                     data_path_));
    }
    if (std::all_of(bytes.begin(), bytes.end(), [](char c) { return c == 0; })) return Status();
    return MakeError(ErrorKind::kExists,
                     fmt::format("{} is not blank; to give it up for a pool, run: dd if=/dev/zero "
                                 "of={} bs=128K count=1 oflag=direct",
                                 data_path_, data_path_));
}

Status Creation::WriteIntent() {
    superblock_.uuid = NewUuid();
    superblock_.created_ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                                 std::chrono::system_clock::now().time_since_epoch())
                                 .count();
    intent_ = EncodeSuperblock(superblock_);
    const File file = OpenFile(intent_path_, O_RDWR | O_CREAT | O_TRUNC);
    if (!file.valid()) return SystemError(errno, fmt::format("cannot open {}", intent_path_));
    Status status = WriteAt(file, 0, intent_, intent_path_);
    if (status.ok()) status = SyncFile(file, intent_path_);
    return status.ok() ? SyncDirectory(given_.path) : status;
}

Status Creation::MakeData() {
    if (!data_.valid()) {
        data_ = OpenFile(data_path_, O_RDWR | O_CREAT);
        if (!data_.valid()) return SystemError(errno, fmt::format("cannot make {}", data_path_));
        const Status status = LockData(data_, data_path_, given_.lock_wait_ms);
        if (!status.ok()) return status;
    }
    Status status = WriteAt(data_, 0, intent_, data_path_);
    if (status.ok()) status = SyncFile(data_, data_path_);
    if (!status.ok() || device_) return status;
    std::error_code error;
    const fs::path real = fs::canonical(data_path_, error);  // it may be a symbolic link
    if (error) return SystemError(error.value(), fmt::format("cannot find {}", data_path_));
    return SyncDirectory(real.parent_path().string());
}

Status Creation::MakeMetadata() {
    std::error_code error;
    const std::string unfinished = given_.path + "/meta.new";
    fs::remove_all(unfinished, error);
    if (error) return SystemError(error.value(), fmt::format("cannot remove {}", unfinished));
    RocksOptions rocks;
    rocks.create = true;
    rocks.reserve = true;
    rocks.buffer_bytes = given_.buffer_bytes;
    Result<std::unique_ptr<MetadataStore>> metadata = OpenRocksStore(unfinished, rocks);
    if (!metadata.ok()) return metadata.error();
    Batch batch;
    batch.Put(kDirectoryKey, EncodeDirectoryRow({superblock_.uuid, given_.elsewhere}));
    const Status status = metadata.value()->Commit(batch);
    metadata.value().reset();
    if (!status.ok()) return status;
    if (::rename(unfinished.c_str(), (given_.path + "/meta").c_str()) != 0) {
        return SystemError(errno, fmt::format("cannot rename {}", unfinished));
    }
    return SyncDirectory(given_.path);
}

}  // namespace

std::string EncodeDirectoryRow(const DirectoryRow& row) {
    std::string bytes(1, static_cast<char>(kRowVersion));
    bytes.append(reinterpret_cast<const char*>(row.uuid.data()), row.uuid.size());
    return bytes + row.data_path;
}

Result<DirectoryRow> DecodeDirectoryRow(const std::string& bytes, const std::string& path) {
    if (bytes.size() < kRowHeader) {
        return MakeError(ErrorKind::kDamaged,
                         fmt::format("the metadata in {}/meta lacks the pool's identity; restore "
                                     "the pool from a backup",
                                     path));
    }
    const auto version = static_cast<uint8_t>(bytes[0]);
    if (version != kRowVersion) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("the pool {} has format version {}, but this varved reads "
                                     "version {}; use the varved that wrote it",
                                     path, version, kRowVersion));
    }
    DirectoryRow row;
    std::copy_n(bytes.begin() + 1, row.uuid.size(), row.uuid.begin());
    row.data_path = bytes.substr(kRowHeader);
    return row;
}

Content Inspect(const std::string& path) {
    std::error_code error;
    if (!fs::exists(path, error)) return Content::kAbsent;
    if (fs::exists(path + "/meta", error)) return Content::kPool;
    fs::directory_iterator entries(path, error);
    if (error) return Content::kForeign;
    for (const fs::directory_entry& entry : entries) {
        const std::string name = entry.path().filename().string();
        const bool own =
            name == "lock" || name == "creating" || name == "meta.new" || name == "admin.sock";
        if (own) continue;
        const bool just_superblock = name == "data" && entry.is_regular_file(error) &&
                                     entry.file_size(error) <= kSuperblockBytes;
        if (!just_superblock) return Content::kForeign;
    }
    return Content::kEmpty;
}

Status CreatePool(const PoolCreation& creation) {
    return Creation(creation).Run();
}

Status TidyCreation(const std::string& path) {
    if (::unlink((path + "/creating").c_str()) == 0) return SyncDirectory(path);
    if (errno == ENOENT) return Status();
    return SystemError(errno, fmt::format("cannot remove {}/creating", path));
}

Status LockData(const File& data, const std::string& path, uint64_t wait_ms) {
    bool told = false;
    for (uint64_t waited = 0; ::flock(data.fd(), LOCK_EX | LOCK_NB) != 0; waited += kLockPauseMs) {
        if (errno != EWOULDBLOCK) return SystemError(errno, fmt::format("cannot lock {}", path));
        if (waited >= wait_ms) {
            return MakeError(ErrorKind::kBusy,
                             fmt::format("the data file {} is in use by another process, or its "
                                         "device has not finished the writes of a server that has "
                                         "ended; stop the one or wait for the other",
                                         path));
        }
        if (!std::exchange(told, true)) {
            Log(LogLevel::kInfo, fmt::format("waiting for {}: it is in use", path));
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(kLockPauseMs));
    }
    // Whoever comes in between has it, and this one has not.
    if (::flock(data.fd(), LOCK_SH | LOCK_NB) == 0) return Status();
    return MakeError(ErrorKind::kBusy,
                     fmt::format("the data file {} is in use by another process", path));
}

}  // namespace varve::cow
