#include "base/task.h"

#include <array>
#include <new>

namespace varve {
namespace {

#ifdef VARVE_SANITIZED
constexpr bool kRecycle = false;  // let the sanitizer see every frame's life
#else
constexpr bool kRecycle = true;
#endif

constexpr size_t kClassBytes = 128;
constexpr size_t kClasses = 32;     // frames up to 4 KiB
constexpr unsigned kKeptMax = 512;  // frames kept for each class and thread

struct FreeFrames {
    struct Node {
        Node* next;
    };
    struct List {
        Node* head = nullptr;
        unsigned count = 0;
    };
    std::array<List, kClasses> lists;

    ~FreeFrames() {
        for (List& list : lists) {
            while (list.head) ::operator delete(std::exchange(list.head, list.head->next));
        }
    }
};

thread_local FreeFrames free_frames;

size_t ClassOf(size_t bytes) {
    return (bytes - 1) / kClassBytes;
}

}  // namespace

#ifdef __clang__
const char* internal::ThreadMark() {
    thread_local char mark;
    return &mark;
}
#endif

void* AllocateFrame(size_t bytes) {
    const size_t size_class = ClassOf(bytes);
    if (!kRecycle || size_class >= kClasses) return ::operator new(bytes);
    FreeFrames::List& list = free_frames.lists[size_class];
    if (!list.head) return ::operator new((size_class + 1) * kClassBytes);
    --list.count;
    return std::exchange(list.head, list.head->next);
}

void FreeFrame(void* frame, size_t bytes) {
    const size_t size_class = ClassOf(bytes);
    if (!kRecycle || size_class >= kClasses) return ::operator delete(frame);
    FreeFrames::List& list = free_frames.lists[size_class];
    if (list.count >= kKeptMax) return ::operator delete(frame);
    ++list.count;
    list.head = new (frame) FreeFrames::Node{list.head};
}

}  // namespace varve
