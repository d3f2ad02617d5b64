// What fuzz targets share: a reader that turns an input's bytes into choices.
// Not a harness: libFuzzer calls LLVMFuzzerTestOneInput, or replay.cc does with the corpus.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace varve::fuzz {

/// Takes bytes from the front of an input; zeros when there are none left.
class Input {
  public:
    Input(const uint8_t* data, size_t size) : rest_(reinterpret_cast<const char*>(data), size) {}

    uint8_t Byte() {
        if (rest_.empty()) return 0;
        const auto byte = static_cast<uint8_t>(rest_.front());
        rest_.remove_prefix(1);
        return byte;
    }
    uint64_t Number(unsigned bytes) {
        uint64_t number = 0;
        while (bytes-- > 0) number = number << 8 | Byte();
        return number;
    }
    /// At most `most` bytes.
    std::string_view Bytes(size_t most) {
        const std::string_view bytes = rest_.substr(0, most);
        rest_.remove_prefix(bytes.size());
        return bytes;
    }
    std::string_view rest() const { return rest_; }
    bool empty() const { return rest_.empty(); }

  private:
    std::string_view rest_;
};

/// Nonempty lines of `text`.
inline std::vector<std::string> Lines(std::string_view text) {
    std::vector<std::string> lines;
    while (!text.empty()) {
        const std::string_view line = text.substr(0, text.find('\n'));
        if (!line.empty()) lines.emplace_back(line);
        text.remove_prefix(std::min(text.size(), line.size() + 1));
    }
    return lines;
}

}  // namespace varve::fuzz
