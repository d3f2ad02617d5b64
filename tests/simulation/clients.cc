// Clients: requests, and what their answers promise.
#include "tests/simulation/runner.h"

namespace varve::simulation {

std::string Runner::Fill(const std::string& disk, uint64_t length) {
    // Each piece of 32 bytes says which disk it was written to and when, and differs from all
    // others.
    constexpr size_t kPiece = 32;
    const std::string tag = fmt::format("{}#{}#", disk, ++sequence_);
    std::string text((length + kPiece - 1) / kPiece * kPiece, '-');
    for (size_t at = 0; at < text.size(); at += kPiece) {
        tag.copy(text.data() + at, tag.size());
        const fmt::format_int number(at);
        std::memcpy(text.data() + at + tag.size(), number.data(), number.size());
        text[at + kPiece - 1] = '|';
    }
    text.resize(length);
    return text;
}

Runner::Range Runner::DrawRange(uint64_t size) {
    const uint64_t kinds[] = {1, 512, 4096, 4096, 65536};
    const uint64_t unit = rude_ ? 4096 : kinds[dice_.Draw(5)];
    uint64_t length = unit * (1 + dice_.Draw(unit == 1 ? 9000 : rude_ ? 2 : 12));
    length = std::min(length, size);
    uint64_t offset = dice_.Draw(size - length + 1);
    if (dice_.Chance(0.6) || rude_) offset = std::min(offset, uint64_t{40960});  // a hot spot
    offset = offset / unit * unit;
    return {offset, std::min(length, size - offset)};
}

Runner::Change Runner::BeginChange(ModelDisk& model, Range range, const std::string* data) {
    Change change;
    if (range.length == 0) return change;
    change.first = range.offset / kSectorBytes;
    const Time began = Now();
    const uint64_t end = range.offset + range.length;
    for (uint64_t s = change.first; s * kSectorBytes < end; ++s) {
        const uint64_t base = s * kSectorBytes;
        const uint64_t from = std::max(base, range.offset);
        const uint64_t to = std::min(base + kSectorBytes, end);
        Edit edit{began, from - base,
                  data ? data->substr(from - range.offset, to - from) : std::string(to - from, 0)};
        change.results.push_back(model.sectors()[s].Begin(began, edit));
        change.edits.push_back(std::move(edit));
    }
    return change;
}

void Runner::EndChange(ModelDisk& model, const Change& change, Errno error) {
    if (!media_.power()) return;  // nobody hears answers any more
    const Time now = Now();
    for (size_t i = 0; i < change.results.size(); ++i) {
        model.sectors()[change.first + i].End(now, change.edits[i], change.results[i], error == 0);
    }
}

void Runner::Judge(Errno error, const char* what) {
    if (error == 0 || !media_.power()) return;
    const bool faulty = Faulty() && (error == EIO || error == ENOSPC);
    const bool full = (tight_ || limited_) && error == ENOSPC;
    if (!faulty && !full) return Violation(fmt::format("{} fails with {}", what, error));
}

Task<void> Runner::Client(uint64_t actor, std::string name, Disk* disk, cow::Volume* volume,
                          unsigned requests) {
    co_await Hop(volume->executor());
    for (unsigned i = 0; i < requests && media_.power() && Fine(); ++i) {
        if (!Begin(actor, i)) continue;
        ++result_.requests;
        co_await Request(name, disk, volume);
    }
    co_await Hop(machine_->home());
    --clients_;
}

Task<void> Runner::Request(const std::string& name, Disk* disk, cow::Volume* volume) {
    const uint64_t kind = dice_.Draw(100);
    const Range range = DrawRange(disk->model.size());
    const auto note = [&](const char* what) {
        Note("{} {} {}+{}", what, name, range.offset, range.length);
    };
    if (kind < 45) {
        note(kind < 10 ? "write and flush" : "write");
        co_await WriteOnce(name, disk, volume, range, kind < 10);
    } else if (kind < 60) {
        const Range whole{0, disk->model.size()};
        const Range read = dice_.Chance(0.2) ? whole : range;
        Note("read {} {}+{}", name, read.offset, read.length);
        co_await ReadOnce(name, disk, volume, read);
    } else if (kind < 75) {
        note("trim");
        co_await TrimOnce(disk, volume, range);
    } else if (kind < 90) {
        note("zero");
        const Change change = BeginChange(disk->model, range, nullptr);
        const bool allocate = kind < 80;
        const Errno error = co_await volume->WriteZeroes(range.offset, range.length, allocate);
        EndChange(disk->model, change, error);
        Judge(error, "write zeroes");
    } else {
        Note("flush {}", name);
        co_await FlushOnce(disk, volume);
    }
}

Task<void> Runner::WriteOnce(const std::string& name, Disk* disk, cow::Volume* volume, Range range,
                             bool fua) {
    const std::string data = Fill(name, range.length);
    Buffer buffer(data.size(), dice_.Chance(0.7));
    buffer.Fill(data);
    const std::span<const std::byte> bytes = buffer.span();
    const Change change = BeginChange(disk->model, range, &data);
    const Errno error = co_await volume->Write(range.offset, bytes);
    EndChange(disk->model, change, error);
    Judge(error, "write");
    if (fua && error == 0) co_await FlushOnce(disk, volume);
}

Task<void> Runner::TrimOnce(Disk* disk, cow::Volume* volume, Range range) {
    const uint64_t begin = (range.offset + 4095) / 4096 * 4096;
    const uint64_t end = (range.offset + range.length) / 4096 * 4096;
    Range whole{begin, end > begin ? end - begin : 0};
    const Change change = BeginChange(disk->model, whole, nullptr);
    const Errno error = co_await volume->Trim(range.offset, range.length);
    EndChange(disk->model, change, error);
    Judge(error, "trim");
}

Task<void> Runner::FlushOnce(Disk* disk, cow::Volume* volume) {
    const Time start = Now();
    const Errno error = co_await volume->Flush();
    if (!media_.power()) co_return;
    if (error == 0) disk->model.Flushed(start);
    if (error != 0) failed_ = true;
    Judge(error, "flush");
    if (error == 0) Answered();
}

Task<void> Runner::ReadOnce(std::string name, Disk* disk, cow::Volume* volume, Range range) {
    Buffer buffer(range.length, dice_.Chance(0.7));
    const Time start = Now();
    std::vector<cow::Allocation> map;
    const Errno error = co_await volume->Read(range.offset, buffer.span(), &map);
    const std::string data = buffer.text();
    if (!media_.power()) co_return;
    Judge(error, "read");
    if (error != 0) co_return;
    uint64_t covered = 0;
    for (const cow::Allocation& part : map) covered += part.length;
    if (covered != range.length) Violation("a read's map does not cover it");
    const uint64_t end = range.offset + range.length;
    for (uint64_t s = (range.offset + kSectorBytes - 1) / kSectorBytes;
         (s + 1) * kSectorBytes <= end; ++s) {
        const Content seen = Content::Of(data.data() + s * kSectorBytes - range.offset);
        if (!disk->model.sectors()[s].MayBe(seen, start, time_)) {
            const Sector::States possible = disk->model.sectors()[s].Possible(start, time_);
            Explain(Image(1, possible), std::string(seen.bytes()), 0);
            Violation(fmt::format("a read of {} sector {} shows what it never held", name, s));
        }
    }
}

}  // namespace varve::simulation
