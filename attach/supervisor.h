// Supervisor: sets a device up, and keeps it connected for as long as it is attached.
// Not in the data path: requests go from the kernel to the server. While no connection is left they
// wait in the kernel.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

#include "attach/netlink.h"
#include "attach/record.h"
#include "attach/remote.h"
#include "base/result.h"

namespace varve::attach {

struct AttachOptions {
    std::string uri;
    std::string name;               // of /dev/varve/NAME; may be empty
    std::optional<uint32_t> index;  // nothing: a free one
    uint32_t connections = 4;       // fewer if the server does not offer several
    uint32_t block_size = 4096;     // bytes, 512 to 4096
    bool read_only = false;
    uint64_t io_timeout_s = 15;    // a request without an answer is sent again elsewhere
    uint64_t give_up_s = 0;        // without any connection for so long: I/O errors; 0: never
    int64_t size_check_ms = 5000;  // how often the server is asked whether the disk has grown
};

/// One thread, on which everything happens.
class Supervisor {
  public:
    Supervisor(AttachOptions options, Records records);
    ~Supervisor();

    /// Sets the device up; or takes over one that an earlier supervisor has left connected to the
    /// same URI under the same name or index. kBusy, kExists,
    /// kNotFound, kInvalid, kFailed.
    Status Start();
    /// Keeps it connected until SIGTERM or SIGINT, then detaches it; or until somebody else has
    /// detached it. REQUIRES: Start(). `changed` is called when the record has changed.
    Status Run(const std::function<void(const Record&)>& changed);

    const Record& record() const { return record_; }

  private:
    Status Connect();
    Result<bool> TakeOver();
    bool StillThere() const;
    void CountDead();
    void TryToConnect();
    Result<Remote> NegotiateAgain();
    void CheckSize();
    void Grow(uint64_t size);
    void Tell();

    const AttachOptions options_;
    const Records records_;
    std::unique_ptr<NbdDriver> driver_;
    Record record_;
    int lock_ = -1;
    int64_t backoff_ms_ = 0;
    int64_t next_try_ms_ = 0;
    int64_t next_check_ms_ = 0;
    std::function<void(const Record&)> changed_;
};

}  // namespace varve::attach
