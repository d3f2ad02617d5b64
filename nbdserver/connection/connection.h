// Connection: the transmission phase of one NBD client, from the first request to the last reply.
// Not negotiation (it starts after it), not an engine: it serves whatever cow::Volume it is given.
//
// All connections of a reactor share a ConnectionHost: pooled memory and the bound on it.
//
//   receive --> parse --> one coroutine for each request --> reply queue --> one send for all
//                 |             Volume::Read, Write, ...                      replies of a batch
//                 '-- over a limit: stop receiving until replies have left
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/reactor.h"
#include "base/result.h"
#include "base/sync.h"
#include "base/task.h"
#include "cow/volume/changes.h"
#include "cow/volume/volume.h"
#include "nbdserver/connection/block_status.h"
#include "nbdserver/tls/records.h"

namespace varve::nbdserver {

class Connection;

/// Bounds on what clients can make the server hold. Over a bound a connection stops receiving
/// until replies have left; nothing fails. How connections share the memory: memory_budget.h. One
/// without anything in flight is always granted a request of 16 KiB, or of 4 KiB that is not
/// aligned to 4 KiB; larger ones may wait for others, and meanwhile whoever holds memory but does
/// not take or send its bytes is closed.
struct ConnectionLimits {
    uint32_t payload_max = 32 << 20;       // bytes of one READ or WRITE; over it: EINVAL
    uint32_t requests_max = 1024;          // in flight, for each connection
    uint64_t bytes_max = 64 << 20;         // payloads in flight, for each connection
    uint64_t work_bytes_max = 64 << 20;    // that requests without payload work on, likewise: one
                                           // that is larger alone, the others wait
    uint64_t host_bytes_max = 512 << 20;   // memory in flight, all connections of all reactors
    uint64_t unused_bytes_max = 64 << 20;  // pooled memory kept for later, for each reactor
    uint64_t stall_ms_max = 5000;          // without progress, while others wait for its memory
    uint64_t leave_ms_max = 2000;          // to finish what is outstanding when others come
};

/// What `client.list` shows. Written by the connection's reactor, readable from every thread.
struct ConnectionCounters {
    std::atomic<uint64_t> requests{0};       // answered
    std::atomic<uint64_t> bytes_read{0};     // payload sent
    std::atomic<uint64_t> bytes_written{0};  // payload received and written without error
    std::atomic<uint64_t> errors{0};         // requests answered with an error
    std::atomic<uint64_t> given_up{0};       // requests of a client that has gone
};

/// What was agreed on in negotiation.
struct TransmissionOptions {
    bool structured_replies = false;
    bool extended_headers = false;  // then structured_replies as well
    /// That were selected for this export.
    std::vector<StatusContext> contexts;
    /// What they compare it with, by StatusContext::base.
    std::vector<std::shared_ptr<const cow::Base>> bases;
    /// For depths: what the export's blocks are counted by now. Started and finished on the
    /// reactor. May be null if no context needs it.
    std::function<Task<std::shared_ptr<const cow::Layers>>()> layers;
    /// Bytes that arrived behind the last option: the client's first requests.
    std::vector<std::byte> received;
    /// The records that all further bytes are in; null: there is no TLS.
    std::unique_ptr<tls::Records> tls;
    std::string tls_received;  // the beginning of one that has arrived
    bool read_only = false;    // whatever the volume is
    /// Kept and counted into; may be shared with whoever lists clients. Null: nobody looks.
    std::shared_ptr<ConnectionCounters> counters;
};

/// The transmission flags (16 bits) that this implementation serves. `structured_replies`: they
/// were negotiated before the flags are sent; `extended`: extended headers likewise.
uint16_t TransmissionFlags(bool read_only, bool structured_replies, bool extended = false);

class MemoryPot;

/// A wait for clients that have left, for who may lose interest. All of it on one reactor's thread.
class LeaverWait {
  public:
    /// Ends the wait, or lets it not begin.
    void GiveUp();

  private:
    friend class ConnectionHost;  // and what its connections share
    bool given_up_ = false;
    bool over_ = false;            // nobody is left to wait for
    WaitList* changed_ = nullptr;  // while it lasts
};

/// The connections of one reactor. All methods on the reactor's thread, except construction and
/// destruction, which may happen anywhere while the reactor does not use it.
class ConnectionHost {
  public:
    /// `pot`: the memory that the hosts of all reactors share. Null: one of its own.
    ConnectionHost(Reactor& reactor, ConnectionLimits limits,
                   std::shared_ptr<MemoryPot> pot = nullptr);
    /// REQUIRES: no connection is left.
    ~ConnectionHost();

    /// Starts serving `volume` on the stream socket `fd`, which the connection owns from now on.
    /// REQUIRES: volume.executor() is this host's reactor; `volume` lives until `ended`.
    /// `ended` is called once, on the reactor, when no request of this client is running and
    /// the socket is closed: from then on the Connection is gone and nothing of its client can
    /// land any more. It ends when the client disconnects, breaks the protocol, or by End().
    Connection* Start(int fd, TransmissionOptions options, cow::Volume& volume,
                      std::function<void()> ended);

    /// Waits until nothing can land on `volume` any more of clients that have left it: their
    /// connections have ended. They are given ConnectionLimits::leave_ms_max to finish what is
    /// outstanding, then that is given up; what hangs in the device is waited for as long as it
    /// does. Clients that are there are not waited for. On a read-only volume nothing lands: there
    /// it waits only if many have left, which bounds them. False once `wait` is given up. REQUIRES:
    /// `wait` and `volume` live meanwhile.
    Task<bool> AwaitLeavers(cow::Volume& volume, LeaverWait& wait);

    /// End() for all of them.
    void EndAll();

    uint64_t connections() const;
    uint64_t bytes_in_flight() const;  // memory that requests hold, for tests and status
    uint64_t peers_asked() const;      // how often the system was, whether one has left; for tests
    uint64_t bytes_received() const;   // but not begun, or what receives may bring, for tests

    /// The most of it since the last call in which some was added. Any thread.
    uint64_t TakePeak();

  private:
    friend class Connection;
    struct Shared;

    std::unique_ptr<Shared> shared_;
};

/// Ends `connection` now: its socket is shut down, requests running in the volume are given up and
/// their replies dropped, then `ended` is called. On the reactor's thread, before `ended`; more
/// than once is allowed.
void End(Connection* connection);

}  // namespace varve::nbdserver
