#include "base/buffers.h"

#include <cstdlib>

namespace varve {
namespace {

#ifdef VARVE_SANITIZED
constexpr bool kRecycle = false;  // let the sanitizer see every buffer's life
#else
constexpr bool kRecycle = true;
#endif

}  // namespace

BufferPool::~BufferPool() {
    VARVE_CHECK(taken_bytes_ == 0);
    for (Unused* unused : unused_) {
        while (unused) std::free(std::exchange(unused, unused->next));
    }
}

Buffer BufferPool::Take(size_t bytes) {
    VARVE_CHECK(bytes > 0);
    const unsigned size_class = ClassOf(bytes);
    const size_t rounded = kAlignment << size_class;
    std::byte* data = nullptr;
    if (size_class < kClasses && unused_[size_class]) {
        Unused* taken = std::exchange(unused_[size_class], unused_[size_class]->next);
        data = reinterpret_cast<std::byte*>(taken);
        kept_bytes_ -= rounded;
    } else {
        data = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
        if (!data) return Buffer();
    }
    taken_bytes_ += rounded;
    return Buffer(this, data, bytes);
}

void BufferPool::Return(std::byte* data, size_t size) {
    const unsigned size_class = ClassOf(size);
    const size_t rounded = kAlignment << size_class;
    VARVE_CHECK(taken_bytes_ >= rounded);
    taken_bytes_ -= rounded;
    if (!kRecycle || size_class >= kClasses || kept_bytes_ + rounded > kept_bytes_max_) {
        std::free(data);
        return;
    }
    kept_bytes_ += rounded;
    unused_[size_class] = new (data) Unused{unused_[size_class]};
}

}  // namespace varve
