// ListReply: the answer to a LIST, encoded once and sent to many clients.
// Not who may have it when: it knows no pool and no threads.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace varve::nbdserver {

/// The head of a reply to an option; `length` bytes of data follow it.
void AppendReply(std::string& out, uint32_t option, uint32_t type, size_t length);
/// A whole reply that is an error.
void AppendErrorReply(std::string& out, uint32_t option, uint32_t type, std::string_view message);

struct ListReply {
    std::vector<std::string> pieces;  // of some 64 KiB; one after the other they are the answer
    uint64_t exports = 0;             // named in it; 0 if it is an error
};

class ListEncoder {
  public:
    /// An answer longer than `bytes_max` becomes an error.
    explicit ListEncoder(uint64_t bytes_max);

    /// In the order in which clients shall see them. False if they are too many by now: more need
    /// not be added.
    bool Add(std::string_view name);
    /// Pieces made so far: a large list is better made in steps.
    size_t pieces() const { return reply_.pieces.size(); }
    ListReply Finish();

  private:
    const uint64_t bytes_max_;
    uint64_t bytes_ = 0;
    ListReply reply_;
    std::string piece_;
};

}  // namespace varve::nbdserver
