// The end of the data file as the metadata knows it. A file that ends before that was cut off, and
// would read as zeros there once it grows again.
// Not for every start: it reads the rows of all regions beyond a given length.
#pragma once

#include "base/result.h"
#include "cow/store/stores.h"

namespace varve::cow {

/// Bytes of the regions that the pool's record counts: a file that was not cut off has as many,
/// but for regions that a crash took before anything in them was in use. 0 if the record is
/// unreadable, which whoever reads all of it reports.
Result<uint64_t> ProvisionedEnd(MetadataView& view);

/// The byte after the last one that is in use, by the regions' rows, the ring and journal rows;
/// `from` if that lies before it. kDamaged names an unreadable row.
Result<uint64_t> UsedEnd(MetadataView& view, uint64_t from);

}  // namespace varve::cow
