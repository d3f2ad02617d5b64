// Daemon: varved as a whole. Owns its parts, starts them in order and stops them in order.
// Not a part itself: knows nothing of how requests or commands are served.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "admin/service.h"
#include "base/clock.h"
#include "base/result.h"
#include "base/worker.h"
#include "cow/pool/pool.h"
#include "cow/pool/pool_directory.h"
#include "nbdserver/daemon/clients.h"
#include "nbdserver/daemon/control.h"
#include "nbdserver/daemon/data_plane.h"
#include "nbdserver/daemon/options.h"
#include "nbdserver/daemon/server.h"
#include "nbdserver/daemon/tls_service.h"

namespace varve::nbdserver {

class Daemon {
  public:
    /// Opens the pool, recovers it, and only then listens; tells systemd and prints the ready line.
    /// Blocks. One error for whatever is in the way.
    static Result<std::unique_ptr<Daemon>> Start(const Options& options);
    ~Daemon();

    /// Serves on the calling thread until SIGTERM or SIGINT, then stops: answers requests in
    /// flight, commits, closes. Takes at most 2 s, unless the disk is slower than that. An error if
    /// something could not be made durable.
    Status Run();

    /// As the ready line shows them: "nbd://127.0.0.1:10809", ..., "admin=/run/varve/admin.sock".
    const std::vector<std::string>& uris() const { return uris_; }

  private:
    Daemon() = default;

    Status OpenPool(const Options& options);
    Status StartServing(const Options& options);
    void AnnounceReady();

    Task<void> CommitNowAndThen(uint64_t interval_ms);
    Task<void> Stop();
    Task<void> EndStuckClients();
    void Reload();
    Task<void> ReloadFiles();
    Task<void> ReloadAccess();
    Task<void> StopInTime();
    Task<void> LeaveBehind(std::string what);
    void ClosePool();

    std::unique_ptr<Control> control_;  // first: it keeps signals from ending the process
    std::unique_ptr<cow::PoolDirectory> directory_;
    // Threads end in the reverse order: each before those that it posts to. The reactors, which
    // post to the workers and are posted to by them, are stopped first and destroyed last.
    std::unique_ptr<DataPlane> plane_;
    std::unique_ptr<Worker> home_;
    std::unique_ptr<Worker> committer_;
    std::unique_ptr<Worker> loader_;
    std::unique_ptr<Worker> auditor_;
    std::unique_ptr<SystemClock> clock_;
    std::unique_ptr<cow::Pool> pool_;  // used and destroyed on home
    std::unique_ptr<Clients> clients_;
    std::unique_ptr<admin::Service> admin_;
    std::unique_ptr<TlsService> tls_;  // null: there is none
    std::string access_;               // file; empty: there is none
    std::unique_ptr<Server> server_;

    // Of the control thread.
    std::unique_ptr<Timer> commit_timer_, drain_timer_, command_timer_, stop_timer_;
    std::unique_ptr<Gate> stop_watch_;
    std::unique_ptr<Gate> loops_;
    std::unique_ptr<AsyncMutex> reloading_;  // of access
    bool reload_waits_ = false;              // for the one that is under way
    uint64_t commit_interval_ms_ = 0;
    bool admin_stopped_ = false;
    bool stopping_ = false;
    bool stopped_ = false;
    Status outcome_;

    uint64_t descriptors_max_ = 0;
    std::vector<std::string> uris_;
};

}  // namespace varve::nbdserver
