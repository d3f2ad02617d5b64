#include "cow/runs.h"

#include <algorithm>

#include "cow/codec.h"

namespace varve::cow {
namespace {

constexpr uint8_t kRowFormat = 1;

/// The first run that ends after `block`.
template <typename R>
auto FirstEndingAfter(R& runs, uint32_t block) {
    return std::partition_point(runs.begin(), runs.end(),
                                [block](const Run& run) { return run.end() <= block; });
}

/// Blocks [first, end) of `run`, which contains them.
Run Slice(const Run& run, uint32_t first, uint32_t end) {
    Run slice = run;
    slice.place = run.place + (first - run.first);
    slice.first = first;
    slice.count = end - first;
    return slice;
}

bool Continues(const Run& left, const Run& right) {
    return left.end() == right.first && left.place + left.count == right.place &&
           left.birth == right.birth;
}

}  // namespace

Piece PieceAt(const Runs& runs, uint32_t first, uint32_t end) {
    VARVE_CHECK(first < end && end <= kChunkBlocks);
    const auto run = FirstEndingAfter(runs, first);
    if (run == runs.end() || run->first >= end) return {.first = first, .count = end - first};
    if (run->first > first) {
        return {.first = first, .count = static_cast<uint32_t>(run->first) - first};
    }
    const uint32_t stop = std::min<uint32_t>(end, static_cast<uint32_t>(run->end()));
    return {.first = first,
            .count = stop - first,
            .mapped = true,
            .place = run->place + (first - run->first),
            .birth = run->birth};
}

void Unmap(Runs& runs, uint32_t first, uint32_t end, Runs* removed) {
    auto run = FirstEndingAfter(runs, first);
    if (run == runs.end() || run->first >= end) return;
    if (run->first < first) {
        // Split so that `run` begins at `first`; the part before stays.
        const Run whole = *run;
        *run = Slice(whole, static_cast<uint32_t>(whole.first), first);
        run = runs.insert(run + 1, Slice(whole, first, static_cast<uint32_t>(whole.end())));
    }
    auto last = run;
    while (last != runs.end() && last->end() <= end) {
        if (removed) removed->push_back(*last);
        ++last;
    }
    if (last != runs.end() && last->first < end) {
        if (removed) removed->push_back(Slice(*last, static_cast<uint32_t>(last->first), end));
        *last = Slice(*last, end, static_cast<uint32_t>(last->end()));
    }
    runs.erase(run, last);
}

void Map(Runs& runs, Run run, Runs* removed) {
    Unmap(runs, static_cast<uint32_t>(run.first), static_cast<uint32_t>(run.end()), removed);
    auto next = FirstEndingAfter(runs, static_cast<uint32_t>(run.first));
    if (next != runs.begin() && Continues(*(next - 1), run)) {
        --next;
        next->count += run.count;
    } else {
        next = runs.insert(next, run);
    }
    const auto after = next + 1;
    if (after != runs.end() && Continues(*next, *after)) {
        next->count += after->count;
        runs.erase(after);
    }
}

uint64_t MappedBlocks(const Runs& runs) {
    uint64_t blocks = 0;
    for (const Run& run : runs) blocks += run.count;
    return blocks;
}

Runs Subtract(const Runs& runs, const Runs& other) {
    Runs result;
    for (const Run& run : runs) {
        uint32_t at = static_cast<uint32_t>(run.first);
        const uint32_t end = static_cast<uint32_t>(run.end());
        while (at < end) {
            const Piece theirs = PieceAt(other, at, end);
            const Run mine = Slice(run, at, at + theirs.count);
            if (!theirs.mapped || theirs.place != mine.place) result.push_back(mine);
            at += theirs.count;
        }
    }
    return result;
}

std::string EncodeRuns(const Runs& runs, Generation generation) {
    std::string out;
    out.reserve(2 + runs.size() * 8);
    out.push_back(static_cast<char>(kRowFormat));
    out.push_back(static_cast<char>(runs.size()));
    for (const Run& run : runs) {
        VARVE_CHECK(run.birth <= generation);
        out.push_back(static_cast<char>(run.first));
        out.push_back(static_cast<char>(run.count));
        AppendVarint(out, run.place);
        AppendVarint(out, generation.value - run.birth.value);
    }
    return out;
}

std::optional<Runs> DecodeRuns(std::string_view value, Generation generation) {
    Decoder in(value);
    if (in.Byte() != kRowFormat) return std::nullopt;
    const uint8_t count = in.Byte();
    if (count > kChunkBlocks) return std::nullopt;
    Runs runs;
    runs.reserve(count);
    uint32_t at = 0;
    for (uint8_t i = 0; i < count; ++i) {
        const uint32_t first = in.Byte();
        const uint32_t blocks = in.Byte();
        const uint64_t place = in.Varint();
        const uint64_t age = in.Varint();
        if (!in.ok() || blocks == 0 || first < at || first + blocks > kChunkBlocks) {
            return std::nullopt;
        }
        if (place == 0 || place >= (uint64_t{1} << 48) || age >= generation.value) {
            return std::nullopt;
        }
        Run run;
        run.place = place;
        run.first = first;
        run.count = blocks;
        run.birth = Generation{generation.value - age};
        runs.push_back(run);
        at = first + blocks;
    }
    if (!in.Finished()) return std::nullopt;
    return runs;
}

}  // namespace varve::cow
