// The mutants, and within how many seeds the simulation must find each of them.
// VARVE_MUTANT=name hunts one; VARVE_SEEDS=n runs n seeds of each, to see how many find it.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <string_view>

#include "tests/mutants/hunt.h"
#include "tests/simulation/explore.h"
#include "tests/simulation/shrink.h"

namespace varve::simulation {
namespace {

using cow::Mutant;

/// Processes at a time.
constexpr unsigned kTogether = 2;

enum class Devices { kSound, kFaulty };

struct Entry {
    Mutant mutant;
    const char* name;
    const char* bug;
    uint64_t seeds;  // within which it must be found
    Devices devices = Devices::kSound;
};

constexpr Entry kEntries[] = {
    // What was flushed survives
    {Mutant::kFlushAnsweredBeforeSync, "flush-before-sync",
     "a flush is answered when its sync begins", 20},
    {Mutant::kFlushJoinsRunningSync, "flush-joins-sync",
     "a flush is answered by the sync that runs already", 50},
    {Mutant::kRowsBeforeData, "rows-before-data", "rows are committed before the data is synced",
     80},
    {Mutant::kNeverSynced, "never-synced", "the data file is not synced at all", 20},
    {Mutant::kInPlaceWriteNotSynced, "in-place-not-synced",
     "a flush after an overwrite in place does not sync", 20},
    {Mutant::kWritesDuringSyncForgotten, "sync-forgets-writes",
     "a write that ends during a sync counts as synced", 80},
    {Mutant::kFailedSyncIgnored, "failed-sync-ignored",
     "a flush is answered though its sync failed", 20, Devices::kFaulty},
    {Mutant::kTrimNotDurable, "trim-not-durable", "a trim changes the map in memory only", 20},
    {Mutant::kBitsAfterRows, "bits-after-rows",
     "rows and allocator bits are committed one after the other", 50},
    {Mutant::kFreedBitNotStored, "freed-bit-kept", "the bit of a freed block is not stored", 20},
    // A disk holds what was written to it
    {Mutant::kMappedBeforeWritten, "mapped-before-written",
     "a block is mapped before its data is written", 20},
    {Mutant::kFailedWriteMapped, "failed-write-mapped", "a block is mapped though its write failed",
     20, Devices::kFaulty},
    {Mutant::kNoRangeLock, "no-range-lock", "requests on the same block do not wait for each other",
     20},
    {Mutant::kLockedInPart, "locked-in-part",
     "the next in line gets its blocks though some of them are still locked", 50},
    {Mutant::kGoneWorkGoesOn, "gone-work-goes-on",
     "pieces of a request begin although its client has gone", 50},
    {Mutant::kPartOfBlockLosesRest, "rest-of-block-lost",
     "writing a part of a block zeroes the rest", 20},
    {Mutant::kZeroesMissTheEdges, "zeroes-miss-edges", "zeroes leave out the block at their start",
     20},
    {Mutant::kLastRunLost, "last-run-lost", "a row lacks the last of its runs", 20},
    {Mutant::kStaleRowsLoaded, "stale-rows", "a load brings back rows that were replaced meanwhile",
     50},
    {Mutant::kReusedBeforeCommit, "reused-before-commit",
     "a block is reused before the commit that forgets it", 20},
    {Mutant::kReusedDuringRead, "reused-during-read", "a block is reused while it is being read",
     200},
    {Mutant::kShrinkKeepsData, "shrink-keeps-data",
     "what is beyond a shrunk disk's end stays mapped", 20},
    {Mutant::kShrinkNotResumed, "shrink-not-resumed",
     "a shrink that a crash met is not finished later", 400},
    // A snapshot is one moment and never changes
    {Mutant::kHeldBlockOverwritten, "held-block-overwritten",
     "a block that a snapshot holds is overwritten in place", 20},
    {Mutant::kFreezeWithoutDraining, "freeze-without-draining",
     "a snapshot does not wait for writes under way", 20},
    {Mutant::kLateWriteMissesSeal, "late-write-misses-seal",
     "a write that ends after the freeze is missing in the snapshot", 50},
    {Mutant::kRoundDuringCut, "round-during-cut",
     "rows of the new generation are committed before the snapshot", 20},
    {Mutant::kCutWithoutHold, "cut-without-hold", "a cut across disks is taken one after the other",
     150},
    // The journal
    {Mutant::kDeletedUnfolded, "deleted-unfolded",
     "a snapshot is deleted while its generation is in the journal", 50},
    {Mutant::kOpenedUnfolded, "opened-unfolded",
     "a snapshot is opened before its map rows are written", 20},
    {Mutant::kJournalForgottenEarly, "journal-forgotten-early",
     "segments are free before all that they hold is folded", 100},
    {Mutant::kJournalOutOfOrder, "journal-out-of-order",
     "recovery applies the journal's changes in the wrong order", 50},
    {Mutant::kSealNotSynced, "seal-not-synced",
     "a snapshot is answered before its generation is synced", 150},
    {Mutant::kRegionsNotKnown, "regions-not-known",
     "recovery knows only those regions that the store knows of", 250},
    {Mutant::kAnsweredUnwritten, "answered-unwritten",
     "a request is answered before its change is written to the journal", 20},
    {Mutant::kYoungOverwritten, "young-overwritten",
     "a block is overwritten in place before its map change is settled", 20},
    {Mutant::kReleasedUnsynced, "released-unsynced",
     "a block is reused before the journal that gives it up is synced", 200},
    {Mutant::kReaderStopsEarly, "reader-stops-early", "the reader stops after one frame", 20},
    {Mutant::kTailUnverified, "tail-unverified",
     "what the journal maps counts after a power cut, whether it is there or not", 20},
    {Mutant::kAnnouncedSynced, "announced-synced",
     "a sync counts for writes that were announced and had not completed", 50},
    {Mutant::kFoldedBeforeWritten, "folded-before-written",
     "a fold counts for writes that were announced and had not completed", 50},
    {Mutant::kNewGenerationLost, "new-generation-lost",
     "what was written after a snapshot that a crash met is lost with it", 50},
    // Branches
    {Mutant::kWrongVersionAtFork, "wrong-version-at-fork",
     "a branch reads its parent's newest rows, not those at the fork", 20},
    {Mutant::kRestoreKeepsWrites, "restore-keeps-writes",
     "a restored disk keeps what the old head wrote", 20},
    {Mutant::kRestoreKeepsMap, "restore-keeps-map", "a restored disk keeps its map in memory", 20},
    {Mutant::kCloneKeepsGeneration, "clone-keeps-generation",
     "a clone goes on in its snapshot's generation", 20},
    // Deleting gives back what only the snapshot held
    {Mutant::kHeadFreesHeldBlock, "head-frees-held-block",
     "a head frees older blocks by itself when it drops them", 20},
    {Mutant::kSweepFreesVisible, "sweep-frees-visible",
     "a sweep frees blocks that are in rows it keeps", 20},
    {Mutant::kSweepIgnoresFloor, "sweep-ignores-floor",
     "a sweep frees blocks that the snapshot below sees", 20},
    {Mutant::kSweepForgetsInherited, "sweep-forgets-inherited",
     "a sweep drops rows that a later view inherits", 20},
    {Mutant::kChangedNotToldOf, "changed-not-told-of",
     "sweeps do not learn which branches got rows since they were read", 100},
    {Mutant::kNoteForgotten, "note-forgotten", "a dropped older block leaves no note", 20},
    {Mutant::kDeletionNotResumed, "deletion-not-resumed",
     "a deletion that a restart met is not finished later", 20},
    {Mutant::kNotesSkipped, "notes-skipped",
     "the pass over the notes that a start finds ends after its first step", 100},
    // Flattening
    {Mutant::kFlattenedEarly, "flattened-early", "a branch counts as flattened after one step",
     100},
    {Mutant::kFlattenNotResumed, "flatten-not-resumed",
     "a flattening that a crash met counts as done", 150},
    {Mutant::kFlattenLeavesRows, "flatten-leaves-rows",
     "a flattening leaves no jobs for the rows that nobody reads any more", 200},
    // Damage is noticed, and nothing else is taken for it
    {Mutant::kSumOfAnotherBirth, "stale-checksum",
     "a checksum counts for whatever block is at its place now", 20},
    {Mutant::kSumOfUnsealed, "checksum-too-early",
     "blocks get checksums while they are still overwritten in place", 20},
    {Mutant::kHeadReadsUnverified, "head-unverified", "reads of disks and clones are not verified",
     20},
    {Mutant::kDamageLaundered, "damage-laundered",
     "the rest of a damaged block becomes part of a new one", 20},
    {Mutant::kSumsStayUnknown, "checksum-stays-unknown",
     "the cache goes on without checksums that were made meanwhile", 50},
    {Mutant::kSummedTooEarly, "summed-unfolded",
     "a snapshot is marked as summed before its map rows are written", 50},
};

std::vector<Entry> Chosen() {
    const char* name = std::getenv("VARVE_MUTANT");
    std::vector<Entry> chosen;
    for (const Entry& entry : kEntries) {
        if (!name || entry.name == std::string_view(name)) chosen.push_back(entry);
    }
    return chosen;
}

/// Seeds that found a mutant, each with whether devices failed.
std::set<std::pair<bool, uint64_t>> finders;

TEST(MutantsTest, EveryMutantIsFound) {
    const char* all = std::getenv("VARVE_SEEDS");
    const std::vector<Entry> entries = Chosen();
    ASSERT_FALSE(entries.empty()) << "no such mutant";
    std::vector<Prey> prey;
    for (const Entry& entry : entries) {
        const uint64_t seeds = all ? std::strtoull(all, nullptr, 10) : entry.seeds;
        prey.push_back({entry.mutant, entry.devices == Devices::kFaulty, 1, seeds});
    }
    const std::vector<Catch> catches = Hunt(prey, kTogether, all != nullptr);
    for (size_t i = 0; i < entries.size(); ++i) {
        const Catch& found = catches[i];
        fmt::print("{:<24} found by {:>2} of {:>2} seeds, first {:>2}: {}\n", entries[i].name,
                   found.found, found.seeds, found.seed, found.how);
        if (found.seed != 0) finders.emplace(prey[i].faults, found.seed);
        EXPECT_NE(found.seed, 0) << entries[i].name << ": " << entries[i].bug
                                 << "; not found by seeds 1 to " << prey[i].seeds;
    }
}

/// The seeds that find mutants find nothing without: so it is the mutants that they found.
TEST(MutantsTest, WithoutMutantTheSameSeedsFindNothing) {
    ASSERT_FALSE(finders.empty()) << "run EveryMutantIsFound before";
    std::vector<Prey> prey;
    for (const auto& [faults, seed] : finders) {
        prey.push_back({Mutant::kNone, faults, seed, 1});
    }
    for (const Catch& result : Hunt(prey, kTogether, true)) {
        EXPECT_EQ(result.found, 0) << "seed " << result.seed << ": " << result.how;
    }
}

/// Explores seeds without drawn cuts until a mishap finds `mutant`, which stays switched on.
ExploreResult ExploreFor(Mutant mutant, ExploreOptions* options) {
    cow::present_mutant = mutant;
    options->simulation.small = true;
    options->simulation.rounds = 3;
    options->simulation.crash = 0;
    ExploreResult result;
    for (uint64_t seed = 1; seed <= 20 && result.number == 0; ++seed) {
        options->simulation.seed = seed;
        result = Explore(*options);
    }
    return result;
}

/// A mishap at every call finds a mutant too; the call replays it, and it becomes a short list.
TEST(MutantsTest, ExploringFindsOneAndMakesItShort) {
    ExploreOptions options;
    const ExploreResult result = ExploreFor(Mutant::kRowsBeforeData, &options);
    ASSERT_NE(result.number, 0);
    SimulationOptions replay = options.simulation;
    replay.probe = At(result.number, result.mishap);
    const Outcome outcome = RunInChild(replay);
    EXPECT_EQ(outcome.found, result.violation);
    const Shrunk shrunk = Shrink(options.simulation, JudgeEveryCall(true, false));
    fmt::print("{}", Describe(shrunk));
    EXPECT_NE(shrunk.found, "");
    EXPECT_LT(shrunk.steps.size(), outcome.steps.size());
    cow::present_mutant = Mutant::kNone;
}

/// What a mishap leaves is checked too, not only read.
TEST(MutantsTest, ExploringFindsWhatOnlyTheCheckerSees) {
    ExploreOptions options;
    const ExploreResult result = ExploreFor(Mutant::kBitsAfterRows, &options);
    EXPECT_NE(result.number, 0);
    EXPECT_NE(result.violation.find(" check: "), std::string::npos) << result.violation;
    cow::present_mutant = Mutant::kNone;
}

}  // namespace
}  // namespace varve::simulation
