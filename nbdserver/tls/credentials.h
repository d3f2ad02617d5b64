// Credentials: what the server shows and what it asks of clients, read from files once.
// Not kept up to date: whoever wants new ones loads them (SIGHUP) and uses those from then on.
#pragma once

#include <memory>
#include <string>

#include "base/result.h"
#include "nbdserver/tls/psk_file.h"

struct ssl_ctx_st;  // OpenSSL's SSL_CTX

namespace varve::nbdserver::tls {

struct CredentialFiles {
    std::string certificates;  // DIR with server-cert.pem, server-key.pem, ca-cert.pem, ca-crl.pem
    std::string psk;           // file
    bool verify_peer = false;  // a client without PSK must show a certificate of the authority's

    bool empty() const { return certificates.empty() && psk.empty(); }
};

/// Fixed once made; any thread.
class Credentials {
  public:
    /// Reads all files; blocks. kInvalid or kIo, in one line that names the file.
    static Result<std::shared_ptr<const Credentials>> Load(const CredentialFiles& files);
    ~Credentials();

    ssl_ctx_st* context() const { return context_; }
    const PskTable& users() const { return users_; }

  private:
    Credentials() = default;
    Status LoadCertificates(const std::string& directory, bool verify_peer);
    Status LoadUsers(const std::string& path);

    ssl_ctx_st* context_ = nullptr;
    PskTable users_;
};

}  // namespace varve::nbdserver::tls
