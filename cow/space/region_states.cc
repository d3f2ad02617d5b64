#include "cow/space/region_states.h"

#include <algorithm>

namespace varve::cow {

RegionState RegionStates::Get(uint64_t region) const {
    const auto page = pages_.find(region / kPageRegions);
    if (page == pages_.end()) return RegionState::kUnknown;
    return page->second->states[region % kPageRegions];
}

void RegionStates::Set(uint64_t region, RegionState state) {
    const uint64_t number = region / kPageRegions;
    std::unique_ptr<Page>& page = pages_[number];
    if (!page) page = std::make_unique<Page>();
    RegionState& present = page->states[region % kPageRegions];
    if (present == state) return;
    if (present != RegionState::kUnknown) {
        --counts_[Index(present)];
        if (--page->counts[Index(present)] == 0) with_[Index(present)].erase(number);
    }
    present = state;
    if (state == RegionState::kUnknown) return;
    ++counts_[Index(state)];
    if (++page->counts[Index(state)] == 1) with_[Index(state)].insert(number);
}

std::optional<uint64_t> RegionStates::First(RegionState state) const {
    const std::set<uint64_t>& with = with_[Index(state)];
    if (with.empty()) return std::nullopt;
    const auto& states = pages_.at(*with.begin())->states;
    const auto found = std::find(states.begin(), states.end(), state);
    return *with.begin() * kPageRegions + static_cast<uint64_t>(found - states.begin());
}

std::optional<uint64_t> RegionStates::Last(RegionState state) const {
    const std::set<uint64_t>& with = with_[Index(state)];
    if (with.empty()) return std::nullopt;
    const auto& states = pages_.at(*with.rbegin())->states;
    const auto found = std::find(states.rbegin(), states.rend(), state);
    return *with.rbegin() * kPageRegions + static_cast<uint64_t>(states.rend() - found) - 1;
}

}  // namespace varve::cow
