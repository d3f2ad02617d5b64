// RingStore: the engine's block store on a file or block device, through a reactor's ring.
// What is submitted in one turn of the reactor and lies side by side in the file leaves as one
// transfer: first writes after a snapshot do, wherever on the disk they are.
// Not the owner of the file, and not the source of its space (cow::SpaceStore).
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/reactor.h"
#include "cow/store/stores.h"
#include "nbdserver/storage/file_mapping.h"

namespace varve::nbdserver {

/// How a data file must be accessed.
struct FileTraits {
    uint32_t alignment = 1;  // bytes; see cow::BlockStore::alignment
    /// tmpfs: nothing waits for a device, but the ring hands such files to its worker threads,
    /// which costs several times a small transfer (measured: 4.5 against 1.8 us of CPU for 4 KiB).
    bool in_memory = false;
};

/// Asks the system about `fd`. `direct`: it was opened with O_DIRECT. A file system that does not
/// tell its alignment gets 4096. kInvalid if it needs more than 4096.
Result<FileTraits> ProbeFile(int fd, bool direct);

/// One for each reactor and file; Submit and completions on the reactor's thread only. Errors are
/// errno values of the system; EIO too for a read behind the end of the file and for a transfer
/// that makes no aligned progress. At most one sync is under way, and after one that failed all do:
/// the system tells of a lost write only once.
class RingStore : public cow::BlockStore {
  public:
    /// A sync that takes no longer than this may hold up the reactor's thread: through the ring it
    /// takes 70 us longer (measured: 217 to 248 us, and 144 to 159). A limit for tests to change.
    static constexpr int64_t kQuickSyncNanoseconds = 500'000;
    /// So many in a row must have been quick, however they were done.
    static constexpr unsigned kQuickSyncs = 64;

    /// `fd` stays the caller's and open until the store is gone. REQUIRES: traits as probed.
    /// `mapping`: of that file, if it is in memory; null: reads are system calls.
    RingStore(Reactor& reactor, int fd, FileTraits traits,
              std::shared_ptr<const FileMapping> mapping = nullptr,
              int64_t quick_sync_nanoseconds = kQuickSyncNanoseconds);
    /// REQUIRES: nothing in flight. Any thread, once the reactor no longer uses it.
    ~RingStore() override;

    void Submit(cow::BlockIo& io) override;
    bool DoNow(cow::BlockIo& io) override;
    uint32_t alignment() const override { return traits_.alignment; }

    /// Transfers under way.
    uint64_t in_flight() const { return in_flight_; }

    /// Syncs that did not go through the ring, of files that are not in memory.
    uint64_t syncs_done_now() const { return syncs_done_now_; }

    /// Transfers and syncs that the ring could not begin for want of a thread, and this one did.
    uint64_t transfers_done_here() const { return transfers_done_here_; }

  private:
    struct Transfer;  // the ring's side of a BlockIo

    struct StartPending : Runnable {
        RingStore* store = nullptr;
    };

    /// A sync that this thread is to do, once the present turn's replies have left.
    struct SyncNext : BatchHook, Runnable {
        RingStore* store = nullptr;
        Transfer* transfer = nullptr;  // null: none
    };

    Transfer* Take();
    void Return(Transfer& transfer);
    Transfer& Begin(cow::BlockIo& io, uint64_t bytes);
    bool Join(Transfer& transfer, cow::BlockIo& io, uint64_t bytes);
    void StartSync();
    void FlushPending();
    void Step(Transfer& transfer);
    bool IsMovedNow(const Transfer& transfer) const;
    bool MaySyncNow(const Transfer& sync) const;
    void SyncOrLeaveToRing();
    void CountSync(std::chrono::steady_clock::time_point began);
    bool ReadMapped(const iovec* vectors, uint32_t count, uint64_t offset);
    int32_t MoveNow(cow::BlockIo::Kind kind, const iovec* vectors, uint32_t count, uint64_t offset);
    void Advance(Transfer& transfer, int32_t result);
    void Finish(Transfer& transfer, Errno error);

    Reactor& reactor_;
    const int fd_;
    const FileTraits traits_;
    const std::shared_ptr<const FileMapping> mapping_;
    Transfer* unused_ = nullptr;      // recycled
    std::vector<Transfer*> pending_;  // of this turn; not started
    StartPending start_pending_;
    SyncNext sync_next_;
    std::vector<cow::BlockIo*> waiting_syncs_;  // for the one under way to end
    bool syncing_ = false;
    Errno sync_error_ = 0;                  // of the first that failed; then all do
    std::vector<cow::BlockIo*> finishing_;  // of one transfer
    uint64_t in_flight_ = 0;
    const int64_t quick_sync_nanoseconds_;
    unsigned quick_syncs_ = 0;  // in a row, the latest ones
    uint64_t syncs_done_now_ = 0;
    uint64_t transfers_done_here_ = 0;
};

}  // namespace varve::nbdserver
