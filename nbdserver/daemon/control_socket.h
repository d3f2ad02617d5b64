// ControlSocket: a non-blocking stream socket, waited for by coroutines of the control thread.
// Not the data path: attached clients are served by connection.h.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string_view>

#include "base/task.h"
#include "nbdserver/daemon/control.h"

namespace varve::nbdserver {

/// All methods on the control thread; at most one wait at a time.
class ControlSocket {
  public:
    /// Takes `fd` over and makes it non-blocking. Cancelled from the start if the system cannot
    /// wait for it.
    ControlSocket(Control& control, int fd);
    /// Closes it. REQUIRES: nobody waits.
    ~ControlSocket();

    /// Waits until the socket is readable or, if it listens, has a connection. False once Cancel()
    /// was called, before or meanwhile.
    Task<bool> WaitReadable();

    /// The next bytes, at least one; 0 at the end of the stream, on an error, and once cancelled.
    Task<size_t> Read(std::span<char> into);
    /// False on an error and once cancelled.
    Task<bool> WriteAll(std::string_view bytes);
    /// Sends all or nothing, now: false if the socket has no room for it.
    bool WriteNow(std::string_view bytes);

    /// Ends waits, for good.
    void Cancel();
    bool cancelled() const { return cancelled_; }

    int fd() const;
    /// Gives the descriptor away, blocking again. REQUIRES: nobody waits.
    int Release();

  private:
    enum class Direction { kRead, kWrite };
    Task<bool> Wait(Direction direction);

    struct State;
    std::unique_ptr<State> state_;
    bool cancelled_ = false;
};

}  // namespace varve::nbdserver
