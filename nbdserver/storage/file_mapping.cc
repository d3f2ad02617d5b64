#include "nbdserver/storage/file_mapping.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

#include "base/check.h"

namespace varve::nbdserver {
namespace {

/// Of address space, of which a process has 128 TiB.
constexpr uint64_t kBytesMax = uint64_t{16} << 40;

/// Where to go on when the copy that this thread is at meets a page that cannot be had.
thread_local sigjmp_buf* copy_failed = nullptr;

void OnBusError(int signal, siginfo_t*, void*) {
    if (copy_failed) siglongjmp(*copy_failed, 1);
    // Nobody expected it: what the system does without a handler happens when the access is
    // repeated, which is at once.
    struct sigaction standard {};
    standard.sa_handler = SIG_DFL;
    sigaction(signal, &standard, nullptr);
}

void HandleBusErrors() {
    static std::once_flag once;
    std::call_once(once, [] {
        struct sigaction action {};
        action.sa_sigaction = OnBusError;
        // NODEFER: the jump out of the handler does not restore the mask, which spares a copy two
        // system calls.
        action.sa_flags = SA_SIGINFO | SA_NODEFER;
        VARVE_CHECK(sigaction(SIGBUS, &action, nullptr) == 0);
    });
}

}  // namespace

std::shared_ptr<FileMapping> FileMapping::Map(int fd) {
    struct statfs fs {};
    struct stat file {};
    if (fstatfs(fd, &fs) != 0 || fstat(fd, &file) != 0) return nullptr;
    uint64_t bytes = fs.f_blocks * static_cast<uint64_t>(fs.f_bsize);
    if (bytes == 0) bytes = kBytesMax;  // tmpfs without a limit
    bytes = std::min(std::max(bytes, static_cast<uint64_t>(file.st_size)), kBytesMax);
    void* data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (data == MAP_FAILED) return nullptr;
    HandleBusErrors();
    return std::shared_ptr<FileMapping>(
        new FileMapping(static_cast<const std::byte*>(data), bytes));
}

FileMapping::~FileMapping() {
    munmap(const_cast<std::byte*>(data_), bytes_);
}

bool FileMapping::Read(uint64_t offset, void* memory, size_t length) const {
    if (offset > bytes_ || length > bytes_ - offset) return false;
    sigjmp_buf here;
    if (sigsetjmp(here, 0) != 0) {
        copy_failed = nullptr;
        return false;
    }
    copy_failed = &here;
    std::atomic_signal_fence(std::memory_order_seq_cst);
    std::memcpy(memory, data_ + offset, length);
    std::atomic_signal_fence(std::memory_order_seq_cst);
    copy_failed = nullptr;
    return true;
}

}  // namespace varve::nbdserver
