// TlsService: the credentials in force, and the thread on which handshakes compute.
// Not a handshake (tls/handshake.h), nor who may do what.
#pragma once

#include <memory>

#include "base/executor.h"
#include "base/result.h"
#include "base/sync.h"
#include "base/task.h"
#include "base/worker.h"
#include "nbdserver/daemon/control.h"
#include "nbdserver/tls/credentials.h"

namespace varve::nbdserver {

/// Lives on the control thread.
class TlsService {
  public:
    /// Reads the files; blocks. Errors as of Credentials::Load.
    static Result<std::unique_ptr<TlsService>> Start(Control& control, tls::CredentialFiles files);

    /// Where a signature may take milliseconds.
    Executor& worker() { return worker_; }
    /// For a new handshake. Those that are under way keep theirs.
    std::shared_ptr<const tls::Credentials> credentials() const { return credentials_; }

    /// Reads the files again. If one cannot be used, all stays as it was; the log says so.
    Task<void> Reload();

  private:
    TlsService(Control& control, tls::CredentialFiles files)
        : control_(control), files_(std::move(files)), worker_("tls", 1), reloading_(control) {}

    Control& control_;
    const tls::CredentialFiles files_;
    Worker worker_;
    std::shared_ptr<const tls::Credentials> credentials_;
    AsyncMutex reloading_;
    bool reload_waits_ = false;  // for the one that is under way
};

}  // namespace varve::nbdserver
