// Environment: what an open pool runs on - threads, stores and clocks, all of them the caller's.
// Not settings of the pool: those are pool/pool.h's PoolOptions.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "base/clock.h"
#include "base/executor.h"
#include "cow/store/stores.h"

namespace varve::cow {

/// A data-plane thread as the engine sees it.
struct Lane {
    Executor* executor = nullptr;
    BlockStore* blocks = nullptr;  // bound to `executor`
};

/// What the engine runs on. All of it outlives the pool.
struct Environment {
    Executor* home = nullptr;  // one thread, which never waits for the device: catalog, allocator
    Executor* committer = nullptr;  // one thread; blocks as long as a commit takes
    Executor* loader = nullptr;     // may block, may be several threads: map rows are read here
    Executor* auditor = nullptr;    // may block for long: checks, and figures that need many rows
    std::vector<Lane> lanes;        // at least one
    SpaceStore* space = nullptr;
    MetadataStore* metadata = nullptr;
    std::function<int64_t()> now_ms;   // wall clock, milliseconds since 1970
    std::function<uint64_t()> random;  // numbers that are never drawn twice
    Clock* clock = nullptr;            // to pace background work by; without it nothing is paced
};

}  // namespace varve::cow
