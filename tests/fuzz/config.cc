// Fuzz target: the configuration file of varved. Limits that are accepted lie in their ranges, the
// same lines as arguments give the same settings, an error names file and line.
// Input: the file.
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nbdserver/daemon/options.h"
#include "tests/fuzz/fuzz.h"

namespace varve::nbdserver {
namespace {

/// A file in memory, the same for all inputs.
class File {
  public:
    File() : fd_(memfd_create("varved.conf", MFD_CLOEXEC)) { VARVE_CHECK(fd_ >= 0); }
    ~File() { close(fd_); }
    std::string Fill(std::string_view text) const {
        VARVE_CHECK(ftruncate(fd_, 0) == 0);
        VARVE_CHECK(pwrite(fd_, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()));
        return fmt::format("/proc/self/fd/{}", fd_);
    }

  private:
    const int fd_;
};

void VerifyRanges(const Options& o) {
    VARVE_CHECK(o.threads <= 1024);
    VARVE_CHECK(o.poll_us <= 1000);
    VARVE_CHECK(o.negotiation.options_max >= 8 && o.negotiation.options_max <= 1'000'000);
    VARVE_CHECK(o.negotiation.option_bytes_max >= 4200);
    VARVE_CHECK(o.negotiation.option_bytes_max <= 64 << 10);
    VARVE_CHECK(o.negotiation_timeout_s >= 1 && o.negotiation_timeout_s <= 3600);
    VARVE_CHECK(o.connection.requests_max >= 1 && o.connection.requests_max <= 65536);
    VARVE_CHECK(o.connection.bytes_max >= 1 << 20);
    VARVE_CHECK(o.connection.stall_ms_max >= 1000 && o.connection.stall_ms_max <= 3'600'000);
    VARVE_CHECK(o.pool_options.disk_bytes_max >= cow::kBlockBytes);
    VARVE_CHECK(o.pool_options.disk_bytes_max <= cow::kDiskBytesMax);
    VARVE_CHECK(o.admin_connections_max >= 1 && o.admin_connections_max <= 10'000);
}

/// All that a file can set, in one text.
std::string Summary(const Options& o) {
    std::string text = fmt::format(
        "{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}|{}", o.pool, o.data,
        o.admin, o.threads, o.direct, static_cast<int>(o.log_format), static_cast<int>(o.log_level),
        o.pool_options.map_cache_bytes, o.pool_options.ring_bytes, o.pool_options.capacity_max,
        o.pool_options.disks_max, o.pool_options.snapshots_max, o.pool_options.disk_bytes_max,
        o.pool_options.commit_interval_ms, o.metadata_cache_bytes, o.negotiation_timeout_s,
        o.negotiating_max, o.connections_max, o.negotiation.options_max,
        o.negotiation.option_bytes_max, o.negotiation.list_bytes_max, o.connection.requests_max,
        o.connection.bytes_max);
    text += fmt::format("|{}|{}|{}|{}", o.bytes_in_flight_max, o.admin_connections_max,
                        o.connection.stall_ms_max, o.poll_us);
    text += fmt::format("|{}|{}|{}", o.tls.certificates, o.tls.psk, o.tls.verify_peer) + o.access;
    const auto policy = [](const ListenPolicy& p) {
        return fmt::format("{} {}", p.tls ? static_cast<int>(*p.tls) : -1, p.read_only);
    };
    for (const TcpAddress& address : o.listen) {
        text += fmt::format("|{} {} {}", address.host, address.port, policy(address.policy));
    }
    for (const UnixAddress& address : o.listen_unix) {
        text += fmt::format("|{} {}", address.path, policy(address.policy));
    }
    return text;
}

std::string Trimmed(const std::string& text) {
    const size_t begin = text.find_first_not_of(" \t\r");
    if (begin == std::string::npos) return "";
    return text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
}

/// The lines of an accepted file, by other means than the product's: as arguments.
std::vector<std::string> AsArguments(std::string_view text) {
    std::vector<std::string> arguments = {"--check-config"};
    for (std::string line : fuzz::Lines(text)) {
        if (line[0] == '#') continue;
        line.resize(std::min({line.size(), line.find(" #"), line.find("\t#")}));
        const size_t equals = line.find('=');
        if (equals == std::string::npos) continue;
        arguments.push_back("--" + Trimmed(line.substr(0, equals)) + "=" +
                            Trimmed(line.substr(equals + 1)));
    }
    return arguments;
}

}  // namespace
}  // namespace varve::nbdserver

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace varve;             // NOLINT: a function of C's
    using namespace varve::nbdserver;  // NOLINT
    static const File file;
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const std::string path = file.Fill(text);
    const Result<Options> parsed = ParseOptions({"--check-config", "--config", path});
    if (!parsed.ok()) {
        const Error& error = parsed.error();
        VARVE_CHECK(error.kind == ErrorKind::kInvalid);
        // What does not go together is in no line of its own.
        VARVE_CHECK(error.message.substr(0, path.size() + 1) == path + ":" ||
                    error.message.find("needs --tls-") != std::string::npos);
        VARVE_CHECK(error.message.find('\n') == std::string::npos);
        return 0;
    }
    VerifyRanges(parsed.value());
    const Result<Options> again = ParseOptions(AsArguments(text));
    VARVE_CHECK(again.ok());
    VARVE_CHECK(Summary(again.value()) == Summary(parsed.value()));
    return 0;
}
