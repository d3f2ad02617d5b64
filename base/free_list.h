// FreeList: objects that nobody needs now, for whoever needs one next.
// Not for memory of any size: that is buffers.h.
#pragma once

#include <utility>

namespace varve {

/// Keeps at most `kMost`, linked by their `next`. One thread.
template <typename T, unsigned kMost>
class FreeList {
  public:
    FreeList() = default;
    FreeList(const FreeList&) = delete;
    ~FreeList() {
        while (head_) delete std::exchange(head_, head_->next);
    }

    /// As it was returned, or a new one.
    T* Take() {
        if (!head_) return new T;
        --count_;
        return std::exchange(head_, head_->next);
    }
    void Return(T* object) {
        if (count_ == kMost) {
            delete object;
            return;
        }
        ++count_;
        object->next = std::exchange(head_, object);
    }

  private:
    T* head_ = nullptr;
    unsigned count_ = 0;
};

}  // namespace varve
