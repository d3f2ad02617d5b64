// Mutants: deliberate bugs, to prove that the simulation finds what it claims to find.
// Not in the product: there Mutated() is a constant false, and nothing of this is compiled in.
//
// The engine is built once more with VARVE_MUTANTS for tests/mutants/, whose table says what each
// of them breaks. A hook is part of one line, at the place where the bug could have been written.
#pragma once

#include <cstdint>

namespace varve::cow {

enum class Mutant {
    kNone,
    // What was flushed survives
    kFlushAnsweredBeforeSync,
    kFlushJoinsRunningSync,
    kRowsBeforeData,
    kNeverSynced,
    kInPlaceWriteNotSynced,
    kWritesDuringSyncForgotten,
    kFailedSyncIgnored,
    kTrimNotDurable,
    kBitsAfterRows,
    kFreedBitNotStored,
    // A disk holds what was written to it
    kMappedBeforeWritten,
    kFailedWriteMapped,
    kNoRangeLock,
    kLockedInPart,
    kGoneWorkGoesOn,
    kPartOfBlockLosesRest,
    kZeroesMissTheEdges,
    kLastRunLost,
    kStaleRowsLoaded,
    kReusedBeforeCommit,
    kReusedDuringRead,
    kShrinkKeepsData,
    kShrinkNotResumed,
    // A snapshot is one moment and never changes
    kHeldBlockOverwritten,
    kFreezeWithoutDraining,
    kLateWriteMissesSeal,
    kRoundDuringCut,
    kCutWithoutHold,
    // The journal
    kDeletedUnfolded,
    kOpenedUnfolded,
    kJournalForgottenEarly,
    kJournalOutOfOrder,
    kSealNotSynced,
    kRegionsNotKnown,
    kAnsweredUnwritten,
    kYoungOverwritten,
    kReleasedUnsynced,
    kReaderStopsEarly,
    kTailUnverified,
    kAnnouncedSynced,
    kFoldedBeforeWritten,
    kNewGenerationLost,
    // Branches
    kWrongVersionAtFork,
    kRestoreKeepsWrites,
    kRestoreKeepsMap,
    kCloneKeepsGeneration,
    // Deleting gives back what only the snapshot held
    kHeadFreesHeldBlock,
    kSweepFreesVisible,
    kSweepIgnoresFloor,
    kSweepForgetsInherited,
    kChangedNotToldOf,
    kNoteForgotten,
    kDeletionNotResumed,
    kNotesSkipped,
    kFlattenedEarly,
    kFlattenNotResumed,
    kFlattenLeavesRows,
    // Damage is noticed, and nothing else is taken for it
    kSumOfAnotherBirth,
    kSumOfUnsealed,
    kHeadReadsUnverified,
    kDamageLaundered,
    kSumsStayUnknown,
    kSummedTooEarly,
};

#ifdef VARVE_MUTANTS
/// Switched on before the engine is started, by the one thread there is.
inline Mutant present_mutant = Mutant::kNone;
inline bool Mutated(Mutant mutant) {
    return mutant == present_mutant;
}
#else
constexpr bool Mutated(Mutant) {
    return false;
}
#endif

/// kReusedBeforeCommit: what a round is about to forget goes back into the disk's own lease.
template <typename Commit, typename Lease>
void ReuseDropped(const Commit& commit, Lease* lease, uint64_t* lease_blocks) {
    for (const auto& row : commit.rows) {
        for (const auto& run : row.dropped) {
            if (run.birth != commit.generation) continue;
            lease->push_front({run.place, run.count});
            *lease_blocks += run.count;
        }
    }
}

}  // namespace varve::cow
