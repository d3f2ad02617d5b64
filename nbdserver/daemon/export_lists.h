// ExportLists: the answers to LIST. Each is encoded once for a state of the catalog, and shared by
// all clients that take it. Not the sending, and not the names: those are the pool's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/sync.h"
#include "base/task.h"
#include "cow/pool/pool.h"
#include "nbdserver/daemon/control.h"
#include "nbdserver/negotiation/list_reply.h"

namespace varve::nbdserver {

/// Lives on the control thread.
class ExportLists {
  public:
    /// At most this many answers of different states exist at a time.
    static constexpr uint64_t kListsMax = 4;

    /// `bytes_max` of one answer. `pool` lives on `home`.
    ExportLists(Control& control, Executor& home, cow::Pool& pool, uint64_t bytes_max)
        : control_(control), home_(home), pool_(pool), bytes_max_(bytes_max), changed_(control) {}

    /// The exports of now. If names have changed and clients still take kListsMax older answers, it
    /// waits for one of those to end, by taking it or by its deadline.
    Task<std::shared_ptr<const ListReply>> Get();

    uint64_t encoded() const { return encoded_; }  // so far, for tests

  private:
    using Names = std::vector<cow::ExportEntry>;
    Task<std::shared_ptr<const ListReply>> Encode(std::shared_ptr<const Names> names);

    Control& control_;
    Executor& home_;
    cow::Pool& pool_;
    const uint64_t bytes_max_;
    uint64_t lists_ = 0;  // that exist
    uint64_t encoded_ = 0;
    bool encoding_ = false;
    WaitList changed_;  // the newest, or how many there are
    std::weak_ptr<const Names> newest_names_;
    std::shared_ptr<const ListReply> newest_;  // of those
};

}  // namespace varve::nbdserver
