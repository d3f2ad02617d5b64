#include "nbdserver/daemon/clients.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/log.h"

namespace varve::nbdserver {

namespace {

/// For clients that were ended to be gone: their requests are given up between pieces of work, but
/// not one that hangs in the device.
constexpr int64_t kDisconnectUs = 10'000'000;

constexpr size_t kClientsPerTurn = 16;

/// For the log: "192.0.2.7:51234 (psk:alice)".
std::string NameOf(const Visitor& visitor) {
    const std::string identity = tls::Describe(visitor.who.identity);
    return identity.empty() ? visitor.name : fmt::format("{} ({})", visitor.name, identity);
}

/// Whether somebody may see where an export differs from a snapshot of its disk: who may read that.
bool MayCompare(const access::Grants& grants, std::string_view name, std::string_view base) {
    std::string snapshot(name.substr(0, name.find('@')));
    snapshot.append("@").append(base);
    return grants.Of(snapshot) != access::Right::kNone;
}

Error Stopping() {
    return MakeError(ErrorKind::kFailed, "the server is shutting down");
}

}  // namespace

class Client {
  public:
    explicit Client(Visitor v) : visitor(std::move(v)) {}

    const Visitor visitor;

    // Fixed from Open() on.
    std::vector<std::string> bases;  // names of snapshots and bookmarks, as they were
    cow::Export opened;
    ExportDescription description;
    int64_t since_ms = 0;  // since 1970
    Executor* reactor = nullptr;
    std::shared_ptr<ConnectionCounters> counters = std::make_shared<ConnectionCounters>();

    // Changed by home only.
    bool given_up = false;  // it does not wait for its export any more
    bool serving = false;
    bool closing = false;  // the pool may have forgotten the export
    uint64_t requests_seen = 0;
    std::chrono::steady_clock::time_point active;  // when there were more of them, or it came

    // Changed by the reactor only.
    bool draining = false;
    bool ending = false;
    LeaverWait leavers;
    int fd = -1;                       // while there is a connection
    Connection* connection = nullptr;  // null before and after
};

const ExportDescription& DescriptionOf(const Client& client) {
    return client.description;
}

namespace {

/// Suspends until the client's connection has ended; resumed by a post, not from inside the
/// connection.
class Ended : Resumption {
  public:
    explicit Ended(Client& client) : client_(client) {}
    std::function<void()> Callback() {
        return [this] {
            client_.connection = nullptr;  // from now on nobody may end it
            ended_ = true;
            if (handle) client_.reactor->Post(this);
        };
    }
    bool await_ready() const noexcept { return ended_; }
    void await_suspend(std::coroutine_handle<> waiter) noexcept { handle = waiter; }
    void await_resume() const noexcept {}

  private:
    Client& client_;
    bool ended_ = false;
};

Task<void> GiveUpOnReactor(std::shared_ptr<Client> client) {
    co_await Hop(*client->reactor);
    client->leavers.GiveUp();
}

Task<void> EndOnReactor(std::shared_ptr<Client> client) {
    co_await Hop(*client->reactor);
    client->ending = true;
    client->leavers.GiveUp();
    if (client->connection) End(client->connection);
}

Task<void> DrainOnReactor(std::shared_ptr<Client> client) {
    co_await Hop(*client->reactor);
    client->draining = true;
    client->leavers.GiveUp();
    // The connection sees the end of the stream: it answers what it has, then closes.
    if (client->connection) ::shutdown(client->fd, SHUT_RD);
}

/// Gives the contexts what they compare with: a diff export has one base, which it shows in its
/// allocation as well.
void Compare(const cow::Export& opened, TransmissionOptions& options) {
    options.bases = opened.bases;
    uint8_t next = 0;
    for (StatusContext& context : options.contexts) {
        if (context.kind == ContextKind::kBitmap) context.base = next++;
        if (opened.diff && context.kind == ContextKind::kAllocation) {
            context.kind = ContextKind::kDiffAllocation;
        }
    }
}

int64_t UnixMs() {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::milliseconds>(now).count();
}

}  // namespace

Clients::Clients(Executor& home, Clock& clock, cow::Pool& pool,
                 std::function<ConnectionHost&(Executor&)> host_of,
                 std::shared_ptr<const access::Rules> rules)
    : home_(home),
      pool_(pool),
      host_of_(std::move(host_of)),
      rules_(std::move(rules)),
      changed_(home),
      ticker_(&clock, home) {
    pool_.SetDisconnector([this](const std::vector<uint64_t>& exports) {
        for (const uint64_t id : exports) {
            const auto client = clients_.find(id);
            if (client != clients_.end()) End(client->second);
        }
    });
}

Clients::~Clients() {
    VARVE_CHECK(clients_.empty());
}

/// Who may not is told what he would be told if there was no such export: names are not for
/// everybody. A bitmap shows something of its snapshot, too.
Result<ExportDescription> Clients::Describe(std::string export_name,
                                            const std::vector<std::string>& bases,
                                            const Visitor& visitor) {
    Result<cow::ExportDetails> found = pool_.DescribeExport(std::move(export_name));
    if (!found.ok()) return found.error();
    cow::ExportDetails& details = found.value();
    const access::Grants grants = GrantsOf(visitor);
    const access::Right right = grants.Of(details.name);
    if (right == access::Right::kNone) {
        refusals_.Tell(fmt::format("{} may not open '{}'", NameOf(visitor), details.name));
        return MakeError(ErrorKind::kNotFound, "there is nothing that this client may open");
    }
    ExportDescription description;
    description.size = details.size;
    description.read_only = details.read_only || visitor.read_only || right == access::Right::kRead;
    description.diff = details.diff;
    for (const std::string& base : bases) {
        const bool there = pool_.HasBase(details.name, base);
        if (there && MayCompare(grants, details.name, base)) description.bases.push_back(base);
    }
    if (MayCompare(grants, details.name, details.base)) description.base = std::move(details.base);
    description.name = std::move(details.name);
    return description;
}

std::shared_ptr<Client> Clients::Make(Visitor visitor) {
    return std::make_shared<Client>(std::move(visitor));
}

Task<Status> Clients::Open(std::shared_ptr<Client> client, std::string export_name,
                           std::vector<std::string> bases) {
    if (closing_) co_return Stopping();
    if (rules_) {  // before anything of the export's shows, that it is in use for example
        const Result<ExportDescription> may = Describe(export_name, bases, client->visitor);
        if (!may.ok()) co_return may.error();
    }
    client->bases = bases;
    Task<Result<cow::Export>> opening =
        pool_.OpenExport(std::move(export_name), std::move(bases), &client->given_up);
    const Result<cow::Export> opened = co_await opening;
    if (!opened.ok()) co_return opened.error();
    const Status entered = Enter(client, opened.value());
    if (!entered.ok()) {
        Task<void> closing = pool_.CloseExport(opened.value().id);
        co_await closing;
        co_return entered;
    }
    const cow::Volume& volume = *client->opened.volume;
    co_await Hop(*client->reactor);
    client->description.size = volume.size();
    co_await Hop(home_);
    co_return Status();
}

/// What may have changed while the export was being opened: its name, the rules, Drain(). From now
/// on the client can be fenced.
Status Clients::Enter(const std::shared_ptr<Client>& client, const cow::Export& opened) {
    if (closing_) return Stopping();
    Result<ExportDescription> may =
        Describe(pool_.ExportName(opened.id), client->bases, client->visitor);
    if (!may.ok()) return may.error();
    if (may.value().bases != client->bases) {
        return MakeError(ErrorKind::kNotFound, "what it is to be compared with is not there now");
    }
    client->opened = opened;
    client->description = std::move(may.value());
    client->since_ms = UnixMs();
    client->active = std::chrono::steady_clock::now();
    client->reactor = &opened.volume->executor();
    clients_.emplace(opened.id, client);
    return Status();
}

Task<Status> Clients::Attach(std::shared_ptr<Client> client, std::string export_name,
                             std::vector<std::string> bases) {
    std::shared_ptr<Client> shared = client;
    Task<Status> opening = Open(std::move(shared), std::move(export_name), std::move(bases));
    Status status = co_await opening;
    if (!status.ok()) co_return status;
    Executor& reactor = *client->reactor;
    co_await Hop(reactor);
    Task<bool> waiting = host_of_(reactor).AwaitLeavers(*client->opened.volume, client->leavers);
    const bool nothing_lands = co_await waiting;
    co_await Hop(home_);
    if (nothing_lands) co_return Status();
    Task<void> closing = Close(std::move(client));
    co_await closing;
    co_return MakeError(ErrorKind::kBusy, "requests of clients that left it are still under way");
}

void Clients::GiveUp(std::shared_ptr<Client> client) {
    client->given_up = true;
    if (client->reactor) Spawn(GiveUpOnReactor(std::move(client)));
}

/// Started and finished on the client's reactor.
Task<std::shared_ptr<const cow::Layers>> Clients::LayersOf(std::shared_ptr<Client> client) {
    co_await Hop(home_);
    std::shared_ptr<const cow::Layers> layers = pool_.LayersOf(client->opened.id);
    co_await Hop(*client->reactor);
    co_return layers;
}

Task<void> Clients::Serve(std::shared_ptr<Client> client, int fd, TransmissionOptions options) {
    client->serving = true;
    options.counters = client->counters;
    options.read_only = client->description.read_only;
    Compare(client->opened, options);
    options.layers = [this, client] { return LayersOf(client); };
    Log(LogLevel::kDebug,
        fmt::format("{} attached to '{}'", client->visitor.name, client->description.name));
    ConnectionHost& host = host_of_(*client->reactor);
    co_await Hop(*client->reactor);
    if (client->ending || client->draining) {
        ::close(fd);
    } else {
        Ended ended(*client);
        client->fd = fd;
        client->connection =
            host.Start(fd, std::move(options), *client->opened.volume, ended.Callback());
        co_await ended;
    }
    co_await Hop(home_);
    const uint64_t given_up = client->counters->given_up.load(std::memory_order_relaxed);
    Log(given_up ? LogLevel::kInfo : LogLevel::kDebug,
        fmt::format("{} left '{}', {} of its requests were given up", client->visitor.name,
                    client->description.name, given_up));
    Task<void> closing = Close(std::move(client));
    co_await closing;
}

Task<void> Clients::Release(std::shared_ptr<Client> client) {
    Task<void> closing = Close(std::move(client));
    co_await closing;
}

Task<void> Clients::Close(std::shared_ptr<Client> client) {
    client->serving = false;
    client->closing = true;  // the pool forgets the export before it has closed it
    Task<void> closing = pool_.CloseExport(client->opened.id);
    co_await closing;
    clients_.erase(client->opened.id);
    changed_.WakeAll();
}

void Clients::End(std::shared_ptr<Client> client) {
    Spawn(EndOnReactor(std::move(client)));
}

/// By the export's present name.
bool Clients::MayStay(const Client& client) const {
    const access::Grants grants = GrantsOf(client.visitor);
    const std::string name = pool_.ExportName(client.opened.id);
    for (const std::string& base : client.bases) {
        if (!MayCompare(grants, name, base)) return false;
    }
    const access::Right right = grants.Of(name);
    return client.description.read_only ? right != access::Right::kNone
                                        : right == access::Right::kWrite;
}

/// In turns. Who comes meanwhile comes by the new rules.
Task<std::vector<uint64_t>> Clients::ChangeRules(std::shared_ptr<const access::Rules> rules) {
    rules_ = std::move(rules);
    std::vector<uint64_t> ids, cut_off;
    for (const auto& [id, client] : clients_) ids.push_back(id);
    for (size_t i = 0; i < ids.size(); ++i) {
        if (i % kClientsPerTurn == kClientsPerTurn - 1) co_await Hop(home_);
        const auto found = clients_.find(ids[i]);
        if (found == clients_.end() || found->second->closing || MayStay(*found->second)) continue;
        refusals_.Tell(fmt::format("{} may no longer open '{}', or not write to it: cut off",
                                   NameOf(found->second->visitor), pool_.ExportName(ids[i])));
        End(found->second);
        cut_off.push_back(ids[i]);
    }
    co_return cut_off;
}

void Clients::Observe() {
    const auto now = std::chrono::steady_clock::now();
    for (const auto& [id, client] : clients_) {
        const uint64_t requests = client->counters->requests.load(std::memory_order_relaxed);
        if (std::exchange(client->requests_seen, requests) != requests) client->active = now;
    }
    refusals_.TellNumber();
}

Task<std::vector<admin::ClientInfo>> Clients::List() {
    Observe();
    const auto now = std::chrono::steady_clock::now();
    std::vector<admin::ClientInfo> infos;
    for (const auto& [id, client] : clients_) {
        if (!client->serving) continue;
        admin::ClientInfo info;
        info.id = id;
        info.address = client->visitor.name;
        info.export_name = pool_.ExportName(id);
        info.since_ms = client->since_ms;
        const auto idle = std::chrono::duration_cast<std::chrono::seconds>(now - client->active);
        info.idle_s = static_cast<uint64_t>(idle.count());
        info.read_only = client->description.read_only;
        info.tls = client->visitor.tls;
        info.identity = tls::Describe(client->visitor.who.identity);
        info.requests = client->counters->requests.load(std::memory_order_relaxed);
        info.bytes_read = client->counters->bytes_read.load(std::memory_order_relaxed);
        info.bytes_written = client->counters->bytes_written.load(std::memory_order_relaxed);
        infos.push_back(std::move(info));
    }
    co_return infos;
}

Task<uint64_t> Clients::Disconnect(std::vector<uint64_t> ids) {
    std::erase_if(ids, [this](uint64_t id) { return !clients_.contains(id); });
    for (const uint64_t id : ids) End(clients_.at(id));
    Task<uint64_t> leaving = Left(std::move(ids));
    co_return co_await leaving;
}

Task<uint64_t> Clients::Left(std::vector<uint64_t> ids) {
    uint64_t left = 0;
    std::function<bool(int64_t*)> gone = [&](int64_t*) {  // an export's id is never used again
        left = static_cast<uint64_t>(std::count_if(
            ids.begin(), ids.end(), [this](uint64_t id) { return clients_.contains(id); }));
        return left == 0;
    };
    const bool all = co_await ticker_.Wait(changed_, kDisconnectUs, std::move(gone));
    co_return all ? ids.size() : ids.size() - left;
}

void Clients::Drain() {
    closing_ = true;
    for (const auto& [id, client] : clients_) Spawn(DrainOnReactor(client));
}

void Clients::EndAll() {
    for (const auto& [id, client] : clients_) End(client);
}

Task<void> Clients::Gone() {
    while (!clients_.empty()) co_await changed_.Wait();
    co_await ticker_.Idle();
}

}  // namespace varve::nbdserver
