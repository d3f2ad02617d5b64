#include "cow/pool/pool_directory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>

#include "cow/pool/data_end.h"
#include "cow/store/rocks_store.h"

namespace varve::cow {
namespace {

namespace fs = std::filesystem;

constexpr uint8_t kRowVersion = 1;
constexpr size_t kRowHeader = 1 + sizeof(Uuid);  // version, uuid; the data file's path follows
constexpr size_t kBlankBytes = 128 << 10;        // of a device, before it is taken for unused

enum class Content { kAbsent, kEmpty, kPool, kForeign };

/// What lies at `path`. A directory with what an interrupted creation leaves is empty.
Content Inspect(const std::string& path) {
    std::error_code error;
    if (!fs::exists(path, error)) return Content::kAbsent;
    if (fs::exists(path + "/meta", error)) return Content::kPool;
    fs::directory_iterator entries(path, error);
    if (error) return Content::kForeign;
    for (const fs::directory_entry& entry : entries) {
        const std::string name = entry.path().filename().string();
        if (name == "lock" || name == "meta.new" || name == "admin.sock") continue;
        const bool just_superblock = name == "data" && entry.is_regular_file(error) &&
                                     entry.file_size(error) <= kSuperblockBytes;
        if (!just_superblock) return Content::kForeign;
    }
    return Content::kEmpty;
}

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

Status MakeDirectory(const std::string& path) {
    if (::mkdir(path.c_str(), 0750) != 0) {
        return SystemError(errno, fmt::format("cannot make the directory {}", path));
    }
    return SyncDirectory(Parent(path));
}

Status LockData(const File& data, const std::string& path) {
    if (::flock(data.fd(), LOCK_EX | LOCK_NB) == 0) return Status();
    if (errno != EWOULDBLOCK) return SystemError(errno, fmt::format("cannot lock {}", path));
    return MakeError(ErrorKind::kBusy,
                     fmt::format("the data file {} is in use by another process", path));
}

/// Whether nobody seems to use the block device: a file system, a partition table or a pool would
/// show at its beginning.
Status CheckBlank(const File& device, const std::string& path) {
    const Result<std::string> begin = ReadAt(device, 0, kBlankBytes, path);
    if (!begin.ok()) return begin.error();
    const std::string& bytes = begin.value();
    if (std::all_of(bytes.begin(), bytes.end(), [](char c) { return c == 0; })) return Status();
    return MakeError(ErrorKind::kExists,
                     fmt::format("{} is not blank; to give it up for a pool, run: dd if=/dev/zero "
                                 "of={} bs=128K count=1 oflag=direct",
                                 path, path));
}

/// A new, empty data file, or a device that nobody uses.
Result<File> ClaimData(const std::string& path) {
    struct stat about;
    const bool exists = ::stat(path.c_str(), &about) == 0;
    const bool device = exists && S_ISBLK(about.st_mode);
    if (exists && !device && (!S_ISREG(about.st_mode) || about.st_size != 0)) {
        return MakeError(ErrorKind::kExists,
                         fmt::format("cannot make the data file {}: it exists already", path));
    }
    // For a device, O_EXCL means: not mounted and not used by another driver.
    File file = OpenFile(path, device ? O_RDWR | O_EXCL : O_RDWR | O_CREAT);
    if (!file.valid() && errno == EBUSY) {
        return MakeError(ErrorKind::kBusy, fmt::format("{} is mounted or in use", path));
    }
    if (!file.valid()) return SystemError(errno, fmt::format("cannot open {}", path));
    Status status = LockData(file, path);
    if (status.ok() && device) status = CheckBlank(file, path);
    if (!status.ok()) return status.error();
    return file;
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

std::string EncodeRow(const Uuid& uuid, const std::string& data_path) {
    std::string row(1, static_cast<char>(kRowVersion));
    row.append(reinterpret_cast<const char*>(uuid.data()), uuid.size());
    return row + data_path;
}

}  // namespace

PoolDirectory::~PoolDirectory() {
    metadata_.reset();
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
    if (content == Content::kAbsent) status = MakeDirectory(pool->path_);
    if (status.ok()) status = pool->Lock();
    if (!status.ok()) return status.error();
    // Now that nobody else can change it, see whether another server was just making it.
    content = Inspect(pool->path_);
    if (content == Content::kForeign) return NoPool(pool->path_, content);
    if (content != Content::kPool) status = pool->Create(options);
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
    std::error_code error;
    const std::string unfinished = path_ + "/meta.new";
    fs::remove_all(unfinished, error);
    const bool elsewhere =
        !options.data.empty() &&
        fs::absolute(options.data, error).lexically_normal() != fs::path(path_ + "/data");
    if (elsewhere) remembered_ = fs::absolute(options.data, error).lexically_normal().string();
    const std::string data_path = elsewhere ? remembered_ : path_ + "/data";
    if (!elsewhere) fs::remove(data_path, error);  // of an interrupted creation: Inspect() saw it

    Result<File> data = ClaimData(data_path);
    if (!data.ok()) return data.error();
    Superblock superblock;
    superblock.uuid = NewUuid();
    superblock.created_ms = std::chrono::duration_cast<std::chrono::milliseconds>(
                                std::chrono::system_clock::now().time_since_epoch())
                                .count();
    Status status = WriteAt(data.value(), 0, EncodeSuperblock(superblock), data_path);
    if (status.ok()) status = SyncFile(data.value(), data_path);
    if (status.ok()) status = SyncDirectory(Parent(data_path));
    if (!status.ok()) return status;

    RocksOptions rocks;
    rocks.create = true;
    rocks.reserve = true;
    rocks.buffer_bytes = BufferBytes(path_);
    Result<std::unique_ptr<MetadataStore>> metadata = OpenRocksStore(unfinished, rocks);
    if (!metadata.ok()) return metadata.error();
    Batch batch;
    batch.Put(kDirectoryKey, EncodeRow(superblock.uuid, remembered_));
    status = metadata.value()->Commit(batch);
    metadata.value().reset();
    if (!status.ok()) return status;
    if (::rename(unfinished.c_str(), (path_ + "/meta").c_str()) != 0) {
        return SystemError(errno, fmt::format("cannot rename {}", unfinished));
    }
    created_ = true;
    return SyncDirectory(path_);
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
    if (!row.value() || row.value()->size() < kRowHeader) {
        return MakeError(ErrorKind::kDamaged,
                         fmt::format("the metadata in {}/meta lacks the pool's identity; restore "
                                     "the pool from a backup",
                                     path_));
    }
    const std::string& bytes = *row.value();
    if (static_cast<uint8_t>(bytes[0]) != kRowVersion) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("the pool {} has format version {}, but this varved reads "
                                     "version {}; use the varved that wrote it",
                                     path_, static_cast<uint8_t>(bytes[0]), kRowVersion));
    }
    std::copy_n(bytes.begin() + 1, uuid_.size(), uuid_.begin());
    remembered_ = bytes.substr(kRowHeader);
    return Status();
}

Status PoolDirectory::OpenData(const PoolDirectoryOptions& options) {
    std::error_code error;
    const std::string own = path_ + "/data";
    data_path_ = remembered_.empty() ? own : remembered_;
    if (!options.data.empty()) {
        data_path_ = fs::absolute(options.data, error).lexically_normal().string();
    }
    // Through the page cache, so that neither length nor memory must suit O_DIRECT.
    const File plain = OpenFile(data_path_, O_RDONLY);
    if (!plain.valid() && errno == ENOENT) {
        return MakeError(ErrorKind::kNotFound,
                         fmt::format("the data file {} of the pool {} is missing; if it has moved, "
                                     "start once with --data and its new path",
                                     data_path_, path_));
    }
    if (!plain.valid()) return SystemError(errno, fmt::format("cannot open {}", data_path_));
    const Result<std::string> begin = ReadAt(plain, 0, kSuperblockBytes, data_path_);
    if (!begin.ok()) return begin.error();
    const Result<Superblock> superblock = DecodeSuperblock(begin.value(), data_path_);
    if (!superblock.ok()) return superblock.error();
    if (superblock.value().uuid != uuid_) {
        return MakeError(
            ErrorKind::kInvalid,
            fmt::format("{} is the data file of pool {}, but {} is pool {}; give the "
                        "right one with --data",
                        data_path_, FormatUuid(superblock.value().uuid), path_, FormatUuid(uuid_)));
    }
    struct stat about;
    const bool device = ::fstat(plain.fd(), &about) == 0 && S_ISBLK(about.st_mode);
    data_ = OpenFile(data_path_, O_RDWR | (options.direct ? O_DIRECT : 0) | (device ? O_EXCL : 0));
    if (!data_.valid() && errno == EINVAL && options.direct) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("the file system of {} does not support O_DIRECT; use "
                                     "--cache buffered",
                                     data_path_));
    }
    if (!data_.valid()) return SystemError(errno, fmt::format("cannot open {}", data_path_));
    Status status = LockData(data_, data_path_);
    if (!status.ok()) return status;
    // What a crash left in the page cache must not look durable to those who rely on it now.
    status = SyncFile(data_, data_path_);
    if (!status.ok()) return status;
    constexpr uint64_t kReserveMax = 256 << 20;
    const std::string metadata = path_ + "/meta";
    Result<DataSpace> space = DataSpace::Make(data_.fd(), data_path_, metadata, kReserveMax,
                                              kReserveBuffers * BufferBytes(metadata));
    if (!space.ok()) return space.error();
    space_ = std::make_unique<DataSpace>(std::move(space.value()));
    status = CheckDataEnd();
    if (!status.ok()) return status;

    const std::string remember = data_path_ == own ? "" : data_path_;
    if (remember == remembered_) return Status();
    Batch batch;
    batch.Put(kDirectoryKey, EncodeRow(uuid_, remember));
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
