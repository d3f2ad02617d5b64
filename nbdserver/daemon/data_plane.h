// DataPlane: the reactors with what belongs to each: a block store on the data file, and the host
// of its connections.
// Not what runs on them: the engine gets lanes, Clients gets hosts.
#pragma once

#include <memory>
#include <vector>

#include "base/reactor.h"
#include "base/result.h"
#include "cow/pool/pool.h"
#include "nbdserver/connection/connection.h"
#include "nbdserver/storage/ring_store.h"

namespace varve::nbdserver {

class DataPlane {
  public:
    /// Starts `threads` reactors on the data file `fd`, which stays the caller's. kFailed where
    /// io_uring cannot be used. `poll_nanoseconds`: see ReactorOptions.
    static Result<std::unique_ptr<DataPlane>> Start(unsigned threads, int fd, FileTraits traits,
                                                    const ConnectionLimits& limits,
                                                    int64_t poll_nanoseconds);

    /// Waits until each thread has come back to its loop from what it ran when this was called.
    void Settle();

    /// Waits for what is under way, then ends the threads. REQUIRES: no connection is left, and
    /// nothing is posted any more.
    void Stop();
    /// Stop(), if that was not done. REQUIRES: whoever posted has returned from it.
    ~DataPlane();
    DataPlane(const DataPlane&) = delete;

    std::vector<cow::Lane> lanes() const;
    /// The host on `reactor`, one of the lanes' executors. Any thread.
    ConnectionHost& HostOf(Executor& reactor) const;

    /// To be called every second or so, by one thread: after a large load, gives back to the system
    /// what the allocator keeps of it.
    void ReturnMemory();

  private:
    struct Lane {
        std::unique_ptr<Reactor> reactor;
        int fd = -1;  // the data file's
        std::unique_ptr<RingStore> store;
        std::unique_ptr<ConnectionHost> host;
    };

    DataPlane() = default;

    std::vector<Lane> lanes_;
    uint64_t load_bytes_ = 0;  // most that clients held since memory was last returned
};

}  // namespace varve::nbdserver
