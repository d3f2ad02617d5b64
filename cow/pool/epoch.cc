#include "cow/pool/epoch.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/endian.h"

namespace varve::cow {
namespace {

constexpr char kEpochRowVersion = 1;
constexpr size_t kEpochBytes = 2 * sizeof(uint64_t);

void Append(std::string& bytes, const Epoch& epoch) {
    AppendBig(bytes, epoch.number);
    AppendBig(bytes, epoch.tag);
}

Epoch Load(const char* from) {
    return {LoadBig<uint64_t>(from), LoadBig<uint64_t>(from + sizeof(uint64_t))};
}

Status Put(MetadataStore& metadata, const EpochRow& row) {
    Batch batch;
    batch.Put(kEpochKey, EncodeEpochRow(row));
    return metadata.Commit(batch);
}

}  // namespace

std::string EncodeEpochRow(const EpochRow& row) {
    std::string bytes(1, kEpochRowVersion);
    Append(bytes, row.current);
    if (row.next) Append(bytes, *row.next);
    return bytes;
}

Result<EpochRow> DecodeEpochRow(std::string_view bytes) {
    const bool whole = bytes.size() == 1 + kEpochBytes || bytes.size() == 1 + 2 * kEpochBytes;
    if (!whole || bytes[0] != kEpochRowVersion) {
        return MakeError(ErrorKind::kDamaged,
                         "the metadata's row about the epoch is damaged; restore the pool from a "
                         "backup");
    }
    EpochRow row;
    row.current = Load(bytes.data() + 1);
    if (bytes.size() > 1 + kEpochBytes) row.next = Load(bytes.data() + 1 + kEpochBytes);
    return row;
}

Result<EpochRow> ReadEpochRow(MetadataStore& metadata) {
    const Result<std::optional<std::string>> row = metadata.View()->Get(kEpochKey);
    if (!row.ok()) return row.error();
    if (!row.value()) return EpochRow();
    return DecodeEpochRow(*row.value());
}

Status CheckEpoch(const EpochRow& row, const Epoch& of_data, const std::string& pool,
                  const std::string& data) {
    if (of_data == row.current || (row.next && of_data == *row.next)) return Status();
    const char* older = of_data.number < row.current.number ? "the data file" : "the metadata";
    if (of_data.number == row.current.number) older = "one of them";
    return MakeError(
        ErrorKind::kDamaged,
        fmt::format("{}/meta and {} are of different times (epochs {} and {}): {} must come from "
                    "an older or another copy, and disks would show wrong data; restore both from "
                    "the same copy (--force-epoch opens them as they are)",
                    pool, data, row.current.number, of_data.number, older));
}

/// Either epoch is good while both stand in the metadata. No number is given twice: of a beginning
/// that was interrupted, the metadata or the data file knows.
Status BeginEpoch(MetadataStore& metadata, const File& data, const std::string& path,
                  Superblock* superblock) {
    const Result<EpochRow> row = ReadEpochRow(metadata);
    if (!row.ok()) return row.error();
    uint64_t latest = std::max(superblock->epoch.number, row.value().current.number);
    if (row.value().next) latest = std::max(latest, row.value().next->number);
    const Epoch next = NewEpoch(latest);

    Status status = Put(metadata, {superblock->epoch, next});
    if (!status.ok()) return status;
    superblock->epoch = next;
    const std::string bytes = EncodeSuperblock(*superblock);
    status = WriteAt(data, 0, std::string_view(bytes).substr(0, kSuperblockSector), path);
    if (status.ok()) status = SyncFile(data, path);
    if (!status.ok()) return status;
    return Put(metadata, {next, std::nullopt});
}

}  // namespace varve::cow
