// varve attach, detach, attached: a disk as /dev/nbdN of this machine. A program of its own, which
// varve becomes: it needs libraries that varve, started for every command, shall not load.
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/wait.h>
#include <syslog.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <sstream>

#include "admin/cli.h"
#include "admin/render.h"
#include "attach/supervisor.h"
#include "attach/table.h"
#include "base/units.h"

namespace varve::attach {
namespace {

constexpr const char* kTable = "/etc/varve/attach";

std::string Directory() {
    const char* other = std::getenv("VARVE_ATTACH_STATE");
    return other ? other : "/run/varve/attach";
}

/// A disk's name stands for it on $VARVE_NBD, or on this machine.
std::string UriOf(const std::string& target) {
    if (target.find("://") != std::string::npos) return target;
    const char* server = std::getenv("VARVE_NBD");
    const std::string base = server ? server : "nbd://localhost";
    const size_t query = base.find('?');
    if (query == std::string::npos) return base + "/" + target;
    const std::string path = base.substr(0, query);
    return path + (path.ends_with('/') ? "" : "/") + target + base.substr(query);
}

Result<uint32_t> IndexOf(const std::string& device) {
    unsigned index = 0;
    int length = 0;
    const std::string name = device.substr(device.rfind('/') + 1);
    if (std::sscanf(name.c_str(), "nbd%u%n", &index, &length) == 1 &&
        static_cast<size_t>(length) == name.size()) {
        return index;
    }
    return MakeError(ErrorKind::kInvalid,
                     fmt::format("'{}' is no NBD device; give /dev/nbd0, for instance", device));
}

int Fail(const Error& error) {
    std::fprintf(stderr, "varve: %s\n", admin::OneLine(error.message).c_str());
    return admin::ExitCodeOf(error.kind);
}

std::string Sentence(const Record& record) {
    std::string text = fmt::format("{} ({}): {}", record.device(), record.uri, record.state());
    if (record.dead > 0) {
        text += fmt::format(", {} of {} connections are dead", record.dead, record.connections);
    }
    if (!record.error.empty()) text += ": " + record.error;
    return text;
}

void PrintDevice(const std::string& device, bool as_json) {
    if (as_json) {
        std::cout << boost::json::serialize(boost::json::object{{"device", device}}) << '\n';
    } else {
        std::cout << device << '\n';
    }
}

// ---- attach

struct AttachCommand {
    std::string target, device, table;
    AttachOptions options;
    bool foreground = false;

    void Define(CLI::App& app) {
        app.add_option("TARGET", target, "a disk, or an NBD URI: nbd://host/disk0");
        app.add_option("DEVICE", device, "/dev/nbdN; default: a free one");
        app.add_option("--connections", options.connections, "connections to the server")
            ->check(CLI::Range(1, 16))
            ->capture_default_str();
        app.add_flag("--read-only", options.read_only, "the device cannot be written");
        app.add_option("--block-size", options.block_size,
                       "the device's sector size; partition tables and XFS are bound to it")
            ->check(CLI::IsMember({512, 1024, 2048, 4096}))
            ->capture_default_str();
        app.add_option("--io-timeout", options.io_timeout_s,
                       "seconds without an answer until a request is sent again")
            ->check(CLI::Range(1, 3600))
            ->capture_default_str();
        app.add_option("--give-up", options.give_up_s,
                       "seconds without a connection until I/O fails; 0: wait for ever")
            ->capture_default_str();
        app.add_option("--name", options.name, "also appears as /dev/varve/NAME");
        app.add_option("--table", table,
                       fmt::format("take target and options of this name from {}", kTable));
        app.add_flag("--foreground", foreground, "do not become a daemon (for systemd)");
    }

    Status Complete() {
        if (target.empty()) {
            return MakeError(ErrorKind::kInvalid,
                             "say what to attach: varve attach DISK, or an NBD URI");
        }
        options.uri = UriOf(target);
        if (device.empty()) return Status();
        const Result<uint32_t> index = IndexOf(device);
        if (!index.ok()) return index.error();
        options.index = index.value();
        return Status();
    }
};

/// What the starter waits for: "OK device" or a message; then the child goes on alone.
class Report {
  public:
    explicit Report(int fd) : fd_(fd) {}
    void Send(const std::string& line) {
        if (fd_ < 0) return;
        const ssize_t written = ::write(fd_, line.data(), line.size());
        (void)written;  // nobody reads: then nobody waits
        ::close(std::exchange(fd_, -1));
    }

  private:
    int fd_;
};

int Supervise(const AttachCommand& command, int report_fd) {
    Report report(report_fd);
    Supervisor supervisor(command.options, Records(Directory()));
    Status s = supervisor.Start();
    if (!s.ok()) {
        report.Send(fmt::format("{} {}\n", static_cast<int>(s.error().kind), s.error().message));
        return report_fd < 0 ? Fail(s.error()) : 1;
    }
    report.Send("OK " + supervisor.record().device() + "\n");
    ::sd_notifyf(0, "READY=1\nSTATUS=%s", Sentence(supervisor.record()).c_str());
    ::openlog("varve-attach", LOG_PID, LOG_DAEMON);
    s = supervisor.Run([](const Record& record) {
        const std::string text = Sentence(record);
        ::sd_notifyf(0, "STATUS=%s", text.c_str());
        ::syslog(record.dead > 0 ? LOG_WARNING : LOG_NOTICE, "%s", text.c_str());
    });
    return s.ok() ? 0 : Fail(s.error());
}

[[noreturn]] void BecomeDaemon(const AttachCommand& command, int report_fd) {
    ::setsid();
    const int null = ::open("/dev/null", O_RDWR);
    for (const int fd : {0, 1, 2}) ::dup2(null, fd);
    ::close(null);
    std::_Exit(Supervise(command, report_fd));
}

int Attach(AttachCommand& command, bool as_json) {
    const Status s = command.Complete();
    if (!s.ok()) return Fail(s.error());
    if (command.foreground) return Supervise(command, -1);
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return Fail(SystemError(errno, "pipe"));
    const pid_t child = ::fork();
    if (child < 0) return Fail(SystemError(errno, "fork"));
    if (child == 0) {
        ::close(ends[0]);
        BecomeDaemon(command, ends[1]);
    }
    ::close(ends[1]);
    std::string answer;
    char part[512];
    for (ssize_t n; (n = ::read(ends[0], part, sizeof part)) > 0;) {
        answer.append(part, static_cast<size_t>(n));
    }
    while (!answer.empty() && answer.back() == '\n') answer.pop_back();
    if (answer.starts_with("OK ")) {
        PrintDevice(answer.substr(3), as_json);
        return 0;
    }
    ::waitpid(child, nullptr, 0);
    int kind = 0, length = 0;
    if (std::sscanf(answer.c_str(), "%d %n", &kind, &length) != 1) {
        return Fail(MakeError(ErrorKind::kFailed,
                              "the supervisor ended; the system log may say "
                              "why"));
    }
    return Fail(MakeError(static_cast<ErrorKind>(kind), answer.substr(length)));
}

// ---- detach

/// Whatever holds the device, a file system, LVM or swap, is asked for nothing: it must let go.
Status CheckUnused(const Record& record) {
    const int fd = ::open(record.device().c_str(),
                          (record.read_only ? O_RDONLY : O_RDWR) | O_EXCL | O_CLOEXEC);
    if (fd < 0 && errno == EBUSY) {
        return MakeError(ErrorKind::kBusy,
                         record.device() +
                             " is in use; unmount it first, or say --force, which "
                             "makes its I/O fail");
    }
    if (fd < 0) return SystemError(errno, "cannot open " + record.device());
    Status s;
    if (record.dead == record.connections) {
        s = MakeError(ErrorKind::kBusy,
                      record.device() +
                          " has no connection; wait until the server is back, or say "
                          "--force, which loses what is not written yet");
    } else if (::fsync(fd) != 0) {
        s = SystemError(errno, "cannot flush " + record.device() + "; --force detaches it anyway");
    }
    ::close(fd);
    return s;
}

int Detach(const std::string& device, bool force, bool as_json) {
    const Result<uint32_t> index = IndexOf(device);
    if (!index.ok()) return Fail(index.error());
    const Records records(Directory());
    const Result<Record> record = records.Read(index.value());
    if (!record.ok()) return Fail(record.error());
    if (!force) {
        const Status s = CheckUnused(record.value());
        if (!s.ok()) return Fail(s.error());
    }
    int lock = records.Lock(index.value(), false);
    if (lock < 0) {
        if (::kill(record.value().pid, SIGTERM) != 0) {
            return Fail(SystemError(errno, "cannot tell the supervisor"));
        }
        lock = records.Lock(index.value(), true);  // until it is gone
    } else {
        const Result<std::unique_ptr<NbdDriver>> driver = NbdDriver::Open();
        if (!driver.ok()) return Fail(driver.error());
        const Status s = driver.value()->Disconnect(index.value());
        if (!s.ok() && !force) return Fail(s.error());
        records.Remove(index.value());
    }
    ::close(lock);
    if (as_json) PrintDevice(record.value().device(), true);
    return 0;
}

// ---- attached

int Attached(bool as_json) {
    const std::vector<Record> records = Records(Directory()).All();
    if (as_json) {
        boost::json::array list;
        for (const Record& record : records) list.push_back(ToJson(record));
        std::cout << boost::json::serialize(boost::json::object{{"attached", list}}) << '\n';
        return 0;
    }
    std::vector<std::vector<std::string>> rows = {
        {"DEVICE", "URI", ">SIZE", "STATE", ">CONNECTIONS", ">RECONNECTS", "LAST ERROR"}};
    for (const Record& record : records) {
        rows.push_back({record.device(), record.uri, FormatSize(record.size), record.state(),
                        fmt::format("{}/{}", record.connections - record.dead, record.connections),
                        std::to_string(record.reconnects),
                        record.error.empty() ? "-" : admin::OneLine(record.error)});
    }
    std::cout << admin::RenderTable(rows);
    return 0;
}

/// For udev: the name of a kernel device, to make a link of.
int NameOf(const std::string& device) {
    const Result<uint32_t> index = IndexOf(device);
    if (!index.ok()) return 1;
    const Result<Record> record = Records(Directory()).Read(index.value());
    if (!record.ok() || record.value().name.empty()) return 1;
    std::cout << record.value().name << '\n';
    return 0;
}

// ---- the command line

/// Options of every verb of varve.
struct Globals {
    bool json = false;
    bool yes = false;   // nothing is asked
    std::string admin;  // no server is spoken to there

    void Define(CLI::App& app) {
        app.add_flag("--json", json, "print one JSON document instead of text");
        app.add_flag("--yes,-y", yes, "do not ask (there is nothing to ask here)");
        app.add_option("--admin", admin, "the server's admin socket (not needed here)");
        app.set_version_flag("--version", "varve " VARVE_VERSION);
    }
};

struct Commands {
    CLI::App app{"Varve: disks of an NBD server as devices of this machine"};
    AttachCommand attach;
    CLI::App* attach_app = app.add_subcommand("attach", "make a disk a device, and keep it one");
    std::string device;
    bool force = false;
    CLI::App* detach_app = app.add_subcommand("detach", "end it");
    Globals globals;
    std::string name_of;
    CLI::App* attached_app = app.add_subcommand("attached", "what is attached, and how it is");

    Commands() {
        app.require_subcommand(1);
        attach.Define(*attach_app);
        detach_app->add_option("DEVICE", device, "/dev/nbdN")->required();
        detach_app->add_flag("--force", force, "even if it is in use or has no connection");
        attached_app->add_option("--name-of", name_of, "print the name of a device (for udev)");
        for (CLI::App* each : {attach_app, detach_app, attached_app}) globals.Define(*each);
    }

    /// 0, or the exit code.
    int Parse(std::vector<std::string> words) {
        std::reverse(words.begin(), words.end());  // as CLI11 wants it
        try {
            app.parse(words);
            return 0;
        } catch (const CLI::Success& e) {
            app.exit(e);
            std::exit(0);
        } catch (const CLI::ParseError& e) {
            std::fprintf(stderr, "varve: %s; see 'varve %s --help'\n", e.what(),
                         words.empty() ? "" : words.back().c_str());
            return admin::ExitCodeOf(ErrorKind::kInvalid);
        }
    }
};

/// The words of the table's line in the place of the command's own.
Result<std::vector<std::string>> FromTable(const std::string& name, bool foreground) {
    std::ifstream file(kTable);
    if (!file) {
        return MakeError(ErrorKind::kNotFound, fmt::format("there is no table {}", kTable));
    }
    std::stringstream text;
    text << file.rdbuf();
    Result<std::vector<std::string>> words = FindInTable(text.str(), name, kTable);
    if (!words.ok()) return words;
    words.value().insert(words.value().begin(), "attach");
    words.value().insert(words.value().end(), {"--name", name});
    if (foreground) words.value().push_back("--foreground");
    return words;
}

int Run(const std::vector<std::string>& words) {
    auto commands = std::make_unique<Commands>();
    if (const int code = commands->Parse(words); code != 0) return code;
    const bool json_before = commands->globals.json;  // of a table's line
    if (!commands->attach.table.empty()) {
        const Result<std::vector<std::string>> line =
            FromTable(commands->attach.table, commands->attach.foreground);
        if (!line.ok()) return Fail(line.error());
        commands = std::make_unique<Commands>();
        if (const int code = commands->Parse(line.value()); code != 0) return code;
    }
    const bool as_json = commands->globals.json || json_before;
    if (commands->attach_app->parsed()) return Attach(commands->attach, as_json);
    if (commands->detach_app->parsed()) return Detach(commands->device, commands->force, as_json);
    return commands->name_of.empty() ? Attached(as_json) : NameOf(commands->name_of);
}

}  // namespace
}  // namespace varve::attach

int main(int argc, char** argv) {
    return varve::attach::Run(std::vector<std::string>(argv + (argc > 0), argv + argc));
}
