// Gcm: AES-GCM in one direction, piece by piece, in place or from one place to another.
// Not a record layer: records.h makes nonces and what is authenticated besides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace varve::nbdserver::tls {

inline constexpr size_t kNonceBytes = 12;
inline constexpr size_t kTagBytes = 16;

/// One thread at a time. A message is Begin(), any number of Update(), then Tag() or Verify().
class Gcm {
  public:
    enum class Direction { kEncrypt, kDecrypt };

    /// `key`: 16 or 32 bytes. With Intel's multi-buffer library where the processor has AES
    /// instructions, else with OpenSSL.
    static std::unique_ptr<Gcm> Make(Direction direction, std::span<const std::byte> key);
    static std::unique_ptr<Gcm> MakeWithOpenSsl(Direction direction,
                                                std::span<const std::byte> key);
    virtual ~Gcm() = default;

    /// `nonce`: kNonceBytes. `also`: is authenticated, not encrypted.
    virtual void Begin(const std::byte* nonce, std::span<const std::byte> also) = 0;
    /// `out` is `in`, or does not overlap with it. Decrypted bytes may be used only after Verify().
    virtual void Update(std::byte* out, const std::byte* in, size_t bytes) = 0;
    /// Writes kTagBytes. REQUIRES: encrypting.
    virtual void Tag(std::byte* tag) = 0;
    /// Whether the message is what was encrypted. REQUIRES: decrypting.
    virtual bool Verify(const std::byte* tag) = 0;
};

}  // namespace varve::nbdserver::tls
