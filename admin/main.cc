// varve: the command line for a running varved. Only the entry: everything else is in cli.h, where
// tests reach it.
// The offline check is a program of its own, varve-check: a script that takes snapshots shall not
// wait each time for the storage engine's library to be loaded (measured: 5 ms instead of 2).
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "admin/cli.h"
#include "base/priority.h"

namespace {

/// Becomes the varve-check beside this program; returns only if that is impossible.
varve::Error BecomeCheck(char** argv) {
    std::error_code error;
    const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
    const std::string program = (self.parent_path() / "varve-check").string();
    ::execv(program.c_str(), argv);
    return varve::MakeError(varve::ErrorKind::kFailed,
                            "cannot run " + program + ": " + std::strerror(errno) +
                                "; install it in the directory of varve");
}

}  // namespace

int main(int argc, char** argv) {
    // Applications may be frozen while they wait for a snapshot.
    varve::PreferThisThread();
    // Without a program name there are no arguments either.
    return varve::admin::RunCli(
        std::vector<std::string>(argv + (argc > 0), argv + argc),
        [argv](const std::string&) -> varve::Result<varve::cow::CheckReport> {
            return BecomeCheck(argv);
        });
}
