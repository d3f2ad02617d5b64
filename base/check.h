// CHECK: assertions against programmers' errors, on in every build.
// Not for bytes from the wire, the disk or the admin socket: those get error values.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace varve::internal {
[[noreturn]] inline void CheckFailed(const char* file, int line, const char* condition) {
    std::fprintf(stderr, "varve: internal error at %s:%d: CHECK(%s) failed\n", file, line,
                 condition);
    std::abort();
}
}  // namespace varve::internal

#define VARVE_CHECK(condition)                                              \
    do {                                                                    \
        if (!(condition)) [[unlikely]]                                      \
            ::varve::internal::CheckFailed(__FILE__, __LINE__, #condition); \
    } while (false)
