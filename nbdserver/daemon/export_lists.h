// ExportLists: the answers to LIST. Each is encoded once for a state of the catalog and what may be
// seen of it, and shared by all clients that take it. Not the sending, and not the names: those are
// the pool's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "base/sync.h"
#include "base/task.h"
#include "cow/pool/pool.h"
#include "nbdserver/access/rules.h"
#include "nbdserver/daemon/control.h"
#include "nbdserver/negotiation/list_reply.h"

namespace varve::nbdserver {

/// Lives on the control thread.
class ExportLists {
  public:
    /// At most so many answers of the largest size exist at a time; or more smaller ones.
    static constexpr uint64_t kListsMax = 4;

    /// `bytes_max` of one answer. `pool` lives on `home`.
    ExportLists(Control& control, Executor& home, cow::Pool& pool, uint64_t bytes_max)
        : control_(control), home_(home), pool_(pool), bytes_max_(bytes_max), changed_(control) {}

    /// The exports of now that somebody with `grants` may open. If that is to be encoded and
    /// clients still take kListsMax others, it waits for one of those to end, by taking it or by
    /// its deadline.
    Task<std::shared_ptr<const ListReply>> Get(access::Grants grants = {});

    uint64_t encoded() const { return encoded_; }  // so far, for tests

  private:
    using Names = std::vector<cow::ExportEntry>;
    struct Made {
        std::weak_ptr<const Names> names;
        access::Grants grants;
        std::weak_ptr<const ListReply> list;
    };
    std::shared_ptr<const ListReply> Find(const std::shared_ptr<const Names>& names,
                                          const access::Grants& grants) const;
    Task<std::shared_ptr<const ListReply>> Encode(std::shared_ptr<const Names> names,
                                                  access::Grants grants);

    Control& control_;
    Executor& home_;
    cow::Pool& pool_;
    const uint64_t bytes_max_;
    uint64_t bytes_ = 0;  // of all that exist
    uint64_t encoded_ = 0;
    bool encoding_ = false;
    WaitList changed_;                         // the newest, or how many there are
    std::vector<Made> made_;                   // that exist, and perhaps some that did
    std::shared_ptr<const ListReply> newest_;  // of those: kept when nobody takes it
};

}  // namespace varve::nbdserver
