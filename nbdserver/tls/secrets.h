// What a handshake leaves behind: the version, the cipher, and each direction's keys; and how keys
// come from secrets (RFC 8446, 7; RFC 5246, 6.3).
// Not records: records.h uses the keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace varve::nbdserver::tls {

enum class Version { k12, k13 };

/// A direction's keys. A string whose memory is wiped at its end.
class Secret {
  public:
    Secret() = default;
    explicit Secret(std::string bytes) : bytes_(std::move(bytes)) {}
    ~Secret() { Wipe(); }
    Secret(const Secret& other) = default;
    Secret(Secret&& other) noexcept : bytes_(other.bytes_) { other.Wipe(); }
    Secret& operator=(Secret other) noexcept {
        bytes_.swap(other.bytes_);
        return *this;
    }

    const std::string& bytes() const { return bytes_; }
    bool empty() const { return bytes_.empty(); }

  private:
    void Wipe();
    std::string bytes_;
};

/// Of pairs of hexadecimal digits, and nothing else.
std::optional<Secret> FromHex(std::string_view hex);

struct DirectionKeys {
    Secret key;  // 16 or 32 bytes: of AES-GCM
    Secret iv;   // 12 bytes in TLS 1.3, 4 in TLS 1.2
};

/// All that a connection needs after its handshake.
struct Agreement {
    Version version = Version::k13;
    size_t key_bytes = 16;
    bool sha384 = false;                     // the key schedule's hash; else SHA-256
    size_t fragment_max = 16384;             // bytes of data in one record
    Secret client, server;                   // TLS 1.3: traffic secrets
    DirectionKeys client_keys, server_keys;  // TLS 1.2
    uint64_t server_nonce = 0;               // TLS 1.2: of the server's last record
};

/// TLS 1.3: the keys of a traffic secret, and the secret that follows it after a key update.
DirectionKeys KeysOf(const Secret& traffic, size_t key_bytes, bool sha384);
Secret NextSecret(const Secret& traffic, bool sha384);

/// TLS 1.2: fills the keys of both directions. False if the library cannot.
bool ExpandMaster(const Secret& master, const std::string& client_random,
                  const std::string& server_random, Agreement& agreement);

}  // namespace varve::nbdserver::tls
