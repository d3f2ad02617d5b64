// Volume: what an export reads and writes - the head of a disk, or a snapshot.
// This is the data path's interface; pool.h hands volumes out. Not a connection: knows no NBD.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/executor.h"
#include "base/task.h"
#include "cow/format/types.h"
#include "cow/volume/requester.h"

namespace varve::cow {

struct Base;
struct Layers;

/// All methods run on executor() only. Offsets and lengths are bytes; any alignment is served,
/// multiples of 4096 fastest. Ranges must lie within size(): the caller has checked (a range that
/// does not is answered EINVAL). Buffers must stay valid until the task finishes; those aligned to
/// 4096 bytes are transferred without a copy.
/// Errors are errno values: EIO (device failed, or metadata unreadable), ENOSPC (pool full),
/// EPERM (write to a snapshot), EINVAL, ESHUTDOWN (the volume is being closed), ECANCELED (the
/// requester is gone: each piece of the request, some blocks of one chunk, is done or not done).
/// A requester may be null: somebody waits in any case. When it goes, at most 32 pieces of each of
/// its requests are under way, 8 MiB; they are finished before the task ends.
class Volume {
  public:
    virtual ~Volume() = default;

    virtual Executor& executor() = 0;
    virtual uint64_t size() const = 0;  // bytes, a multiple of 512
    virtual bool read_only() const = 0;

    /// Fills `buffer` from `offset` on. Holes read as zeros. If `map` is given, the stretches of
    /// the range are appended to it: those marked as hole are zeros in `buffer` as well.
    virtual Task<Errno> Read(uint64_t offset, std::span<std::byte> buffer,
                             std::vector<Allocation>* map, Requester* requester) = 0;

    /// Writes `buffer`. When it is answered, reads see it; durable only after Flush().
    virtual Task<Errno> Write(uint64_t offset, std::span<const std::byte> buffer,
                              Requester* requester) = 0;

    /// Unmaps the whole blocks inside the range; they read as zeros. Part blocks stay as they are.
    virtual Task<Errno> Trim(uint64_t offset, uint64_t length, Requester* requester) = 0;

    /// The range reads as zeros. `allocate`: it is backed by blocks afterwards (NO_HOLE), which
    /// costs as much as writing; else whole blocks are unmapped.
    virtual Task<Errno> WriteZeroes(uint64_t offset, uint64_t length, bool allocate,
                                    Requester* requester) = 0;

    /// Everything answered before this call is durable when it succeeds.
    virtual Task<Errno> Flush() = 0;

    /// Appends the stretches of the range, at most `most` of them; together they may be shorter
    /// than the range (never empty for a range that is not empty), never longer. With `layers`,
    /// which live as long as the task, their depths too.
    virtual Task<Errno> Status(uint64_t offset, uint64_t length, uint32_t most,
                               const Layers* layers, std::vector<Allocation>* map,
                               Requester* requester) = 0;

    /// Appends what changed since `base`, which was made for this volume and lives as long as the
    /// task; otherwise as Status().
    virtual Task<Errno> Changes(const Base* base, uint64_t offset, uint64_t length, uint32_t most,
                                std::vector<Delta>* changes, Requester* requester) = 0;

    // The same for nobody in particular.
    Task<Errno> Read(uint64_t offset, std::span<std::byte> buffer, std::vector<Allocation>* map) {
        return Read(offset, buffer, map, nullptr);
    }
    Task<Errno> Write(uint64_t offset, std::span<const std::byte> buffer) {
        return Write(offset, buffer, nullptr);
    }
    Task<Errno> Trim(uint64_t offset, uint64_t length) { return Trim(offset, length, nullptr); }
    Task<Errno> WriteZeroes(uint64_t offset, uint64_t length, bool allocate) {
        return WriteZeroes(offset, length, allocate, nullptr);
    }
    Task<Errno> Status(uint64_t offset, uint64_t length, uint32_t most,
                       std::vector<Allocation>* map) {
        return Status(offset, length, most, nullptr, map, nullptr);
    }
};

}  // namespace varve::cow
