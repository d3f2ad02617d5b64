// Leases: hands free blocks to disks, and sees to it that there are some: reads what is known to
// the store only, makes the data file grow, gives back what nobody needs. Not the book of what is
// free, which is allocator.h.
//
// Belongs to the home executor. What blocks runs on the loader, one step at a time; a region is
// provisioned ahead of demand, so that a writer rarely waits for the file system.
#pragma once

#include <deque>
#include <vector>

#include "base/sync.h"
#include "cow/core/core.h"
#include "cow/space/allocator.h"
#include "cow/space/page_reader.h"

namespace varve::cow {

class Leases {
  public:
    Leases(Core& core, Allocator& allocator);

    /// At most `most` free blocks of one region, which it shares with others. kNoSpace if there are
    /// none anywhere.
    Task<Result<std::vector<Extent>>> Take(uint64_t most);

    /// Opens regions, so that a commit which frees blocks of theirs reads nothing. Errors show when
    /// it does. REQUIRES: they are held.
    Task<void> Open(std::vector<uint64_t> regions);

    /// Nobody can reach these blocks any more: they may be taken again.
    void Release(const std::vector<Extent>& extents);

    /// Regions, at most, whose rows were not tried when others of their page could not be read.
    uint64_t untried() const { return untried_; }

    /// Waits for what runs in the background.
    Task<void> Idle();

  private:
    Task<Status> Provide(size_t wanted, bool urgent);
    Task<void> Learn(uint64_t* rows);
    bool MayReadOn() const;
    Task<void> ReadOn();
    Task<void> ReadPage(PageReader& reader);
    void KeepUnfinished(PageReader reader);
    Task<Status> OpenOne(uint64_t region);
    void Refilled();
    Task<Status> Grow();
    Task<Status> Reprovision(uint64_t region);
    Task<void> ProvideAhead();
    Task<void> GiveBack();

    Core& core_;
    Allocator& allocator_;
    AsyncMutex providing_;               // one at a time: a failing growth cuts the file back
    bool ahead_ = false;                 // ProvideAhead runs
    bool refused_ = false;               // the last attempt to provide found nothing
    bool giving_ = false;                // GiveBack runs
    std::deque<PageReader> unfinished_;  // of which some rows were not tried
    uint64_t untried_ = 0;               // those rows
    int64_t read_on_from_us_ = 0;        // not before
    Gate background_;
};

}  // namespace varve::cow
