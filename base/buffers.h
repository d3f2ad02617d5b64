// BufferPool: memory aligned to 4096 bytes for transfers, recycled by size class.
// Not thread-safe, and not a limit: who takes buffers counts what it holds.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "base/check.h"

namespace varve {

class BufferPool;

/// Memory out of a pool, given back on destruction. Empty if none was taken.
class Buffer {
  public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept
        : pool_(other.pool_),
          data_(std::exchange(other.data_, nullptr)),
          size_(std::exchange(other.size_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        if (this != &other) {
            Release();
            pool_ = other.pool_;
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
    Buffer(BufferPool* pool, std::byte* data, size_t size)
        : pool_(pool), data_(data), size_(size) {}

    BufferPool* pool_ = nullptr;
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
    struct Unused {
        Unused* next;
    };
    // Classes are powers of two from 4 KiB to 64 MiB; larger buffers are not kept.
    static constexpr unsigned kClasses = 15;
    static unsigned ClassOf(size_t bytes) {
        if (bytes <= kAlignment) return 0;
        return static_cast<unsigned>(std::bit_width(bytes - 1)) - 12;
    }
    void Return(std::byte* data, size_t size);

    const size_t kept_bytes_max_;
    size_t kept_bytes_ = 0;
    size_t taken_bytes_ = 0;
    std::array<Unused*, kClasses> unused_{};
};

inline void Buffer::Release() {
    if (data_) pool_->Return(std::exchange(data_, nullptr), std::exchange(size_, 0));
}

}  // namespace varve
