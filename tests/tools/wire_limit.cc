// varve-wire-limit SOCKET MIB [FILE]: a measuring stick for scripts/bench, not a server. It answers
// NBD requests with as few system calls as can be: for each connection a thread and a ring, one
// receive for many requests, one send for many replies. No map, no limits, no errors, no flush;
// structured replies only.
// Without FILE it keeps the disk in its memory: what the wire alone costs. With FILE (on tmpfs) it
// sends from a mapping of it and writes by pwrite: what any server costs that keeps a file.
#include <fcntl.h>
#include <liburing.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "admin/unix_socket.h"
#include "base/check.h"
#include "nbdserver/negotiation/negotiation.h"
#include "nbdserver/wire/wire.h"

namespace varve::nbdserver {
namespace {

constexpr size_t kReceiveBytes = 4 << 20;
constexpr size_t kPiecesMax = 1024;  // IOV_MAX

struct Disk {
    std::byte* memory = nullptr;
    uint64_t size = 0;  // bytes
    int fd = -1;        // of the file that `memory` maps, if there is one
};

Disk MakeDisk(uint64_t size, const char* path) {
    Disk disk;
    disk.size = size;
    if (path) {
        disk.fd = open(path, O_RDWR | O_CLOEXEC);
        VARVE_CHECK(disk.fd >= 0);
    }
    const int how = (path ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) | MAP_POPULATE;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, how, disk.fd, 0);
    VARVE_CHECK(memory != MAP_FAILED);
    disk.memory = static_cast<std::byte*>(memory);
    return disk;
}

bool SendText(int fd, const std::string& text) {
    return send(fd, text.data(), text.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(text.size());
}

/// False: the client went away.
bool Negotiate(int fd, const Disk& disk) {
    Negotiator negotiator;
    std::array<char, 4096> bytes;
    for (Negotiator::Step step = negotiator.step(); step != Negotiator::Step::kDone;) {
        if (!SendText(fd, negotiator.TakeOutput())) return false;
        if (step == Negotiator::Step::kHangUp) return false;
        if (step == Negotiator::Step::kInput) {
            const ssize_t got = recv(fd, bytes.data(), bytes.size(), 0);
            if (got <= 0) return false;
            step = negotiator.Feed({bytes.data(), static_cast<size_t>(got)});
        } else if (step == Negotiator::Step::kList) {
            const ListReply none = ListEncoder(0).Finish();
            step = SendText(fd, none.pieces[0]) ? negotiator.AnswerList(none)
                                                : Negotiator::Step::kHangUp;
        } else {
            step = negotiator.AnswerLookup({"disk0", disk.size, false});
        }
    }
    // libnbd and fio agree on structured replies.
    return negotiator.TakeResult().structured_replies && SendText(fd, negotiator.TakeOutput());
}

class Stick {
  public:
    Stick(int fd, const Disk& disk)
        : fd_(fd), disk_(disk), received_(std::make_unique<std::byte[]>(kReceiveBytes)) {
        io_uring_params params{};
        params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
        VARVE_CHECK(io_uring_queue_init_params(8, &ring_, &params) == 0);
    }
    Stick(const Stick&) = delete;
    ~Stick() {
        io_uring_queue_exit(&ring_);
        close(fd_);
    }

    void Serve() {
        replies_.resize(kReceiveBytes / sizeof(wire::Request));
        while (Receive() && Answer() && Send()) {
        }
    }

  private:
    struct Data {
        wire::Chunk chunk;
        wire::OffsetData body;
    };
    struct Head {
        wire::SimpleReply simple;
        Data data;
    };

    int Complete() {
        VARVE_CHECK(io_uring_submit_and_wait(&ring_, 1) >= 0);
        io_uring_cqe* cqe = nullptr;
        VARVE_CHECK(io_uring_wait_cqe(&ring_, &cqe) == 0);
        const int result = cqe->res;
        io_uring_cqe_seen(&ring_, cqe);
        return result;
    }
    bool Receive() {
        io_uring_prep_recv(io_uring_get_sqe(&ring_), fd_, received_.get() + have_,
                           kReceiveBytes - have_, 0);
        const int got = Complete();
        if (got > 0) have_ += static_cast<size_t>(got);
        return got > 0;
    }
    /// Takes every whole request. False: the client disconnects.
    bool Answer() {
        size_t at = 0, count = 0;
        wire::Request request;
        while (have_ - at >= sizeof request) {
            std::memcpy(&request, received_.get() + at, sizeof request);
            const bool write = request.type == wire::kCmdWrite;
            const size_t whole = sizeof request + (write ? uint32_t{request.length} : 0);
            if (have_ - at < whole) break;
            if (request.type == wire::kCmdDisconnect) return false;
            VARVE_CHECK(request.offset + request.length <= disk_.size);
            if (write) Write(request.offset, received_.get() + at + sizeof request, request.length);
            Reply(request, replies_[count++]);
            at += whole;
        }
        std::memmove(received_.get(), received_.get() + at, have_ - at);
        have_ -= at;
        return true;
    }
    void Reply(const wire::Request& request, Head& head) {
        if (request.type != wire::kCmdRead) {
            head.simple = wire::SimpleReply();
            head.simple.cookie = request.cookie;
            pieces_.push_back({&head.simple, sizeof head.simple});
            return;
        }
        head.data = Data();
        head.data.chunk.flags = wire::kChunkDone;
        head.data.chunk.type = wire::kChunkOffsetData;
        head.data.chunk.cookie = request.cookie;
        head.data.chunk.length =
            static_cast<uint32_t>(sizeof head.data.body.offset) + request.length;
        head.data.body.offset = request.offset;
        pieces_.push_back({&head.data, sizeof head.data});
        pieces_.push_back({disk_.memory + request.offset, request.length});
    }
    void Write(uint64_t offset, const std::byte* data, size_t length) {
        if (disk_.fd < 0) {
            std::memcpy(disk_.memory + offset, data, length);
        } else {
            VARVE_CHECK(pwrite(disk_.fd, data, length, static_cast<off_t>(offset)) ==
                        static_cast<ssize_t>(length));
        }
    }
    bool Send() {
        for (size_t first = 0; first < pieces_.size();) {
            msghdr message{};
            message.msg_iov = &pieces_[first];
            message.msg_iovlen = std::min(kPiecesMax, pieces_.size() - first);
            io_uring_prep_sendmsg(io_uring_get_sqe(&ring_), fd_, &message,
                                  MSG_WAITALL | MSG_NOSIGNAL);
            int sent = Complete();
            if (sent <= 0) return false;
            while (sent > 0) {
                iovec& piece = pieces_[first];
                const int taken = std::min(sent, static_cast<int>(piece.iov_len));
                piece.iov_base = static_cast<std::byte*>(piece.iov_base) + taken;
                piece.iov_len -= static_cast<size_t>(taken);
                sent -= taken;
                if (piece.iov_len == 0) ++first;
            }
        }
        pieces_.clear();
        return true;
    }

    const int fd_;
    const Disk& disk_;
    io_uring ring_{};
    const std::unique_ptr<std::byte[]> received_;
    size_t have_ = 0;  // bytes of it
    std::vector<Head> replies_;
    std::vector<iovec> pieces_;
};

}  // namespace
}  // namespace varve::nbdserver

int main(int count, char** arguments) {
    using namespace varve::nbdserver;  // NOLINT
    if (count != 3 && count != 4) {
        std::fprintf(stderr, "usage: varve-wire-limit SOCKET MIB [FILE]\n");
        return 2;
    }
    const uint64_t size = std::strtoull(arguments[2], nullptr, 10) << 20;
    const Disk disk = MakeDisk(size, count == 4 ? arguments[3] : nullptr);
    const varve::Result<varve::admin::ListeningSocket> listening =
        varve::admin::ListenUnix(arguments[1], 0600);
    VARVE_CHECK(listening.ok());
    const int listening_fd = listening.value().fd.get();
    VARVE_CHECK(fcntl(listening_fd, F_SETFL, 0) == 0);  // blocking
    for (;;) {
        const int fd = accept(listening_fd, nullptr, nullptr);
        VARVE_CHECK(fd >= 0);
        std::thread([fd, &disk] {
            if (Negotiate(fd, disk)) {
                Stick(fd, disk).Serve();
            } else {
                close(fd);
            }
        }).detach();
    }
}
