// Content: what a sector holds, as a small number. The bytes are kept once, so that a model of
// thousands of sectors is cheap to copy and to compare.
// One thread.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string_view>
#include <unordered_map>

namespace varve::simulation {

inline constexpr uint64_t kSectorBytes = 512;

class Content {
  public:
    Content() = default;  // zeros

    /// `bytes`: kSectorBytes of them.
    static Content Of(const void* bytes) {
        const std::string_view view(static_cast<const char*>(bytes), kSectorBytes);
        if (view == Content().bytes()) return Content();
        const auto known = numbers_.find(view);
        if (known != numbers_.end()) return Content(known->second);
        Bytes& kept = kept_.emplace_back();
        std::memcpy(kept.data(), bytes, kSectorBytes);
        const auto number = static_cast<uint32_t>(kept_.size() - 1);
        numbers_.emplace(std::string_view(kept.data(), kSectorBytes), number);
        return Content(number);
    }

    std::string_view bytes() const { return {kept_[number_].data(), kSectorBytes}; }
    bool zeros() const { return number_ == 0; }
    bool operator==(const Content&) const = default;

  private:
    using Bytes = std::array<char, kSectorBytes>;
    explicit Content(uint32_t number) : number_(number) {}

    static inline std::deque<Bytes> kept_{Bytes{}};
    static inline std::unordered_map<std::string_view, uint32_t> numbers_{
        {std::string_view(kept_[0].data(), kSectorBytes), 0}};

    uint32_t number_ = 0;
};

}  // namespace varve::simulation
