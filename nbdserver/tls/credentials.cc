#include "nbdserver/tls/credentials.h"

#include <fmt/format.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>

#include "base/small_file.h"
#include "nbdserver/tls/callbacks.h"

namespace varve::nbdserver::tls {
namespace {

// Only ciphers that records.h has, each with an ephemeral exchange; AES-128 first: a PSK of
// psktool's goes with SHA-256 only.
constexpr const char* kCiphers13 = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384";
constexpr const char* kCiphers12 =
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES256-GCM-SHA384:DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384";

/// The first of the library's complaints: the later ones say that something failed.
std::string Reason() {
    const unsigned long error = ERR_peek_error();
    if (ERR_SYSTEM_ERROR(error)) return std::generic_category().message(ERR_GET_REASON(error));
    const char* reason = ERR_reason_error_string(error);
    return reason ? reason : "the TLS library does not say why";
}

Error CannotUse(const std::string& path, const std::string& why) {
    return MakeError(ErrorKind::kInvalid, fmt::format("cannot use {}: {}", path, why));
}

/// A key behind a password: nobody is there to type it.
int RefusePassword(char*, int, int, void*) {
    return -1;
}

Status LoadRevoked(SSL_CTX* context, const std::string& path) {
    X509_STORE* store = SSL_CTX_get_cert_store(context);
    X509_LOOKUP* lookup = X509_STORE_add_lookup(store, X509_LOOKUP_file());
    if (!lookup || X509_load_crl_file(lookup, path.c_str(), X509_FILETYPE_PEM) <= 0) {
        return CannotUse(path, Reason());
    }
    X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK);
    return Status();
}

}  // namespace

Credentials::~Credentials() {
    SSL_CTX_free(context_);
}

Result<std::shared_ptr<const Credentials>> Credentials::Load(const CredentialFiles& files) {
    const std::shared_ptr<Credentials> made(new Credentials);
    ERR_clear_error();
    made->context_ = SSL_CTX_new(TLS_server_method());
    SSL_CTX* context = made->context_;
    const bool set = context && SSL_CTX_set_min_proto_version(context, TLS1_2_VERSION) == 1 &&
                     SSL_CTX_set_ciphersuites(context, kCiphers13) == 1 &&
                     SSL_CTX_set_cipher_list(context, kCiphers12) == 1 &&
                     SSL_CTX_set_num_tickets(context, 0) == 1;
    if (!set) return MakeError(ErrorKind::kFailed, "cannot set TLS up: " + Reason());
    SSL_CTX_set_options(context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION |
                                     SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE);
    // 112 bits, as Debian builds the library; as others do, DHE with a PSK has 1024 bits only.
    SSL_CTX_set_security_level(context, std::max(SSL_CTX_get_security_level(context), 2));
    SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
    // A PSK is a session to the library, and with --tls-verify-peer sessions must have this.
    const unsigned char session_context[] = "varved";
    SSL_CTX_set_session_id_context(context, session_context, sizeof session_context);
    SSL_CTX_set_dh_auto(context, 1);
    Status status;
    if (!files.certificates.empty()) {
        status = made->LoadCertificates(files.certificates, files.verify_peer);
    }
    if (status.ok() && !files.psk.empty()) status = made->LoadUsers(files.psk);
    if (!status.ok()) return status.error();
    SSL_CTX_set_keylog_callback(context, TakeKeyLog);
    if (!files.psk.empty()) SSL_CTX_set_psk_server_callback(context, FindPsk);
    return std::shared_ptr<const Credentials>(made);
}

Status Credentials::LoadCertificates(const std::string& directory, bool verify_peer) {
    const std::string certificate = directory + "/server-cert.pem";
    const std::string key = directory + "/server-key.pem";
    const std::string authority = directory + "/ca-cert.pem";
    const std::string revoked = directory + "/ca-crl.pem";
    SSL_CTX_set_default_passwd_cb(context_, RefusePassword);
    if (SSL_CTX_use_certificate_chain_file(context_, certificate.c_str()) != 1) {
        return CannotUse(certificate, Reason());
    }
    if (SSL_CTX_use_PrivateKey_file(context_, key.c_str(), SSL_FILETYPE_PEM) != 1) {
        return CannotUse(key, Reason());
    }
    // The library has a place for each kind: a key of another kind is not held against it above.
    if (SSL_CTX_check_private_key(context_) != 1) {
        return CannotUse(key, "it is not the key of " + certificate);
    }
    if (!verify_peer) return Status();
    if (SSL_CTX_load_verify_file(context_, authority.c_str()) != 1) {
        return CannotUse(authority, Reason() + "; --tls-verify-peer needs it");
    }
    SSL_CTX_set_client_CA_list(context_, SSL_load_client_CA_file(authority.c_str()));
    SSL_CTX_set_verify(context_, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
    // Anything but "there is none" is an error: else a link that leads nowhere would let in who is
    // revoked.
    std::error_code unknown;
    const auto kind = std::filesystem::symlink_status(revoked, unknown).type();
    if (kind == std::filesystem::file_type::not_found) return Status();
    return LoadRevoked(context_, revoked);
}

Status Credentials::LoadUsers(const std::string& path) {
    Result<std::string> text = ReadSmallFile(path, kPskFileBytesMax);
    if (!text.ok()) return text.error();
    const Secret wiped(std::move(text.value()));
    Result<PskTable> users = ParsePskFile(wiped.bytes());
    if (!users.ok()) return CannotUse(path, users.error().message);
    users_ = std::move(users.value());
    return Status();
}

}  // namespace varve::nbdserver::tls
