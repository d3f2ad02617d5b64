#include "nbdserver/tls/gcm.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#ifdef VARVE_IPSEC_MB
#include <intel-ipsec-mb.h>
#endif

#include <array>

#include "base/check.h"

namespace varve::nbdserver::tls {
namespace {

unsigned char* Bytes(std::byte* bytes) {
    return reinterpret_cast<unsigned char*>(bytes);
}
const unsigned char* Bytes(const std::byte* bytes) {
    return reinterpret_cast<const unsigned char*>(bytes);
}

/// None of its calls fails but for wrong arguments, except for a tag that does not fit.
class OpenSslGcm : public Gcm {
  public:
    OpenSslGcm(Direction direction, std::span<const std::byte> key)
        : context_(EVP_CIPHER_CTX_new()) {
        const EVP_CIPHER* cipher = key.size() == 16 ? EVP_aes_128_gcm() : EVP_aes_256_gcm();
        const int encrypt = direction == Direction::kEncrypt;
        VARVE_CHECK(
            EVP_CipherInit_ex(context_, cipher, nullptr, Bytes(key.data()), nullptr, encrypt) == 1);
    }
    ~OpenSslGcm() override { EVP_CIPHER_CTX_free(context_); }

    void Begin(const std::byte* nonce, std::span<const std::byte> also) override {
        VARVE_CHECK(EVP_CipherInit_ex(context_, nullptr, nullptr, nullptr, Bytes(nonce), -1) == 1);
        int done = 0;
        VARVE_CHECK(EVP_CipherUpdate(context_, nullptr, &done, Bytes(also.data()),
                                     static_cast<int>(also.size())) == 1);
    }
    void Update(std::byte* out, const std::byte* in, size_t bytes) override {
        int done = 0;
        VARVE_CHECK(
            EVP_CipherUpdate(context_, Bytes(out), &done, Bytes(in), static_cast<int>(bytes)) == 1);
    }
    void Tag(std::byte* tag) override {
        VARVE_CHECK(Finish());
        VARVE_CHECK(EVP_CIPHER_CTX_ctrl(context_, EVP_CTRL_AEAD_GET_TAG, kTagBytes, tag) == 1);
    }
    bool Verify(const std::byte* tag) override {
        void* expected = const_cast<std::byte*>(tag);  // it is only read
        VARVE_CHECK(EVP_CIPHER_CTX_ctrl(context_, EVP_CTRL_AEAD_SET_TAG, kTagBytes, expected) == 1);
        return Finish();
    }

  private:
    bool Finish() {
        unsigned char nothing[kTagBytes];
        int done = 0;
        return EVP_CipherFinal_ex(context_, nothing, &done) == 1;
    }

    EVP_CIPHER_CTX* const context_;
};

#ifdef VARVE_IPSEC_MB

/// Its functions for this processor; null without AES instructions. Read by all threads.
IMB_MGR* Manager() {
    static IMB_MGR* const manager = []() -> IMB_MGR* {
        IMB_MGR* made = alloc_mb_mgr(0);
        if (!made) return nullptr;
        IMB_ARCH arch = IMB_ARCH_NONE;
        init_mb_mgr_auto(made, &arch);
        if (imb_get_errno(made) == 0 && arch > IMB_ARCH_NOAESNI) return made;
        free_mb_mgr(made);
        return nullptr;
    }();
    return manager;
}

class MultiBufferGcm : public Gcm {
  public:
    MultiBufferGcm(IMB_MGR& manager, Direction direction, std::span<const std::byte> key)
        : encrypt_(direction == Direction::kEncrypt) {
        if (key.size() == 16) {
            manager.gcm128_pre(key.data(), &key_);
            init_ = manager.gcm128_init;
            update_ = encrypt_ ? manager.gcm128_enc_update : manager.gcm128_dec_update;
            finish_ = encrypt_ ? manager.gcm128_enc_finalize : manager.gcm128_dec_finalize;
        } else {
            manager.gcm256_pre(key.data(), &key_);
            init_ = manager.gcm256_init;
            update_ = encrypt_ ? manager.gcm256_enc_update : manager.gcm256_dec_update;
            finish_ = encrypt_ ? manager.gcm256_enc_finalize : manager.gcm256_dec_finalize;
        }
    }
    ~MultiBufferGcm() override {
        OPENSSL_cleanse(&key_, sizeof key_);
        OPENSSL_cleanse(&message_, sizeof message_);
    }

    void Begin(const std::byte* nonce, std::span<const std::byte> also) override {
        init_(&key_, &message_, Bytes(nonce), Bytes(also.data()), also.size());
    }
    void Update(std::byte* out, const std::byte* in, size_t bytes) override {
        update_(&key_, &message_, Bytes(out), Bytes(in), bytes);
    }
    void Tag(std::byte* tag) override {
        VARVE_CHECK(encrypt_);
        finish_(&key_, &message_, Bytes(tag), kTagBytes);
    }
    bool Verify(const std::byte* tag) override {
        VARVE_CHECK(!encrypt_);
        std::array<std::byte, kTagBytes> expected;
        finish_(&key_, &message_, Bytes(expected.data()), kTagBytes);
        return CRYPTO_memcmp(expected.data(), tag, kTagBytes) == 0;
    }

  private:
    const bool encrypt_;
    alignas(64) gcm_key_data key_;
    alignas(64) gcm_context_data message_;
    aes_gcm_init_t init_;
    aes_gcm_enc_dec_update_t update_;
    aes_gcm_enc_dec_finalize_t finish_;
};

#endif

}  // namespace

std::unique_ptr<Gcm> Gcm::Make(Direction direction, std::span<const std::byte> key) {
    VARVE_CHECK(key.size() == 16 || key.size() == 32);
#ifdef VARVE_IPSEC_MB
    if (IMB_MGR* manager = Manager()) {
        return std::make_unique<MultiBufferGcm>(*manager, direction, key);
    }
#endif
    return MakeWithOpenSsl(direction, key);
}

std::unique_ptr<Gcm> Gcm::MakeWithOpenSsl(Direction direction, std::span<const std::byte> key) {
    VARVE_CHECK(key.size() == 16 || key.size() == 32);
    return std::make_unique<OpenSslGcm>(direction, key);
}

}  // namespace varve::nbdserver::tls
