// Reactor: setting its ring up and taking it down.
#include <fmt/format.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "base/reactor_state.h"

namespace varve {
namespace {

// Threads that the ring may have: for what the device's file cannot do without waiting, and for all
// else, which nothing here should need.
constexpr unsigned kFileWorkersMax = 16;
constexpr unsigned kOtherWorkersMax = 1;

int DisabledSysctl() {
    std::FILE* file = std::fopen("/proc/sys/kernel/io_uring_disabled", "re");
    if (!file) return 0;
    int value = 0;
    if (std::fscanf(file, "%d", &value) != 1) value = 0;
    std::fclose(file);
    return value;
}

/// Says why io_uring cannot be used here and what to do about it.
Error Unusable(int error) {
    const char* const seccomp =
        "a seccomp filter (of a container, most likely) forbids it: allow io_uring_setup, "
        "io_uring_enter and io_uring_register in its profile";
    std::string reason;
    if (error == ENOSYS) {
        reason = fmt::format("this kernel has none, or {}. Linux 6.1 or later is needed", seccomp);
    } else if (error == EPERM || error == EACCES) {
        const int disabled = DisabledSysctl();
        reason = disabled ? fmt::format(
                                "it is switched off, kernel.io_uring_disabled is {}: set "
                                "it to 0 with sysctl",
                                disabled)
                          : seccomp;
    } else if (error == EINVAL) {
        reason = "this kernel is too old: Linux 6.1 or later is needed";
    } else if (error == ENOMEM) {
        reason = "not enough memory: raise the memory limit, or RLIMIT_MEMLOCK";
    } else {
        reason = std::strerror(error);
    }
    return MakeError(ErrorKind::kFailed, "io_uring cannot be used: " + reason);
}

void* MapMemory(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? nullptr : memory;
}

}  // namespace

Status Reactor::State::SetUp() {
    io_uring_params params{};
    // DEFER_TASKRUN: the kernel's own work for this ring runs only inside Enter().
    params.flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
                   IORING_SETUP_SUBMIT_ALL | IORING_SETUP_CQSIZE;
    params.cq_entries = std::max(options.completion_entries, options.queue_entries * 2);
    const int error = io_uring_queue_init_params(options.queue_entries, &ring, &params);
    if (error < 0) return Unusable(-error);
    ring_open = true;
    if (!(params.features & IORING_FEAT_NODROP)) return Unusable(EINVAL);
    io_uring_register_ring_fd(&ring);  // a cheaper entry; it works without

    unsigned workers[2] = {kFileWorkersMax, kOtherWorkersMax};
    const int bounded = io_uring_register_iowq_max_workers(&ring, workers);
    if (bounded < 0) return Unusable(-bounded);

    wake_fd = eventfd(0, EFD_CLOEXEC);
    if (wake_fd < 0) return SystemError(errno, "cannot make an eventfd");
    if (options.receive_buffers) {
        Status buffers_ready = SetUpBuffers();
        if (!buffers_ready.ok()) return buffers_ready;
    }
    ArmWake();
    return {};
}

Status Reactor::State::SetUpBuffers() {
    lent_ring =
        static_cast<io_uring_buf_ring*>(MapMemory(options.receive_buffers * sizeof(io_uring_buf)));
    buffers = static_cast<std::byte*>(
        MapMemory(size_t{options.receive_buffers} * options.receive_buffer_bytes));
    if (!lent_ring || !buffers) return SystemError(ENOMEM, "cannot allocate receive buffers");
    io_uring_buf_reg registration{};
    registration.ring_addr = reinterpret_cast<uintptr_t>(lent_ring);
    registration.ring_entries = options.receive_buffers;
    registration.bgid = kBufferGroup;
    const int error = io_uring_register_buf_ring(&ring, &registration, 0);
    if (error < 0) return Unusable(-error);
    io_uring_buf_ring_init(lent_ring);
    LendMore();
    return {};
}

void Reactor::State::TearDown() {
    if (ring_open) io_uring_queue_exit(&ring);
    if (lent_ring) munmap(lent_ring, options.receive_buffers * sizeof(io_uring_buf));
    if (buffers) munmap(buffers, size_t{options.receive_buffers} * options.receive_buffer_bytes);
}

}  // namespace varve
