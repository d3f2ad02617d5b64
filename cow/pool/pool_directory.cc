#include "cow/pool/pool_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "base/log.h"
#include "cow/pool/data_end.h"
#include "cow/pool/epoch.h"
#include "cow/store/rocks_store.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;

Error NoPool(const std::string& path, Content content) {
    if (content == Content::kForeign) {
        return MakeError(ErrorKind::kExists,
                         fmt::format("{} holds no pool ({}/meta is missing) but is not empty; give "
                                     "a pool's directory or an empty one",
                                     path, path));
    }
    return MakeError(ErrorKind::kNotFound, fmt::format("there is no pool in {}", path));
}

std::string Parent(const std::string& path) {
    return fs::path(path).parent_path().string();
}

/// Empty if `path` is.
std::string Absolute(const std::string& path) {
    std::error_code error;
    return path.empty() ? path : fs::absolute(path, error).lexically_normal().string();
}

/// Also of a directory that was there: who made it may have been an interrupted creation.
Status SyncName(const std::string& path) {
    const File directory = OpenFile(Parent(path), O_RDONLY | O_DIRECTORY);
    if (directory.valid()) return SyncFile(directory, Parent(path));
    // Then it was made by somebody else.
    if (errno == EACCES) return Status();
    return SystemError(errno, fmt::format("cannot open {}", Parent(path)));
}

/// Of memory tables: what data leaves free beside metadata. They need seven, three may be rows.
constexpr uint64_t kReserveBuffers = 10;

/// The memory tables that the metadata's file system has room for: the store keeps fifteen times as
/// much for itself, 6 % of a small one.
uint64_t BufferBytes(const std::string& path) {
    constexpr uint64_t kLeast = 1 << 20;
    constexpr uint64_t kMost = 16 << 20;
    struct statvfs system;
    if (::statvfs(path.c_str(), &system) != 0) return kMost;
    return std::clamp(uint64_t{system.f_blocks} * system.f_frsize / 256, kLeast, kMost);
}

}  // namespace

PoolDirectory::~PoolDirectory() {
    if (in_epoch_) (void)BeginEpoch().ok();  // if it fails, it is as after a crash
    metadata_.reset();
}

Status PoolDirectory::BeginEpoch() {
    const Status status = cow::BeginEpoch(*metadata_, plain_, data_path_, &superblock_);
    in_epoch_ = status.ok();
    return status;
}

Result<std::unique_ptr<PoolDirectory>> PoolDirectory::Open(const PoolDirectoryOptions& options) {
    std::unique_ptr<PoolDirectory> pool(new PoolDirectory);
    std::error_code error;
    fs::path absolute = fs::absolute(options.path, error).lexically_normal();
    if (!absolute.has_filename()) absolute = absolute.parent_path();  // a trailing slash
    pool->path_ = absolute.string();
    Content content = Inspect(pool->path_);
    const bool usable =
        content == Content::kPool || (options.create && content != Content::kForeign);
    if (options.path.empty() || !usable) return NoPool(pool->path_, content);
    Status status;
    if (content == Content::kAbsent && ::mkdir(pool->path_.c_str(), 0750) != 0) {
        return SystemError(errno, fmt::format("cannot make the directory {}", pool->path_));
    }
    if (status.ok()) status = pool->Lock();
    if (!status.ok()) return status.error();
    // Now that nobody else can change it, see whether another server was just making it.
    content = Inspect(pool->path_);
    if (content == Content::kForeign) return NoPool(pool->path_, content);
    status = content != Content::kPool ? pool->Create(options) : TidyCreation(pool->path_);
    if (status.ok()) status = pool->OpenMetadata(options);
    if (status.ok()) status = pool->OpenData(options);
    if (!status.ok()) return status.error();
    return pool;
}

Status PoolDirectory::Lock() {
    const std::string path = path_ + "/lock";
    lock_ = OpenFile(path, O_RDWR | O_CREAT);
    if (!lock_.valid()) return SystemError(errno, fmt::format("cannot open {}", path));
    if (::flock(lock_.fd(), LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK) return SystemError(errno, fmt::format("cannot lock {}", path));
        Result<std::string> holder = ReadAt(lock_, 0, 20, path);
        std::string id = holder.ok() ? holder.value() : "";
        id.erase(std::find_if(id.begin(), id.end(), [](char c) { return c < '0' || c > '9'; }),
                 id.end());
        return MakeError(ErrorKind::kBusy,
                         fmt::format("the pool {} is in use by process {}; stop that one first",
                                     path_, id.empty() ? "of an unknown id" : id));
    }
    if (::ftruncate(lock_.fd(), 0) != 0) {
        return SystemError(errno, fmt::format("cannot write {}", path));
    }
    return WriteAt(lock_, 0, fmt::format("{}\n", ::getpid()), path);
}

Status PoolDirectory::Create(const PoolDirectoryOptions& options) {
    PoolCreation creation;
    creation.path = path_;
    creation.buffer_bytes = BufferBytes(path_);
    creation.lock_wait_ms = options.lock_wait_ms;
    const std::string given = Absolute(options.data);
    if (given != path_ + "/data") creation.elsewhere = given;
    created_ = true;
    const Status status = SyncName(path_);
    return status.ok() ? CreatePool(creation) : status;
}

Status PoolDirectory::OpenMetadata(const PoolDirectoryOptions& options) {
    RocksOptions rocks;
    rocks.cache_bytes = options.metadata_cache_bytes;
    rocks.open_files_max = options.metadata_files_max;
    rocks.reserve = true;
    rocks.buffer_bytes = BufferBytes(path_ + "/meta");
    Result<std::unique_ptr<MetadataStore>> metadata = OpenRocksStore(path_ + "/meta", rocks);
    if (!metadata.ok()) return metadata.error();
    metadata_ = std::move(metadata.value());
    const Result<std::optional<std::string>> row = metadata_->View()->Get(kDirectoryKey);
    if (!row.ok()) return row.error();
    Result<DirectoryRow> identity = DecodeDirectoryRow(row.value().value_or(""), path_);
    if (!identity.ok()) return identity.error();
    uuid_ = identity.value().uuid;
    remembered_ = std::move(identity.value().data_path);
    return Status();
}

/// Nothing of the file counts before it is locked: another may still write to it.
Status PoolDirectory::OpenData(const PoolDirectoryOptions& options) {
    Status status = OpenDataFile(options);
    // What a crash left in the page cache must not look durable to those who rely on it now.
    if (status.ok()) status = SyncFile(data_, data_path_);
    if (status.ok()) status = CheckSuperblock(options);
    if (!status.ok()) return status;
    constexpr uint64_t kReserveMax = 256 << 20;
    const std::string metadata = path_ + "/meta";
    Result<DataSpace> space = DataSpace::Make(data_.fd(), data_path_, metadata, kReserveMax,
                                              kReserveBuffers * BufferBytes(metadata));
    if (!space.ok()) return space.error();
    space_ = std::make_unique<DataSpace>(std::move(space.value()));
    status = CheckDataEnd();
    return status.ok() ? RememberData() : status;
}

Status PoolDirectory::OpenDataFile(const PoolDirectoryOptions& options) {
    data_path_ = remembered_.empty() ? path_ + "/data" : remembered_;
    if (!options.data.empty()) data_path_ = Absolute(options.data);
    struct stat about;
    const bool device = ::stat(data_path_.c_str(), &about) == 0 && S_ISBLK(about.st_mode);
    // For a device, O_EXCL means: not mounted and not used by another driver.
    data_ = OpenFile(data_path_, O_RDWR | (options.direct ? O_DIRECT : 0) | (device ? O_EXCL : 0));
    if (!data_.valid()) return CannotOpen(errno, options.direct);
    return LockData(data_, data_path_, options.lock_wait_ms);
}

Error PoolDirectory::CannotOpen(Errno error, bool direct) const {
    switch (error) {
        case ENOENT:
            return MakeError(ErrorKind::kNotFound,
                             fmt::format("the data file {} of the pool {} is missing; if it has "
                                         "moved, start once with --data and its new path",
                                         data_path_, path_));
        case EBUSY:
            return MakeError(ErrorKind::kBusy, fmt::format("{} is mounted or in use", data_path_));
        case EINVAL:
            if (!direct) break;
            return MakeError(ErrorKind::kInvalid,
                             fmt::format("the file system of {} does not support O_DIRECT; use "
                                         "--cache buffered",
                                         data_path_));
        default:
            break;
    }
    return SystemError(error, fmt::format("cannot open {}", data_path_));
}

Status PoolDirectory::CheckSuperblock(const PoolDirectoryOptions& options) {
    // Through the page cache, so that neither length nor memory must suit O_DIRECT. It carries
    // transfers, too, so it has the lock.
    plain_ = OpenFile(fmt::format("/proc/self/fd/{}", data_.fd()), O_RDWR);
    if (!plain_.valid() || ::flock(plain_.fd(), LOCK_SH | LOCK_NB) != 0) {
        return SystemError(errno, fmt::format("cannot open {} again", data_path_));
    }
    const Result<std::string> begin = ReadAt(plain_, 0, kSuperblockBytes, data_path_);
    if (!begin.ok()) return begin.error();
    const Result<Superblock> superblock = DecodeSuperblock(begin.value(), data_path_);
    if (!superblock.ok()) return superblock.error();
    superblock_ = superblock.value();
    if (superblock_.uuid != uuid_) {
        return MakeError(
            ErrorKind::kInvalid,
            fmt::format("{} is the data file of pool {}, but {} is pool {}; give the "
                        "right one with --data",
                        data_path_, FormatUuid(superblock_.uuid), path_, FormatUuid(uuid_)));
    }
    const Result<EpochRow> row = ReadEpochRow(*metadata_);
    if (!row.ok()) return row.error();
    Status status = CheckEpoch(row.value(), superblock_.epoch, path_, data_path_);
    if (status.ok() || !options.force_epoch) return status;
    Log(LogLevel::kWarning, "opened by force: " + status.error().message);
    return Status();
}

Status PoolDirectory::RememberData() {
    const std::string remember = data_path_ == path_ + "/data" ? "" : data_path_;
    if (remember == remembered_) return Status();
    Batch batch;
    batch.Put(kDirectoryKey, EncodeDirectoryRow({uuid_, remember}));
    return metadata_->Commit(batch);
}

/// A file that was cut off would grow again with the next write, and read as zeros in between.
Status PoolDirectory::CheckDataEnd() const {
    struct stat about;
    if (::fstat(data_.fd(), &about) != 0) {
        return SystemError(errno, fmt::format("cannot stat {}", data_path_));
    }
    const uint64_t device = space_->device_bytes();
    const uint64_t size = device != 0 ? device : static_cast<uint64_t>(about.st_size);
    const std::unique_ptr<MetadataView> view = metadata_->View();
    const Result<uint64_t> provisioned = ProvisionedEnd(*view);
    if (!provisioned.ok()) return provisioned.error();
    if (size >= provisioned.value()) return Status();
    const Result<uint64_t> used = UsedEnd(*view, size);
    if (!used.ok()) return used.error();
    if (size >= used.value()) return Status();
    return MakeError(
        ErrorKind::kDamaged,
        fmt::format("the end of {} is missing: it has {} bytes, and data up to byte {} "
                    "is in use; restore the pool from a backup",
                    data_path_, size, used.value()));
}

}  // namespace varve::cow
