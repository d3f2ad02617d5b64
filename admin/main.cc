// varve: the command line for a running varved. Only the entry: everything else is in cli.h, where
// tests reach it.
// The offline check and attaching are programs of their own, varve-check and varve-attach: a script
// that takes snapshots shall not wait each time for their libraries to be loaded (measured for the
// storage engine's: 5 ms instead of 2).
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "admin/arguments.h"
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
    // Without a program name there are no arguments either.
    const std::vector<std::string> words(argv + (argc > 0), argv + argc);
    const size_t at = varve::admin::FindVerbIn(words);
    const std::string verb = at < words.size() ? words[at] : "";
    if (verb == "attach" || verb == "detach" || verb == "attached") {
        // It wants its verb first.
        std::rotate(argv + 1, argv + 1 + at, argv + 2 + at);
        std::fprintf(stderr, "varve: %s\n", Become("varve-attach", argv).message.c_str());
        return varve::admin::ExitCodeOf(varve::ErrorKind::kFailed);
    }
    // Applications may be frozen while they wait for a snapshot.
    varve::PreferThisThread();
    return varve::admin::RunCli(
        words, [argv](const std::string&) -> varve::Result<varve::cow::CheckReport> {
            return Become("varve-check", argv);
        });
}
