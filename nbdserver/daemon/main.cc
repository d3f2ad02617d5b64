// varved: the server. Reads the settings, runs the daemon, turns errors into exit codes.
#include <sys/resource.h>

#include <csignal>
#include <cstdio>
#include <string>
#include <vector>

#include "admin/cli.h"
#include "base/log.h"
#include "nbdserver/daemon/daemon.h"
#include "nbdserver/daemon/options.h"

namespace {

using varve::LogLevel;

int Fail(const varve::Error& error) {
    varve::Log(LogLevel::kError, error.message);
    return varve::admin::ExitCodeOf(error.kind);
}

/// Each client costs a descriptor: take as many as the system grants.
void RaiseDescriptorLimit() {
    rlimit limit{};
    if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    limit.rlim_cur = limit.rlim_max;
    if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) {
        varve::Log(LogLevel::kWarning, "cannot raise the limit on open files");
    }
}

}  // namespace

int main(int argc, char** argv) {
    using namespace varve::nbdserver;
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    const varve::Result<Options> parsed = ParseOptions(arguments);
    if (!parsed.ok()) return Fail(parsed.error());
    const Options& options = parsed.value();
    if (options.help) {
        std::fputs(HelpText().c_str(), stdout);
        return 0;
    }
    if (options.version) {
        std::puts("varved " VARVE_VERSION);
        return 0;
    }
    if (options.check_config) {
        std::puts("the configuration is valid");
        return 0;
    }
    varve::SetLog(options.log_level, options.log_format);
    std::signal(SIGPIPE, SIG_IGN);
    RaiseDescriptorLimit();
    varve::Result<std::unique_ptr<Daemon>> daemon = Daemon::Start(options);
    if (!daemon.ok()) return Fail(daemon.error());
    const varve::Status status = daemon.value()->Run();
    if (!status.ok()) return Fail(status.error());
    daemon.value().reset();
    varve::Log(LogLevel::kInfo, "stopped");
    return 0;
}
