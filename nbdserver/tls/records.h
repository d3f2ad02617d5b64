// Records: TLS records after the handshake - what the client sends is opened, what it is sent is
// sealed, both where the bytes lie. Bytes in, bytes out: it knows no sockets and no threads.
// Not the handshake (handshake.h). One thread at a time. Sources: RFC 8446, 5; RFC 5246, 6.2.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "nbdserver/tls/gcm.h"
#include "nbdserver/tls/secrets.h"

namespace varve::nbdserver::tls {

inline constexpr size_t kHeaderBytes = 5;
/// Of a record, with its header: the most that a client may send.
inline constexpr size_t kRecordBytesMax = kHeaderBytes + 16384 + 256;
/// What sealing adds in front of a record's data, and behind it, at most.
inline constexpr size_t kHeadBytesMax = kHeaderBytes + 8;
inline constexpr size_t kTailBytesMax = 1 + kTagBytes;

enum class Alert : uint8_t {
    kCloseNotify = 0,
    kUnexpectedMessage = 10,
    kBadRecordMac = 20,
    kRecordOverflow = 22,
    kDecodeError = 50,
    kUserCanceled = 90,
};

class Records {
  public:
    /// The server's side. `records_max`: sealed with one key, then it is renewed (TLS 1.3 only).
    explicit Records(const Agreement& agreement, uint64_t records_max = uint64_t{1} << 24);

    // ---- receiving

    /// What is opened from now on has arrived later than what came before: a client may renew its
    /// keys as often as it likes, but not hundreds of times at once.
    void BeginReceive() { updates_ = 0; }

    /// The length, with its header, of the record that begins with `bytes`; 0: more bytes are
    /// needed to tell, or it is none (then broken()).
    size_t Measure(std::span<const std::byte> bytes);

    /// Opens a whole record, as measured. Gives its data, which lies at the front of `direct` if
    /// that has room for all of it, else inside `record`. None: it was no data, or an error; then
    /// see closed() and broken(). What `direct` holds behind the data, up to its end, is undefined.
    std::span<std::byte> Open(std::span<std::byte> record, std::span<std::byte> direct = {});

    /// Opens the whole records that `sealed` begins with, for what is small or rare: takes them
    /// away, and appends their data to `out`.
    void OpenCopy(std::string& sealed, std::string& out);

    /// The client has said that it sends no more.
    bool closed() const { return closed_; }
    /// The stream makes no sense from here on, and why.
    std::optional<Alert> broken() const { return broken_; }

    // ---- sending

    size_t fragment_max() const { return fragment_max_; }
    size_t head_bytes() const { return version_ == Version::k13 ? kHeaderBytes : kHeadBytesMax; }
    size_t tail_bytes() const { return version_ == Version::k13 ? kTailBytesMax : kTagBytes; }

    /// Encrypts `pieces`, of at most fragment_max() bytes together, where they lie, as the data of
    /// one record; writes what goes before and behind them. REQUIRES: !KeyUpdateDue().
    void Seal(std::span<const iovec> pieces, std::byte* head, std::byte* tail);

    /// Whether SealKeyUpdate() must be sent before the next record.
    bool KeyUpdateDue() const { return update_asked_ || sealed_ >= records_max_; }
    static constexpr size_t kKeyUpdateBytes = kHeaderBytes + 5 + kTailBytesMax;
    /// A whole record that says that the keys change, from the next record on.
    std::array<std::byte, kKeyUpdateBytes> SealKeyUpdate();

    /// A whole record that says so. Nothing may be sent behind it.
    std::string SealAlert(Alert alert);

    /// Copies `data` into records, for what is small or rare. Appends to `out`.
    void SealCopy(std::string_view data, std::string& out);

  private:
    enum class Type : uint8_t { kChangeCipherSpec = 20, kAlert, kHandshake, kData };
    using Nonce = std::array<std::byte, kNonceBytes>;

    /// What one direction works with.
    struct Half {
        std::unique_ptr<Gcm> gcm;
        Nonce iv{};           // TLS 1.2: the first four bytes
        uint64_t number = 0;  // of the next record
        Secret traffic;       // TLS 1.3
    };

    Half MakeHalf(Gcm::Direction direction, const DirectionKeys& keys, const Secret& traffic);
    void Renew(Half& half, Gcm::Direction direction);
    Nonce NonceOf(const Half& half) const;
    std::span<std::byte> Open12(std::span<std::byte> record, std::span<std::byte> direct);
    std::span<std::byte> Open13(std::span<std::byte> record, std::span<std::byte> direct);
    std::span<std::byte> Take(Type type, std::span<std::byte> content);
    void TakeAlert(std::span<const std::byte> content);
    void TakeHandshake(std::span<const std::byte> content);
    std::span<std::byte> Break(Alert alert);
    void SealAs(Type type, std::span<const iovec> pieces, std::byte* head, std::byte* tail);
    std::string SealWhole(Type type, std::string content);

    const Version version_;
    const size_t key_bytes_;
    const bool sha384_;
    const size_t fragment_max_;
    const uint64_t records_max_;
    const uint64_t nonce_;  // TLS 1.2: before the first record
    Half read_, write_;
    uint64_t sealed_ = 0;   // with the present key
    unsigned empty_ = 0;    // records without data, in a row
    unsigned updates_ = 0;  // of the client's keys, since BeginReceive()
    bool update_asked_ = false;
    bool closed_ = false;
    std::optional<Alert> broken_;
};

}  // namespace varve::nbdserver::tls
