// Core: what the parts of an open pool share - its environment and its failure.
// Not the pool itself: no commands here; nor its lanes' state, which is volume/lane.h.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <string>

#include "cow/core/environment.h"
#include "cow/core/pacer.h"
#include "cow/core/waits.h"
#include "cow/format/types.h"

namespace varve::cow {

struct Core {
    explicit Core(Environment env) : environment(std::move(env)) {}

    Environment environment;

    Executor& home() { return *environment.home; }
    Executor& committer() { return *environment.committer; }
    Executor& loader() { return *environment.loader; }
    Executor& auditor() { return *environment.auditor; }
    MetadataStore& metadata() { return *environment.metadata; }

    /// Set when data or metadata could not be made durable: from then on nobody knows what the
    /// disk holds of the latest writes, so writes and flushes are refused until a restart, and
    /// nothing is retried. Any thread.
    std::atomic<bool> failed = false;
    void Fail(const std::string& reason);
    /// Called after the first failure. Set before there can be one.
    std::function<void()> on_failure;
    std::string failure();

    /// Bytes of metadata that each lane's heads may still have to commit for what was answered.
    /// Written once, before there are any.
    uint64_t owed_by_lane = MetadataSpace::kPlenty;

    /// Recovery is over. Before, whoever opens the pool tells the failure.
    bool opened = false;

    /// The pool is closing: long work ends early, to be taken up at the next start. Any thread.
    std::atomic<bool> closing = false;

    /// Of all background work. On home.
    Pacer pacer{environment.clock, *environment.home, closing};

    /// What is waited for. Any thread.
    Waits waits{environment.clock};

    /// The frozen block at `place`, born in `birth`, does not hold what it held: logged once, with
    /// `what`, and counted. Any thread.
    void FoundDamage(uint64_t place, Generation birth, const std::string& what);
    /// Blocks found damaged since the start.
    uint64_t damaged_blocks();

  private:
    std::mutex failure_mutex_;
    std::string failure_;
    std::mutex damage_mutex_;
    std::set<std::pair<uint64_t, Generation>> damage_;  // at most kDamageMax of them
    uint64_t damaged_blocks_ = 0;
};

}  // namespace varve::cow
