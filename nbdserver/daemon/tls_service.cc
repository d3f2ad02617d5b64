#include "nbdserver/daemon/tls_service.h"

#include <utility>

#include "base/log.h"

namespace varve::nbdserver {

using Loaded = Result<std::shared_ptr<const tls::Credentials>>;

Result<std::unique_ptr<TlsService>> TlsService::Start(Control& control,
                                                      tls::CredentialFiles files) {
    const Loaded loaded = tls::Credentials::Load(files);
    if (!loaded.ok()) return loaded.error();
    std::unique_ptr<TlsService> service(new TlsService(control, std::move(files)));
    service->credentials_ = loaded.value();
    return service;
}

Task<void> TlsService::Reload() {
    if (std::exchange(reload_waits_, true)) co_return;  // that one reads what is there by then
    Task<void> locking = reloading_.Lock();
    co_await locking;
    reload_waits_ = false;
    co_await Hop(worker_);
    const Loaded loaded = tls::Credentials::Load(files_);
    co_await Hop(control_);
    if (loaded.ok()) {
        credentials_ = loaded.value();
        Log(LogLevel::kInfo,
            "SIGHUP: new connections use the certificates and keys as they are now");
    } else {
        Log(LogLevel::kError,
            "SIGHUP: certificates and keys stay as they were: " + loaded.error().message);
    }
    reloading_.Unlock();
}

}  // namespace varve::nbdserver
