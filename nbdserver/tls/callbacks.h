// What OpenSSL calls during a handshake: set by Credentials, done by Handshake.
#pragma once

#include <openssl/ssl.h>

namespace varve::nbdserver::tls {

/// Takes a line of the key log for the Handshake of `ssl`.
void TakeKeyLog(const SSL* ssl, const char* line);
/// The key of a user, for the Handshake of `ssl`. 0: there is no such user.
unsigned FindPsk(SSL* ssl, const char* user, unsigned char* key, unsigned most);

}  // namespace varve::nbdserver::tls
