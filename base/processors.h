// How many processors the process may use: not how many the machine has.
#pragma once

#include <string>

namespace varve {

/// The least of: processors that the caller's affinity allows, and what quotas of control groups
/// (cpu.max of version 2, cpu.cfs_quota_us of version 1; its own group's and those above it) let
/// it use, rounded up. At least 1. `root`: where /proc and /sys are, for tests.
unsigned AvailableProcessors(const std::string& root = "");

}  // namespace varve
