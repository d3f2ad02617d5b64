#include "cow/format/runs.h"

#include <algorithm>
#include <span>

#include "cow/format/codec.h"
#include "cow/mutants.h"

namespace varve::cow {
namespace {

constexpr uint8_t kRowFormat = 1;
/// Format, count; for each run first, count, place (48 bits), age.
constexpr size_t kRowBytesMax = 2 + kChunkBlocks * (2 + 7 + kVarintBytesMax);

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
    auto theirs = other.begin();
    for (const Run& run : runs) {
        const auto end = static_cast<uint32_t>(run.end());
        for (auto at = static_cast<uint32_t>(run.first); at < end;) {
            while (theirs != other.end() && theirs->end() <= at) ++theirs;
            if (theirs == other.end() || theirs->first >= end) {
                result.push_back(Slice(run, at, end));
                break;
            }
            const uint32_t begin = std::max(at, static_cast<uint32_t>(theirs->first));
            if (begin > at) result.push_back(Slice(run, at, begin));
            const uint32_t stop = std::min(end, static_cast<uint32_t>(theirs->end()));
            const bool same =
                theirs->place + begin - theirs->first == run.place + begin - run.first;
            if (!same) result.push_back(Slice(run, begin, stop));
            at = stop;
        }
    }
    return result;
}

std::string EncodeRuns(const Runs& runs, Generation generation) {
    char bytes[kRowBytesMax];  // no string grows byte by byte: half of what encoding cost
    char* out = bytes;
    const size_t lost = Mutated(Mutant::kLastRunLost) && runs.size() > 2 ? 1 : 0;
    *out++ = static_cast<char>(kRowFormat);
    *out++ = static_cast<char>(runs.size() - lost);
    VARVE_CHECK(runs.size() <= kChunkBlocks);
    for (const Run& run : std::span(runs).first(runs.size() - lost)) {
        VARVE_CHECK(run.birth <= generation);
        *out++ = static_cast<char>(run.first);
        *out++ = static_cast<char>(run.count);
        out = PutVarint(out, run.place);
        out = PutVarint(out, generation.value - run.birth.value);
    }
    return {bytes, out};
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
        if (!ArePlaces(place, blocks) || age >= generation.value) return std::nullopt;
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
