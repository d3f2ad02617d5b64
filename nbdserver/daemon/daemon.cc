#include "nbdserver/daemon/daemon.h"

#include <fmt/format.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <random>
#include <utility>

#include "base/log.h"
#include "base/priority.h"
#include "base/processors.h"
#include "base/run_on.h"
#include "base/units.h"
#include "nbdserver/daemon/descriptors.h"

namespace varve::nbdserver {
namespace {

// Of the 2 s that stopping may take: how long clients may take their last replies, how long
// commands of the admin socket may go on after that, and when all that is left is left behind.
constexpr uint64_t kDrainMsMax = 1000;
constexpr uint64_t kCommandMsMax = 500;
constexpr uint64_t kStopMsMax = 1700;
constexpr int kFlushLogMs = 100;
constexpr unsigned kLoaderThreads = 2;

Task<bool> Prefer() {
    PreferThisThread();
    co_return true;
}

Task<bool> Destroy(std::unique_ptr<cow::Pool> pool) {
    pool.reset();
    co_return true;
}

int64_t NowMs() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
}

uint64_t Random() {
    std::random_device device;
    return uint64_t{device()} << 32 | device();
}

std::string Absolute(const std::string& path) {
    std::error_code error;
    return std::filesystem::absolute(path, error).lexically_normal().string();
}

Result<std::vector<Listener>> Listen(const Options& options) {
    const bool credentials = !options.tls.empty();
    Result<std::vector<Listener>> listeners = TakeSystemdSockets();
    if (!listeners.ok()) return listeners.error();
    for (Listener& passed : listeners.value()) ApplyPolicy(ListenPolicy(), credentials, passed);
    std::vector<TcpAddress> addresses = options.listen;
    if (addresses.empty() && options.listen_unix.empty() && listeners.value().empty()) {
        addresses.push_back({"127.0.0.1", kNbdPort});
    }
    for (const TcpAddress& address : addresses) {
        // 0.0.0.0 beside [::], with the same port: each takes its own.
        const bool both = std::none_of(addresses.begin(), addresses.end(), [&](const auto& other) {
            return other.host == "0.0.0.0" && other.port == address.port;
        });
        Result<std::vector<Listener>> more = ListenTcp(address, both);
        if (!more.ok()) return more.error();
        for (Listener& one : more.value()) ApplyPolicy(address.policy, credentials, one);
        std::move(more.value().begin(), more.value().end(), std::back_inserter(listeners.value()));
    }
    for (const UnixAddress& address : options.listen_unix) {
        Result<Listener> listener = ListenNbdUnix(Absolute(address.path));
        if (!listener.ok()) return listener.error();
        ApplyPolicy(address.policy, credentials, listener.value());
        listeners.value().push_back(std::move(listener.value()));
    }
    return listeners;
}

/// To be called when all other files are open.
Result<DescriptorShares> ShareAmongClients(const Options& options, uint64_t limit) {
    const DescriptorShares asked{options.connections_max, options.admin_connections_max};
    Result<DescriptorShares> shares = ShareDescriptors(limit, CountDescriptors(), asked);
    if (shares.ok() && shares.value().connections < asked.connections) {
        Log(LogLevel::kWarning,
            fmt::format("at most {} connections instead of {}, because {} files may be open; raise "
                        "the limit (LimitNOFILE=, ulimit -n) for more",
                        shares.value().connections, asked.connections, limit));
    }
    return shares;
}

}  // namespace

Result<std::unique_ptr<Daemon>> Daemon::Start(const Options& options) {
    std::unique_ptr<Daemon> daemon(new Daemon);
    Status status = daemon->OpenPool(options);
    if (status.ok()) status = daemon->StartServing(options);
    if (!status.ok()) return status.error();
    return daemon;
}

Status Daemon::OpenPool(const Options& options) {
    cow::PoolDirectoryOptions place;
    place.path = options.pool;
    place.data = options.data;
    place.direct = options.direct;
    place.force_epoch = options.force_epoch;
    place.metadata_cache_bytes = options.metadata_cache_bytes;
    descriptors_max_ = RaiseDescriptorLimit();
    place.metadata_files_max = MetadataTables(descriptors_max_);
    Result<std::unique_ptr<cow::PoolDirectory>> directory = cow::PoolDirectory::Open(place);
    if (!directory.ok()) return directory.error();
    directory_ = std::move(directory.value());

    const int fd = directory_->data_fd();
    const Result<FileTraits> traits = ProbeFile(fd, options.direct);
    if (!traits.ok()) return traits.error();
    const unsigned cpus = AvailableProcessors();
    const unsigned threads = options.threads != 0 ? options.threads : cpus;
    ConnectionLimits limits = options.connection;
    limits.host_bytes_max = std::max(options.bytes_in_flight_max, limits.bytes_max);
    // On a single CPU polling would only keep the client from running.
    const int64_t poll = cpus > 1 ? static_cast<int64_t>(options.poll_us) * 1000 : 0;
    Result<std::unique_ptr<DataPlane>> plane =
        DataPlane::Start(threads, fd, traits.value(), limits, poll);
    if (!plane.ok()) return plane.error();
    plane_ = std::move(plane.value());

    clock_ = std::make_unique<SystemClock>();
    home_ = std::make_unique<Worker>("home", 1);
    committer_ = std::make_unique<Worker>("committer", 1);
    loader_ = std::make_unique<Worker>("loader", kLoaderThreads);
    auditor_ = std::make_unique<Worker>("auditor", 1);
    cow::Environment environment;
    environment.home = home_.get();
    environment.committer = committer_.get();
    environment.loader = loader_.get();
    environment.auditor = auditor_.get();
    environment.lanes = plane_->lanes();
    environment.space = &directory_->space();
    environment.metadata = &directory_->metadata();
    environment.now_ms = NowMs;
    environment.random = Random;
    environment.clock = clock_.get();
    Result<std::unique_ptr<cow::Pool>> pool =
        RunOn(*home_, cow::Pool::Open(std::move(environment), options.pool_options,
                                      [this] { return directory_->BeginEpoch(); }));
    if (!pool.ok()) return pool.error();
    pool_ = std::move(pool.value());
    return Status();
}

Status Daemon::StartServing(const Options& options) {
    control_ = std::make_unique<Control>();
    loops_ = std::make_unique<Gate>(*control_);
    commit_timer_ = std::make_unique<Timer>(*control_);
    drain_timer_ = std::make_unique<Timer>(*control_);
    command_timer_ = std::make_unique<Timer>(*control_);
    stop_timer_ = std::make_unique<Timer>(*control_);
    stop_watch_ = std::make_unique<Gate>(*control_);
    reloading_ = std::make_unique<AsyncMutex>(*control_);
    commit_interval_ms_ = options.pool_options.commit_interval_ms;
    access_ = options.access;
    std::shared_ptr<const access::Rules> rules;
    if (!access_.empty()) {
        Result<std::shared_ptr<const access::Rules>> loaded = access::Rules::Load(access_);
        if (!loaded.ok()) return loaded.error();
        rules = std::move(loaded.value());
    }
    clients_ = std::make_unique<Clients>(
        *home_, *clock_, *pool_,
        [this](Executor& reactor) -> ConnectionHost& { return plane_->HostOf(reactor); },
        std::move(rules));

    if (!options.tls.empty()) {
        Result<std::unique_ptr<TlsService>> tls = TlsService::Start(*control_, options.tls);
        if (!tls.ok()) return tls.error();
        tls_ = std::move(tls.value());
    }
    Result<std::vector<Listener>> listeners = Listen(options);
    if (!listeners.ok()) return listeners.error();
    for (const Listener& listener : listeners.value()) uris_.push_back(listener.uri);

    const Result<DescriptorShares> shares = ShareAmongClients(options, descriptors_max_);
    if (!shares.ok()) return shares.error();

    admin::ServiceOptions service;
    service.path = options.admin.empty() ? directory_->path() + "/admin.sock" : options.admin;
    service.pool_directory = directory_->path();
    service.connections_max = shares.value().admin_connections;
    service.log = [](const std::string& line) { Log(LogLevel::kInfo, line); };
    admin::Backend backend;
    backend.home = home_.get();
    backend.pool = pool_.get();
    backend.clients = clients_.get();
    uris_.push_back("admin=" + Absolute(service.path));
    admin_ = std::make_unique<admin::Service>(control_->io(), backend, std::move(service));
    const Status status = admin_->Start();
    if (!status.ok()) {
        admin_.reset();
        return status;
    }
    ServerLimits limits;
    limits.negotiation = options.negotiation;
    limits.negotiation_ms_max = options.negotiation_timeout_s * 1000;
    limits.negotiating_max = options.negotiating_max;
    limits.waiting_max = options.waiting_max;
    limits.peer_timeout_s = options.peer_timeout_s;
    limits.connections_max = shares.value().connections;
    server_ = std::make_unique<Server>(*control_, *home_, *pool_, *clients_, tls_.get(), limits);
    server_->Start(std::move(listeners.value()));
    control_->OnTermination([this](int) { Spawn(Stop()); });
    control_->OnReload([this] { Reload(); });
    AnnounceReady();
    return Status();
}

void Daemon::AnnounceReady() {
    if (directory_->created()) {
        Log(LogLevel::kInfo, fmt::format("made a new pool in {}", directory_->path()));
    }
    LogAlways(fmt::format("ready {}", fmt::join(uris_, " ")));
    ::sd_notify(0, "READY=1");
}

Status Daemon::Run() {
    // Only now: all other threads have been started.
    PreferThisThread();
    RunOn(*home_, Prefer());
    loops_->Enter();
    Spawn(CommitNowAndThen(commit_interval_ms_));
    control_->Run();
    return outcome_;
}

Task<void> Daemon::CommitNowAndThen(uint64_t interval_ms) {
    for (;;) {
        Task<bool> waiting = commit_timer_->Wait(interval_ms);
        const bool expired = co_await waiting;
        if (!expired) break;
        co_await Hop(*home_);
        clients_->Observe();
        Task<void> committing = pool_->CommitDirty();
        co_await committing;
        co_await Hop(*control_);
        server_->Observe();
        plane_->ReturnMemory();
    }
    loops_->Leave();
}

Task<void> Daemon::Stop() {
    stopping_ = true;
    Log(LogLevel::kInfo, "stopping");
    ::sd_notify(0, "STOPPING=1");
    pool_->PrepareShutdown();
    stop_watch_->Enter();
    Spawn(StopInTime());
    commit_timer_->Cancel();
    server_->Close();
    admin_->Stop([this] {
        admin_stopped_ = true;
        command_timer_->Cancel();
    });
    loops_->Enter();
    Spawn(EndStuckClients());
    co_await Hop(*home_);
    clients_->Drain();
    Task<void> gone = clients_->Gone();
    co_await gone;
    co_await Hop(*control_);
    drain_timer_->Cancel();
    Task<void> closed = server_->Closed();
    co_await closed;
    Task<void> looped = loops_->Drained();
    co_await looped;
    if (!admin_stopped_) {
        Task<bool> waiting = command_timer_->Wait(kCommandMsMax);
        co_await waiting;
    }
    if (!admin_stopped_) {
        Task<void> leaving = LeaveBehind("a command was still running: it is done or not done");
        co_await leaving;
    }
    co_await Hop(*home_);
    Task<Status> shutting = pool_->Shutdown();
    Status status = co_await shutting;
    co_await Hop(*control_);
    stop_timer_->Cancel();
    Task<void> watched = stop_watch_->Drained();
    co_await watched;
    outcome_ = std::move(status);
    stopped_ = true;
    control_->Stop();
}

void Daemon::Reload() {
    if (stopping_) return;
    if (!tls_ && access_.empty()) {
        Log(LogLevel::kInfo, "SIGHUP: no setting can change while the server runs; restart it");
        return;
    }
    loops_->Enter();
    Spawn(ReloadFiles());
}

Task<void> Daemon::ReloadFiles() {
    if (tls_) {
        Task<void> reloading = tls_->Reload();
        co_await reloading;
    }
    if (!access_.empty()) {
        Task<void> reloading = ReloadAccess();
        co_await reloading;
    }
    loops_->Leave();
}

Task<void> Daemon::ReloadAccess() {
    if (std::exchange(reload_waits_, true)) co_return;  // that one reads what is there by then
    Task<void> locking = reloading_->Lock();
    co_await locking;
    reload_waits_ = false;
    co_await Hop(*loader_);
    Result<std::shared_ptr<const access::Rules>> loaded = access::Rules::Load(access_);
    if (!loaded.ok()) {
        co_await Hop(*control_);
        Log(LogLevel::kError, "SIGHUP: access stays as it was: " + loaded.error().message);
        reloading_->Unlock();
        co_return;
    }
    const size_t rules = loaded.value()->rules().size();
    co_await Hop(*home_);
    Task<std::vector<uint64_t>> changing = clients_->ChangeRules(std::move(loaded.value()));
    std::vector<uint64_t> cut_off = co_await changing;
    co_await Hop(*control_);
    reloading_->Unlock();  // what the device keeps keeps no other reload
    co_await Hop(*home_);
    const size_t count = cut_off.size();
    Task<uint64_t> going = clients_->Left(std::move(cut_off));
    const uint64_t gone = co_await going;
    co_await Hop(*control_);
    Log(LogLevel::kInfo, fmt::format("SIGHUP: access is as in {} now: {}; {} cut off", access_,
                                     FormatCount(rules, "rule"), FormatCount(count, "client")));
    if (gone < count) {
        Log(LogLevel::kWarning, fmt::format("{} that may no longer: requests are still under way",
                                            FormatCount(count - gone, "client")));
    }
}

Task<void> Daemon::EndStuckClients() {
    Task<bool> waiting = drain_timer_->Wait(kDrainMsMax);
    const bool expired = co_await waiting;
    if (expired) {
        Log(LogLevel::kWarning, "some clients do not take their replies: closing them");
        co_await Hop(*home_);
        clients_->EndAll();
        co_await Hop(*control_);
    }
    loops_->Leave();
}

/// Whatever is not through by then, the next start takes up: folding, deletions, negotiations.
Task<void> Daemon::StopInTime() {
    Task<bool> waiting = stop_timer_->Wait(kStopMsMax);
    const bool expired = co_await waiting;
    if (expired) {
        Task<void> leaving = LeaveBehind("stopping took long: what is left is done");
        co_await leaving;
    }
    stop_watch_->Leave();
}

/// Cut off as by a crash, which every command and all background work is made for. What was
/// answered is in the journal, which outlives the process: nobody waits for a device that hangs.
Task<void> Daemon::LeaveBehind(std::string what) {
    admin_->LeaveBehind();
    co_await Hop(*home_);
    Log(LogLevel::kWarning, what + " at the next start");
    FlushLog(kFlushLogMs);
    ::_exit(0);
}

Daemon::~Daemon() {
    server_.reset();
    admin_.reset();
    clients_.reset();
    if (pool_) ClosePool();
    if (plane_) plane_->Stop();
}

void Daemon::ClosePool() {
    if (!stopped_) {
        const Status status = RunOn(*home_, pool_->Shutdown());
        if (!status.ok()) Log(LogLevel::kError, status.error().message);
    }
    // A request that finished last may have told home so from inside of the pool's turns, and be on
    // its way out of them yet.
    plane_->Settle();
    RunOn(*home_, Destroy(std::move(pool_)));
}

}  // namespace varve::nbdserver
