#include "base/buffers.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

namespace varve {
namespace {

#ifdef VARVE_SANITIZED
constexpr bool kRecycle = false;  // let the sanitizer see every buffer's life
#else
constexpr bool kRecycle = true;
#endif

// Small enough that one with a single buffer left wastes few addresses.
constexpr size_t kSlabBytes = 1 << 20;
constexpr unsigned kPiecesMax = 64;

constexpr size_t PieceBytes(unsigned size_class) {
    return BufferPool::kAlignment << size_class;
}

/// Of one slab.
constexpr unsigned Pieces(unsigned size_class) {
    if (!kRecycle) return 1;
    return static_cast<unsigned>(
        std::clamp<size_t>(kSlabBytes / PieceBytes(size_class), 1, kPiecesMax));
}

constexpr size_t SlabBytes(unsigned size_class) {
    return PieceBytes(size_class) * Pieces(size_class);
}

constexpr uint64_t AllPieces(unsigned size_class) {
    return ~uint64_t{0} >> (kPiecesMax - Pieces(size_class));
}

std::byte* GetMemory(size_t bytes) {
    if (!kRecycle) {
        return static_cast<std::byte*>(std::aligned_alloc(BufferPool::kAlignment, bytes));
    }
    void* const memory =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    // A huge page would make buffers resident that nobody has taken.
    if (bytes <= kSlabBytes) madvise(memory, bytes, MADV_NOHUGEPAGE);
    return static_cast<std::byte*>(memory);
}

void FreeMemory(std::byte* memory, size_t bytes) {
    if (!kRecycle) return std::free(memory);
    if (munmap(memory, bytes) == 0) return;
    // The process has too many mappings to cut one in two: the addresses are lost.
    madvise(memory, bytes, MADV_DONTNEED);
}

}  // namespace

BufferPool::~BufferPool() {
    VARVE_CHECK(taken_bytes_ == 0);
    for (Class& own : classes_) {
        own.others.splice(own.others.end(), own.ready);
        for (const Slab& slab : own.others) FreeMemory(slab.memory, SlabBytes(slab.size_class));
    }
}

/// One with an unused piece, best one that is kept. Null: the system has no memory.
BufferPool::Slab* BufferPool::SlabToTakeFrom(unsigned size_class) {
    Class& own = classes_[size_class];
    if (!own.ready.empty()) return &own.ready.front();
    if (!own.others.empty() && own.others.front().unused != 0) return &own.others.front();
    std::byte* const memory = GetMemory(SlabBytes(size_class));
    if (!memory) return nullptr;
    Slab& slab = own.others.emplace_front();
    slab = {this, memory, size_class, AllPieces(size_class), 0, own.others.begin()};
    return &slab;
}

Buffer BufferPool::Take(size_t bytes) {
    VARVE_CHECK(bytes > 0);
    const unsigned size_class = ClassOf(bytes);
    Slab* const slab = size_class < kClasses ? SlabToTakeFrom(size_class) : nullptr;
    if (!slab) return Buffer();
    const uint64_t candidates = slab->kept ? slab->kept : slab->unused;
    const uint64_t piece = candidates & -candidates;
    slab->unused &= ~piece;
    if (slab->kept) {
        SetKept(*slab, slab->kept & ~piece);
    } else if (slab->unused == 0) {
        std::list<Slab>& others = classes_[size_class].others;
        others.splice(others.end(), others, slab->place);
    }
    taken_bytes_ += PieceBytes(size_class);
    const auto index = static_cast<size_t>(std::countr_zero(piece));
    return Buffer(slab, slab->memory + index * PieceBytes(size_class), bytes);
}

void BufferPool::Return(Slab& slab, std::byte* data) {
    const size_t bytes = PieceBytes(slab.size_class);
    VARVE_CHECK(taken_bytes_ >= bytes);
    const uint64_t piece = uint64_t{1} << (static_cast<size_t>(data - slab.memory) / bytes);
    // While the piece counts as taken its slab stays, whatever makes room.
    const bool keep = kRecycle && MakeRoom(bytes);
    taken_bytes_ -= bytes;
    slab.unused |= piece;
    if (keep) {
        SetKept(slab, slab.kept | piece);
    } else {
        GiveToSystem(slab, piece);
    }
}

/// `pieces` are kept from now on, in place of those that were.
void BufferPool::SetKept(Slab& slab, uint64_t pieces) {
    Class& own = classes_[slab.size_class];
    const size_t before = static_cast<size_t>(std::popcount(slab.kept));
    const size_t after = static_cast<size_t>(std::popcount(pieces));
    const size_t change = (after - before) * PieceBytes(slab.size_class);  // modulo 2^64
    own.kept_bytes += change;
    kept_bytes_ += change;
    slab.kept = pieces;
    if ((before == 0) == (after == 0)) return;
    std::list<Slab>& from = after == 0 ? own.ready : own.others;
    std::list<Slab>& to = after == 0 ? own.others : own.ready;
    const bool last = after == 0 && slab.unused == 0;
    to.splice(last ? to.end() : to.begin(), from, slab.place);
}

/// Gives kept memory to the system until `bytes` more can be kept: of the class that has most, as
/// loads change. False: they never can.
bool BufferPool::MakeRoom(size_t bytes) {
    if (bytes > kept_bytes_max_) return false;
    while (kept_bytes_ + bytes > kept_bytes_max_) {
        const auto most = std::max_element(
            classes_.begin(), classes_.end(),
            [](const Class& a, const Class& b) { return a.kept_bytes < b.kept_bytes; });
        Slab& slab = most->ready.back();
        GiveToSystem(slab, slab.kept);
    }
    return true;
}

/// `pieces` are unused. A slab of which nobody has any goes as a whole.
void BufferPool::GiveToSystem(Slab& slab, uint64_t pieces) {
    SetKept(slab, slab.kept & ~pieces);
    std::list<Slab>& others = classes_[slab.size_class].others;
    if (slab.unused == AllPieces(slab.size_class)) {
        SetKept(slab, 0);
        FreeMemory(slab.memory, SlabBytes(slab.size_class));
        others.erase(slab.place);
        return;
    }
    if (slab.kept == 0) others.splice(others.begin(), others, slab.place);
    const size_t bytes = PieceBytes(slab.size_class);
    while (pieces) {
        const int first = std::countr_zero(pieces);
        const int count = std::countr_one(pieces >> first);
        madvise(slab.memory + static_cast<size_t>(first) * bytes,
                static_cast<size_t>(count) * bytes, MADV_DONTNEED);
        if (first + count >= 64) return;
        pieces &= ~uint64_t{0} << (first + count);
    }
}

}  // namespace varve
