// Pool: the engine's front door. Opens a pool, keeps its disks and snapshots, hands out volumes.
// Not the data path (volume.h), not a server: knows no sockets and no command syntax.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/task.h"
#include "cow/core/environment.h"
#include "cow/integrity/scrub_report.h"
#include "cow/volume/changes.h"
#include "cow/volume/volume.h"

namespace varve::cow {

/// Settings with their defaults. Counts and sizes are limits: going over gives ErrorKind::kLimit.
struct PoolOptions {
    uint64_t map_cache_bytes = 256 << 20;  // all lanes together
    uint64_t disks_max = 10'000;
    uint64_t snapshots_max = 100'000;         // of one disk
    uint64_t disk_bytes_max = kDiskBytesMax;  // size of one disk
    uint64_t capacity_max = 0;                // bytes of the data file; 0: what the device holds
    uint64_t lease_blocks_min = 0;            // handed to a disk at once at the least
    uint64_t flatten_depth = 64;              // branches; a longer line is flattened by itself
    uint64_t reclaim_step_chunks = 128;       // swept between two commits of the reclaimer
    uint64_t reclaim_read_after = 16;    // questions about a branch's rows, until it reads them
    uint64_t commit_interval_ms = 1000;  // (server) how long a write may wait for a sync
    /// Of the journal in the data file, at most; a sixteenth of a small pool.
    uint64_t ring_bytes = 64 << 20;
};

struct DiskInfo {
    std::string name;
    uint64_t size = 0;       // bytes
    uint64_t used = 0;       // bytes of blocks mapped by the disk now
    uint64_t snapshots = 0;  // how many
    uint64_t clients = 0;    // attached to the disk (not to its snapshots)
    int64_t created_ms = 0;
    uint64_t generation = 0;   // the one being written now
    uint64_t depth = 0;        // branches a lookup may have to visit
    bool offline = false;      // no clients until it is set online
    bool approximate = false;  // something hangs: `used` lacks the latest, or `unique` is missing
    std::optional<uint64_t> unique;  // bytes that no snapshot and no other disk sees; ShowDisk only
};

struct SnapshotInfo {
    std::string disk;
    std::string name;
    int64_t created_ms = 0;
    uint64_t size = 0;  // bytes
    uint64_t generation = 0;
    uint64_t unique = 0;       // bytes that deleting it would free
    uint64_t referenced = 0;   // bytes of blocks mapped by it
    bool approximate = false;  // both may be older figures, or 0: something hangs
};

/// What is left of a deleted snapshot, to compare with.
struct BookmarkInfo {
    std::string name;
    int64_t created_ms = 0;  // of the snapshot
    uint64_t size = 0;       // bytes, likewise
    uint64_t generation = 0;
};

/// Some of what changed between two states, in order.
struct Difference {
    struct Extent {
        uint64_t offset = 0;  // bytes
        uint64_t length = 0;  // bytes
        bool zero = false;    // not mapped, reads as zeros
    };
    std::vector<Extent> extents;
    std::optional<uint64_t> next;  // where to go on; nothing: that was all
};

/// Something that is waited for, and since when.
struct Waiting {
    std::string what;
    uint64_t seconds = 0;
};

/// The worst of what is known of a pool.
enum class Health : uint8_t {
    kOk,
    kWarning,  // nearly full, damage was found, or space cannot be given back
    kFull,     // writes that need space get ENOSPC
    kFailed,   // writes and flushes are refused until a restart
};
inline const char* NameOf(Health health) {  // here, so that varve needs nothing of the engine
    constexpr const char* kNames[] = {"ok", "warning", "full", "failed"};
    return kNames[static_cast<size_t>(health)];
}

struct PoolStatus {
    uint64_t capacity = 0;  // bytes the pool could hold
    uint64_t used = 0;      // bytes of allocated blocks, those waiting for reclaim included
    uint64_t leased = 0;    // not used, but handed to disks, or still being read
    uint64_t free = 0;      // capacity - used, or less: what metadata has room for
    uint64_t metadata_capacity = 0;  // bytes that rows may take in all
    uint64_t metadata_used = 0;
    uint64_t metadata_free = 0;
    Health health = Health::kOk;
    std::vector<std::string> warnings;  // each a line that says what to do
    uint64_t disks = 0;
    uint64_t snapshots = 0;
    uint64_t reclaim_pending = 0;    // deletions whose space is not all given back yet
    uint64_t reclaim_set_aside = 0;  // chunks, notes, deletions that cannot be read
    uint64_t reclaimed_chunks = 0;   // looked at by the running deletion
    uint64_t reclaimed_bytes = 0;    // given back since the start
    uint64_t commits = 0;            // since the start
    uint64_t home_reads = 0;         // rows of the allocator that were read on home: none should be
    uint64_t map_cache_used = 0;     // bytes
    uint64_t map_cache_limit = 0;
    uint64_t checksums_pending = 0;  // snapshots whose blocks may lack checksums
    uint64_t checksummed_bytes = 0;  // since the start
    bool scrub_running = false;
    uint64_t scrubbed_bytes = 0;   // verified by the running scrub, or the last one
    uint64_t damaged_bytes = 0;    // of frozen blocks found damaged since the start
    std::vector<Waiting> waiting;  // what takes a second or longer at this moment
    bool approximate = false;      // what was written last may not be counted: something hangs
    bool failed = false;           // a commit or sync failed: writes are refused until a restart
    std::string failure;
};

struct CheckReport {
    std::vector<std::string> errors;  // at most 100, then a count
    uint64_t disks = 0, snapshots = 0, branches = 0;
    uint64_t map_rows = 0;
    uint64_t used_blocks = 0;
    uint64_t leaked_blocks = 0;   // marked used, held by nothing
    uint64_t reclaim_blocks = 0;  // marked used, waiting for a deletion to finish
    uint64_t checksums = 0;       // stored, those of blocks that are gone included
    bool ok() const { return errors.empty() && leaked_blocks == 0; }
};

/// What an attached client holds. All of it stays valid until Pool::Close(export).
struct Export {
    Volume* volume = nullptr;
    uint64_t id = 0;
    std::vector<std::shared_ptr<const Base>> bases;  // as asked for, of a diff export just its own
    bool diff = false;
};

struct ExportEntry {
    std::string name;  // "disk", "disk@snapshot", or, never listed, "disk@new~old"
    uint64_t size = 0;
    bool read_only = false;
};

/// What one can ask of an export before opening it.
struct ExportDetails : ExportEntry {
    bool diff = false;  // "disk@new~old"
    /// What it is compared with, or, of others, what one would compare it with: the newest snapshot
    /// or bookmark that it comes from. Empty: nothing.
    std::string base;
};

/// Commands on one disk wait for each other, at most some seconds: kBusy then. What shows something
/// does not wait for what hangs: it tells what memory says, and that it may be approximate.
///
/// All methods run on the environment's home executor, except where said. Names are checked here.
/// Every command is atomic: after a crash it is done or not done. Errors carry a message of one
/// line that says what to do.
class Pool {
  public:
    virtual ~Pool() = default;

    /// Reads the catalog and resumes interrupted deletions in the background. An empty store
    /// becomes a new pool. Runs on home. kDamaged or kInvalid (other version) with a message.
    /// `recovered`, if any, is called on home when all is known to be sound, before anything
    /// changes in the data file; its error is this function's.
    static Task<Result<std::unique_ptr<Pool>>> Open(Environment environment, PoolOptions options,
                                                    std::function<Status()> recovered = nullptr);

    /// Shutdown will follow: long work ends early, to be taken up at the next start; a writer that
    /// waits for space gets ENOSPC. From any thread.
    virtual void PrepareShutdown() = 0;
    /// Commits everything, stops background work, waits for all volumes. Exports must be closed.
    virtual Task<Status> Shutdown() = 0;

    // ---- disks
    virtual Task<Status> CreateDisk(std::string name, uint64_t size) = 0;
    virtual Task<Result<std::vector<DiskInfo>>> ListDisks() = 0;
    virtual Task<Result<DiskInfo>> ShowDisk(std::string name) = 0;
    virtual Task<Status> RenameDisk(std::string name, std::string to) = 0;
    /// Smaller sizes need `shrink`; see `disconnect` at RestoreSnapshot.
    virtual Task<Status> ResizeDisk(std::string name, uint64_t size, bool shrink,
                                    bool disconnect) = 0;
    /// An offline disk has no clients; its snapshots may be read. See `disconnect` there.
    virtual Task<Status> SetOffline(std::string name, bool offline, bool disconnect) = 0;
    /// A disk that has snapshots needs `snapshots`, which deletes them too. Clones stay.
    virtual Task<Status> DeleteDisk(std::string name, bool snapshots, bool disconnect) = 0;
    virtual Task<Status> CloneSnapshot(std::string snapshot, std::string name) = 0;
    /// Brings the disk's depth back to 1, while it is in use. Goes on in the background, through
    /// restarts too, whether somebody waits for it or not.
    virtual Task<Status> FlattenDisk(std::string name) = 0;

    // ---- snapshots, named "disk@snapshot"
    /// One crash-consistent cut across all of them. Returns once it is durable.
    virtual Task<Status> CreateSnapshots(std::vector<std::string> names) = 0;
    /// Oldest first. `unique` costs time proportional to what changed around each snapshot.
    virtual Task<Result<std::vector<SnapshotInfo>>> ListSnapshots(std::string disk) = 0;
    virtual Result<std::vector<BookmarkInfo>> ListBookmarks(std::string disk) const = 0;
    virtual Task<Result<SnapshotInfo>> ShowSnapshot(std::string name) = 0;
    /// Bytes that deleting all these disks and snapshots together would free. `snapshots` as for
    /// DeleteDisk. kBusy if counting does not go on.
    virtual Task<Result<uint64_t>> EstimateDelete(std::vector<std::string> names,
                                                  bool snapshots) = 0;
    /// A bookmark, too.
    virtual Task<Status> RenameSnapshot(std::string name, std::string to) = 0;
    /// A bookmark, too. `bookmark`: its name stays as one, to compare with.
    virtual Task<Status> DeleteSnapshot(std::string name, bool disconnect, bool bookmark) = 0;
    Task<Status> DeleteSnapshot(std::string name, bool disconnect) {
        return DeleteSnapshot(std::move(name), disconnect, false);
    }
    /// What differs in snapshot `to` from `from`, a snapshot or bookmark of the same disk; from
    /// byte `offset` on, some thousand extents.
    virtual Task<Result<Difference>> Diff(std::string from, std::string to, uint64_t offset) = 0;
    /// Needs the disk without clients: kBusy, or, with `disconnect`, they are fenced first; then
    /// the disk is offline afterwards, since they would write what they remember, unless `online`
    /// is set, which sets it online. `keep_as`: also freezes the present state under that name, in
    /// the same commit.
    virtual Task<Status> RestoreSnapshot(std::string name, std::optional<std::string> keep_as,
                                         bool disconnect, bool online) = 0;

    // ---- the pool
    virtual Task<Result<PoolStatus>> GetStatus() = 0;
    /// Verifies every invariant on one consistent view, while disks are in use.
    virtual Task<Result<CheckReport>> Check() = 0;
    /// Reads all frozen blocks of `disk` and its snapshots, or of all, and compares them with their
    /// checksums, while disks are in use. May take hours. kBusy while another one runs.
    virtual Task<Result<ScrubReport>> Scrub(std::optional<std::string> disk) = 0;
    /// Waits until no checksums are missing that could be made, which goes at full speed then.
    virtual Task<void> WaitForChecksums() = 0;
    /// Waits until no deletion is pending. Meanwhile deletions do not give way to requests.
    virtual Task<void> WaitForReclaim() = 0;
    /// Somebody waits for deletions by asking for the status: they do not give way for a second.
    virtual void HurryReclaim() = 0;
    /// Commits what is dirty on every disk, and takes back what idle ones were handed: the server
    /// calls it every commit_interval_ms.
    virtual Task<void> CommitDirty() = 0;

    // ---- exports
    /// Made once for each state of the catalog, in pieces: cheap to ask for.
    virtual Task<std::shared_ptr<const std::vector<ExportEntry>>> ListExports() = 0;
    /// Whether there is such a disk or snapshot: kNotFound, or kInvalid.
    virtual Status FindExport(std::string_view name) const = 0;
    /// What OpenExport would open, without opening it; also of a disk that it would refuse now: who
    /// lists exports and asks about each gives up at the first refusal. kNotFound, kInvalid.
    virtual Result<ExportDetails> DescribeExport(std::string name) = 0;
    /// Whether the export can be compared with that snapshot or bookmark of its disk.
    virtual bool HasBase(std::string_view name, std::string_view base) const = 0;
    /// By export name; "" is the only disk when there is exactly one. `bases`, kBasesMax at most:
    /// what it is to be compared with, as HasBase() says. kNotFound; kBusy while the
    /// disk is fenced or offline, or a snapshot is not stored soon; soon after `*given_up` is
    /// set, too, which whoever asks may do on home to end the wait.
    virtual Task<Result<Export>> OpenExport(std::string name, std::vector<std::string> bases,
                                            const bool* given_up) = 0;
    Task<Result<Export>> OpenExport(std::string name) {
        return OpenExport(std::move(name), {}, nullptr);
    }
    /// What the depths of the export's blocks are counted by, now. REQUIRES: it is open.
    virtual std::shared_ptr<const Layers> LayersOf(uint64_t id) = 0;
    /// REQUIRES: no task of the volume is running for this export.
    virtual Task<void> CloseExport(uint64_t id) = 0;
    /// What the export is called now: it follows renames. REQUIRES: it is open.
    virtual std::string ExportName(uint64_t id) = 0;
    /// How commands fence: must make the holders of these exports close them, soon, and drop what
    /// they have not answered. Set once by the server, called on home.
    virtual void SetDisconnector(std::function<void(const std::vector<uint64_t>&)> disconnect) = 0;
};

/// Verifies the metadata in `store`; what Pool::Check does, and the offline check. Blocks.
Result<CheckReport> CheckMetadata(MetadataStore& store);

}  // namespace varve::cow
