// Channel: the bytes of a client that negotiates, in the clear or under TLS, and how long it has
// kept the server waiting. Not what they mean (negotiation.h), and not the transmission phase.
#pragma once

#include <array>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "base/task.h"
#include "nbdserver/daemon/control.h"
#include "nbdserver/daemon/control_socket.h"
#include "nbdserver/daemon/tls_service.h"
#include "nbdserver/tls/handshake.h"
#include "nbdserver/tls/records.h"

namespace varve::nbdserver {

/// Time in pieces.
class Stopwatch {
  public:
    using Clock = std::chrono::steady_clock;

    void Go() { began_ = Clock::now(); }
    void Halt() {
        passed_ += Clock::now() - *began_;
        began_.reset();
    }
    bool running() const { return began_.has_value(); }
    Clock::duration passed() const {
        return passed_ + (began_ ? Clock::now() - *began_ : Clock::duration::zero());
    }
    uint64_t ms() const {
        const auto all = std::chrono::duration_cast<std::chrono::milliseconds>(passed());
        return static_cast<uint64_t>(all.count());
    }

  private:
    Clock::duration passed_{};
    std::optional<Clock::time_point> began_;
};

/// All methods on the control thread; at most one task at a time.
class Channel {
  public:
    Channel(Control& control, int fd) : control_(control), socket_(control, fd) {}

    /// The next bytes; none at the end of the stream, on an error, and once cancelled.
    Task<std::string> Read();
    /// `bytes` live meanwhile. False on an error and once cancelled.
    Task<bool> WriteAll(std::string_view bytes);
    /// Sends all or nothing, now: false if there is no room for it.
    bool WriteNow(std::string_view bytes);

    /// Makes the server's side of a TLS handshake: from then on all bytes are under TLS. Empty if
    /// it succeeded, else why not. The service lives meanwhile.
    Task<std::string> StartTls(TlsService& service);
    bool encrypted() const { return records_ != nullptr; }
    /// Who the client is, by TLS.
    const tls::Identity& identity() const { return identity_; }

    /// Tells the client, if there is room, that no more is sent.
    void SayGoodbye();

    /// Ends tasks, for good.
    void Cancel() { socket_.Cancel(); }
    bool cancelled() const { return socket_.cancelled(); }
    int fd() const { return socket_.fd(); }

    /// How long this client was waited for, to send or to take.
    const Stopwatch& waited() const { return waited_; }
    /// Whether it is the client that is waited for now, not this thread that has not come to it.
    bool IsLate() const;

    /// What the transmission phase goes on with.
    struct Remains {
        int fd = -1;  // blocking
        std::unique_ptr<tls::Records> records;
        std::string plain;   // arrived already
        std::string sealed;  // behind it: the beginning of a record
    };
    Remains Release();

  private:
    Task<std::string> ReadRaw();
    Task<bool> WriteRaw(std::string_view bytes);
    bool OpenRecords(std::string& data);

    Control& control_;
    ControlSocket socket_;
    Stopwatch waited_;
    bool reading_ = false;
    std::unique_ptr<tls::Records> records_;
    std::string sealed_;  // arrived, not opened
    tls::Identity identity_;
    std::array<char, 4096> buffer_;
};

}  // namespace varve::nbdserver
