// The table of disks to attach at boot, /etc/varve/attach: `NAME TARGET [OPTION...]` a line.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"

namespace varve::attach {

/// A line's words behind its name: what `varve attach` takes. '#' begins a comment. kNotFound if no
/// line has the name, kInvalid names a line that has no target. `path` is for messages.
Result<std::vector<std::string>> FindInTable(std::string_view text, std::string_view name,
                                             const std::string& path);

}  // namespace varve::attach
