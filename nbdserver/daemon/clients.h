// Clients: who is attached, from the export being opened to it being closed.
// Not the connections themselves: connection.h serves them; not the sockets' negotiation.
//
//   Make -> Attach (home) -> [GO is answered] -> Serve (home -> the volume's reactor -> home) ->
//   closed
//                                  '-----------> Release (home)
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "admin/client_directory.h"
#include "base/executor.h"
#include "base/sync.h"
#include "base/task.h"
#include "base/ticker.h"
#include "cow/pool/pool.h"
#include "nbdserver/access/rules.h"
#include "nbdserver/connection/connection.h"
#include "nbdserver/daemon/limited_log.h"
#include "nbdserver/negotiation/negotiation.h"

namespace varve::nbdserver {

class Client;

/// What is known of a client before it asks for an export.
struct Visitor {
    std::string name;  // as Peer has it
    bool tls = false;
    access::Subject who;
    bool read_only = false;  // whatever the export is, and whatever the rules say
};

/// Lives on the home executor: all methods are called there, and their tasks are started there.
class Clients : public admin::ClientDirectory {
  public:
    /// `host_of` gives the connection host of a volume's executor. Tells `pool` how to fence.
    /// Without `rules` everybody may open everything.
    Clients(Executor& home, Clock& clock, cow::Pool& pool,
            std::function<ConnectionHost&(Executor&)> host_of,
            std::shared_ptr<const access::Rules> rules = nullptr);
    /// REQUIRES: no client is left. The pool must not fence any more.
    ~Clients() override;

    /// Says what an export is to a visitor, without attaching to it, and which of `bases` he can
    /// compare it with. Errors as of Pool::DescribeExport, and kNotFound if he may not open it.
    Result<ExportDescription> Describe(std::string export_name,
                                       const std::vector<std::string>& bases,
                                       const Visitor& visitor);

    /// What a visitor may open.
    access::Grants GrantsOf(const Visitor& visitor) const { return {rules_, visitor.who}; }

    /// From now on these hold, for those that are attached too: who may not open his export any
    /// more, or not write to it, is cut off. Gives who was, for Left().
    Task<std::vector<uint64_t>> ChangeRules(std::shared_ptr<const access::Rules> rules);
    /// Waits, some seconds at most, until these are gone. How many are.
    Task<uint64_t> Left(std::vector<uint64_t> ids);

    /// A client that will ask for an export. Any thread.
    static std::shared_ptr<Client> Make(Visitor visitor);

    /// Opens the export for a client that asks for it, to be compared with `bases`. Errors as of
    /// Pool::OpenExport, and kNotFound if he may not; kFailed after Drain(), kBusy after GiveUp().
    /// If it succeeds, the client owes Serve() or Release(), soon and without waiting for its peer.
    /// Nothing of clients that have left the disk lands after it: that is waited for, for as long
    /// as the device keeps a request of theirs.
    Task<Status> Attach(std::shared_ptr<Client> client, std::string export_name,
                        std::vector<std::string> bases);

    /// Nobody waits for Attach() of this client any more: it ends soon.
    void GiveUp(std::shared_ptr<Client> client);

    /// Serves the client on the socket `fd`, which is owned from now on, until it is gone.
    Task<void> Serve(std::shared_ptr<Client> client, int fd, TransmissionOptions options);

    /// Closes the export of a client that will not be served.
    Task<void> Release(std::shared_ptr<Client> client);

    /// Notes who has had a request answered since the last call, and tells how many refusals the
    /// log has left out. To be called every second or so.
    void Observe();

    // ---- admin::ClientDirectory
    Task<std::vector<admin::ClientInfo>> List() override;
    Task<uint64_t> Disconnect(std::vector<uint64_t> ids) override;

    /// Stops opening exports and receiving requests: requests in flight are still answered.
    void Drain();
    /// Ends what is left, replies or not.
    void EndAll();
    /// Waits until no client is left.
    Task<void> Gone();

  private:
    Task<Status> Open(std::shared_ptr<Client> client, std::string export_name,
                      std::vector<std::string> bases);
    Task<std::shared_ptr<const cow::Layers>> LayersOf(std::shared_ptr<Client> client);
    Status Enter(const std::shared_ptr<Client>& client, const cow::Export& opened);
    bool MayStay(const Client& client) const;
    void End(std::shared_ptr<Client> client);
    Task<void> Close(std::shared_ptr<Client> client);

    Executor& home_;
    cow::Pool& pool_;
    const std::function<ConnectionHost&(Executor&)> host_of_;
    std::shared_ptr<const access::Rules> rules_;  // null: there are none
    LimitedLog refusals_{"refusals"};
    std::map<uint64_t, std::shared_ptr<Client>> clients_;  // by the export's id
    WaitList changed_;                                     // a client went
    Ticker ticker_;
    bool closing_ = false;
};

/// The export of an open client, for negotiation.
const ExportDescription& DescriptionOf(const Client& client);

}  // namespace varve::nbdserver
