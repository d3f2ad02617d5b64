// Locks on blocks of a chunk: whoever changes them has them for itself, first come first served.
// Not for reads, which need none.
//
// Who cannot have its blocks at once gets in line at the chunk, and nobody passes it, not even for
// other blocks: a request for the whole chunk waits for those before it only. Whoever gives blocks
// back hands them to the head of the line, so a waiter is woken once, when it has what it wants.
#pragma once

#include "cow/volume/chunk_cache.h"
#include "cow/volume/requester.h"

namespace varve::cow {

/// Locks the blocks of `mask` if they are free and nobody waits. The chunk is pinned then.
bool TryLock(Chunk& chunk, uint64_t mask);
/// Gives them back. The chunk may be evicted afterwards.
void Unlock(Chunk& chunk, uint64_t mask);

/// `co_await` gives true once the blocks are locked, false if the requester has left meanwhile.
/// REQUIRES: TryLock() has just failed.
class LockWait : private Requester::Waiting, private Resumption {
  public:
    /// On `executor`, the chunk's lane. The requester may be null.
    LockWait(Chunk& chunk, uint64_t mask, Executor& executor, Requester* requester);

    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> waiter);
    bool await_resume() const noexcept { return locked_; }

  private:
    friend void Unlock(Chunk& chunk, uint64_t mask);
    static void HandOver(Chunk& chunk);
    static void Left(Requester::Waiting* waiting);
    void StepOut();

    Chunk& chunk_;
    const uint64_t mask_;
    Executor& executor_;
    bool locked_ = false;
    LockWait* before_ = nullptr;  // in the line, which is a ring; null: not in it
    LockWait* after_ = nullptr;
};

}  // namespace varve::cow
