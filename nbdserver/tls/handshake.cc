#include "nbdserver/tls/handshake.h"

#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/endian.h"
#include "nbdserver/tls/callbacks.h"

namespace varve::nbdserver::tls {
namespace {

constexpr size_t kNamesMax = 64;  // of a certificate, that are kept

std::string TextOf(const ASN1_STRING* string) {
    unsigned char* utf8 = nullptr;
    const int length = ASN1_STRING_to_UTF8(&utf8, string);
    if (length < 0) return {};
    std::string text(reinterpret_cast<const char*>(utf8), static_cast<size_t>(length));
    OPENSSL_free(utf8);
    // A name with a NUL in it is made to be taken for another.
    return text.find('\0') == std::string::npos ? text : std::string();
}

std::string CommonName(const X509* certificate) {
    const X509_NAME* subject = X509_get_subject_name(certificate);
    const int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
    if (at < 0) return {};
    return TextOf(X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)));
}

std::vector<std::string> AlternativeNames(const X509* certificate) {
    std::vector<std::string> names;
    auto* all = static_cast<GENERAL_NAMES*>(
        X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr));
    for (int i = 0; i < sk_GENERAL_NAME_num(all) && names.size() < kNamesMax; ++i) {
        const GENERAL_NAME* name = sk_GENERAL_NAME_value(all, i);
        if (name->type != GEN_DNS && name->type != GEN_URI && name->type != GEN_EMAIL) continue;
        std::string text = TextOf(name->d.ia5);
        if (!text.empty()) names.push_back(std::move(text));
    }
    GENERAL_NAMES_free(all);
    return names;
}

/// A file of keys may be in another encoding, and U+0080 to U+009F control terminals, too.
std::string Legible(std::string_view text) {
    std::string legible;
    while (!text.empty()) {
        unsigned long character = 0;
        const int bytes = UTF8_getc(reinterpret_cast<const unsigned char*>(text.data()),
                                    static_cast<int>(text.size()), &character);
        const bool control = character < 0x20 || (character >= 0x7f && character < 0xa0);
        const bool shown = bytes > 0 && !control && character <= 0x10ffff;
        const size_t taken = bytes > 0 ? static_cast<size_t>(bytes) : 1;
        legible += shown ? text.substr(0, taken) : "?";
        text.remove_prefix(taken);
    }
    return legible;
}

std::string Drain(BIO* bio) {
    char* data = nullptr;
    const long length = BIO_get_mem_data(bio, &data);
    std::string bytes(data, static_cast<size_t>(length));
    BIO_reset(bio);
    return bytes;
}

}  // namespace

std::string Describe(const Identity& identity) {
    std::string text;
    if (!identity.psk_user.empty()) {
        text = "psk:" + identity.psk_user;
    } else if (!identity.common_name.empty()) {
        text = "certificate:" + identity.common_name;
    } else if (!identity.names.empty()) {
        text = "certificate:" + identity.names.front();
    }
    return Legible(text);
}

/// What the library keeps until the handshake is done.
struct Handshake::Library {
    explicit Library(SSL_CTX* context)
        : ssl(SSL_new(context)), in(BIO_new(BIO_s_mem())), out(BIO_new(BIO_s_mem())) {
        VARVE_CHECK(ssl && in && out);
        SSL_set_bio(ssl, in, out);  // owns them from now on
        SSL_set_accept_state(ssl);
    }
    ~Library() { SSL_free(ssl); }

    static Handshake& Of(const SSL* ssl) { return *static_cast<Handshake*>(SSL_get_app_data(ssl)); }

    static void TakeKeyLog(const SSL* ssl, std::string_view line);
    static const Secret* FindKey(SSL* ssl, std::string_view user);

    SSL* ssl;
    BIO *in, *out;
};

/// NSS' key log format: LABEL, the client's random, the secret, the latter two in hex.
void Handshake::Library::TakeKeyLog(const SSL* ssl, std::string_view line) {
    const size_t first = line.find(' '), last = line.rfind(' ');
    if (first == std::string_view::npos || first == last) return;
    const std::string_view label = line.substr(0, first);
    Handshake& handshake = Of(ssl);
    Secret* place = nullptr;
    if (label == "CLIENT_TRAFFIC_SECRET_0") place = &handshake.agreement_.client;
    if (label == "SERVER_TRAFFIC_SECRET_0") place = &handshake.agreement_.server;
    if (label == "CLIENT_RANDOM") place = &handshake.master_;
    if (place) *place = FromHex(line.substr(last + 1)).value_or(Secret());
}

const Secret* Handshake::Library::FindKey(SSL* ssl, std::string_view user) {
    Handshake& handshake = Of(ssl);
    const PskTable& users = handshake.credentials_->users();
    const auto found = users.find(user);
    if (found == users.end()) return nullptr;
    handshake.identity_.psk_user = found->first;  // if that holds: see Finish()
    return &found->second;
}

void TakeKeyLog(const SSL* ssl, const char* line) {
    Handshake::Library::TakeKeyLog(ssl, line);
}

/// For TLS 1.3 as well: the library makes a PSK for SHA-256 of it.
unsigned FindPsk(SSL* ssl, const char* user, unsigned char* key, unsigned most) {
    const Secret* found = user ? Handshake::Library::FindKey(ssl, user) : nullptr;
    if (!found || found->bytes().size() > most) return 0;
    std::memcpy(key, found->bytes().data(), found->bytes().size());
    return static_cast<unsigned>(found->bytes().size());
}

Handshake::Handshake(std::shared_ptr<const Credentials> credentials)
    : credentials_(std::move(credentials)),
      library_(std::make_unique<Library>(credentials_->context())) {
    SSL_set_app_data(library_->ssl, this);
}

Handshake::~Handshake() = default;

Handshake::Step Handshake::Feed(std::string_view bytes) {
    VARVE_CHECK(step_ == Step::kInput);
    SSL* const ssl = library_->ssl;
    VARVE_CHECK(BIO_write(library_->in, bytes.data(), static_cast<int>(bytes.size())) ==
                static_cast<int>(bytes.size()));
    ERR_clear_error();
    const int result = SSL_do_handshake(ssl);
    if (result == 1) return Finish();
    if (SSL_get_error(ssl, result) == SSL_ERROR_WANT_READ) return step_;
    const long verified = SSL_get_verify_result(ssl);
    if (verified != X509_V_OK) {
        return Fail(std::string("its certificate: ") + X509_verify_cert_error_string(verified));
    }
    const char* reason = ERR_reason_error_string(ERR_peek_last_error());
    ERR_clear_error();
    return Fail(reason ? reason : "it makes no sense");
}

Handshake::Step Handshake::Fail(std::string why) {
    failure_ = std::move(why);
    return step_ = Step::kFailed;
}

std::string Handshake::TakeOutput() {
    return Drain(library_->out);
}

std::string Handshake::TakeLeftover() {
    return Drain(library_->in);
}

Handshake::Step Handshake::Finish() {
    SSL* const ssl = library_->ssl;
    const SSL_CIPHER* cipher = SSL_get_current_cipher(ssl);
    const int kind = SSL_CIPHER_get_cipher_nid(cipher);
    VARVE_CHECK(kind == NID_aes_128_gcm || kind == NID_aes_256_gcm);  // no others are offered
    agreement_.version = SSL_version(ssl) == TLS1_3_VERSION ? Version::k13 : Version::k12;
    agreement_.key_bytes = kind == NID_aes_128_gcm ? 16 : 32;
    agreement_.sha384 = EVP_MD_is_a(SSL_CIPHER_get_handshake_digest(cipher), "SHA384") == 1;
    const uint8_t code = SSL_SESSION_get_max_fragment_length(SSL_get_session(ssl));
    if (code != TLSEXT_max_fragment_length_DISABLED) {
        agreement_.fragment_max = size_t{256} << code;  // RFC 6066, 4: 1 is 512
    }
    bool complete = !agreement_.client.empty() && !agreement_.server.empty();
    const bool by_psk = SSL_session_reused(ssl) == 1 ||  // nothing else is ever resumed
                        SSL_CIPHER_get_auth_nid(cipher) == NID_auth_psk;
    if (agreement_.version == Version::k12) complete = ExpandSecrets() && FindNonce();
    if (!by_psk) identity_.psk_user.clear();
    X509* certificate = SSL_get1_peer_certificate(ssl);
    if (certificate) {
        identity_.common_name = CommonName(certificate);
        identity_.names = AlternativeNames(certificate);
        X509_free(certificate);
    }
    if (!complete) return Fail("the TLS library does not give its secrets");
    return step_ = Step::kDone;
}

bool Handshake::ExpandSecrets() {
    std::string client(SSL3_RANDOM_SIZE, '\0'), server(SSL3_RANDOM_SIZE, '\0');
    SSL_get_client_random(library_->ssl, reinterpret_cast<unsigned char*>(client.data()),
                          client.size());
    SSL_get_server_random(library_->ssl, reinterpret_cast<unsigned char*>(server.data()),
                          server.size());
    return !master_.empty() && ExpandMaster(master_, client, server, agreement_);
}

/// The library begins with a nonce at random. Its one record, Finished, is the last in the output:
/// a header, the nonce, 16 bytes and a tag.
bool Handshake::FindNonce() {
    constexpr long kRecord = 5 + 8 + 16 + 16;
    char* data = nullptr;
    const long length = BIO_get_mem_data(library_->out, &data);
    if (length < kRecord || data[length - kRecord] != SSL3_RT_HANDSHAKE) return false;
    agreement_.server_nonce = LoadBig<uint64_t>(data + length - kRecord + 5);
    return true;
}

}  // namespace varve::nbdserver::tls
