#pragma once

#include <algorithm>
#include <vector>

namespace varve {

/// Sorts, and leaves each value once.
template <typename T>
void SortUnique(std::vector<T>& values) {
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
}

}  // namespace varve
