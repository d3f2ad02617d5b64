// varve-fill-map: makes a pool with one disk whose map is full, without writing the disk's data.
// For measuring and testing large maps: the rows are those that the engine would have written, so
// `varve check --pool` finds the pool clean; the data file is sparse, so reads give zeros.
// Not a way to make a pool for use.
//
//   varve-fill-map POOL DISK SIZE in-order|at-random
// at-random: neighbouring blocks of the disk lie far apart in the data file, so that each chunk has
// a run for each of its blocks, as after random writes.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <string>

#include "base/units.h"
#include "cow/format/runs.h"
#include "cow/history/catalog.h"
#include "cow/pool/pool.h"
#include "cow/pool/pool_directory.h"
#include "cow/space/allocator.h"

namespace {

using namespace varve;
using namespace varve::cow;

/// Rows in one commit.
constexpr uint64_t kTogether = 4096;

/// Numbers below `count`, each once, in an order that looks random. The same on every run.
class Permutation {
  public:
    explicit Permutation(uint64_t count)
        : count_(count), bits_(std::bit_width(std::max<uint64_t>(count - 1, 1))) {}

    uint64_t operator()(uint64_t i) const {
        do i = Mix(i);
        while (i >= count_);  // a bijection of the next power of two: walk on until inside
        return i;
    }

  private:
    uint64_t Mix(uint64_t x) const {
        const uint64_t mask = ~uint64_t{0} >> (64 - bits_);
        const unsigned half = (bits_ + 1) / 2;
        for (const uint64_t odd : {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu}) {
            x = (x ^ x >> half) * odd & mask;
        }
        return x ^ x >> half;
    }

    const uint64_t count_;
    const unsigned bits_;
};

/// Gathers puts into commits of bounded size.
class Rows {
  public:
    explicit Rows(MetadataStore& store) : store_(store) {}

    Status Put(std::string key, std::string value) {
        batch_.Put(std::move(key), std::move(value));
        return batch_.ops().size() < kTogether ? Status() : Commit();
    }
    Status Commit() {
        const Batch batch = std::exchange(batch_, Batch());
        return batch.empty() ? Status() : store_.Commit(batch);
    }

  private:
    MetadataStore& store_;
    Batch batch_;
};

struct Filling {
    uint64_t blocks = 0;
    bool at_random = false;
    BranchId branch;
    Generation generation;
};

/// The state of one chunk. Block 0 of the data file is the superblock.
Runs RunsOf(const Filling& filling, const Permutation& places, uint64_t chunk) {
    Runs runs;
    const uint64_t first = chunk * kChunkBlocks;
    const uint64_t count = std::min(kChunkBlocks, filling.blocks - first);
    for (uint64_t i = 0; i < count; ++i) {
        const uint64_t place = 1 + (filling.at_random ? places(first + i) : first + i);
        Map(runs, Run{.place = place, .first = i, .count = 1, .birth = filling.generation},
            nullptr);
    }
    return runs;
}

/// Map rows first and their marks afterwards, so that RocksDB's tables come in the order of keys.
Status PutMap(MetadataStore& store, const Filling& filling) {
    const Permutation places(filling.blocks);
    const uint64_t chunks = (filling.blocks + kChunkBlocks - 1) / kChunkBlocks;
    Rows rows(store);
    for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
        const Status s = rows.Put(MapKey(filling.branch, ChunkIndex{chunk}, filling.generation),
                                  EncodeRuns(RunsOf(filling, places, chunk), filling.generation));
        if (!s.ok()) return s;
        if (chunk % (chunks / 10 + 1) == 0) {
            fmt::print(stderr, "varve-fill-map: {} of {} rows\n", chunk, chunks);
        }
    }
    for (uint64_t chunk = 0; chunk < chunks; ++chunk) {
        const Status s =
            rows.Put(TouchedKey(filling.branch, filling.generation, ChunkIndex{chunk}), "");
        if (!s.ok()) return s;
    }
    return rows.Commit();
}

/// Takes `blocks` blocks for the disk, from the front of the data file.
Status PutRegions(Allocator& allocator, uint64_t blocks, MetadataStore& store) {
    while (blocks > 0) {
        allocator.AddRegion();
        for (Extent extent : allocator.Take(*allocator.FindReady(), kRegionBlocks)) {
            const uint64_t taken = std::min(extent.count, blocks);
            if (const Status s = allocator.MarkUsed({extent.place, taken}); !s.ok()) return s;
            blocks -= taken;
            extent = {extent.place + taken, extent.count - taken};
            if (extent.count > 0) allocator.Release(extent);
        }
        Batch batch;
        allocator.Encode(batch);
        if (const Status s = store.Commit(batch); !s.ok()) return s;
    }
    return Status();
}

Status Fill(PoolDirectory& pool, const std::string& name, uint64_t size, bool at_random) {
    MetadataStore& store = pool.metadata();
    Result<Catalog> loaded = Catalog::Load(*store.View());
    if (!loaded.ok()) return loaded.error();
    Catalog& catalog = loaded.value();
    Batch batch;
    Filling filling;
    filling.blocks = size / kBlockBytes;
    filling.at_random = at_random;
    filling.branch = catalog.AddBranch(BranchId{}, Generation{}, batch);
    filling.generation = Generation{catalog.NextId()};
    if (const Status s = PutMap(store, filling); !s.ok()) return s;

    Allocator allocator(store, pool.space(), catalog.mutable_pool(), 0);
    if (const Status s = PutRegions(allocator, filling.blocks, store); !s.ok()) return s;
    const uint64_t bytes = catalog.pool().region_count * kRegionBytes;
    if (::ftruncate(pool.data_fd(), static_cast<off_t>(bytes)) != 0) {
        return SystemError(errno, fmt::format("cannot extend {}", pool.data_path()));
    }
    DiskRecord disk;
    disk.name = name;
    disk.size = size;
    disk.branch = filling.branch;
    disk.generation = filling.generation;
    disk.mapped_blocks = filling.blocks;
    catalog.AddDisk(std::move(disk), batch);
    catalog.PutPool(batch);
    return store.Commit(batch);
}

Status Main(const std::string& directory, const std::string& name, const std::string& size_text,
            const std::string& order) {
    const Result<uint64_t> size = ParseSize(size_text);
    if (!size.ok()) return size.error();
    const bool sound = size.value() > 0 && size.value() % kBlockBytes == 0 && IsValidName(name) &&
                       (order == "in-order" || order == "at-random");
    if (!sound) {
        return MakeError(ErrorKind::kInvalid,
                         "give POOL DISK SIZE in-order|at-random; the size is "
                         "a multiple of 4096");
    }
    PoolDirectoryOptions options;
    options.path = directory;
    options.direct = false;
    const Result<std::unique_ptr<PoolDirectory>> pool = PoolDirectory::Open(options);
    if (!pool.ok()) return pool.error();
    if (!pool.value()->created()) {
        return MakeError(ErrorKind::kExists, fmt::format("{} is a pool already", directory));
    }
    return Fill(*pool.value(), name, size.value(), order == "at-random");
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) {
        fmt::print(stderr, "varve-fill-map: give POOL DISK SIZE in-order|at-random\n");
        return 2;
    }
    const Status s = Main(argv[1], argv[2], argv[3], argv[4]);
    if (s.ok()) return 0;
    fmt::print(stderr, "varve-fill-map: {}\n", s.error().message);
    return 1;
}
