#include "nbdserver/daemon/data_plane.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <malloc.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "base/run_on.h"
#include "nbdserver/connection/memory_pot.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kLargeLoadBytes = 64 << 20;

/// An open file of its own for each lane. The system tells a lost write once to each open file that
/// is synced: with one for all, a lane's sync could succeed because another's has just failed.
/// Each has the lock: should this process be killed, the system keeps the file open, and locked,
/// until the last transfer on it has ended.
int OpenAgain(int fd) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0) return -1;
    const int kept = flags & (O_ACCMODE | O_DIRECT);
    const int again = ::open(fmt::format("/proc/self/fd/{}", fd).c_str(), kept | O_CLOEXEC);
    if (again >= 0 && ::flock(again, LOCK_SH | LOCK_NB) != 0) {
        ::close(again);
        return -1;
    }
    return again;
}

Task<bool> Nothing() {
    co_return true;
}

}  // namespace

Result<std::unique_ptr<DataPlane>> DataPlane::Start(unsigned threads, int fd, FileTraits traits,
                                                    const ConnectionLimits& limits,
                                                    int64_t poll_nanoseconds) {
    std::unique_ptr<DataPlane> plane(new DataPlane);
    std::shared_ptr<const FileMapping> mapping;
    if (traits.in_memory) mapping = FileMapping::Map(fd);
    const auto pot = std::make_shared<MemoryPot>(limits.host_bytes_max, threads);
    ConnectionLimits each = limits;
    each.unused_bytes_max = std::min(limits.unused_bytes_max, limits.host_bytes_max / threads);
    for (unsigned i = 0; i < threads; ++i) {
        ReactorOptions options;
        options.name = fmt::format("reactor{}", i);
        options.poll_nanoseconds = poll_nanoseconds;
        Result<std::unique_ptr<Reactor>> reactor = Reactor::Start(options);
        if (!reactor.ok()) return reactor.error();
        Lane& lane = plane->lanes_.emplace_back();
        lane.reactor = std::move(reactor.value());
        lane.fd = OpenAgain(fd);
        if (lane.fd < 0) return SystemError(errno, "cannot open the data file again");
        lane.store = std::make_unique<RingStore>(*lane.reactor, lane.fd, traits, mapping);
        lane.host = std::make_unique<ConnectionHost>(*lane.reactor, each, pot);
    }
    return plane;
}

void DataPlane::Settle() {
    for (Lane& lane : lanes_) RunOn(*lane.reactor, Nothing());
}

void DataPlane::Stop() {
    for (const Lane& lane : lanes_) lane.reactor->Stop();
}

DataPlane::~DataPlane() {
    Stop();
    for (const Lane& lane : lanes_) {
        if (lane.fd >= 0) ::close(lane.fd);
    }
}

std::vector<cow::Lane> DataPlane::lanes() const {
    std::vector<cow::Lane> lanes;
    for (const Lane& lane : lanes_) lanes.push_back({lane.reactor.get(), lane.store.get()});
    return lanes;
}

ConnectionHost& DataPlane::HostOf(Executor& reactor) const {
    for (const Lane& lane : lanes_) {
        if (lane.reactor.get() == &reactor) return *lane.host;
    }
    VARVE_CHECK(false);
    __builtin_unreachable();
}

void DataPlane::ReturnMemory() {
    uint64_t held = 0;
    for (const Lane& lane : lanes_) held += lane.host->TakePeak();
    // Small pieces that live on keep the large ones around them from leaving by themselves:
    // 200 MiB stayed after clients that did not read. Not while a load goes on: it takes time.
    if (load_bytes_ >= kLargeLoadBytes && held < load_bytes_ / 8) {
        malloc_trim(0);
        load_bytes_ = 0;
    }
    load_bytes_ = std::max(load_bytes_, held);
}

}  // namespace varve::nbdserver
