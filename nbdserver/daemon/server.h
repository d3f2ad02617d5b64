// Server: accepts NBD clients, negotiates with them, and hands them to the data plane.
// Not their requests: once negotiated, a client belongs to Clients and to its disk's reactor.
//
//   listener --accept--> negotiation (deadline, bounded number) --> Clients::Serve
//                              '-> [waits for its export: WaitingRoom] -'
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "base/sync.h"
#include "base/task.h"
#include "cow/pool/pool.h"
#include "nbdserver/daemon/clients.h"
#include "nbdserver/daemon/control.h"
#include "nbdserver/daemon/control_socket.h"
#include "nbdserver/daemon/export_lists.h"
#include "nbdserver/daemon/limited_log.h"
#include "nbdserver/daemon/listeners.h"
#include "nbdserver/daemon/tls_service.h"
#include "nbdserver/daemon/waiting_room.h"
#include "nbdserver/negotiation/negotiation.h"

namespace varve::nbdserver {

struct ServerLimits {
    NegotiationLimits negotiation;
    /// How long the server waits for one client, in all; its own time does not count. Half a
    /// second is enough to make room for another that waits for a place.
    uint64_t negotiation_ms_max = 10'000;
    uint64_t negotiating_max = 100;     // more wait in the listeners' backlogs
    uint64_t waiting_max = 100;         // for one export, besides those; more are refused
    uint64_t peer_timeout_s = 60;       // see PrepareConnection()
    uint64_t connections_max = 10'000;  // negotiating or attached; more are closed at once
};

/// Lives on the control thread: all methods are called there.
class Server {
  public:
    /// All of these outlive the server. `clients` and `pool` live on `home`. `tls` may be null if
    /// no listener offers it.
    Server(Control& control, Executor& home, cow::Pool& pool, Clients& clients, TlsService* tls,
           ServerLimits limits);
    /// REQUIRES: never started, or Closed() has finished.
    ~Server();

    /// Accepts from `listeners` from now on.
    void Start(std::vector<Listener> listeners);

    /// Stops accepting and negotiating; attached clients stay.
    void Close();
    /// Waits until nobody is negotiating or attached any more.
    Task<void> Closed();

    /// Tells how many failures the log has left out. To be called every second or so.
    void Observe() { failures_.TellNumber(); }

    uint64_t connections() const { return connections_; }

  private:
    struct Acceptor;
    struct Handshake;

    Task<void> Accept(std::shared_ptr<Acceptor> acceptor);
    bool AcceptOne(const Acceptor& acceptor, Errno* shortage);
    bool Full() const { return handshakes_.size() - waiting_.seated() >= limits_.negotiating_max; }
    void MakeRoom();
    uint64_t AllowedMs(const Handshake& handshake) const;
    void EndLate(Handshake& handshake);
    Task<void> WatchDeadline(std::shared_ptr<Handshake> handshake);
    Task<void> Negotiate(std::shared_ptr<Handshake> handshake);
    Task<void> Converse(std::shared_ptr<Handshake> handshake);
    Task<bool> Tell(std::shared_ptr<Handshake> handshake);
    Task<bool> StartTls(std::shared_ptr<Handshake> handshake);
    Task<void> AnswerList(std::shared_ptr<Handshake> handshake);
    Task<void> AnswerLookup(std::shared_ptr<Handshake> handshake);
    Task<void> OpenExport(std::shared_ptr<Handshake> handshake);
    void EndWait(Handshake& handshake, WaitingRoom::Reason reason);
    Task<void> GiveUp(std::shared_ptr<Client> client);
    void Refuse(Negotiator& negotiator, const Error& error);
    Task<void> Attend(std::shared_ptr<Client> client, int fd, TransmissionOptions options);
    void NegotiationEnded(const std::shared_ptr<Handshake>& handshake);
    void ConnectionEnded();

    Control& control_;
    Executor& home_;
    cow::Pool& pool_;
    Clients& clients_;
    TlsService* const tls_;
    const ServerLimits limits_;

    ExportLists lists_;
    std::vector<std::shared_ptr<Acceptor>> acceptors_;
    std::set<std::shared_ptr<Handshake>> handshakes_;
    uint64_t connections_ = 0;
    bool closing_ = false;
    uint64_t leaving_ = 0;                      // of handshakes_: closed already
    bool full_ = false;                         // reported already
    LimitedLog failures_{"handshakes failed"};  // whoever reaches the port can fail
    WaitList room_;                             // a negotiation ended, or may be ended for others
    Gate gate_;                                 // accept loops, connections and their deadlines
    WaitingRoom waiting_;                       // of handshakes_: those that wait for their export
};

}  // namespace varve::nbdserver
