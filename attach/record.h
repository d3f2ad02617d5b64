// Record: what is known of an attached device, in a file that outlives its supervisor. The
// supervisor writes it; `attached`, `detach`, udev and a supervisor started anew read it.
#pragma once

#include <sys/types.h>

#include <boost/json/object.hpp>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"

namespace varve::attach {

struct Record {
    uint32_t index = 0;  // of /dev/nbdN
    std::string name;    // /dev/varve/NAME; may be empty
    std::string uri;
    uint64_t size = 0;        // bytes, as the kernel was told
    uint32_t block_size = 0;  // bytes
    uint32_t connections = 0;
    uint32_t dead = 0;  // of the connections
    bool read_only = false;
    uint64_t reconnects = 0;  // since it was attached
    std::string error;        // why the last try to connect failed; empty: it did not
    int64_t attached_ms = 0;  // since 1970
    int64_t changed_ms = 0;
    pid_t pid = 0;  // of the supervisor

    std::string device() const { return "/dev/nbd" + std::to_string(index); }
    /// "connected", "degraded" (some connections are dead) or "reconnecting" (all are).
    const char* state() const;
    /// Who may reconfigure the device.
    std::string backend() const { return "varve:" + uri; }
};

boost::json::object ToJson(const Record& record);

/// The records of a directory, /run/varve/attach unless tests say otherwise. Any process; a record
/// is replaced as a whole.
class Records {
  public:
    explicit Records(std::string directory);

    Status Write(const Record& record) const;
    /// kNotFound if there is none, kDamaged if it is none.
    Result<Record> Read(uint32_t index) const;
    std::vector<Record> All() const;
    void Remove(uint32_t index) const;

    /// Held by a supervisor for its device as long as it lives: a descriptor, or -1 if another
    /// holds it. `wait`: until then.
    int Lock(uint32_t index, bool wait) const;

  private:
    std::string PathOf(uint32_t index, const char* ending) const;
    const std::string directory_;
};

}  // namespace varve::attach
