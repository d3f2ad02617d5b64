// PoolImpl: the pool's commands, over the catalog, the committer, the reclaimer and the heads.
// Split by subject: pool.cc (opening, closing, status, space), health.cc, recovery.cc,
// pool_ring.cc, pool_disks.cc, pool_snapshots.cc, pool_exports.cc, pool_changes.cc,
// pool_waiting.cc.
//
// Everything here belongs to the home executor; a task that visits a lane comes back. Commands
// that change something hold their disks (Hold), and only those, until they end; the trimming of a
// shrunk disk lets others be refused meanwhile (Disk::busy).
#pragma once

#include <atomic>
#include <map>

#include "base/ticker.h"
#include "cow/head/map_commit.h"
#include "cow/integrity/checksummer.h"
#include "cow/integrity/scrub.h"
#include "cow/pool/pool.h"
#include "cow/reclaim/reclaim.h"

namespace varve::cow {

class PoolImpl : public Pool, public HeadHost {
  public:
    PoolImpl(Environment environment, PoolOptions options, Catalog catalog);
    ~PoolImpl() override;
    /// Folds the journal that a crash left. Before Start(). `recovered`: see Pool::Open(). Errors:
    /// its own, kDamaged, kIo, kNoSpace; then nothing was logged.
    Task<Status> Recover(const std::function<Status()>& recovered);
    /// Instead of Start().
    Task<void> Abandon();
    /// Makes the heads and starts the background work.
    void Start();

    void PrepareShutdown() override { core_.closing = true; }
    Task<Status> Shutdown() override;

    Task<Status> CreateDisk(std::string name, uint64_t size) override;
    Task<Result<std::vector<DiskInfo>>> ListDisks() override;
    Task<Result<DiskInfo>> ShowDisk(std::string name) override;
    Task<Status> RenameDisk(std::string name, std::string to) override;
    Task<Status> ResizeDisk(std::string name, uint64_t size, bool shrink, bool disconnect) override;
    Task<Status> SetOffline(std::string name, bool offline, bool disconnect) override;
    Task<Status> DeleteDisk(std::string name, bool snapshots, bool disconnect) override;
    Task<Status> CloneSnapshot(std::string snapshot, std::string name) override;
    Task<Status> FlattenDisk(std::string name) override;

    Task<Status> CreateSnapshots(std::vector<std::string> names) override;
    Task<Result<std::vector<SnapshotInfo>>> ListSnapshots(std::string disk) override;
    Result<std::vector<BookmarkInfo>> ListBookmarks(std::string disk) const override;
    Task<Result<SnapshotInfo>> ShowSnapshot(std::string name) override;
    Task<Result<uint64_t>> EstimateDelete(std::vector<std::string> names, bool snapshots) override;
    Task<Status> RenameSnapshot(std::string name, std::string to) override;
    using Pool::DeleteSnapshot;
    Task<Status> DeleteSnapshot(std::string name, bool disconnect, bool bookmark) override;
    Task<Result<Difference>> Diff(std::string from, std::string to, uint64_t offset) override;
    Task<Status> RestoreSnapshot(std::string name, std::optional<std::string> keep_as,
                                 bool disconnect, bool online) override;

    Task<Result<PoolStatus>> GetStatus() override;
    Task<Result<CheckReport>> Check() override;
    Task<Result<ScrubReport>> Scrub(std::optional<std::string> disk) override;
    Task<void> WaitForChecksums() override;
    Task<void> WaitForReclaim() override;
    void HurryReclaim() override;
    Task<void> CommitDirty() override;

    Task<std::shared_ptr<const std::vector<ExportEntry>>> ListExports() override;
    Status FindExport(std::string_view name) const override;
    Result<ExportDetails> DescribeExport(std::string name) override;
    bool HasBase(std::string_view name, std::string_view base) const override;
    using Pool::OpenExport;
    Task<Result<Export>> OpenExport(std::string name, std::vector<std::string> bases,
                                    const bool* given_up) override;
    std::shared_ptr<const Layers> LayersOf(uint64_t id) override;
    Task<void> CloseExport(uint64_t id) override;
    std::string ExportName(uint64_t id) override;
    void SetDisconnector(std::function<void(const std::vector<uint64_t>&)> disconnect) override;

    // HeadHost
    Task<Result<std::vector<Extent>>> LeaseBlocks(DiskId disk, Executor& lane, uint64_t most,
                                                  bool urgent) override;
    Task<bool> FreeMetadata(Executor& lane) override;
    Task<Status> CommitHead(DiskId disk, HeadCommit& commit, Executor& lane) override;

  private:
    struct Disk {
        std::unique_ptr<Head> head;
        uint64_t clients = 0;
        uint64_t visitors = 0;  // tasks that hold the head and are not clients
        bool fenced = false;    // no new clients
        size_t depth = 0;       // of the line that the head was given
        bool stored = false;    // its creation is known to be durable
        bool busy = false;      // it was made smaller, and is not trimmed yet: commands are refused
        bool trimming = false;  // that is under way: they wait
        uint64_t allocations = 0;       // of the head, when ReturnIdleLeases last looked
        uint64_t quiet = 0;             // times that it found them unchanged
        const char* command = nullptr;  // at work: others wait
        int64_t command_since_us = 0;
        bool watched = false;      // WatchSealed runs
        uint64_t seen_sealed = 0;  // how often it has ended
    };
    struct OpenSnapshot {
        std::unique_ptr<MappedVolume> volume;  // null: it is only compared with
        uint64_t clients = 0;                  // or those who compare with it
        bool fenced = false;
    };
    /// A view that one can open: of a snapshot, or, without one, the disk's head.
    struct View {
        DiskId disk;
        SnapshotId snapshot;
        friend auto operator<=>(const View&, const View&) = default;
    };
    struct OpenExportState {
        View view;
        std::vector<SnapshotId> bases;         // snapshots, not bookmarks
        std::string diff;                      // the base's name, of a diff export
        std::shared_ptr<const Layers> layers;  // as asked for last
    };
    /// An export's name taken apart, and found.
    struct Asked {
        View view;
        std::optional<Catalog::Base> diff;
    };
    /// Names a freeze in progress.
    struct Cut;
    struct FreedScan;
    struct DoomedViews {
        std::vector<SnapshotId> snapshots;
        std::vector<DiskId> disks;  // their heads only
    };
    /// What would be freed, on its way.
    struct Counting {
        std::atomic<uint64_t> steps = 0;     // the auditor's
        std::atomic<bool> given_up = false;  // nobody waits for it any more
        std::optional<Result<uint64_t>> bytes;
    };
    /// For whom: a head, a snapshot, or, without both, an estimate.
    using CountingFor = std::pair<DiskId, SnapshotId>;
    /// Keeps other commands from some disks as long as it exists.
    class Hold {
      public:
        Hold(PoolImpl& pool, std::vector<DiskId> disks, const char* command);
        Hold(Hold&& other) noexcept
            : pool_(std::exchange(other.pool_, nullptr)), disks_(std::move(other.disks_)) {}
        ~Hold();

      private:
        PoolImpl* pool_;
        std::vector<DiskId> disks_;
    };
    /// What a command is about. All but the first wait while a shrunk disk is trimmed.
    enum class About {
        kSnapshots,
        kDisk,        // refused if that has failed
        kShrunkDisk,  // done nevertheless
    };
    using FindDisks = std::function<Result<std::vector<DiskId>>()>;

    // pool_waiting.cc
    static Error Stopping();
    Task<Result<Hold>> Reserve(const char* command, FindDisks find, About about = About::kDisk);
    FindDisks DiskNamed(const std::string& name) const;
    FindDisks DiskOf(const std::string& snapshot) const;
    FindDisks DiskOfBase(const std::string& name) const;
    Task<void> WatchSealed(DiskId id);
    Task<bool> IsFolded(SnapshotId id);
    Task<bool> FoldedWithin(SnapshotId id, int64_t us, const bool* given_up = nullptr);
    Task<void> Refreshes();
    Task<bool> Refreshed();
    Task<void> Count(CountingFor whom, DoomedViews views, std::shared_ptr<Counting> counting);
    Task<Result<std::optional<uint64_t>>> BytesFreedSoon(CountingFor whom, DoomedViews views);
    Task<Result<bool>> Counted(SnapshotId id);
    Task<void> MakeExports();

    // recovery.cc
    struct Candidate;
    struct Recovered;
    Task<Status> FoldRows(Recovered* recovered);
    Task<Status> FoldRing(Recovered* recovered);
    Task<Result<std::string>> ReadData(uint64_t offset, uint64_t length);
    Task<Status> ReadRing(std::vector<Candidate>* candidates);
    Task<Status> Verify(std::vector<Candidate>& candidates);
    Task<Status> VerifySome(Candidate* begin, Candidate* end);
    std::vector<JournalPart> PartsOf(const std::vector<Candidate>& candidates);
    Task<Status> FoldParts(const std::vector<JournalPart>& parts, Recovered* recovered);
    Task<Status> FoldPart(const JournalPart& part, std::vector<std::string>* losses);
    void Tell(const Recovered& recovered);
    Task<Status> DropRows(const std::vector<std::string>& keys);

    // pool_ring.cc
    Task<Status> FindRing();
    Task<Status> BeginRing();
    Status UseSegments();
    Task<Status> PutRing();
    Task<Status> EndRing();

    // pool.cc
    Task<Status> Commit(Change change);
    Task<Result<std::vector<Extent>>> FindSpace(DiskId for_disk, uint64_t most);
    Task<void> RecallLeases(std::vector<DiskId> ids);
    Task<void> ReturnIdleLeases();
    bool Scarce() const;
    int64_t StandstillUs();

    // health.cc
    Status Growable() const;
    void Judge(PoolStatus& status) const;
    void WatchHealth();
    Task<void> CompactMetadata();
    void EndVisit(DiskId id);
    Task<void> CommitOne(DiskId id, bool fold, Join* join);
    Task<void> CommitChanged(bool fold);
    Task<void> FoldAll();
    Task<void> Trimmed(DiskId id);

    // pool_disks.cc
    Head& AddHead(DiskId id);
    void Stored(DiskId id);
    Head::Place PlaceOf(DiskId id) const;
    size_t DepthOf(DiskId id) const;
    Status Idle(DiskId id) const;
    Status CheckNewName(std::string_view name) const;
    Status CheckNewDisk(std::string_view name) const;
    DiskInfo InfoOf(DiskId id, bool fresh) const;
    Task<Status> Settle(Head& head);
    Task<Status> ResizeLocked(std::string name, uint64_t size, bool shrink, bool disconnect,
                              std::optional<DiskId>* shrunk);
    Task<Status> ShrinkDisk(DiskId id, uint64_t size, bool disconnect);
    Task<Status> FinishShrink(DiskId id);
    Task<Status> TrimShrunk(DiskId id);
    void BuildDelete(DiskId id, CommitContext& context);
    Task<void> DropHead(DiskId id);
    Task<Result<BranchId>> BeginFlatten(std::string name);
    void FlattenIfDeep(const SnapshotRecord& source, CommitContext& context);
    void RefreshLines();
    Task<void> RefreshLine(DiskId id);

    // pool_snapshots.cc
    Status CheckNewSnapshot(DiskId disk, std::string_view name) const;
    Status CheckNameFree(DiskId id, std::string_view name) const;
    Result<Catalog::Base> FindBaseNamed(std::string_view name) const;
    Status CheckDepth(SnapshotId id) const;
    Result<std::vector<Cut>> PlanCuts(const std::vector<std::string>& names);
    Task<bool> RunCuts(std::vector<Cut>& cuts);
    Task<void> FoldSealed(DiskId id);
    Task<void> CutOne(Cut& cut, bool hold, Join* frozen, Join* sealed);
    Task<void> UnholdOne(DiskId id, Head& head);
    Task<void> FinishOne(Cut cut);
    std::optional<SnapshotId> BuildRestore(SnapshotId id, const std::optional<std::string>& keep_as,
                                           bool offline, CommitContext& context);
    Task<Result<SnapshotInfo>> InfoOf(SnapshotId id, bool* waits);
    Result<std::vector<DiskId>> FindCutDisks(const std::vector<std::string>& names) const;

    // pool_figures.cc
    void LookAtFreed(const DoomedViews& doomed, FreedScan* at);
    Task<Result<uint64_t>> BytesFreedWithout(DoomedViews views, Counting& counting);

    // pool_changes.cc
    std::string BaseFor(const View& view) const;
    Result<std::vector<Catalog::Base>> FindBases(const Asked& asked,
                                                 const std::vector<std::string>& names) const;
    std::shared_ptr<const Base> MakeBase(const View& view, Catalog::Base from) const;
    Task<Status> RemoveBookmark(SnapshotId id);

    // pool_exports.cc
    static Error NoBase(std::string_view name);
    Result<Asked> FindAsked(std::string_view name) const;
    std::pair<BranchId, Generation> PlaceOf(const View& view) const;
    Task<Status> AwaitStored(std::string name, std::vector<std::string> bases,
                             const bool* given_up);
    Result<Volume*> OpenView(const View& view);
    Task<void> ReleaseSnapshot(SnapshotId id);
    Task<bool> ClientsGone(const uint64_t* clients);
    Task<Status> FenceDisk(DiskId id, bool disconnect, bool* cut_off);
    Task<Status> FenceSnapshot(SnapshotId id, bool disconnect);
    void Disconnect(DiskId disk, SnapshotId snapshot);
    void UnfenceSnapshot(SnapshotId id);
    std::string NameOfView(const View& view) const;

    Core core_;
    RingRecord ring_record_;           // as it is to be stored
    std::vector<Extent> ring_leased_;  // of it, that are not reserved yet
    std::unique_ptr<Ring> ring_;
    Lanes lanes_;
    const PoolOptions options_;
    Catalog catalog_;
    Allocator allocator_;
    Leases leases_;
    Reclaimer reclaimer_;
    Committer committer_;
    Checksummer checksummer_;
    Scrubber scrubber_;
    Ticker ticker_;
    Gate commands_;  // under way
    WaitList command_ended_;
    WaitList sealed_seen_;
    std::map<DiskId, Disk> disks_;
    std::map<SnapshotId, OpenSnapshot> snapshots_;  // those that are exported now
    std::map<uint64_t, OpenExportState> exports_;
    std::map<View, std::weak_ptr<const Layers>> layers_;  // all exports of a view share them
    uint64_t next_export_ = 1;
    std::shared_ptr<const std::vector<ExportEntry>> exports_list_;
    uint64_t exports_version_ = 0;  // of the catalog's names, when the list was begun
    bool making_exports_ = false;
    WaitList exports_made_;
    WaitList export_closed_;
    WaitList visit_ended_;
    uint64_t refreshes_wanted_ = 0, refreshes_started_ = 0, refreshes_done_ = 0;
    bool refreshing_ = false;
    WaitList refreshed_;
    struct LaneLook {
        bool busy = false;
        uint64_t ended = 0;    // requests
        int64_t since_us = 0;  // busy, and no request has ended
    };
    std::vector<LaneLook> lane_looks_;
    uint64_t map_cache_used_ = 0;            // at the last refresh
    std::map<SnapshotId, uint64_t> unique_;  // as last counted
    std::map<CountingFor, std::shared_ptr<Counting>> counting_;
    WaitList counted_;
    Gate background_;
    std::function<void(const std::vector<uint64_t>&)> disconnect_;
    bool metadata_low_ = false;
    bool metadata_full_ = false;  // when it was looked at last
    bool compacting_ = false;
    uint64_t compacted_chunks_ = ~uint64_t{0};  // reclaimer_.swept_chunks() then
    uint64_t compacted_commits_ = 0;
    std::string health_logged_;     // the warnings that the log has had last
    bool full_ = false;             // FindSpace found nothing, and since then nothing was released
    uint64_t full_at_release_ = 0;  // committer_.released_blocks() then
};

}  // namespace varve::cow
