// The client's side of NBD by hand: bytes on a socket, and options as they are sent.
#pragma once

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "base/endian.h"
#include "nbdserver/wire/wire.h"
#include "tests/request_header.h"

namespace varve::nbdserver {

/// The client's flags: fixed newstyle, no zeroes.
inline const std::string kHello = std::string("\0\0\0\3", 4);

inline void SendAll(int fd, const std::string& bytes) {
    ASSERT_EQ(::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(bytes.size()));
}

/// Up to `length` bytes; fewer if the peer has closed.
inline std::string Receive(int fd, size_t length) {
    std::string bytes(length, '\0');
    size_t done = 0;
    while (done < length) {
        const ssize_t n = ::recv(fd, bytes.data() + done, length - done, 0);
        if (n <= 0) break;
        done += static_cast<size_t>(n);
    }
    bytes.resize(done);
    return bytes;
}

/// The client's end of a connection. A lost reply fails the test instead of hanging it.
class ClientEnd {
  public:
    explicit ClientEnd(int fd) : fd_(fd) {
        const timeval limit{60, 0};
        setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    }
    ClientEnd(const ClientEnd&) = delete;
    ~ClientEnd() { Close(); }

    int fd() const { return fd_; }
    void Close() {
        if (fd_ >= 0) close(std::exchange(fd_, -1));
    }
    void HalfClose() { shutdown(fd_, SHUT_WR); }

  private:
    int fd_;
};

inline std::string Option(uint32_t option, const std::string& data = "") {
    std::string out;
    AppendBig(out, wire::kOptionMagic);
    AppendBig(out, option);
    AppendBig(out, static_cast<uint32_t>(data.size()));
    return out + data;
}

}  // namespace varve::nbdserver
