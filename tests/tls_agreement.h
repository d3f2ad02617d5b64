// What a handshake might have agreed on, without one: for both sides of a connection in tests.
#pragma once

#include <string>
#include <utility>

#include "nbdserver/tls/secrets.h"

namespace varve::nbdserver {

inline tls::Agreement MakeAgreement(tls::Version version, size_t fragment_max) {
    tls::Agreement agreement;
    agreement.version = version;
    agreement.fragment_max = fragment_max;
    agreement.client = tls::Secret(std::string(32, 'c'));
    agreement.server = tls::Secret(std::string(32, 's'));
    agreement.client_keys = {tls::Secret(std::string(16, 'k')), tls::Secret("iv_c")};
    agreement.server_keys = {tls::Secret(std::string(16, 'K')), tls::Secret("iv_s")};
    return agreement;
}

/// Records that are made for it are the client's.
inline tls::Agreement OtherSide(tls::Agreement agreement) {
    std::swap(agreement.client, agreement.server);
    std::swap(agreement.client_keys, agreement.server_keys);
    return agreement;
}

}  // namespace varve::nbdserver
