// The two doors through which the engine sees the world: a block store for data, a metadata store
// for everything else. The server plugs in io_uring and RocksDB, tests plug in a simulated disk
// with a power switch; a distributed object store would be a third.
// Not an abstraction of files: only what the engine needs.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <coroutine>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace varve::cow {

/// One transfer. It lives in the frame of the coroutine that awaits it and must not move until it
/// completes: co_await Transfer(store, ...) below does that.
struct BlockIo {
    enum class Kind : uint8_t { kRead, kWrite, kAppend, kSync };

    Kind kind = Kind::kRead;
    uint64_t offset = 0;             // bytes from the start of the data file
    const iovec* vectors = nullptr;  // unchanged and valid until completion
    uint32_t vector_count = 0;
    Errno error = 0;  // result: 0, or why nothing may be assumed about the transfer
    void (*done)(BlockIo*) = nullptr;
};

/// The data file or device, seen from one executor: Submit and `done` run there only.
class BlockStore {
  public:
    virtual ~BlockStore() = default;

    /// Starts `io`. `io.done(&io)` is called once, on this store's executor, never from inside
    /// Submit. A transfer is complete or failed: short ones are continued inside.
    /// kWrite: the data may be lost by a power cut until a kSync that was submitted after the
    /// completion has itself completed without error. After a kSync that failed none succeeds.
    /// Until then it outlives the process only.
    /// kAppend: a kWrite of the journal, which many may wait for: it leaves at once.
    virtual void Submit(BlockIo& io) = 0;

    /// Does `io` at once, if that takes no waiting. true: it is complete, with its result in
    /// `io.error`, and `io.done` is not called. false: nothing happened, Submit() it.
    virtual bool DoNow(BlockIo& io) {
        (void)io;
        return false;
    }

    /// Offset, length and memory of a kRead or kWrite must be multiples of this. Bytes, a power of
    /// two, at most 4096; 1 for a store that has no such rule.
    virtual uint32_t alignment() const = 0;
};

/// co_await a transfer; the result is its Errno.
class [[nodiscard]] Transfer : BlockIo {
  public:
    Transfer(BlockStore& store, Kind k, uint64_t at, const iovec* v, uint32_t n) : store_(store) {
        kind = k;
        offset = at;
        vectors = v;
        vector_count = n;
        done = [](BlockIo* self) { static_cast<Transfer*>(self)->handle_.resume(); };
    }
    Transfer(const Transfer&) = delete;
    bool await_ready() { return store_.DoNow(*this); }
    void await_suspend(std::coroutine_handle<> handle) {
        handle_ = handle;
        store_.Submit(*this);
    }
    Errno await_resume() const noexcept { return error; }

  private:
    BlockStore& store_;
    std::coroutine_handle<> handle_;
};

/// Where the data file's space comes from. Calls may block; any thread, but one Provision() at a
/// time, and a stretch is not provisioned and discarded at once.
class SpaceStore {
  public:
    virtual ~SpaceStore() = default;
    /// Makes bytes [offset, offset + length) writable without running out of space later; they
    /// need not read as zeros. kNoSpace if there is none; then nothing changed.
    virtual Status Provision(uint64_t offset, uint64_t length) = 0;
    /// A crash may have made the store shorter than it was provisioned: makes it `end` bytes long
    /// at least, without space behind what is new.
    virtual Status Extend(uint64_t end) {
        (void)end;
        return Status();
    }
    /// Gives bytes back; their content is gone. A hint, errors are ignored.
    virtual void Discard(uint64_t offset, uint64_t length) = 0;
    /// How many bytes the store could hold in all, now. `provisioned`: what it was made to hold; it
    /// may hold less, where something was discarded.
    virtual uint64_t Capacity(uint64_t provisioned) = 0;
};

/// Puts and deletes that happen together or not at all. Keys and values are bytes.
class Batch {
  public:
    struct Op {
        std::string key;
        std::optional<std::string> value;  // empty: delete
    };
    void Put(std::string key, std::string value) {
        bytes_ += kOpBytes + key.size() + value.size();
        ops_.push_back({std::move(key), std::move(value)});
    }
    void Delete(std::string key) {
        bytes_ += kOpBytes + key.size();
        ops_.push_back({std::move(key), std::nullopt});
    }
    void Append(Batch other) {
        bytes_ += other.bytes_;
        if (ops_.empty()) return ops_.swap(other.ops_);
        ops_.insert(ops_.end(), std::make_move_iterator(other.ops_.begin()),
                    std::make_move_iterator(other.ops_.end()));
    }
    const std::vector<Op>& ops() const { return ops_; }
    bool empty() const { return ops_.empty(); }
    /// About what a store writes for it, once.
    uint64_t bytes() const { return bytes_; }

  private:
    static constexpr uint64_t kOpBytes = 16;
    std::vector<Op> ops_;
    uint64_t bytes_ = 0;
};

/// Walks rows in the order of their keys (bytewise) within fixed bounds. One thread at a time.
class Cursor {
  public:
    virtual ~Cursor() = default;
    virtual void Seek(std::string_view key) = 0;  // to the first row at or after `key`
    virtual void Next() = 0;                      // REQUIRES: valid()
    virtual bool valid() const = 0;
    virtual std::string_view key() const = 0;    // REQUIRES: valid(); until the next move
    virtual std::string_view value() const = 0;  // REQUIRES: valid(); until the next move
    /// Why valid() is false, if not for the end of the range.
    virtual Status status() const = 0;
    /// valid() is false, status() is ok, and the end was not reached: the last move met more
    /// deleted rows than Range() allowed.
    virtual bool gave_up() const { return false; }
};

/// A consistent view: later commits do not show in it. Any thread, one at a time.
class MetadataView {
  public:
    virtual ~MetadataView() = default;
    virtual Result<std::optional<std::string>> Get(std::string_view key) = 0;
    /// A cursor over keys in [lower, upper), to be placed by Seek. A row that was deleted costs a
    /// step until the store has been compacted, so a cursor that is to find out that there is
    /// nothing needs bounds as close as can be, or gives up after `deleted_most` in one move (0: it
    /// never does).
    virtual std::unique_ptr<Cursor> Range(std::string_view lower, std::string_view upper,
                                          uint64_t deleted_most = 0) = 0;
};

/// The room of a metadata store, in bytes. What it needs for itself is not counted.
struct MetadataSpace {
    static constexpr uint64_t kPlenty = uint64_t{1} << 62;
    uint64_t capacity = kPlenty;  // of rows, with what is free now
    uint64_t free = kPlenty;
    uint64_t owed = kPlenty;  // may still be committed when nothing is free, of earlier changes
};

/// An ordered, transactional key-value store. Calls block; any thread.
class MetadataStore {
  public:
    virtual ~MetadataStore() = default;
    /// Measures. A few system calls, none of which waits for the device.
    virtual MetadataSpace Space() { return {}; }
    /// Nothing is free: what makes rows grow must be refused now, so that commits go on. Follows
    /// Space(), and commits. Costs nothing.
    virtual bool full() const { return false; }
    /// Gives back the room of rows that were deleted. Blocks, perhaps for minutes; ends early when
    /// `cancelled` becomes true.
    virtual void Compact(std::atomic<bool>& cancelled) { (void)cancelled; }
    /// Also what is owed is half used up: only deletions may go on.
    virtual bool exhausted() const { return false; }
    virtual std::unique_ptr<MetadataView> View() = 0;
    /// Applies `batch` as a whole; on success it is durable. After an error nobody knows whether
    /// it will be there after the next open: the caller must not commit again.
    virtual Status Commit(const Batch& batch) = 0;
};

}  // namespace varve::cow
