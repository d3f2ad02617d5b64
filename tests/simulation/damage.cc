// Damage: without any, nothing is taken for it; a flipped bit is an I/O error for all who see it.
#include <algorithm>
#include <utility>

#include "cow/format/runs.h"
#include "cow/history/catalog.h"
#include "cow/volume/map_reader.h"
#include "tests/simulation/runner.h"

namespace varve::simulation {
namespace {

/// Where a view keeps a block; 0 if it does not map it.
uint64_t PlaceIn(cow::MetadataView& view, const cow::Line& line, uint64_t offset) {
    const ChunkIndex chunk{offset / cow::kChunkBytes};
    const auto rows = cow::ReadMap(view, line, chunk, ChunkIndex{chunk.value + 1});
    if (rows.value().rows.empty()) return 0;
    const auto block = static_cast<uint32_t>(offset % cow::kChunkBytes / cow::kBlockBytes);
    const cow::Piece piece = cow::PieceAt(rows.value().rows[0].runs, block, block + 1);
    return piece.mapped ? piece.place : 0;
}

}  // namespace

Task<void> Runner::WaitForChecksums(bool* done) {
    co_await Hop(machine_->home());
    co_await pool().WaitForChecksums();
    *done = true;
}

/// Beside clients.
Task<void> Runner::Scrub() {
    if (std::exchange(scrubbing_, true)) co_return;  // a second one is refused
    std::optional<std::string> all;
    const Result<cow::ScrubReport> report = co_await pool().Scrub(std::move(all));
    scrubbing_ = false;
    if (!report.ok()) {
        Do(report.status());
        co_return;
    }
    for (const cow::ScrubDamage& damage : report.value().damage) {
        const bool excused = damage.unreadable && (Faulty() || !media_.power());
        if (excused) continue;
        Violation(fmt::format("a scrub finds damage in {}@{} at {}", damage.disk, damage.snapshot,
                              damage.offset));
    }
}

void Runner::VerifyChecksums() {
    if (!Fine() || !media_.power() || dice_.Chance(0.5)) return;
    {
        const bool before = Struck();
        const Exposed exposed(*this);
        bool done = false;
        Spawn(WaitForChecksums(&done));
        scheduler_.RunUntil([&] { return done; });
        if (Struck() != before || !media_.power()) return;
    }
    const auto report = machine_->Do(pool().Scrub(std::nullopt));
    if (!report.ok()) return Violation("scrub: " + report.error().message);
    for (const cow::ScrubDamage& damage : report.value().damage) {
        return Violation(fmt::format("a scrub finds damage in {}@{} at {}", damage.disk,
                                     damage.snapshot, damage.offset));
    }
    const auto status = machine_->Do(pool().GetStatus());
    // What could not be read is given up until a restart.
    if (status.value().checksums_pending == 0) {
        DamageOne();
    } else if (!options_.faults && !limited_) {
        Violation("checksums are missing and nobody makes them");
    }
}

Errno Runner::Attempt(const std::string& name, uint64_t offset, uint64_t length, bool write) {
    const auto opened = machine_->Do(pool().OpenExport(name));
    if (!opened.ok()) return 0;
    cow::Volume& volume = *opened.value().volume;
    Buffer data(length, dice_.Chance(0.5));
    Errno error = 0;
    if (write) {
        error = Await(scheduler_, volume.executor(), volume.Write(offset, data.span()));
    } else {
        error = Await(scheduler_, volume.executor(), volume.Read(offset, data.span(), nullptr));
    }
    Close(opened.value().id);
    return error;
}

/// `name` has a damaged block at `offset`.
void Runner::ExpectDamage(const std::string& name, uint64_t offset) {
    if (!Fine()) return;
    const uint64_t part = dice_.Draw(7) * kSector;
    if (Attempt(name, offset, cow::kBlockBytes, false) != EIO) {
        return Violation(fmt::format("{} at {} is damaged and read nevertheless", name, offset));
    }
    if (Attempt(name, offset + part, kSector, false) != EIO) {
        return Violation(fmt::format("{} at {} is damaged and read in part", name, offset));
    }
    if (name.find('@') != std::string::npos) return;
    const Errno error = Attempt(name, offset + part, kSector, true);
    const bool full = tight_ && error == ENOSPC;
    if (error != EIO && !full) {
        Violation(fmt::format("{} at {} is damaged and got a new block", name, offset));
    }
}

void Runner::DamageOne() {
    if (disks_.empty()) return;
    auto it = disks_.begin();
    std::advance(it, static_cast<std::ptrdiff_t>(dice_.Draw(disks_.size())));
    std::string snapshot;
    if (!DrawSnapshot(it->second, &snapshot)) return;
    const std::string full = it->first + "@" + snapshot;
    const auto view = machine_->metadata().View();
    const cow::Catalog catalog = std::move(cow::Catalog::Load(*view).value());
    const auto& record = catalog.snapshot(catalog.FindSnapshot(full).value());
    const cow::Line line = catalog.history().LineOf(record.branch, record.generation);
    const uint64_t offset = dice_.Draw(record.size / cow::kBlockBytes) * cow::kBlockBytes;
    const uint64_t place = PlaceIn(*view, line, offset);
    if (place == 0) return;
    const uint64_t sector = place * cow::kBlockBytes / kSector + dice_.Draw(8);
    const uint64_t bit = dice_.Draw(kSector * 8);
    media_.FlipBit(sector, bit);
    ExpectDamage(full, offset);
    for (const auto& [id, disk] : catalog.disks()) {
        const cow::Line head = catalog.history().LineOf(disk.record.branch, cow::kHead);
        const bool sees = offset < disk.record.size && PlaceIn(*view, head, offset) == place;
        if (sees) ExpectDamage(disk.record.name, offset);
    }
    const auto report = machine_->Do(pool().Scrub(it->first));
    const auto& damage = report.value().damage;
    const bool named = std::any_of(damage.begin(), damage.end(), [&](const cow::ScrubDamage& d) {
        return d.disk + "@" + d.snapshot == full && d.offset == offset;
    });
    if (!named) Violation(fmt::format("a scrub does not name {} at {}", full, offset));
    media_.FlipBit(sector, bit);  // and back
}

}  // namespace varve::simulation
