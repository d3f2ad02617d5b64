// varved: the server. Reads the settings, runs the daemon, turns errors into exit codes.
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "admin/cli.h"
#include "base/log.h"
#include "base/standard_streams.h"
#include "nbdserver/daemon/daemon.h"
#include "nbdserver/daemon/options.h"

namespace {

using varve::LogLevel;
using varve::nbdserver::Daemon;
using varve::nbdserver::Options;

int Fail(const varve::Error& error) {
    varve::Log(LogLevel::kError, error.message);
    return varve::admin::ExitCodeOf(error.kind);
}

/// None of these may end the server: it would leave without a commit. SIGHUP is the daemon's once
/// it runs; a write beyond RLIMIT_FSIZE is an error like others; the rest are what log rotation and
/// terminals send.
void IgnoreSignals() {
    for (const int signal :
         {SIGPIPE, SIGHUP, SIGXFSZ, SIGUSR1, SIGUSR2, SIGTTIN, SIGTTOU, SIGALRM}) {
        std::signal(signal, SIG_IGN);
    }
}

constexpr int kFlushLogMs = 100;  // of the 2 s that stopping may take

/// With far too few open files the start ends before it can tell how many it needs, perhaps in a
/// library that throws.
varve::Result<std::unique_ptr<Daemon>> Start(const Options& options) {
    varve::Error error;
    try {
        varve::Result<std::unique_ptr<Daemon>> daemon = Daemon::Start(options);
        if (daemon.ok()) return daemon;
        error = daemon.error();
    } catch (const std::exception& thrown) {
        error = varve::MakeError(varve::ErrorKind::kIo, thrown.what());
    }
    // The end: that of ENFILE, of all processes together, begins with the same words.
    const bool all = error.message.find(std::strerror(ENFILE)) != std::string::npos;
    if (!all && error.message.find(std::strerror(EMFILE)) != std::string::npos) {
        error.message += "; raise the limit on open files (LimitNOFILE=, ulimit -n)";
    }
    return error;
}

/// Those that the settings name, and that are read at the start.
varve::Status CheckFiles(const Options& options) {
    if (!options.tls.empty()) {
        const auto credentials = varve::nbdserver::tls::Credentials::Load(options.tls);
        if (!credentials.ok()) return credentials.error();
    }
    if (options.access.empty()) return varve::Status();
    return varve::nbdserver::access::Rules::Load(options.access).status();
}

int Serve(const Options& options) {
    IgnoreSignals();
    varve::Result<std::unique_ptr<Daemon>> daemon = Start(options);
    if (!daemon.ok()) return Fail(daemon.error());
    const varve::Status status = daemon.value()->Run();
    if (!status.ok()) return Fail(status.error());
    daemon.value().reset();
    varve::Log(LogLevel::kInfo, "stopped");
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    using namespace varve::nbdserver;
    varve::OccupyStandardStreams();
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
        const varve::Status status = CheckFiles(options);
        if (!status.ok()) return Fail(status.error());
        std::puts("the configuration is valid");
        return 0;
    }
    varve::SetLog(options.log_level, options.log_format);
    varve::StartLogThread();
    const int status = Serve(options);
    varve::FlushLog(kFlushLogMs);
    return status;
}
