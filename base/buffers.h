// BufferPool: memory aligned to 4096 bytes for transfers, recycled by size class.
// Not thread-safe, and not a limit: who takes buffers counts what it holds.
//
// Buffers are cut out of slabs of one class each, side by side: out of the heap, one of 4 KiB takes
// 8, as the next aligned place is behind its header, and places that come free between others do
// not fit again. What is unused and not kept goes back to the system, page by page, so the memory
// that is resident is that of the buffers and at most `kept_bytes_max`.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <list>
#include <span>
#include <utility>

#include "base/check.h"

namespace varve {

class BufferPool;

namespace internal {

/// Up to 64 pieces of memory of one size class, each a bit.
struct BufferSlab {
    BufferPool* pool = nullptr;
    std::byte* memory = nullptr;
    unsigned size_class = 0;
    uint64_t unused = 0;  // pieces that nobody has
    uint64_t kept = 0;    // those of them whose memory has not been given to the system
    std::list<BufferSlab>::iterator place;
};

}  // namespace internal

/// Memory out of a pool, given back on destruction. Empty if none was taken.
class Buffer {
  public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept
        : slab_(other.slab_),
          data_(std::exchange(other.data_, nullptr)),
          size_(std::exchange(other.size_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        if (this != &other) {
            Release();
            slab_ = other.slab_;
            data_ = std::exchange(other.data_, nullptr);
            size_ = std::exchange(other.size_, 0);
        }
        return *this;
    }
    ~Buffer() { Release(); }

    void Release();
    explicit operator bool() const { return data_ != nullptr; }
    std::byte* data() const { return data_; }  // aligned to 4096 bytes
    size_t size() const { return size_; }      // as asked for
    std::span<std::byte> span() const { return {data_, size_}; }

  private:
    friend class BufferPool;
    Buffer(internal::BufferSlab* slab, std::byte* data, size_t size)
        : slab_(slab), data_(data), size_(size) {}

    internal::BufferSlab* slab_ = nullptr;
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

class BufferPool {
  public:
    static constexpr size_t kAlignment = 4096;

    /// Keeps at most `kept_bytes_max` bytes of unused memory for later.
    explicit BufferPool(size_t kept_bytes_max) : kept_bytes_max_(kept_bytes_max) {}
    BufferPool(const BufferPool&) = delete;
    /// REQUIRES: every buffer is back.
    ~BufferPool();

    /// Bytes of memory that a buffer of `bytes` > 0 takes.
    static size_t Rounded(size_t bytes) { return kAlignment << ClassOf(bytes); }

    /// `bytes` > 0 of memory with unspecified content; an empty Buffer if the system has none.
    Buffer Take(size_t bytes);

    size_t kept_bytes() const { return kept_bytes_; }
    size_t taken_bytes() const { return taken_bytes_; }  // rounded up to size classes

  private:
    friend class Buffer;
    using Slab = internal::BufferSlab;

    // Classes are powers of two from 4 KiB on.
    static constexpr unsigned kClasses = 52;
    static unsigned ClassOf(size_t bytes) {
        if (bytes <= kAlignment) return 0;
        return static_cast<unsigned>(std::bit_width(bytes - 1)) - 12;
    }

    struct Class {
        std::list<Slab> ready;   // with kept pieces
        std::list<Slab> others;  // those with unused pieces first
        size_t kept_bytes = 0;
    };
    Slab* SlabToTakeFrom(unsigned size_class);
    void Return(Slab& slab, std::byte* data);
    void SetKept(Slab& slab, uint64_t pieces);
    bool MakeRoom(size_t bytes);
    void GiveToSystem(Slab& slab, uint64_t pieces);

    const size_t kept_bytes_max_;
    size_t kept_bytes_ = 0;
    size_t taken_bytes_ = 0;
    std::array<Class, kClasses> classes_;
};

inline void Buffer::Release() {
    if (data_) slab_->pool->Return(*slab_, std::exchange(data_, nullptr));
    size_ = 0;
}

}  // namespace varve
