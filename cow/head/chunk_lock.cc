#include "cow/head/chunk_lock.h"

#include "cow/mutants.h"

namespace varve::cow {
namespace {

bool AreFree(const Chunk& chunk, uint64_t mask) {
    if (Mutated(Mutant::kNoRangeLock)) return true;
    if (Mutated(Mutant::kLockedInPart)) return (chunk.locked & mask) != mask;
    return (chunk.locked & mask) == 0;
}

void TakeBlocks(Chunk& chunk, uint64_t mask) {
    chunk.locked |= mask;
    ++chunk.pins;
}

}  // namespace

bool TryLock(Chunk& chunk, uint64_t mask) {
    if ((chunk.locked & mask) != 0 && !Mutated(Mutant::kNoRangeLock)) return false;
    if (chunk.line && !Mutated(Mutant::kNoRangeLock)) return false;
    TakeBlocks(chunk, mask);
    return true;
}

void Unlock(Chunk& chunk, uint64_t mask) {
    chunk.locked &= ~mask;
    --chunk.pins;
    if (chunk.line) LockWait::HandOver(chunk);
}

LockWait::LockWait(Chunk& chunk, uint64_t mask, Executor& executor, Requester* requester)
    : Waiting(requester, &LockWait::Left), chunk_(chunk), mask_(mask), executor_(executor) {}

void LockWait::await_suspend(std::coroutine_handle<> waiter) {
    handle = waiter;
    LockWait*& first = chunk_.line;
    if (!first) first = before_ = after_ = this;
    if (first == this) return;
    after_ = first;
    before_ = first->before_;
    before_->after_ = this;
    after_->before_ = this;
}

void LockWait::StepOut() {
    before_->after_ = after_;
    after_->before_ = before_;
    if (chunk_.line == this) chunk_.line = after_ == this ? nullptr : after_;
    before_ = after_ = nullptr;
    executor_.Post(this);
}

/// As long as somebody waits, somebody has what the first of them wants.
void LockWait::HandOver(Chunk& chunk) {
    while (chunk.line && AreFree(chunk, chunk.line->mask_)) {
        LockWait& first = *chunk.line;
        TakeBlocks(chunk, first.mask_);
        first.locked_ = true;
        first.StepOut();
    }
}

void LockWait::Left(Requester::Waiting* waiting) {
    auto& self = static_cast<LockWait&>(*waiting);
    if (!self.before_) return;  // it has the lock, and is about to go on
    Chunk& chunk = self.chunk_;
    self.StepOut();
    HandOver(chunk);
}

}  // namespace varve::cow
