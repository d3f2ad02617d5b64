// Handshake: the server's side of a TLS handshake, by OpenSSL. Bytes in, bytes out.
// Not the records that follow it (records.h), and no sockets.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "nbdserver/tls/credentials.h"
#include "nbdserver/tls/secrets.h"

namespace varve::nbdserver::tls {

/// Who the client has proved to be; all empty: nobody in particular.
struct Identity {
    std::string psk_user;
    std::string common_name;         // of its certificate's subject
    std::vector<std::string> names;  // its certificate's alternative names: DNS, URI, e-mail
};

/// "psk:alice", "certificate:backup"; empty for nobody in particular. For lists and logs: UTF-8
/// without control characters.
std::string Describe(const Identity& identity);

/// One thread at a time, not always the same.
class Handshake {
  public:
    enum class Step { kInput, kDone, kFailed };

    explicit Handshake(std::shared_ptr<const Credentials> credentials);
    ~Handshake();
    Handshake(const Handshake&) = delete;

    Step step() const { return step_; }
    /// Takes the client's next bytes. May compute for milliseconds. REQUIRES: step() is kInput.
    Step Feed(std::string_view bytes);
    /// To be sent, after a failure too: the client is told.
    std::string TakeOutput();

    /// Why it failed, in one line.
    const std::string& failure() const { return failure_; }

    // ---- REQUIRES: step() is kDone.
    const Agreement& agreement() const { return agreement_; }
    const Identity& identity() const { return identity_; }
    /// What arrived behind the handshake: records.
    std::string TakeLeftover();

    struct Library;

  private:
    Step Fail(std::string why);
    Step Finish();
    bool ExpandSecrets();
    bool FindNonce();

    const std::shared_ptr<const Credentials> credentials_;
    std::unique_ptr<Library> library_;
    Step step_ = Step::kInput;
    std::string failure_;
    Agreement agreement_;
    Identity identity_;
    Secret master_;  // TLS 1.2
};

}  // namespace varve::nbdserver::tls
