#include "nbdserver/daemon/export_lists.h"

#include <utility>

namespace varve::nbdserver {
namespace {

constexpr size_t kWorkPerTurn = 10'000;  // names, or comparisons of names

uint64_t BytesOf(const ListReply& list) {
    uint64_t bytes = 0;
    for (const std::string& piece : list.pieces) bytes += piece.size();
    return bytes;
}

}  // namespace

Task<std::shared_ptr<const ListReply>> ExportLists::Get(access::Grants grants) {
    for (;;) {
        co_await Hop(home_);
        Task<std::shared_ptr<const Names>> listing = pool_.ListExports();
        std::shared_ptr<const Names> names = co_await listing;
        co_await Hop(control_);
        std::shared_ptr<const ListReply> there = Find(names, grants);
        if (there) co_return there;
        if (!encoding_) {
            newest_.reset();
            if (bytes_ + bytes_max_ <= kListsMax * bytes_max_) {
                Task<std::shared_ptr<const ListReply>> encoding =
                    Encode(std::move(names), std::move(grants));
                co_return co_await encoding;
            }
        }
        names.reset();
        co_await changed_.Wait();
    }
}

std::shared_ptr<const ListReply> ExportLists::Find(const std::shared_ptr<const Names>& names,
                                                   const access::Grants& grants) const {
    for (const Made& made : made_) {
        if (made.names.lock() == names && made.grants == grants) {
            if (std::shared_ptr<const ListReply> list = made.list.lock()) return list;
        }
    }
    return nullptr;
}

/// In steps, so that others have their turns.
Task<std::shared_ptr<const ListReply>> ExportLists::Encode(std::shared_ptr<const Names> names,
                                                           access::Grants grants) {
    encoding_ = true;
    ++encoded_;
    ListEncoder encoder(bytes_max_);
    size_t pieces = 0, work = 0;
    for (const cow::ExportEntry& entry : *names) {
        work += 1 + grants.patterns();
        if (grants.Of(entry.name) != access::Right::kNone && !encoder.Add(entry.name)) break;
        if (encoder.pieces() == pieces && work < kWorkPerTurn) continue;
        pieces = encoder.pieces();
        work = 0;
        co_await Hop(control_);
    }
    const auto forget = [this](const ListReply* list) {
        bytes_ -= BytesOf(*list);
        delete list;
        changed_.WakeAll();
    };
    std::shared_ptr<const ListReply> list(new ListReply(encoder.Finish()), forget);
    bytes_ += BytesOf(*list);
    encoding_ = false;
    newest_ = list;
    std::erase_if(made_, [](const Made& made) { return made.list.expired(); });
    made_.push_back({names, std::move(grants), list});
    changed_.WakeAll();
    co_await Hop(home_);  // if these are the last to have them: there may be many to be freed
    names.reset();
    co_await Hop(control_);
    co_return list;
}

}  // namespace varve::nbdserver
