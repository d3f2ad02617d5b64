#include "nbdserver/daemon/export_lists.h"

#include <utility>

namespace varve::nbdserver {

Task<std::shared_ptr<const ListReply>> ExportLists::Get() {
    for (;;) {
        co_await Hop(home_);
        Task<std::shared_ptr<const Names>> listing = pool_.ListExports();
        std::shared_ptr<const Names> names = co_await listing;
        co_await Hop(control_);
        if (newest_ && newest_names_.lock() == names) co_return newest_;
        if (!encoding_) {
            newest_.reset();
            if (lists_ < kListsMax) {
                Task<std::shared_ptr<const ListReply>> encoding = Encode(std::move(names));
                co_return co_await encoding;
            }
        }
        names.reset();
        co_await changed_.Wait();
    }
}

/// In steps of a piece, so that others have their turns.
Task<std::shared_ptr<const ListReply>> ExportLists::Encode(std::shared_ptr<const Names> names) {
    encoding_ = true;
    ++lists_;
    ++encoded_;
    ListEncoder encoder(bytes_max_);
    size_t pieces = 0;
    for (const cow::ExportEntry& entry : *names) {
        if (!encoder.Add(entry.name)) break;
        if (encoder.pieces() == pieces) continue;
        pieces = encoder.pieces();
        co_await Hop(control_);
    }
    const auto forget = [this](const ListReply* list) {
        delete list;
        --lists_;
        changed_.WakeAll();
    };
    std::shared_ptr<const ListReply> list(new ListReply(encoder.Finish()), forget);
    encoding_ = false;
    newest_ = list;
    newest_names_ = names;
    changed_.WakeAll();
    co_await Hop(home_);  // if these are the last to have them: there may be many to be freed
    names.reset();
    co_await Hop(control_);
    co_return list;
}

}  // namespace varve::nbdserver
