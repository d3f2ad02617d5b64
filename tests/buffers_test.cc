// BufferPool: what it gives is aligned and nobody else's, and what is resident is what it says.
#include "base/buffers.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>
#include <vector>

#include "base/free_list.h"

namespace varve {
namespace {

constexpr size_t kKiB = 1 << 10, kMiB = 1 << 20;

TEST(BufferPool, GivesAlignedMemoryAndKeepsABoundedAmount) {
    BufferPool pool(64 << 10);
    {
        std::vector<Buffer> buffers;
        for (const size_t bytes : {1u, 4096u, 4097u, 65536u, 1u << 20, 33u << 20}) {
            buffers.push_back(pool.Take(bytes));
            ASSERT_TRUE(buffers.back());
            EXPECT_EQ(reinterpret_cast<uintptr_t>(buffers.back().data()) % 4096, 0u);
            EXPECT_EQ(buffers.back().size(), bytes);
            buffers.back().data()[bytes - 1] = std::byte{1};
        }
        EXPECT_GE(pool.taken_bytes(), size_t{34} << 20);
    }
    EXPECT_EQ(pool.taken_bytes(), 0u);
    EXPECT_LE(pool.kept_bytes(), size_t{64} << 10);
}

/// Any order of taking and returning, with much kept, little or nothing: no two buffers share a
/// byte, and the counts are right.
TEST(BufferPool, EachBufferIsItsOwnersAlone) {
    const uint32_t seed = std::random_device()();
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937 random(seed);
    for (const size_t kept : {size_t{0}, 64 * kKiB, 16 * kMiB}) {
        BufferPool pool(kept);
        struct Owned {
            Buffer buffer;
            std::byte mark;
        };
        std::vector<Owned> owned;
        size_t taken = 0;
        for (int step = 0; step < 8'000; ++step) {
            const bool grow = (step / 1000) % 2 == 0;
            if (owned.empty() || random() % 8 < (grow ? 5 : 3)) {
                const size_t bytes = 1 + random() % (4 * kKiB << random() % 9);
                const auto mark = static_cast<std::byte>(random());
                owned.push_back({pool.Take(bytes), mark});
                ASSERT_TRUE(owned.back().buffer);
                taken += BufferPool::Rounded(bytes);
                const std::span<std::byte> all = owned.back().buffer.span();
                for (size_t i = 0; i < all.size(); i += 500) all[i] = mark;
            } else {
                std::swap(owned[random() % owned.size()], owned.back());
                const std::span<std::byte> all = owned.back().buffer.span();
                for (size_t i = 0; i < all.size(); i += 500) ASSERT_EQ(all[i], owned.back().mark);
                taken -= BufferPool::Rounded(all.size());
                owned.pop_back();
            }
            ASSERT_EQ(pool.taken_bytes(), taken);
            ASSERT_LE(pool.kept_bytes(), kept);
        }
    }
}

TEST(FreeListTest, KeepsSoManyAndGivesThemAgain) {
    static int alive = 0;
    struct Counted {
        Counted() { ++alive; }
        ~Counted() { --alive; }
        Counted* next = nullptr;
    };
    {
        FreeList<Counted, 3> list;
        std::vector<Counted*> taken;
        for (int i = 0; i < 10; ++i) taken.push_back(list.Take());
        EXPECT_EQ(alive, 10);
        for (Counted* one : taken) list.Return(one);
        EXPECT_EQ(alive, 3);
        for (int i = 0; i < 4; ++i) taken[static_cast<size_t>(i)] = list.Take();
        EXPECT_EQ(alive, 4);
        for (int i = 0; i < 4; ++i) list.Return(taken[static_cast<size_t>(i)]);
    }
    EXPECT_EQ(alive, 0);
}

#ifndef VARVE_SANITIZED  // a sanitizer's memory is its own

TEST(BufferPool, HasNoBufferOfASizeThatNoMachineHas) {
    BufferPool pool(kMiB);
    EXPECT_FALSE(pool.Take(size_t{1} << 60));
    EXPECT_FALSE(pool.Take(~size_t{0}));
}

size_t ResidentBytes() {
    size_t all = 0, resident = 0;
    std::ifstream("/proc/self/statm") >> all >> resident;
    return resident * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

std::vector<Buffer> TakeAndTouch(BufferPool& pool, size_t count, size_t bytes) {
    std::vector<Buffer> buffers;
    for (size_t i = 0; i < count; ++i) {
        buffers.push_back(pool.Take(bytes));
        std::memset(buffers.back().data(), 1, bytes);
    }
    return buffers;
}

/// Out of the heap they took twice that, as did the server's 20,000 reads of one block.
TEST(BufferPool, SmallBuffersTakeNoMoreMemoryThanTheirSize) {
    BufferPool pool(0);
    const size_t before = ResidentBytes();
    const std::vector<Buffer> buffers = TakeAndTouch(pool, 16384, 4096);
    EXPECT_LE(ResidentBytes() - before, 66 * kMiB);
}

TEST(BufferPool, WhatIsNotKeptLeavesTheProcessThoughOthersAroundItAreStillTaken) {
    BufferPool pool(4 * kMiB);
    const size_t before = ResidentBytes();
    std::vector<Buffer> buffers = TakeAndTouch(pool, 16384, 4096);
    for (size_t i = 0; i < buffers.size(); ++i) {
        if (i % 64 != 0) buffers[i].Release();
    }
    EXPECT_LE(ResidentBytes() - before, 7 * kMiB);
    std::vector<Buffer> large = TakeAndTouch(pool, 4, 8 * kMiB);
    EXPECT_LE(ResidentBytes() - before, 40 * kMiB);
}

TEST(BufferPool, KeepsWhatIsAskedForNowNotWhatOnceWas) {
    BufferPool pool(8 * kMiB);
    TakeAndTouch(pool, 4096, 4096);
    EXPECT_EQ(pool.kept_bytes(), 8 * kMiB);
    TakeAndTouch(pool, 4, kMiB);
    const std::byte* const last = pool.Take(kMiB).data();
    EXPECT_EQ(pool.kept_bytes(), 8 * kMiB);
    const Buffer again = pool.Take(kMiB);
    EXPECT_EQ(again.data(), last);
    EXPECT_EQ(pool.kept_bytes(), 7 * kMiB) << "it was kept";
}

#endif

}  // namespace
}  // namespace varve
