// The client's side of TLS, by OpenSSL: bytes in, bytes out. For tests of what the server makes.
#pragma once

#include <gtest/gtest.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <fstream>
#include <string>
#include <string_view>

namespace varve::nbdserver {

struct TlsSetup {
    int version = TLS1_3_VERSION;
    std::string user = "alice";
    std::string key;      // empty: no PSK
    std::string ciphers;  // of TLS 1.2 or 1.3; empty: the library's
    size_t padding = 0;   // TLS 1.3: records have a multiple of it
    int fragment = 0;     // TLSEXT_max_fragment_length_512, ...
};

class TlsClient {
  public:
    explicit TlsClient(TlsSetup setup) : setup_(std::move(setup)) {
        context_ = SSL_CTX_new(TLS_client_method());
        SSL_CTX_set_min_proto_version(context_, setup_.version);
        SSL_CTX_set_max_proto_version(context_, setup_.version);
        if (!setup_.ciphers.empty()) {
            EXPECT_EQ(setup_.version == TLS1_3_VERSION
                          ? SSL_CTX_set_ciphersuites(context_, setup_.ciphers.c_str())
                          : SSL_CTX_set_cipher_list(context_, setup_.ciphers.c_str()),
                      1);
        }
        if (!setup_.key.empty()) SSL_CTX_set_psk_client_callback(context_, GivePsk);
        if (setup_.padding) SSL_CTX_set_block_padding(context_, setup_.padding);
        ssl_ = SSL_new(context_);
        SSL_set_app_data(ssl_, this);
        if (setup_.fragment) {
            SSL_set_tlsext_max_fragment_length(ssl_, static_cast<uint8_t>(setup_.fragment));
        }
        in_ = BIO_new(BIO_s_mem());
        out_ = BIO_new(BIO_s_mem());
        SSL_set_bio(ssl_, in_, out_);
        SSL_set_connect_state(ssl_);
    }
    ~TlsClient() {
        SSL_free(ssl_);
        SSL_CTX_free(context_);
    }
    TlsClient(const TlsClient&) = delete;

    SSL* ssl() { return ssl_; }

    /// Takes bytes of the server and goes on with the handshake. True once that is done.
    bool Shake(std::string_view bytes) {
        Feed(bytes);
        return SSL_do_handshake(ssl_) == 1;
    }
    void Feed(std::string_view bytes) {
        if (!bytes.empty()) BIO_write(in_, bytes.data(), static_cast<int>(bytes.size()));
    }
    /// What is to be sent to the server.
    std::string TakeOutput() {
        char* data = nullptr;
        const long length = BIO_get_mem_data(out_, &data);
        std::string bytes(data, static_cast<size_t>(length));
        BIO_reset(out_);
        return bytes;
    }
    /// `data` in records.
    std::string Seal(std::string_view data) {
        EXPECT_EQ(SSL_write(ssl_, data.data(), static_cast<int>(data.size())),
                  static_cast<int>(data.size()));
        return TakeOutput();
    }
    /// All data that has come. What else came is answered in TakeOutput().
    std::string Read() {
        std::string data;
        char piece[16384];
        int n = 0;
        while ((n = SSL_read(ssl_, piece, sizeof piece)) > 0) {
            data.append(piece, static_cast<size_t>(n));
        }
        last_error_ = SSL_get_error(ssl_, n);
        return data;
    }
    /// The server has said that it sends no more.
    bool closed() const { return last_error_ == SSL_ERROR_ZERO_RETURN; }
    bool failed() const { return last_error_ == SSL_ERROR_SSL; }

  private:
    static unsigned GivePsk(SSL* ssl, const char*, char* user, unsigned user_max,
                            unsigned char* key, unsigned key_max) {
        const TlsSetup& setup = static_cast<TlsClient*>(SSL_get_app_data(ssl))->setup_;
        if (setup.user.size() >= user_max || setup.key.size() > key_max) return 0;
        setup.user.copy(user, setup.user.size());
        user[setup.user.size()] = '\0';
        setup.key.copy(reinterpret_cast<char*>(key), setup.key.size());
        return static_cast<unsigned>(setup.key.size());
    }

    const TlsSetup setup_;
    SSL_CTX* context_;
    SSL* ssl_;
    BIO *in_, *out_;
    int last_error_ = 0;
};

/// Writes server-cert.pem, self-signed, and server-key.pem.
inline void WriteServerCertificate(const std::string& directory, const std::string& name) {
    EVP_PKEY* key = EVP_EC_gen("P-256");
    X509* certificate = X509_new();
    X509_set_version(certificate, 2);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), -60);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, key);
    X509_NAME* subject = X509_get_subject_name(certificate);
    X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_ASC,
                               reinterpret_cast<const unsigned char*>(name.c_str()), -1, -1, 0);
    X509_set_issuer_name(certificate, subject);
    EXPECT_NE(X509_sign(certificate, key, EVP_sha256()), 0);
    BIO* file = BIO_new_file((directory + "/server-cert.pem").c_str(), "w");
    EXPECT_EQ(PEM_write_bio_X509(file, certificate), 1);
    BIO_free(file);
    file = BIO_new_file((directory + "/server-key.pem").c_str(), "w");
    EXPECT_EQ(PEM_write_bio_PrivateKey(file, key, nullptr, nullptr, 0, nullptr, nullptr), 1);
    BIO_free(file);
    X509_free(certificate);
    EVP_PKEY_free(key);
}

}  // namespace varve::nbdserver
