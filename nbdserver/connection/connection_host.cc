#include <utility>

#include "nbdserver/connection/connection_impl.h"

namespace varve::nbdserver {
namespace {

constexpr size_t kKeptMapMax = 64;  // stretches whose memory an unused request keeps

}  // namespace

ConnectionHost::Shared::Shared(Reactor& r, ConnectionLimits l, std::shared_ptr<MemoryPot> p)
    : reactor(r),
      limits(l),
      pool(l.unused_bytes_max),
      pot(p ? std::move(p) : std::make_shared<MemoryPot>(l.host_bytes_max, 1)),
      budget(pot, kSmallRequestBytes, [this] { Poke(); }),
      received(*pot) {
    slice_timer.shared = this;
    slice_timer.done = [](Op* op, int32_t) {
        static_cast<SliceTimer*>(op)->shared->OnSliceTimer();
    };
    poked.shared = this;
    poked.run = [](Runnable* self) { static_cast<Poked*>(self)->shared->OnPoke(); };
    watch.shared = this;
    watch.done = [](Op* op, int32_t result) {
        static_cast<Watch*>(op)->shared->LookForStalled(result);
    };
}

ConnectionHost::Shared::~Shared() {
    CheckNothingHeld();
}

void ConnectionHost::Shared::CheckNothingHeld() const {
    VARVE_CHECK(bytes == 0 && received.here() == 0 && budget.bytes() == 0);
}

void ConnectionHost::Shared::ReturnRequest(Request* request) {
    request->payload.Release();
    request->layout.Release();
    request->pieces = {};
    request->map.clear();
    if (request->map.capacity() > kKeptMapMax) request->map = {};
    free_requests.Return(request);
}

ConnectionHost::ConnectionHost(Reactor& reactor, ConnectionLimits limits,
                               std::shared_ptr<MemoryPot> pot)
    : shared_(std::make_unique<Shared>(reactor, limits, std::move(pot))) {}

ConnectionHost::~ConnectionHost() {
    VARVE_CHECK(shared_->all.empty());
}

Connection* ConnectionHost::Start(int fd, TransmissionOptions options, cow::Volume& volume,
                                  std::function<void()> ended) {
    VARVE_CHECK(shared_->reactor.InThread());
    VARVE_CHECK(&volume.executor() == &shared_->reactor);
    Connection* connection =
        new Connection(*this, fd, std::move(options), volume, std::move(ended));
    shared_->all.push_back(connection);
    if (shared_->budget.anybody_waits()) shared_->WatchStalled();
    connection->Wake();
    return connection;
}

void ConnectionHost::EndAll() {
    for (Connection* connection : shared_->all) connection->Drop();
}

uint64_t ConnectionHost::connections() const {
    return shared_->all.size();
}

uint64_t ConnectionHost::bytes_in_flight() const {
    return shared_->bytes;
}

uint64_t ConnectionHost::peers_asked() const {
    return shared_->peers_asked;
}

uint64_t ConnectionHost::bytes_received() const {
    return shared_->received.here();
}

uint64_t ConnectionHost::TakePeak() {
    return shared_->peak.exchange(0, std::memory_order_relaxed);
}

}  // namespace varve::nbdserver
