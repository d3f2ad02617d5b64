// varve: the command line for a running varved. Only the entry: everything else is in cli.h, where
// tests reach it.
// The offline check and attaching are programs of their own, varve-check and varve-attach: a script
// that takes snapshots shall not wait each time for their libraries to be loaded (measured for the
// storage engine's: 5 ms instead of 2).
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "admin/cli.h"
#include "base/priority.h"
#include "base/standard_streams.h"

namespace {

/// Becomes the program `name` beside this one; returns only if that is impossible.
varve::Error Become(const char* name, char** argv) {
    std::error_code error;
    const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
    const std::string program = (self.parent_path() / name).string();
    ::execv(program.c_str(), argv);
    return varve::MakeError(varve::ErrorKind::kFailed,
                            "cannot run " + program + ": " + std::strerror(errno) +
                                "; install it in the directory of varve");
}

}  // namespace

int main(int argc, char** argv) {
    varve::OccupyStandardStreams();
    const std::string verb = argc > 1 ? argv[1] : "";
    if (verb == "attach" || verb == "detach" || verb == "attached") {
        std::fprintf(stderr, "varve: %s\n", Become("varve-attach", argv).message.c_str());
        return varve::admin::ExitCodeOf(varve::ErrorKind::kFailed);
    }
    // Applications may be frozen while they wait for a snapshot.
    varve::PreferThisThread();
    // Without a program name there are no arguments either.
    return varve::admin::RunCli(
        std::vector<std::string>(argv + (argc > 0), argv + argc),
        [argv](const std::string&) -> varve::Result<varve::cow::CheckReport> {
            return Become("varve-check", argv);
        });
}
