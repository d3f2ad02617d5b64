// Shared: an object that a process and the children it forks afterwards see alike.
#pragma once

#include <sys/mman.h>

#include <new>
#include <type_traits>

#include "base/check.h"

namespace varve::simulation {

/// Children may end in any way meanwhile: what they wrote is there. Nobody is kept from writing at
/// the same time: T uses atomics if several do.
template <typename T>
class Shared {
  public:
    static_assert(std::is_trivially_destructible_v<T>);

    Shared()
        : memory_(::mmap(nullptr, sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                         0)) {
        VARVE_CHECK(memory_ != MAP_FAILED);
        object_ = new (memory_) T;
    }
    Shared(const Shared&) = delete;
    ~Shared() { VARVE_CHECK(::munmap(memory_, sizeof(T)) == 0); }

    T& operator*() { return *object_; }
    T* operator->() { return object_; }

  private:
    void* const memory_;
    T* object_ = nullptr;
};

}  // namespace varve::simulation
