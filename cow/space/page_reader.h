// PageReader: reads what the allocator's rows of a page of regions say, also where some of them
// cannot be read. Not what is made of it: leases.h.
#pragma once

#include <optional>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "cow/space/region_states.h"
#include "cow/store/stores.h"

namespace varve::cow {

/// One thread at a time. The store reads many rows together, and a cursor does not get past those
/// that it cannot read: the next one is placed behind them, further on each time it fails again.
/// The rows left out are read one by one at last. A device may try for many seconds before it gives
/// up a sector, and whoever needs a lease waits, so all this ends when time is up.
class PageReader {
  public:
    /// Of `regions` from the first of the page on.
    PageReader(uint64_t page, uint64_t regions) : page_(page), states_(regions), left_(regions) {}

    /// Reads on until each row was tried, or until some time after the first failure. Tries a row
    /// at least. `clock` may be null: then time is never up.
    void Read(MetadataView& view, Clock* clock);
    bool done() const { return left_ == 0; }

    uint64_t page() const { return page_; }
    uint64_t first() const { return page_ * RegionStates::kPageRegions; }
    /// Of each region: nothing if its row was not tried, kUnknown if it cannot be read.
    const std::vector<std::optional<RegionState>>& states() const { return states_; }
    uint64_t untried() const;
    /// Rows there are, with those that cannot be read or were not tried.
    uint64_t rows() const;
    const Status& why() const { return why_; }  // the first error, if there was one

  private:
    bool Step(MetadataView& view);
    Status ReadMany(MetadataView& view);
    Status ReadOne(MetadataView& view);

    const uint64_t page_;
    std::vector<std::optional<RegionState>> states_;
    uint64_t next_ = 0;  // where the next cursor is placed, in regions of the page
    uint64_t step_ = 0;  // so far is that behind where the last one failed
    uint64_t left_;      // once next_ is at the end: all from there on were tried
    Status why_;
};

}  // namespace varve::cow
