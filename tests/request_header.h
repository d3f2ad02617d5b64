// A request as a client sends it, for tests and fuzz targets.
#pragma once

#include <cstdint>
#include <string>

#include "nbdserver/wire/wire.h"

namespace varve::nbdserver {

inline std::string RequestHeader(uint16_t type, uint64_t offset, uint32_t length,
                                 uint64_t cookie = 7, uint16_t flags = 0) {
    wire::Request request;
    request.flags = flags;
    request.type = type;
    request.cookie = cookie;
    request.offset = offset;
    request.length = length;
    return {reinterpret_cast<const char*>(&request), sizeof request};
}

}  // namespace varve::nbdserver
