// The common epoch of a pool's two halves: whether the metadata and the data file are of the same
// time, and the beginning of a new one. docs/design/pool-directory.md has the reasons.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "base/result.h"
#include "cow/format/superblock.h"
#include "cow/store/files.h"
#include "cow/store/stores.h"

namespace varve::cow {

inline constexpr char kEpochKey[] = "Uepoch";

/// What the metadata know.
struct EpochRow {
    Epoch current;
    /// It was about to begin: the data file may be of either.
    std::optional<Epoch> next;
};
std::string EncodeEpochRow(const EpochRow& row);
/// kDamaged.
Result<EpochRow> DecodeEpochRow(std::string_view bytes);

/// The row; of a pool that has none, epoch 0. kDamaged; kIo.
Result<EpochRow> ReadEpochRow(MetadataStore& metadata);

/// kDamaged if the data file is of another time than the metadata. `pool` and `data` are paths, for
/// the message.
Status CheckEpoch(const EpochRow& row, const Epoch& of_data, const std::string& pool,
                  const std::string& data);

/// Begins an epoch in both halves. Durable; wherever it is interrupted, CheckEpoch() passes.
/// `data`: the data file at `path`, opened without O_DIRECT; its superblock is `*superblock`.
Status BeginEpoch(MetadataStore& metadata, const File& data, const std::string& path,
                  Superblock* superblock);

}  // namespace varve::cow
