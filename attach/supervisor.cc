#include "attach/supervisor.h"

#include <fmt/format.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>

namespace varve::attach {
namespace {

/// Between two tries to connect; doubled with each that fails.
constexpr int64_t kBackoffFirstMs = 100;
constexpr int64_t kBackoffMaxMs = 3000;
/// The kernel wants a number of seconds for "never".
constexpr uint64_t kNeverS = uint64_t{10} * 365 * 24 * 3600;

int64_t MonotonicMs() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
}

int64_t WallMs() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
}

std::string ReadLine(const std::string& path) {
    std::ifstream file(path);
    std::string line;
    std::getline(file, line);
    return line;
}

sigset_t Signals() {
    sigset_t signals;
    sigemptyset(&signals);
    for (const int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&signals, signal);
    return signals;
}

/// The device may hold this machine's swap, and dirty pages that memory is short for: whoever
/// reconnects it must not wait for memory. Hints; without privileges they are refused.
void StayInMemory() {
    (void)mlockall(MCL_CURRENT | MCL_FUTURE);
#ifdef PR_SET_IO_FLUSHER
    (void)prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
#endif
    std::ofstream("/proc/self/oom_score_adj") << "-1000\n";
}

/// udev looks at the device again and finds the record.
void Announce(uint32_t index) {
    std::ofstream(fmt::format("/sys/block/nbd{}/uevent", index)) << "change\n";
}

}  // namespace

Supervisor::Supervisor(AttachOptions options, Records records)
    : options_(std::move(options)), records_(std::move(records)) {}

Supervisor::~Supervisor() {
    if (lock_ >= 0) ::close(lock_);
}

Status Supervisor::Start() {
    // From here on they are for Run(): a device is not left behind.
    const sigset_t signals = Signals();
    sigprocmask(SIG_BLOCK, &signals, nullptr);
    Result<std::unique_ptr<NbdDriver>> driver = NbdDriver::Open();
    if (!driver.ok()) return driver.error();
    driver_ = std::move(driver.value());
    const Result<bool> taken = TakeOver();
    if (!taken.ok()) return taken.error();
    if (!taken.value()) {
        Status s = Connect();
        if (!s.ok()) return s;
    }
    StayInMemory();
    Status s = records_.Write(record_);
    if (!s.ok()) {
        (void)driver_->Disconnect(record_.index);
        return s;
    }
    Announce(record_.index);
    return Status();
}

/// Of a supervisor that was killed: the device goes on, and nobody reconnects it. False if there is
/// none. kExists if the same disk is attached for writing already: two file systems on it would
/// destroy each other.
Result<bool> Supervisor::TakeOver() {
    for (const Record& left : records_.All()) {
        if (left.uri != options_.uri) continue;
        const int lock = records_.Lock(left.index, false);
        record_ = left;
        const bool same = left.name == options_.name && left.read_only == options_.read_only &&
                          options_.index.value_or(left.index) == left.index;
        if (lock >= 0 && same && StillThere()) {
            lock_ = lock;
            record_.pid = ::getpid();
            // What died meanwhile was told to nobody. One too many is not used.
            record_.dead = record_.connections;
            return true;
        }
        if (lock >= 0) ::close(lock);
        if (StillThere() && !left.read_only && !options_.read_only) {
            return MakeError(ErrorKind::kExists,
                             fmt::format("{} is attached already, as {}; detach it first, or "
                                         "attach it --read-only",
                                         options_.uri, left.device()));
        }
    }
    return false;
}

Status Supervisor::Connect() {
    Result<Remote> first = Negotiate(options_.uri);
    if (!first.ok()) return first.error();
    const uint64_t size = first.value().size;
    if (size == 0 || size % options_.block_size != 0) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("{} has {} bytes, which are not sectors of {} bytes; use "
                                     "--block-size 512",
                                     options_.uri, size, options_.block_size));
    }
    std::vector<Remote> remotes;
    remotes.push_back(std::move(first.value()));
    const uint32_t wanted = remotes.front().multi_conn() ? options_.connections : 1;
    while (remotes.size() < wanted) {
        Result<Remote> more = Negotiate(options_.uri);
        if (!more.ok()) return more.error();
        remotes.push_back(std::move(more.value()));
    }
    record_ = Record();
    record_.uri = options_.uri;
    record_.name = options_.name;
    record_.size = size;
    record_.block_size = options_.block_size;
    record_.connections = wanted;
    record_.read_only = options_.read_only || remotes.front().read_only();
    record_.attached_ms = record_.changed_ms = WallMs();
    record_.pid = ::getpid();

    DeviceSettings settings;
    settings.index = options_.index;
    settings.size = size;
    settings.block_size = options_.block_size;
    settings.server_flags = remotes.front().flags;
    if (options_.read_only) settings.server_flags |= 2;  // NBD_FLAG_READ_ONLY
    settings.io_timeout_s = options_.io_timeout_s;
    settings.dead_timeout_s = options_.give_up_s == 0 ? kNeverS : options_.give_up_s;
    settings.backend = record_.backend();
    for (const Remote& remote : remotes) settings.sockets.push_back(remote.socket.fd());
    const Result<uint32_t> index = driver_->Connect(settings);
    if (!index.ok()) return index.error();
    record_.index = index.value();
    lock_ = records_.Lock(record_.index, false);
    if (lock_ >= 0) return Status();
    (void)driver_->Disconnect(record_.index);
    return MakeError(ErrorKind::kBusy,
                     fmt::format("{} is watched by another process; 'varve attached' shows it",
                                 record_.device()));
}

/// Whether the kernel has the device connected, and by varve to this URI.
bool Supervisor::StillThere() const {
    const std::string block = fmt::format("/sys/block/nbd{}/", record_.index);
    return !ReadLine(block + "pid").empty() && ReadLine(block + "backend") == record_.backend();
}

Status Supervisor::Run(const std::function<void(const Record&)>& changed) {
    changed_ = changed;
    const sigset_t signals = Signals();
    const int told = ::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    if (told < 0) return SystemError(errno, "cannot wait for signals");
    next_check_ms_ = MonotonicMs() + options_.size_check_ms;
    bool ending = false;
    while (!ending && StillThere()) {
        const int64_t now = MonotonicMs();
        const int64_t due =
            record_.dead > 0 ? std::min(next_try_ms_, next_check_ms_) : next_check_ms_;
        pollfd fds[2] = {{told, POLLIN, 0}, {driver_->events_fd(), POLLIN, 0}};
        (void)::poll(fds, 2, static_cast<int>(std::clamp<int64_t>(due - now, 0, 5000)));
        signalfd_siginfo signal;
        while (::read(told, &signal, sizeof signal) == sizeof signal) {
            ending |= signal.ssi_signo != SIGHUP;
        }
        CountDead();
        if (!ending && record_.dead > 0 && MonotonicMs() >= next_try_ms_) TryToConnect();
        if (!ending && MonotonicMs() >= next_check_ms_) CheckSize();
    }
    ::close(told);
    Status result;
    if (ending) result = driver_->Disconnect(record_.index);
    records_.Remove(record_.index);
    Announce(record_.index);
    return result;
}

void Supervisor::CountDead() {
    bool lost = false;
    const std::vector<uint32_t> dead = driver_->TakeDeadLinks(&lost);
    const auto mine = static_cast<uint32_t>(std::count(dead.begin(), dead.end(), record_.index));
    if (mine == 0 && !lost) return;
    const bool first = record_.dead == 0;
    record_.dead = lost ? record_.connections : std::min(record_.connections, record_.dead + mine);
    if (first) next_try_ms_ = 0;
    Tell();
}

/// A server that came back may have another disk under the name, or none yet.
Result<Remote> Supervisor::NegotiateAgain() {
    Result<Remote> remote = Negotiate(options_.uri);
    if (!remote.ok()) return remote;
    if (remote.value().size < record_.size) {
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("the export has {} bytes now, the device {}: detach the "
                                     "device, or let the export have its size again",
                                     remote.value().size, record_.size));
    }
    if (remote.value().read_only() && !record_.read_only) {
        return MakeError(ErrorKind::kInvalid, "the export is read-only now, the device is not");
    }
    return remote;
}

void Supervisor::TryToConnect() {
    Result<Remote> remote = NegotiateAgain();
    Status s = remote.status();
    if (s.ok()) {
        s = driver_->Reconnect(record_.index, record_.backend(), remote.value().socket.fd());
    }
    if (s.ok()) {
        --record_.dead;
        ++record_.reconnects;
        record_.error.clear();
        backoff_ms_ = next_try_ms_ = 0;
        if (remote.value().size > record_.size) Grow(remote.value().size);
        Tell();
        return;
    }
    backoff_ms_ = std::clamp(2 * backoff_ms_, kBackoffFirstMs, kBackoffMaxMs);
    next_try_ms_ = MonotonicMs() + backoff_ms_;
    if (record_.error == s.error().message) return;
    record_.error = s.error().message;
    Tell();
}

void Supervisor::CheckSize() {
    next_check_ms_ = MonotonicMs() + options_.size_check_ms;
    if (record_.dead > 0) return;
    const Result<uint64_t> size = AskSize(options_.uri);
    if (size.ok() && size.value() > record_.size) Grow(size.value());
}

void Supervisor::Grow(uint64_t size) {
    if (size % record_.block_size != 0) return;
    const Status s = driver_->Resize(record_.index, record_.backend(), size);
    if (s.ok()) {
        record_.size = size;
    } else {
        record_.error = s.error().message;
    }
    Tell();
}

void Supervisor::Tell() {
    record_.changed_ms = WallMs();
    const Status written = records_.Write(record_);
    if (!written.ok()) record_.error = written.error().message;
    if (changed_) changed_(record_);
}

}  // namespace varve::attach
