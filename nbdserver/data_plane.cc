#include "nbdserver/data_plane.h"

#include <fmt/format.h>

#include "base/check.h"

namespace varve::nbdserver {

Result<std::unique_ptr<DataPlane>> DataPlane::Start(unsigned threads, int fd, FileTraits traits,
                                                    const ConnectionLimits& limits) {
    std::unique_ptr<DataPlane> plane(new DataPlane);
    for (unsigned i = 0; i < threads; ++i) {
        ReactorOptions options;
        options.name = fmt::format("reactor{}", i);
        Result<std::unique_ptr<Reactor>> reactor = Reactor::Start(options);
        if (!reactor.ok()) return reactor.error();
        Lane lane;
        lane.reactor = std::move(reactor.value());
        lane.store = std::make_unique<RingStore>(*lane.reactor, fd, traits);
        lane.host = std::make_unique<ConnectionHost>(*lane.reactor, limits);
        plane->lanes_.push_back(std::move(lane));
    }
    return plane;
}

DataPlane::~DataPlane() {
    for (const Lane& lane : lanes_) lane.reactor->Stop();
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

}  // namespace varve::nbdserver
