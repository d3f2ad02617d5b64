// Content: what a sector holds, as a small number. The bytes are kept once, so that a model of
// thousands of sectors is cheap to copy and to compare.
// One thread.
#pragma once

#include <array>
#include <boost/unordered/unordered_flat_map.hpp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string_view>

namespace varve::simulation {

inline constexpr uint64_t kSectorBytes = 512;

class Content {
  public:
    Content() = default;  // zeros

    /// `bytes`: kSectorBytes of them.
    static Content Of(const void* bytes) {
        const std::string_view view(static_cast<const char*>(bytes), kSectorBytes);
        if (view == Content().bytes()) return Content();
        const auto number = static_cast<uint32_t>(kept_.size());
        for (uint64_t hash = Hash(view);; ++hash) {
            const auto [known, added] = numbers_.try_emplace(hash, number);
            if (added) break;
            if (Content(known->second).bytes() == view) return Content(known->second);
        }
        std::memcpy(kept_.emplace_back().data(), bytes, kSectorBytes);
        return Content(number);
    }

    std::string_view bytes() const { return {kept_[number_].data(), kSectorBytes}; }
    bool zeros() const { return number_ == 0; }
    bool operator==(const Content&) const = default;

  private:
    using Bytes = std::array<char, kSectorBytes>;
    explicit Content(uint32_t number) : number_(number) {}
    static uint64_t Hash(std::string_view bytes) {
        uint64_t hash = 0;
        for (size_t i = 0; i < kSectorBytes; i += sizeof(uint64_t)) {
            uint64_t word = 0;
            std::memcpy(&word, bytes.data() + i, sizeof(word));
            hash = (hash ^ word) * 0x9E37'79B9'7F4A'7C15;
            hash ^= hash >> 32;
        }
        return hash;
    }

    static inline std::deque<Bytes> kept_{Bytes{}};
    static inline boost::unordered_flat_map<uint64_t, uint32_t> numbers_;  // by Hash(), or after it

    uint32_t number_ = 0;
};

}  // namespace varve::simulation
