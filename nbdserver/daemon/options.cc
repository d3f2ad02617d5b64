#include "nbdserver/daemon/options.h"

#include <fmt/format.h>

#include <charconv>
#include <fstream>
#include <set>

#include "base/units.h"

namespace varve::nbdserver {
namespace {

enum class Form { kFlag, kSwitch, kOnce, kRepeatable };

/// One setting: `--name VALUE` on the command line, `name = VALUE` in the file. A flag has no
/// value, and is not for the file; a switch is `--name` there, for `name = on`.
struct Setting {
    const char* name;
    const char* value;  // as the help text calls it
    Form form;
    Status (*set)(Options&, std::string_view);
    const char* help;
    void (*clear)(Options&) = nullptr;  // of repeatable ones
};

template <typename T>
Status SetCount(T& field, std::string_view text, uint64_t least, uint64_t most) {
    uint64_t number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    const bool whole = error == std::errc() && end == text.data() + text.size();
    if (!whole || number < least || number > most) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("'{}' is not a number from {} to {}", text, least, most));
    }
    field = static_cast<T>(number);
    return Status();
}

template <typename T>
Status SetSize(T& field, std::string_view text, uint64_t least, uint64_t most) {
    const Result<uint64_t> size = ParseSize(text);
    if (!size.ok()) return size.error();
    if (size.value() < least || size.value() > most) {
        return MakeError(ErrorKind::kInvalid, fmt::format("'{}' is not a size from {} to {}", text,
                                                          FormatSize(least), FormatSize(most)));
    }
    field = static_cast<T>(size.value());
    return Status();
}

Status SetText(std::string& field, std::string_view text) {
    if (text.empty()) return MakeError(ErrorKind::kInvalid, "the value is empty");
    field = text;
    return Status();
}

using Text = std::string_view;
constexpr uint64_t kKiB = 1 << 10, kMiB = 1 << 20, kTiB = uint64_t{1} << 40;

const Setting kSettings[] = {
    {"pool", "DIR", Form::kOnce, [](Options& o, Text t) { return SetText(o.pool, t); },
     "the pool; an empty or absent directory becomes a new one"},
    {"data", "PATH", Form::kOnce, [](Options& o, Text t) { return SetText(o.data, t); },
     "data file or block device of a new pool (default DIR/data)"},
    {"listen", "HOST:PORT", Form::kRepeatable,
     [](Options& o, Text t) {
         Result<TcpAddress> address = ParseTcpAddress(t);
         if (address.ok()) o.listen.push_back(address.value());
         return address.status();
     },
     "NBD over TCP; [::1]:PORT for IPv6, port 0 for a free one; repeatable\n"
     "(default 127.0.0.1:10809, without --unix and sockets of systemd's);\n"
     "HOST:PORT,tls=off|allow|require,read-only: what its clients may do (tls: require if\n"
     "there are certificates or keys, else off)",
     [](Options& o) { o.listen.clear(); }},
    {"unix", "PATH", Form::kRepeatable,
     [](Options& o, Text t) {
         Result<UnixAddress> address = ParseUnixAddress(t);
         if (!address.ok()) return address.status();
         o.listen_unix.push_back(std::move(address.value()));
         return Status();
     },
     "NBD over a unix socket; repeatable; PATH,tls=off|allow|require,read-only as above\n"
     "(tls: allow if there are certificates or keys, else off)",
     [](Options& o) { o.listen_unix.clear(); }},
    {"tls-certificates", "DIR", Form::kOnce,
     [](Options& o, Text t) { return SetText(o.tls.certificates, t); },
     "TLS with server-cert.pem and server-key.pem of DIR; SIGHUP reads them again"},
    {"tls-psk", "FILE", Form::kOnce, [](Options& o, Text t) { return SetText(o.tls.psk, t); },
     "TLS with pre-shared keys, USER:HEXKEY a line as psktool writes them; SIGHUP likewise"},
    {"tls-verify-peer", "", Form::kSwitch,
     [](Options& o, Text t) {
         o.tls.verify_peer = t == "on";
         if (o.tls.verify_peer || t == "off") return Status();
         return Status(MakeError(ErrorKind::kInvalid, fmt::format("'{}' is not on or off", t)));
     },
     "clients without pre-shared key must show a certificate of DIR/ca-cert.pem's that is\n"
     "not in DIR/ca-crl.pem"},
    {"access", "FILE", Form::kOnce, [](Options& o, Text t) { return SetText(o.access, t); },
     "who may open which exports, a rule a line: WHO... EXPORT... read-only|read-write, with\n"
     "WHO any, address=RANGE, certificate=NAME, psk=USER or uid=NUMBER; others may nothing;\n"
     "SIGHUP reads it again (default: everybody may open everything)"},
    {"admin", "PATH", Form::kOnce, [](Options& o, Text t) { return SetText(o.admin, t); },
     "admin socket (default DIR/admin.sock)"},
    {"threads", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.threads, t, 1, 1024); },
     "data-plane threads (default: one per CPU that quotas and affinity allow)"},
    {"poll", "US", Form::kOnce, [](Options& o, Text t) { return SetCount(o.poll_us, t, 0, 1000); },
     "microseconds for which a thread looks for the next request of a client that has few\n"
     "under way, before it sleeps (default 50; with one CPU it never does)"},
    {"cache", "direct|buffered", Form::kOnce,
     [](Options& o, Text t) {
         o.direct = t == "direct";
         if (o.direct || t == "buffered") return Status();
         return Status(
             MakeError(ErrorKind::kInvalid, fmt::format("'{}' is not direct or buffered", t)));
     },
     "O_DIRECT (default) or the page cache"},
    {"force-epoch", "", Form::kFlag,
     [](Options& o, Text) {
         o.force_epoch = true;
         return Status();
     },
     "opens a pool although its data file and metadata come from different copies: disks may\n"
     "show each other's data; see docs/operations.md"},
    {"map-cache", "SIZE", Form::kOnce,
     [](Options& o, Text t) { return SetSize(o.pool_options.map_cache_bytes, t, kMiB, kTiB); },
     "memory of the block-map cache (default 256M)"},
    {"journal", "SIZE", Form::kOnce,
     [](Options& o, Text t) { return SetSize(o.pool_options.ring_bytes, t, kMiB, 1024 * kMiB); },
     "of the data file, the journal: a sixteenth of the pool at most. It may grow, when the "
     "server\n"
     "starts, and never gets smaller (default 64M)"},
    {"config", "FILE", Form::kOnce, [](Options& o, Text t) { return SetText(o.config, t); },
     "the same settings, one `name = value` a line, # for comments"},
    {"check-config", "", Form::kFlag,
     [](Options& o, Text) {
         o.check_config = true;
         return Status();
     },
     "reads the settings and the files they name and exits"},
    {"log-format", "text|json", Form::kOnce,
     [](Options& o, Text t) {
         const Result<LogFormat> format = ParseLogFormat(t);
         if (format.ok()) o.log_format = format.value();
         return format.status();
     },
     "form of the lines on stderr (default text)"},
    {"log-level", "LEVEL", Form::kOnce,
     [](Options& o, Text t) {
         const Result<LogLevel> level = ParseLogLevel(t);
         if (level.ok()) o.log_level = level.value();
         return level.status();
     },
     "debug, info (default), warning or error"},
    {"version", "", Form::kFlag,
     [](Options& o, Text) {
         o.version = true;
         return Status();
     },
     "prints the version"},
    {"help", "", Form::kFlag,
     [](Options& o, Text) {
         o.help = true;
         return Status();
     },
     "prints this"},

    // Limits.
    {"capacity", "SIZE", Form::kOnce,
     [](Options& o, Text t) {
         return SetSize(o.pool_options.capacity_max, t, 64 * kMiB, cow::kDiskBytesMax);
     },
     "most bytes of the data file (default: what the device holds)"},
    {"disks-max", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.pool_options.disks_max, t, 1, 1'000'000); },
     "disks in the pool (default 10000)"},
    {"snapshots-max", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.pool_options.snapshots_max, t, 1, 10'000'000); },
     "snapshots of one disk (default 100000)"},
    {"disk-size-max", "SIZE", Form::kOnce,
     [](Options& o, Text t) {
         return SetSize(o.pool_options.disk_bytes_max, t, cow::kBlockBytes, cow::kDiskBytesMax);
     },
     "size of one disk (default 256P)"},
    {"commit-interval", "MS", Form::kOnce,
     [](Options& o, Text t) {
         return SetCount(o.pool_options.commit_interval_ms, t, 10, 3'600'000);
     },
     "how long a write without flush may wait for its commit (default 1000)"},
    {"metadata-cache", "SIZE", Form::kOnce,
     [](Options& o, Text t) { return SetSize(o.metadata_cache_bytes, t, kMiB, kTiB); },
     "memory of RocksDB's block cache (default 32M)"},
    {"negotiation-timeout", "S", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.negotiation_timeout_s, t, 1, 3600); },
     "seconds a client has to negotiate (default 10)"},
    {"negotiating-max", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.negotiating_max, t, 1, 100'000); },
     "clients that negotiate at a time; more wait (default 100)"},
    {"waiting-max", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.waiting_max, t, 1, 100'000); },
     "clients that wait for the same export while the device hangs; more are refused\n"
     "(default 100; in all at most half of --connections-max)"},
    {"connections-max", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.connections_max, t, 1, 1'000'000); },
     "connections in all; more are closed at once (default 10000)"},
    {"options-max", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.negotiation.options_max, t, 8, 1'000'000); },
     "options in one negotiation (default 32)"},
    {"option-size-max", "SIZE", Form::kOnce,
     [](Options& o, Text t) { return SetSize(o.negotiation.option_bytes_max, t, 4200, 64 * kKiB); },
     "data of one option (default 8K)"},
    {"list-size-max", "SIZE", Form::kOnce,
     [](Options& o, Text t) {
         return SetSize(o.negotiation.list_bytes_max, t, 4 * kKiB, 64 * kMiB);
     },
     "answer to a LIST (default 4M)"},
    {"requests-max", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.connection.requests_max, t, 1, 65536); },
     "requests in flight on one connection (default 1024)"},
    {"connection-memory", "SIZE", Form::kOnce,
     [](Options& o, Text t) { return SetSize(o.connection.bytes_max, t, kMiB, kTiB); },
     "payloads in flight on one connection (default 64M)"},
    {"request-memory", "SIZE", Form::kOnce,
     [](Options& o, Text t) { return SetSize(o.bytes_in_flight_max, t, 64 * kMiB, kTiB); },
     "payloads in flight in all (default 1G)"},
    {"stall-timeout", "S", Form::kOnce,
     [](Options& o, Text t) {
         uint64_t seconds = 0;
         const Status status = SetCount(seconds, t, 1, 3600);
         if (status.ok()) o.connection.stall_ms_max = seconds * 1000;
         return status;
     },
     "seconds that a client may hold memory others wait for, and do nothing (default 5)"},
    {"peer-timeout", "S", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.peer_timeout_s, t, 3, 86'400); },
     "seconds until a TCP client is gone of whose machine nothing is heard (default 60)"},
    {"admin-connections-max", "N", Form::kOnce,
     [](Options& o, Text t) { return SetCount(o.admin_connections_max, t, 1, 10'000); },
     "connections to the admin socket (default 128)"},
};

const Setting* Find(std::string_view name) {
    for (const Setting& setting : kSettings) {
        if (name == setting.name) return &setting;
    }
    return nullptr;
}

/// Sets what comes from one source: repeated settings replace those of the source before.
class Source {
  public:
    explicit Source(Options& options) : options_(options) {}

    /// `where` begins the message: "--listen" or "FILE:3: listen".
    Status Set(const Setting& setting, std::string_view value, const std::string& where) {
        const bool first = seen_.insert(&setting).second;
        if (!first && (setting.form == Form::kOnce || setting.form == Form::kSwitch)) {
            return MakeError(ErrorKind::kInvalid, where + " is given twice");
        }
        if (first && setting.clear) setting.clear(options_);
        const Status status = setting.set(options_, value);
        if (status.ok()) return status;
        return MakeError(ErrorKind::kInvalid, where + ": " + status.error().message);
    }

  private:
    Options& options_;
    std::set<const Setting*> seen_;
};

Text Trim(Text text) {
    const size_t begin = text.find_first_not_of(" \t\r");
    if (begin == Text::npos) return {};
    return text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
}

/// Cuts a comment off: # at the beginning or after a blank, so that a path may hold one.
Text WithoutComment(Text line) {
    for (size_t i = 0; i < line.size(); ++i) {
        if (line[i] == '#' && (i == 0 || line[i - 1] == ' ' || line[i - 1] == '\t')) {
            return line.substr(0, i);
        }
    }
    return line;
}

Status ReadConfig(const std::string& path, Options& options) {
    std::ifstream file(path);
    if (!file) {
        return MakeError(ErrorKind::kInvalid, SystemError(errno, "cannot read " + path).message);
    }
    Source source(options);
    std::string line;
    for (unsigned number = 1; std::getline(file, line); ++number) {
        const Text content = Trim(WithoutComment(line));
        if (content.empty()) continue;
        const std::string where = fmt::format("{}:{}: ", path, number);
        const size_t equals = content.find('=');
        if (equals == Text::npos) {
            return MakeError(ErrorKind::kInvalid, where + "this is not of the form name = value");
        }
        const std::string name(Trim(content.substr(0, equals)));
        const Setting* setting = Find(name);
        if (!setting || setting->form == Form::kFlag || name == "config") {
            return MakeError(
                ErrorKind::kInvalid,
                fmt::format("{}there is no setting '{}'; `varved --help` lists them", where, name));
        }
        const Status status = source.Set(*setting, Trim(content.substr(equals + 1)), where + name);
        if (!status.ok()) return status;
    }
    if (file.bad()) return MakeError(ErrorKind::kInvalid, "cannot read " + path);
    return Status();
}

struct Given {
    const Setting* setting;
    std::string value;
};

Result<std::vector<Given>> SplitArguments(const std::vector<std::string>& arguments) {
    std::vector<Given> given;
    for (size_t i = 0; i < arguments.size(); ++i) {
        const std::string& argument = arguments[i];
        const size_t equals = argument.find('=');
        const Text name = Text(argument).substr(0, equals);
        const Setting* setting = name.substr(0, 2) == "--" ? Find(name.substr(2)) : nullptr;
        if (!setting) {
            return MakeError(ErrorKind::kInvalid,
                             fmt::format("there is no option '{}'; see varved --help", name));
        }
        if (setting->form == Form::kFlag) {
            if (equals != std::string::npos) {
                return MakeError(ErrorKind::kInvalid, fmt::format("{} takes no value", name));
            }
            given.push_back({setting, ""});
        } else if (equals != std::string::npos) {
            given.push_back({setting, argument.substr(equals + 1)});
        } else if (setting->form == Form::kSwitch) {
            given.push_back({setting, "on"});
        } else if (i + 1 < arguments.size()) {
            given.push_back({setting, arguments[++i]});
        } else {
            return MakeError(ErrorKind::kInvalid,
                             fmt::format("{} needs a value: {}", name, setting->value));
        }
    }
    return given;
}

/// Whether there is what TLS needs.
Status CheckTls(const Options& options) {
    if (options.tls.verify_peer && options.tls.certificates.empty()) {
        return MakeError(ErrorKind::kInvalid, "--tls-verify-peer needs --tls-certificates");
    }
    if (!options.tls.empty()) return Status();
    const auto wanted = [](const ListenPolicy& policy) {
        return policy.tls.value_or(TlsMode::kOff) != TlsMode::kOff;
    };
    bool any = false;
    for (const TcpAddress& address : options.listen) any = any || wanted(address.policy);
    for (const UnixAddress& address : options.listen_unix) any = any || wanted(address.policy);
    if (!any) return Status();
    return MakeError(ErrorKind::kInvalid, "tls= needs --tls-certificates DIR or --tls-psk FILE");
}

}  // namespace

Result<Options> ParseOptions(const std::vector<std::string>& arguments) {
    const Result<std::vector<Given>> given = SplitArguments(arguments);
    if (!given.ok()) return given.error();
    Options options;
    for (const Given& one : given.value()) {
        if (one.setting->name != Text("config")) continue;
        const Status status = ReadConfig(one.value, options);
        if (!status.ok()) return status.error();
    }
    Source source(options);
    for (const Given& one : given.value()) {
        const Status status =
            source.Set(*one.setting, one.value, std::string("--") + one.setting->name);
        if (!status.ok()) return status.error();
    }
    if (options.help || options.version) return options;
    const Status tls = CheckTls(options);
    if (!tls.ok()) return tls.error();
    if (options.check_config) return options;
    if (options.pool.empty()) {
        return MakeError(ErrorKind::kInvalid, "which pool? give --pool DIR; see varved --help");
    }
    return options;
}

std::string HelpText() {
    std::string text =
        "varved --pool DIR [options]\n"
        "Serves the disks and snapshots of a pool over NBD.\n\n";
    for (const Setting& setting : kSettings) {
        std::string left = fmt::format("  --{} {}", setting.name, setting.value);
        Text help = setting.help;
        while (!help.empty()) {
            const Text line = help.substr(0, help.find('\n'));
            text += fmt::format("{:<32} {}\n", left, line);
            left.clear();
            help.remove_prefix(std::min(help.size(), line.size() + 1));
        }
    }
    text +=
        "\nSizes are bytes or binary units, as in 4096, 512M, 10G, 2T. Exit codes: 0 stopped as "
        "asked,\n1 failed, 2 wrong use, 3 not found, 4 exists, 5 busy, 6 no space, 8 damaged.\n";
    return text;
}

}  // namespace varve::nbdserver
