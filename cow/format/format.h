// The rows of the metadata store: their keys and their records. docs/format.md is the reference.
// Not the value of a map row, which is runs.h, nor a region's bitmap, which is allocator.h, nor a
// journal row's, which is journal.h, nor checksums, which are checksums.h.
//
// Keys begin with one letter and go on with big-endian 64-bit numbers, so that their bytewise
// order is the numbers' order:
//   P                              the pool
//   D disk                         a disk
//   S snapshot                     a snapshot
//   B branch                       a branch
//   M branch chunk ~generation     a map row: newest version first
//   T branch generation chunk      "touched": there is a map row of this branch, chunk, generation
//   R region                       an allocator region that is not wholly free
//   J number                       a view was deleted; its space is not all given back
//   W branch chunk generation n    a note to the sweeper: see sweep.h
//   L branch generation number     map changes that are not in map rows yet: see journal.h
//   C piece                        checksums of frozen blocks in 64 places: see checksums.h
//   K snapshot                     all blocks of the snapshot have checksums
//   O snapshot                     a bookmark: the record of a snapshot that was deleted
// Keys that begin with 'U' belong to whoever owns the pool directory.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "cow/format/types.h"

namespace varve::cow {

inline constexpr uint8_t kFormatVersion = 1;

std::string PoolKey();
std::string DiskKey(DiskId disk);
std::string SnapshotKey(SnapshotId snapshot);
std::string BranchKey(BranchId branch);
std::string MapKey(BranchId branch, ChunkIndex chunk, Generation generation);
std::string TouchedKey(BranchId branch, Generation generation, ChunkIndex chunk);
std::string RegionKey(uint64_t region);
std::string JobKey(uint64_t number);
std::string NoteKey(BranchId branch, ChunkIndex chunk, Generation generation, uint64_t number);
std::string JournalKey(BranchId branch, Generation generation, uint64_t number);
std::string SumsKey(uint64_t piece);
std::string SummedKey(SnapshotId snapshot);
std::string BookmarkKey(SnapshotId snapshot);

/// The branch in which the key's row has its place, if that is a map row or a note.
std::optional<BranchId> BranchOfRow(std::string_view key);

/// The least key greater than all keys that begin with `prefix`.
std::string PrefixEnd(std::string prefix);

/// The `index`-th number of a key (after its letter); all ones if the key is too short.
uint64_t KeyNumber(std::string_view key, unsigned index);
/// Numbers in `key`, or 99 if its length is not 1 + 8n.
unsigned KeyNumbers(std::string_view key);

struct PoolRecord {
    uint64_t sequence = 1;      // the next id of any kind: disk, snapshot, branch, generation, job
    uint64_t region_count = 0;  // regions the data file has been grown to
    uint64_t used_blocks = 0;   // bits set in all regions
};

struct DiskRecord {
    std::string name;
    uint64_t size = 0;  // bytes
    BranchId branch;
    Generation generation;       // the one being written
    uint64_t mapped_blocks = 0;  // of the head, by its map rows
    int64_t created_ms = 0;
    bool trimming = false;  // shrunk, but blocks beyond the end may still be mapped
    bool offline = false;   // no clients
};

struct SnapshotRecord {
    DiskId disk;
    std::string name;
    uint64_t size = 0;  // bytes
    BranchId branch;
    Generation generation;
    uint64_t mapped_blocks = 0;
    int64_t created_ms = 0;
};

/// Whether a branch has rows for all that it inherited: docs/design/flatten.md.
enum class Flattening : uint8_t {
    kNone,
    kUnderWay,
    kDone,
};

struct BranchRecord {
    BranchId parent;  // 0: none
    Generation fork;  // the parent's state at the end of this generation is where it starts
    Flattening flattening = Flattening::kNone;
};

/// The generation of the rows that a branch has of what it inherited: above its fork, below all
/// that was written in it. Ids and generations come from one sequence.
inline Generation InheritedAt(BranchId branch) {
    return Generation{branch.value};
}

/// A view at (branch, generation) was deleted. Heads count as at their last generation.
struct JobRecord {
    BranchId branch;
    Generation generation;
};

/// Blocks that a head at NoteKey's branch and generation no longer maps, whoever else may.
using NoteRecord = Runs;

std::string Encode(const PoolRecord& record);
std::string Encode(const DiskRecord& record);
std::string Encode(const SnapshotRecord& record);
std::string Encode(const BranchRecord& record);
std::string Encode(const JobRecord& record);

/// Each gives false if `value` is not such a record; `*version` is set by the pool's in any case.
bool Decode(std::string_view value, PoolRecord* record, uint8_t* version);
bool Decode(std::string_view value, DiskRecord* record);
bool Decode(std::string_view value, SnapshotRecord* record);
bool Decode(std::string_view value, BranchRecord* record);
bool Decode(std::string_view value, JobRecord* record);

/// Runs of any number and order, for notes.
std::string EncodeNote(const NoteRecord& runs);
std::optional<NoteRecord> DecodeNote(std::string_view value);

}  // namespace varve::cow
