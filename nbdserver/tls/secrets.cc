#include "nbdserver/tls/secrets.h"

#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/kdf.h>

#include <utility>

#include "base/check.h"
#include "base/endian.h"

namespace varve::nbdserver::tls {
namespace {

constexpr size_t kIvBytes13 = 12;
constexpr size_t kIvBytes12 = 4;

/// HKDF-Expand-Label of RFC 8446, 7.1, without a context. `bytes`: at most the hash's, so that one
/// round of HKDF-Expand is enough.
Secret Expand(const Secret& secret, std::string_view label, size_t bytes, bool sha384) {
    const std::string full = "tls13 " + std::string(label);
    std::string info;
    AppendBig(info, static_cast<uint16_t>(bytes));
    info += static_cast<char>(full.size());
    info += full;
    info += '\0';  // no context
    info += '\1';  // HKDF's first round
    std::string out(EVP_MAX_MD_SIZE, '\0');
    unsigned length = 0;
    const EVP_MD* hash = sha384 ? EVP_sha384() : EVP_sha256();
    VARVE_CHECK(HMAC(hash, secret.bytes().data(), static_cast<int>(secret.bytes().size()),
                     reinterpret_cast<const unsigned char*>(info.data()), info.size(),
                     reinterpret_cast<unsigned char*>(out.data()), &length) != nullptr);
    VARVE_CHECK(bytes <= length);
    out.resize(bytes);
    return Secret(std::move(out));
}

int Nibble(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

}  // namespace

std::optional<Secret> FromHex(std::string_view hex) {
    if (hex.size() % 2 != 0) return std::nullopt;
    std::string bytes;
    bytes.reserve(hex.size() / 2);  // no copy of a part is left behind
    for (size_t i = 0; i < hex.size(); i += 2) {
        const int high = Nibble(hex[i]), low = Nibble(hex[i + 1]);
        if (high < 0 || low < 0) return std::nullopt;
        bytes += static_cast<char>(high << 4 | low);
    }
    return Secret(std::move(bytes));
}

void Secret::Wipe() {
    OPENSSL_cleanse(bytes_.data(), bytes_.size());
}

DirectionKeys KeysOf(const Secret& traffic, size_t key_bytes, bool sha384) {
    DirectionKeys keys;
    keys.key = Expand(traffic, "key", key_bytes, sha384);
    keys.iv = Expand(traffic, "iv", kIvBytes13, sha384);
    return keys;
}

Secret NextSecret(const Secret& traffic, bool sha384) {
    return Expand(traffic, "traffic upd", traffic.bytes().size(), sha384);
}

bool ExpandMaster(const Secret& master, const std::string& client_random,
                  const std::string& server_random, Agreement& agreement) {
    EVP_KDF* kdf = EVP_KDF_fetch(nullptr, OSSL_KDF_NAME_TLS1_PRF, nullptr);
    EVP_KDF_CTX* context = kdf ? EVP_KDF_CTX_new(kdf) : nullptr;
    EVP_KDF_free(kdf);
    if (!context) return false;
    std::string hash = agreement.sha384 ? "SHA384" : "SHA256";
    std::string secret = master.bytes();
    std::string seed = "key expansion" + server_random + client_random;
    const OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, hash.data(), 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SECRET, secret.data(), secret.size()),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SEED, seed.data(), seed.size()),
        OSSL_PARAM_construct_end(),
    };
    const size_t key = agreement.key_bytes;
    std::string block(2 * (key + kIvBytes12), '\0');
    const bool derived = EVP_KDF_derive(context, reinterpret_cast<unsigned char*>(block.data()),
                                        block.size(), params) == 1;
    EVP_KDF_CTX_free(context);
    const Secret wiped(std::move(secret));
    agreement.client_keys.key = Secret(block.substr(0, key));
    agreement.server_keys.key = Secret(block.substr(key, key));
    agreement.client_keys.iv = Secret(block.substr(2 * key, kIvBytes12));
    agreement.server_keys.iv = Secret(block.substr(2 * key + kIvBytes12));
    const Secret wiped_too(std::move(block));
    return derived;
}

}  // namespace varve::nbdserver::tls
