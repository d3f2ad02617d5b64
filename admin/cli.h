// The varve command line: a verb becomes calls on the admin socket, the result text or JSON.
// Not the grammar (arguments.h) nor the looks (render.h).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "base/result.h"
#include "cow/pool/pool.h"

namespace varve::admin {

/// Exit codes of `varve`; a contract.
enum ExitCode {
    kExitDone = 0,
    kExitFailed = 1,
    kExitUsage = 2,
    kExitNotFound = 3,
    kExitExists = 4,
    kExitBusy = 5,
    kExitNoSpace = 6,
    kExitUnreachable = 7,
    kExitDamaged = 8,
};

ExitCode ExitCodeOf(ErrorKind kind);

/// Verifies the pool in a directory that no server has open; kBusy if one has.
using OfflineCheck = std::function<Result<cow::CheckReport>(const std::string& directory)>;

/// Runs `varve ARGUMENTS`: reads standard input if it has to ask, writes results to standard
/// output and one line to standard error if something is wrong. Returns the exit code.
int RunCli(const std::vector<std::string>& arguments, const OfflineCheck& check_offline);

}  // namespace varve::admin
