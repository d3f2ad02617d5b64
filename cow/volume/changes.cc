#include "cow/volume/changes.h"

#include <algorithm>
#include <map>
#include <optional>

#include "base/sort_unique.h"
#include "cow/format/format.h"
#include "cow/format/runs.h"

namespace varve::cow {
namespace {

constexpr uint64_t kNoneLeft = ~uint64_t{0};
constexpr uint64_t kAllBlocks = ~uint64_t{0};
/// Generations whose marks are looked at; of more, all rows are compared.
constexpr unsigned kGenerationsMost = 64;
/// Marks taken of all generations together, about; at least kMarksLeast of each.
constexpr uint64_t kMarksLeast = 16;
/// Chunks whose rows are compared without looking for marks, or marks that are taken.
constexpr uint64_t kCompareTogether = 256;
/// Deleted rows that a move of a cursor may meet.
constexpr uint64_t kDeletedTogether = 1024;
/// Moves to a row that may be next, before it is sought.
constexpr unsigned kStepsMost = 4;

// ---- masks

uint64_t MappedMask(const Runs& runs) {
    uint64_t mask = 0;
    for (const Run& run : runs) mask |= MaskOf(run.first, run.end());
    return mask;
}

/// Blocks mapped to the same place, with the same birth.
uint64_t SameMask(const Runs& a, const Runs& b) {
    uint64_t mask = 0;
    auto theirs = b.begin();
    for (const Run& mine : a) {
        while (theirs != b.end() && theirs->end() <= mine.first) ++theirs;
        for (auto other = theirs; other != b.end() && other->first < mine.end(); ++other) {
            const bool same = mine.birth == other->birth &&
                              mine.place + other->first == other->place + mine.first;
            if (!same) continue;
            mask |= MaskOf(std::max<uint64_t>(mine.first, other->first),
                           std::min(mine.end(), other->end()));
        }
    }
    return mask;
}

/// Blocks that were there when `generation` ended.
uint64_t OlderMask(const Runs& runs, Generation generation) {
    uint64_t mask = 0;
    for (const Run& run : runs) {
        if (run.birth <= generation) mask |= MaskOf(run.first, run.end());
    }
    return mask;
}

// ---- marks

struct Marks {
    std::vector<uint64_t> chunks;  // ascending, each once
    uint64_t next = kNoneLeft;     // what is known ends here: there are no others before
};

/// The upper end of a stretch's marks.
std::string MarksEnd(const Stretch& stretch) {
    const Generation after{stretch.to.value + 1};
    if (stretch.to != kHead) return TouchedKey(stretch.branch, after, ChunkIndex{0});
    return PrefixEnd(TouchedKey(stretch.branch, Generation{0}, ChunkIndex{0}).substr(0, 9));
}

/// Collects chunks with marks, generation by generation; each may bring the end nearer.
class MarkScan {
  public:
    MarkScan(uint64_t first, uint64_t end, uint64_t most)
        : first_(first), end_(end), most_(most), least_(std::min(most, kMarksLeast)) {}

    /// False: there are too many generations, or deleted marks.
    Result<bool> Add(MetadataView& view, const Stretch& stretch) {
        const std::string lower =
            TouchedKey(stretch.branch, Generation{stretch.after.value + 1}, ChunkIndex{0});
        const auto cursor = view.Range(lower, MarksEnd(stretch), kDeletedTogether);
        Generation generation;
        uint64_t taken = 0;
        for (cursor->Seek(lower); cursor->valid();) {
            const Generation here{KeyNumber(cursor->key(), 1)};
            const uint64_t chunk = KeyNumber(cursor->key(), 2);
            if (here != generation) {
                if (++generations_ > kGenerationsMost) return false;
                generation = here;
                taken = 0;
            }
            if (chunk < first_) {
                cursor->Seek(TouchedKey(stretch.branch, here, ChunkIndex{first_}));
            } else if (chunk >= end_) {
                beyond_ = std::min(beyond_, chunk);
                cursor->Seek(TouchedKey(stretch.branch, Generation{here.value + 1}, ChunkIndex{0}));
            } else {
                chunks_.push_back(chunk);
                if (++taken >= std::max(most_ / generations_, least_)) end_ = chunk + 1;
                cursor->Next();
            }
        }
        if (Status s = cursor->status(); !s.ok()) return s.error();
        return !cursor->gave_up();
    }

    Marks Take() {
        SortUnique(chunks_);
        const auto beyond = std::lower_bound(chunks_.begin(), chunks_.end(), end_);
        if (beyond != chunks_.end()) beyond_ = std::min(beyond_, *beyond);
        chunks_.erase(beyond, chunks_.end());
        return {std::move(chunks_), std::max(beyond_, end_)};
    }

  private:
    const uint64_t first_;
    uint64_t end_;
    const uint64_t most_, least_;  // marks
    uint64_t beyond_ = kNoneLeft;  // the least one that was seen there
    unsigned generations_ = 0;
    std::vector<uint64_t> chunks_;
};

// ---- rows

struct StoredRow {
    RowAt at;
    std::string value;
};

/// The rows that lines resolve chunks to. Each branch has one cursor, whoever asks: it goes on from
/// where it is if what is asked for lies a few rows ahead, as the rows of two lines of one chunk
/// do.
class RowFinder {
  public:
    explicit RowFinder(MetadataView& view) : view_(view) {}

    Result<std::optional<StoredRow>> Find(const Line& line, ChunkIndex chunk) {
        for (const Stretch& stretch : line) {
            const Cursor* cursor = MoveTo(stretch, chunk);
            if (Status s = cursor->status(); !s.ok()) return s.error();
            if (!cursor->valid() || KeyNumber(cursor->key(), 1) != chunk.value) continue;
            const Generation generation{~KeyNumber(cursor->key(), 2)};
            if (generation <= stretch.after) continue;
            return std::optional<StoredRow>(
                {{stretch.branch, generation}, std::string(cursor->value())});
        }
        return std::optional<StoredRow>();
    }

  private:
    struct Place {
        std::unique_ptr<Cursor> cursor;
        std::string from;  // no row lies between this key and the cursor's
    };

    /// At the first row of the branch from what the stretch may see of the chunk on.
    Cursor* MoveTo(const Stretch& stretch, ChunkIndex chunk) {
        const std::string key = MapKey(stretch.branch, chunk, stretch.to);
        Place& place = places_[stretch.branch];
        if (!place.cursor) {
            const std::string first = MapKey(stretch.branch, ChunkIndex{0}, kHead);
            place.cursor = view_.Range(first, PrefixEnd(key.substr(0, 9)), kDeletedTogether);
            place.cursor->Seek(key);
        } else if (key < place.from) {
            place.cursor->Seek(key);
        }
        Cursor& cursor = *place.cursor;
        for (unsigned steps = 0; cursor.valid() && cursor.key() < key; ++steps) {
            if (steps < kStepsMost) {
                cursor.Next();
            } else {
                cursor.Seek(key);
            }
        }
        place.from = key;
        if (!cursor.gave_up()) return &cursor;
        place.cursor.reset();
        closed_ = view_.Range(key, MapKey(stretch.branch, chunk, stretch.after));
        closed_->Seek(key);
        return closed_.get();
    }

    MetadataView& view_;
    std::map<BranchId, Place> places_;
    std::unique_ptr<Cursor> closed_;  // for one chunk
};

// ---- comparing

/// `touched`: the chunk is not as the state is that both come from.
ChangedChunk Compared(ChunkIndex chunk, const Base& base, const Runs& now, bool touched,
                      const Runs& then) {
    ChangedChunk result{.chunk = chunk, .mapped = MappedMask(now)};
    switch (base.kind) {
        case Base::Kind::kSnapshot:
            result.changed = (result.mapped | MappedMask(then)) & ~SameMask(now, then);
            break;
        case Base::Kind::kBelow:
            if (touched) result.changed = ~OlderMask(now, base.generation);
            break;
        case Base::Kind::kUnknown:
            result.changed = kAllBlocks;
    }
    return result;
}

class Comparison {
  public:
    Comparison(MetadataView& view, const Line& line, const Base& base, FoundChanges& found)
        : line_(line), base_(base), rows_(view), found_(found) {}

    /// `live`: the chunk in memory; null: it is stored.
    Status Look(ChunkIndex chunk, const LiveChunk* live) {
        std::optional<StoredRow> now, then;
        if (!live) {
            Result<std::optional<StoredRow>> row = rows_.Find(line_, chunk);
            if (!row.ok()) return row.error();
            now = std::move(row.value());
        }
        if (base_.kind == Base::Kind::kSnapshot) {
            Result<std::optional<StoredRow>> row = rows_.Find(base_.line, chunk);
            if (!row.ok()) return row.error();
            then = std::move(row.value());
        }
        if (now && then && now->at == then->at) return Status();
        Result<Runs> mine = live  ? live->runs
                            : now ? DecodeRow(chunk, now->at, now->value)
                                  : Runs();
        if (!mine.ok()) return mine.error();
        const Result<Runs> other = then ? DecodeRow(chunk, then->at, then->value) : Runs();
        if (!other.ok()) return other.error();
        const bool touched = live ? live->touched : now && LiesIn(base_.apart, now->at);
        ChangedChunk result = Compared(chunk, base_, mine.value(), touched, other.value());
        if (result.changed != 0) found_.chunks.push_back(result);
        return Status();
    }

  private:
    const Line& line_;
    const Base& base_;
    RowFinder rows_;
    FoundChanges& found_;
};

/// Candidates for a change where marks tell; nothing if they do not.
Result<std::optional<Marks>> Marked(MetadataView& view, const Base& base, ChunkIndex first,
                                    ChunkIndex end, uint64_t most) {
    if (base.kind == Base::Kind::kUnknown) return std::optional<Marks>();
    MarkScan scan(first.value, end.value, most);
    for (const Stretch& stretch : base.apart) {
        const Result<bool> told = scan.Add(view, stretch);
        if (!told.ok()) return told.error();
        if (!told.value()) return std::optional<Marks>();
    }
    return std::optional<Marks>(scan.Take());
}

/// The same where they do not: every chunk of the next few that has a row on one of the sides.
Result<Marks> WithRows(MetadataView& view, const Line& line, const Base& base, ChunkIndex first,
                       ChunkIndex end, uint64_t most) {
    Marks marks;
    const ChunkIndex stop{std::min(end.value, first.value + most)};
    for (const Line* side : {&line, &base.line}) {
        if (side->empty()) continue;
        const Result<MapRows> rows = ReadMap(view, *side, first, stop);
        if (!rows.ok()) return rows.error();
        if (Status s = rows.value().AllReadable(); !s.ok()) return s.error();
        for (const MapRow& row : rows.value().rows) marks.chunks.push_back(row.chunk.value);
        marks.next = std::min(marks.next, rows.value().next.value);
    }
    SortUnique(marks.chunks);
    return marks;
}

}  // namespace

uint32_t Layers::DepthOf(Generation birth) const {
    if (birth >= newest) return 1;
    const auto above = below.end() - std::lower_bound(below.begin(), below.end(), birth);
    return static_cast<uint32_t>(std::max<std::ptrdiff_t>(above + 1, 2));
}

bool LiesIn(const Line& stretches, const RowAt& row) {
    return std::any_of(stretches.begin(), stretches.end(), [&row](const Stretch& s) {
        return s.branch == row.branch && s.after < row.generation && row.generation <= s.to;
    });
}

Result<FoundChanges> FindChanges(MetadataView& view, const Line& line, const Base& base,
                                 ChunkIndex first, ChunkIndex end, uint64_t most,
                                 const std::vector<LiveChunk>& live) {
    VARVE_CHECK(first < end && most > 0);
    most = std::min(most, kCompareTogether);
    Result<std::optional<Marks>> marked = Marked(view, base, first, end, most);
    if (!marked.ok()) return marked.error();
    Marks marks;
    if (marked.value()) {
        marks = std::move(*marked.value());
    } else {
        Result<Marks> rows = WithRows(view, line, base, first, end, most);
        if (!rows.ok()) return rows.error();
        marks = std::move(rows.value());
    }
    FoundChanges found;
    found.next = ChunkIndex{std::min(marks.next, end.value)};
    Comparison comparison(view, line, base, found);
    auto in_memory = live.begin();
    for (auto mark = marks.chunks.begin(); mark != marks.chunks.end() || in_memory != live.end();) {
        const uint64_t stored = mark != marks.chunks.end() ? *mark : kNoneLeft;
        const uint64_t held = in_memory != live.end() ? in_memory->chunk.value : kNoneLeft;
        const ChunkIndex chunk{std::min(stored, held)};
        if (chunk >= found.next) break;
        const LiveChunk* const memory = held == chunk.value ? &*in_memory++ : nullptr;
        if (stored == chunk.value) ++mark;
        if (Status s = comparison.Look(chunk, memory); !s.ok()) return s.error();
    }
    return found;
}

}  // namespace varve::cow
