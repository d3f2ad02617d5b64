#include "nbdserver/storage/ring_store.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <vector>

namespace varve::nbdserver {
namespace {

constexpr uint32_t kVectorsMax = 1024;  // IOV_MAX: more leave as several transfers
// Neighbours leave as one transfer of at most so many bytes.
constexpr uint64_t kJoinedBytesMax = 256 << 10;
// A write to memory of at least so many bytes, or neighbours that have so many on average, is left
// to one of the ring's threads, and this one receives the next meanwhile. One client, QD 8,
// requests/s: 1 MiB 1,520 -> 3,864, 64 KiB 31,453 -> 56,067, 32 KiB 57,926 -> 52,644; neighbours of
// 4 KiB that leave together 199,805 -> 170,667.
constexpr uint64_t kHandedOverBytes = 64 << 10;

uint64_t BytesOf(const iovec* vectors, uint32_t count) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < count; ++i) bytes += vectors[i].iov_len;
    return bytes;
}

bool IsAligned(const cow::BlockIo& io, uint64_t alignment) {
    uint64_t all = io.offset;
    for (uint32_t i = 0; i < io.vector_count; ++i) {
        all |= reinterpret_cast<uintptr_t>(io.vectors[i].iov_base) | io.vectors[i].iov_len;
    }
    return (all & (alignment - 1)) == 0;
}

}  // namespace

Result<FileTraits> ProbeFile(int fd, bool direct) {
    FileTraits traits;
    struct statfs fs {};
    if (fstatfs(fd, &fs) < 0) return SystemError(errno, "cannot examine the data file");
    struct stat about {};
    if (fstat(fd, &about) < 0) return SystemError(errno, "cannot examine the data file");
    // A device's node lies on a file system in memory, what it stands for does not.
    const bool device = S_ISBLK(about.st_mode);
    traits.in_memory = !device && (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC);
    // tmpfs accepts O_DIRECT at any alignment and has nothing to be direct with.
    if (!direct || traits.in_memory) return traits;

    traits.alignment = 4096;
    struct statx file {};
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &file) == 0 &&
        (file.stx_mask & STATX_DIOALIGN) != 0) {
        if (file.stx_dio_offset_align == 0) {
            return MakeError(ErrorKind::kInvalid,
                             "the data file cannot be accessed directly: use --cache buffered");
        }
        traits.alignment = std::max(file.stx_dio_offset_align, file.stx_dio_mem_align);
    }
    if (traits.alignment > 4096 || !std::has_single_bit(traits.alignment)) {
        return MakeError(ErrorKind::kInvalid,
                         "the data file's device needs transfers of more than 4096 bytes: use "
                         "--cache buffered");
    }
    return traits;
}

/// One transfer of the system's, for one BlockIo or for several that lie side by side.
struct RingStore::Transfer : Op, Runnable {
    RingStore* store = nullptr;
    Transfer* following = nullptr;  // among the unused
    cow::BlockIo::Kind kind = cow::BlockIo::Kind::kRead;
    uint64_t offset = 0;
    uint64_t moved = 0;  // bytes that are done
    uint64_t total = 0;  // bytes
    std::vector<cow::BlockIo*> ios;
    std::vector<iovec> vectors;
    std::vector<iovec> rest;                      // what is left after a short step
    bool done_here = false;                       // the ring could not
    int32_t result = 0;                           // of the last step, if this thread did it
    std::chrono::steady_clock::time_point began;  // of a sync
};

RingStore::RingStore(Reactor& reactor, int fd, FileTraits traits,
                     std::shared_ptr<const FileMapping> mapping, int64_t quick_sync_nanoseconds)
    : reactor_(reactor),
      fd_(fd),
      traits_(traits),
      mapping_(std::move(mapping)),
      quick_sync_nanoseconds_(quick_sync_nanoseconds) {
    start_pending_.store = this;
    start_pending_.run = [](Runnable* self) {
        static_cast<StartPending*>(self)->store->FlushPending();
    };
    sync_next_.store = this;
    sync_next_.BatchHook::run = [](BatchHook* self) {
        auto* next = static_cast<SyncNext*>(self);
        next->store->reactor_.Post(next);
    };
    sync_next_.Runnable::run = [](Runnable* self) {
        static_cast<SyncNext*>(self)->store->SyncOrLeaveToRing();
    };
}

RingStore::~RingStore() {
    VARVE_CHECK(in_flight_ == 0);
    while (unused_) delete std::exchange(unused_, unused_->following);
}

RingStore::Transfer* RingStore::Take() {
    if (Transfer* transfer = unused_) {
        unused_ = transfer->following;
        return transfer;
    }
    Transfer* transfer = new Transfer;
    transfer->store = this;
    transfer->done = [](Op* op, int32_t result) {
        Transfer* self = static_cast<Transfer*>(op);
        self->store->Advance(*self, result);
    };
    transfer->run = [](Runnable* runnable) {
        Transfer* self = static_cast<Transfer*>(runnable);
        self->store->Advance(*self, self->result);
    };
    return transfer;
}

void RingStore::Return(Transfer& transfer) {
    transfer.following = unused_;
    unused_ = &transfer;
}

/// Reads out of mapped memory, and appends to a file that is in memory. What a mapping does not
/// hold, and what did not go well, Submit() does.
bool RingStore::DoNow(cow::BlockIo& io) {
    if (io.kind == cow::BlockIo::Kind::kAppend && traits_.in_memory) {
        const uint64_t bytes = BytesOf(io.vectors, io.vector_count);
        const int32_t moved = MoveNow(io.kind, io.vectors, io.vector_count, io.offset);
        return moved >= 0 && static_cast<uint64_t>(moved) == bytes;
    }
    const bool mapped = io.kind == cow::BlockIo::Kind::kRead && mapping_;
    return mapped && ReadMapped(io.vectors, io.vector_count, io.offset);
}

void RingStore::Submit(cow::BlockIo& io) {
    const bool append = io.kind == cow::BlockIo::Kind::kAppend;
    VARVE_CHECK(IsAligned(io, traits_.alignment));
    ++in_flight_;
    const uint64_t bytes = BytesOf(io.vectors, io.vector_count);
    if (io.kind == cow::BlockIo::Kind::kSync) {
        waiting_syncs_.push_back(&io);
        return StartSync();
    }
    if (append || bytes > kJoinedBytesMax / 2) return Step(Begin(io, bytes));
    if (!pending_.empty() && Join(*pending_.back(), io, bytes)) return;
    if (pending_.empty()) reactor_.Post(&start_pending_);
    pending_.push_back(&Begin(io, bytes));
}

RingStore::Transfer& RingStore::Begin(cow::BlockIo& io, uint64_t bytes) {
    Transfer& transfer = *Take();
    transfer.kind = io.kind;
    transfer.offset = io.offset;
    transfer.moved = 0;
    transfer.total = bytes;
    transfer.done_here = false;
    transfer.ios.assign(1, &io);
    transfer.vectors.assign(io.vectors, io.vectors + io.vector_count);
    return transfer;
}

/// Whether `io` goes on where `transfer` ends, and is part of it now.
bool RingStore::Join(Transfer& transfer, cow::BlockIo& io, uint64_t bytes) {
    if (transfer.kind != io.kind || transfer.offset + transfer.total != io.offset ||
        transfer.total + bytes > kJoinedBytesMax ||
        transfer.vectors.size() + io.vector_count > kVectorsMax) {
        return false;
    }
    transfer.total += bytes;
    transfer.ios.push_back(&io);
    transfer.vectors.insert(transfer.vectors.end(), io.vectors, io.vectors + io.vector_count);
    return true;
}

/// One sync for all who wait, once the one under way has ended. The system reports a lost write to
/// one sync of an open file only: another at the same time could succeed in spite of it.
void RingStore::StartSync() {
    if (Transfer* next = sync_next_.transfer) {  // not begun yet
        next->ios.insert(next->ios.end(), waiting_syncs_.begin(), waiting_syncs_.end());
        waiting_syncs_.clear();
    }
    if (syncing_ || waiting_syncs_.empty()) return;
    syncing_ = true;
    Transfer& transfer = Begin(*waiting_syncs_.front(), 0);
    transfer.ios.swap(waiting_syncs_);
    waiting_syncs_.clear();
    transfer.began = std::chrono::steady_clock::now();
    Step(transfer);
}

void RingStore::FlushPending() {
    // Completions come later, so nothing is added meanwhile.
    for (Transfer* transfer : pending_) Step(*transfer);
    pending_.clear();
}

/// Starts what is left of `transfer`; Advance() gets the result.
void RingStore::Step(Transfer& transfer) {
    const iovec* vectors = transfer.vectors.data();
    size_t count = transfer.vectors.size();
    if (transfer.moved) {
        transfer.rest = transfer.vectors;
        uint64_t skip = transfer.moved;
        auto first = transfer.rest.begin();
        while (skip >= first->iov_len) skip -= first++->iov_len;
        first->iov_base = static_cast<std::byte*>(first->iov_base) + skip;
        first->iov_len -= skip;
        vectors = &*first;
        count = static_cast<size_t>(transfer.rest.end() - first);
    }
    const auto n = static_cast<uint32_t>(std::min<size_t>(count, kVectorsMax));
    const uint64_t offset = transfer.offset + transfer.moved;
    if (transfer.kind == cow::BlockIo::Kind::kSync && sync_error_ != 0) {
        transfer.result = -sync_error_;
        reactor_.Post(&transfer);
    } else if (IsMovedNow(transfer)) {
        transfer.result = MoveNow(transfer.kind, vectors, n, offset);
        reactor_.Post(&transfer);
    } else if (transfer.kind == cow::BlockIo::Kind::kRead) {
        reactor_.Read(transfer, fd_, vectors, n, offset);
    } else if (transfer.kind != cow::BlockIo::Kind::kSync) {
        reactor_.Write(transfer, fd_, vectors, n, offset);
    } else if (MaySyncNow(transfer)) {
        sync_next_.transfer = &transfer;
        reactor_.AtBatchEnd(sync_next_);
    } else {
        reactor_.DataSync(transfer, fd_);
    }
}

/// The ring hands a sync to a thread of its own, there and back longer than a fast device takes.
/// Whoever else is served by this thread waits meanwhile, so there must be no other transfer, no
/// page cache that could hold much, and syncs must have been quick.
bool RingStore::MaySyncNow(const Transfer& sync) const {
    return in_flight_ == sync.ios.size() && traits_.alignment > 1 && quick_syncs_ >= kQuickSyncs;
}

/// In the turn after the one that asked for it: replies have left. Others may have come, though.
void RingStore::SyncOrLeaveToRing() {
    Transfer& transfer = *std::exchange(sync_next_.transfer, nullptr);
    if (!MaySyncNow(transfer)) return reactor_.DataSync(transfer, fd_);
    ++syncs_done_now_;
    Advance(transfer, MoveNow(transfer.kind, nullptr, 0, 0));
}

void RingStore::CountSync(std::chrono::steady_clock::time_point began) {
    const std::chrono::nanoseconds took = std::chrono::steady_clock::now() - began;
    quick_syncs_ = took.count() <= quick_sync_nanoseconds_ ? quick_syncs_ + 1 : 0;
}

bool RingStore::IsMovedNow(const Transfer& transfer) const {
    if (transfer.done_here) return true;
    if (!traits_.in_memory) return false;
    const bool large = transfer.total >= kHandedOverBytes * transfer.ios.size();
    return transfer.kind != cow::BlockIo::Kind::kWrite || !large;
}

bool RingStore::ReadMapped(const iovec* vectors, uint32_t count, uint64_t offset) {
    for (uint32_t i = 0; i < count; ++i) {
        if (!mapping_->Read(offset, vectors[i].iov_base, vectors[i].iov_len)) return false;
        offset += vectors[i].iov_len;
    }
    return true;
}

/// Does it at once. One call moves less than 2 GiB.
///
/// Writes do not use the mapping. A write by memcpy could be torn anywhere by kill -9; a system
/// call is not interrupted inside a page, so that a sector is old or new.
int32_t RingStore::MoveNow(cow::BlockIo::Kind kind, const iovec* vectors, uint32_t count,
                           uint64_t offset) {
    const int n = static_cast<int>(count);
    const off_t at = static_cast<off_t>(offset);
    const bool one = count == 1;  // spares the system the import of a vector
    ssize_t result = 0;
    switch (kind) {
        case cow::BlockIo::Kind::kRead:
            result = one ? pread(fd_, vectors->iov_base, vectors->iov_len, at)
                         : preadv(fd_, vectors, n, at);
            break;
        case cow::BlockIo::Kind::kWrite:
        case cow::BlockIo::Kind::kAppend:
            result = one ? pwrite(fd_, vectors->iov_base, vectors->iov_len, at)
                         : pwritev(fd_, vectors, n, at);
            break;
        case cow::BlockIo::Kind::kSync:
            result = fdatasync(fd_);
            break;
    }
    return result < 0 ? -errno : static_cast<int32_t>(result);
}

void RingStore::Advance(Transfer& transfer, int32_t result) {
    if (result == -EINTR) return Step(transfer);
    if (Reactor::WasNotIssued(result)) {
        // The limit on processes was met, for instance. Nothing was tried, so nothing has failed;
        // the thread's other clients wait instead.
        ++transfers_done_here_;
        transfer.done_here = true;
        return Step(transfer);
    }
    if (result < 0) return Finish(transfer, -result);
    if (transfer.kind == cow::BlockIo::Kind::kSync) {
        CountSync(transfer.began);
        return Finish(transfer, 0);
    }
    // The rest of a direct transfer must begin aligned again: an odd tail is done twice.
    const uint64_t mask = traits_.alignment - 1;
    const uint64_t moved = transfer.moved + static_cast<uint32_t>(result);
    if (moved == transfer.total) return Finish(transfer, 0);
    if ((moved & ~mask) == transfer.moved) return Finish(transfer, EIO);
    transfer.moved = moved & ~mask;
    Step(transfer);
}

void RingStore::Finish(Transfer& transfer, Errno error) {
    const bool sync = transfer.kind == cow::BlockIo::Kind::kSync;
    // Whom the error concerns is seen when each goes alone. Of a sync, all.
    const bool again = error != 0 && transfer.ios.size() > 1 && !sync;
    if (sync) {
        syncing_ = false;
        if (error != 0) sync_error_ = error;
    }
    finishing_.swap(transfer.ios);  // the transfer may be taken again by who is told
    Return(transfer);
    if (!again) in_flight_ -= finishing_.size();
    for (cow::BlockIo* io : finishing_) {
        if (again) {
            Step(Begin(*io, BytesOf(io->vectors, io->vector_count)));
            continue;
        }
        io->error = error;
        io->done(io);
    }
    StartSync();
}

}  // namespace varve::nbdserver
