#include "base/result.h"

#include <cstring>

namespace varve {

const char* KindName(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kFailed:
            return "failed";
        case ErrorKind::kInvalid:
            return "invalid";
        case ErrorKind::kNotFound:
            return "not_found";
        case ErrorKind::kExists:
            return "exists";
        case ErrorKind::kBusy:
            return "busy";
        case ErrorKind::kNoSpace:
            return "no_space";
        case ErrorKind::kLimit:
            return "limit";
        case ErrorKind::kIo:
            return "io";
        case ErrorKind::kDamaged:
            return "damaged";
    }
    return "failed";
}

Error MakeError(ErrorKind kind, std::string message) {
    return Error{kind, std::move(message)};
}

Error SystemError(Errno error, std::string what) {
    const bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
    return Error{full ? ErrorKind::kNoSpace : ErrorKind::kIo, what + ": " + std::strerror(error)};
}

}  // namespace varve
