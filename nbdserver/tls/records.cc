#include "nbdserver/tls/records.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/endian.h"

namespace varve::nbdserver::tls {
namespace {

constexpr uint16_t kWireVersion = 0x0303;  // of records, in both versions
constexpr size_t kDataMax = 16384;         // of any record
constexpr size_t kCipherMax13 = kDataMax + 256;
constexpr size_t kExplicitNonceBytes = 8;  // TLS 1.2
constexpr unsigned kEmptyMax = 32;
// Each takes 10 us, and 27 bytes of what may be a receive of 256 KiB.
constexpr unsigned kUpdatesMax = 64;
constexpr std::byte kHandshakeKeyUpdate{24};

size_t BytesOf(std::span<const iovec> pieces) {
    size_t bytes = 0;
    for (const iovec& piece : pieces) bytes += piece.iov_len;
    return bytes;
}

/// What TLS 1.2 authenticates besides.
std::array<std::byte, 13> Also12(uint64_t number, std::byte type, size_t bytes) {
    std::array<std::byte, 13> also;
    StoreBig(also.data(), number);
    also[8] = type;
    StoreBig(&also[9], kWireVersion);
    StoreBig(&also[11], static_cast<uint16_t>(bytes));
    return also;
}

void WriteHeader(std::byte* head, std::byte type, size_t bytes) {
    head[0] = type;
    StoreBig(head + 1, kWireVersion);
    StoreBig(head + 3, static_cast<uint16_t>(bytes));
}

}  // namespace

Records::Records(const Agreement& agreement, uint64_t records_max)
    : version_(agreement.version),
      key_bytes_(agreement.key_bytes),
      sha384_(agreement.sha384),
      fragment_max_(std::min(agreement.fragment_max, kDataMax)),
      records_max_(version_ == Version::k13 ? records_max : UINT64_MAX),
      nonce_(agreement.server_nonce) {
    read_ = MakeHalf(Gcm::Direction::kDecrypt, agreement.client_keys, agreement.client);
    write_ = MakeHalf(Gcm::Direction::kEncrypt, agreement.server_keys, agreement.server);
    // TLS 1.2: the record before was Finished, with the same keys.
    if (version_ == Version::k12) read_.number = write_.number = 1;
}

Records::Half Records::MakeHalf(Gcm::Direction direction, const DirectionKeys& keys,
                                const Secret& traffic) {
    const DirectionKeys derived =
        version_ == Version::k13 ? KeysOf(traffic, key_bytes_, sha384_) : keys;
    Half half;
    half.gcm = Gcm::Make(direction, std::as_bytes(std::span(derived.key.bytes())));
    VARVE_CHECK(derived.iv.bytes().size() <= half.iv.size());
    std::memcpy(half.iv.data(), derived.iv.bytes().data(), derived.iv.bytes().size());
    half.traffic = traffic;
    return half;
}

void Records::Renew(Half& half, Gcm::Direction direction) {
    half = MakeHalf(direction, DirectionKeys(), NextSecret(half.traffic, sha384_));
}

Records::Nonce Records::NonceOf(const Half& half) const {
    Nonce nonce = half.iv;
    std::array<std::byte, 8> number;
    StoreBig(number.data(), half.number);
    for (size_t i = 0; i < number.size(); ++i) nonce[4 + i] ^= number[i];
    return nonce;
}

// ---------------------------------------------------------------------------------------------
// Receiving

std::span<std::byte> Records::Break(Alert alert) {
    if (!broken_) broken_ = alert;
    return {};
}

size_t Records::Measure(std::span<const std::byte> bytes) {
    if (bytes.size() < kHeaderBytes || closed_ || broken_) return 0;
    const size_t length = LoadBig<uint16_t>(&bytes[3]);
    const bool tls13 = version_ == Version::k13;
    const size_t overhead = tls13 ? kTailBytesMax : kExplicitNonceBytes + kTagBytes;
    // TLS 1.3 pads; data longer than allowed shows when it is open.
    const size_t most = tls13 ? kCipherMax13 : kDataMax + overhead;
    const auto type = static_cast<Type>(bytes[0]);
    const bool known = tls13 ? type == Type::kData : type >= Type::kAlert && type <= Type::kData;
    if (!known || LoadBig<uint16_t>(&bytes[1]) != kWireVersion) {
        Break(Alert::kUnexpectedMessage);
    } else if (length > most) {
        Break(Alert::kRecordOverflow);
    } else if (length < overhead) {
        Break(Alert::kDecodeError);
    }
    return broken_ ? 0 : kHeaderBytes + length;
}

std::span<std::byte> Records::Open(std::span<std::byte> record, std::span<std::byte> direct) {
    VARVE_CHECK(!closed_ && !broken_);
    return version_ == Version::k13 ? Open13(record, direct) : Open12(record, direct);
}

void Records::OpenCopy(std::string& sealed, std::string& out) {
    std::span<std::byte> rest = std::as_writable_bytes(std::span(sealed));
    while (const size_t bytes = Measure(rest)) {
        if (bytes > rest.size()) break;
        const std::span<std::byte> data = Open(rest.first(bytes));
        out.append(reinterpret_cast<const char*>(data.data()), data.size());
        rest = rest.subspan(bytes);
    }
    sealed.erase(0, sealed.size() - rest.size());
}

std::span<std::byte> Records::Open12(std::span<std::byte> record, std::span<std::byte> direct) {
    const std::byte type = record[0];
    const std::byte* nonce_part = &record[kHeaderBytes];
    std::span<std::byte> content = record.subspan(kHeaderBytes + kExplicitNonceBytes);
    content = content.first(content.size() - kTagBytes);
    const std::byte* tag = content.data() + content.size();
    Nonce nonce = read_.iv;
    std::memcpy(&nonce[4], nonce_part, kExplicitNonceBytes);
    read_.gcm->Begin(nonce.data(), Also12(read_.number, type, content.size()));
    ++read_.number;
    std::byte* out = content.data();
    if (static_cast<Type>(type) == Type::kData && content.size() <= direct.size()) {
        out = direct.data();
    }
    read_.gcm->Update(out, content.data(), content.size());
    if (!read_.gcm->Verify(tag)) return Break(Alert::kBadRecordMac);
    return Take(static_cast<Type>(type), {out, content.size()});
}

/// The content's type is its last byte that is not zero. Usually that is the very last one: so all
/// before it may go where the data is wanted.
std::span<std::byte> Records::Open13(std::span<std::byte> record, std::span<std::byte> direct) {
    std::span<std::byte> content = record.subspan(kHeaderBytes);
    content = content.first(content.size() - kTagBytes);
    const std::byte* tag = content.data() + content.size();
    size_t bytes = content.size() - 1;
    read_.gcm->Begin(NonceOf(read_).data(), record.first(kHeaderBytes));
    ++read_.number;
    std::byte* out = bytes <= direct.size() ? direct.data() : content.data();
    std::byte type{};
    read_.gcm->Update(out, content.data(), bytes);
    read_.gcm->Update(&type, content.data() + bytes, 1);
    if (!read_.gcm->Verify(tag)) return Break(Alert::kBadRecordMac);
    while (type == std::byte{} && bytes > 0) type = out[--bytes];
    if (bytes > kDataMax) return Break(Alert::kRecordOverflow);
    return Take(static_cast<Type>(type), {out, bytes});
}

std::span<std::byte> Records::Take(Type type, std::span<std::byte> content) {
    if (type == Type::kData) {
        if (!content.empty()) {
            empty_ = 0;
        } else if (++empty_ > kEmptyMax) {
            Break(Alert::kUnexpectedMessage);
        }
        return content;
    }
    if (type == Type::kAlert) {
        TakeAlert(content);
    } else if (type == Type::kHandshake) {
        TakeHandshake(content);
    } else {
        Break(Alert::kUnexpectedMessage);
    }
    return {};
}

/// Any other alert ends the connection; the client knows why.
void Records::TakeAlert(std::span<const std::byte> content) {
    if (content.size() != 2) {
        Break(Alert::kDecodeError);
        return;
    }
    const auto alert = static_cast<Alert>(content[1]);
    if (alert == Alert::kUserCanceled && ++empty_ <= kEmptyMax) return;  // close_notify follows
    if (alert != Alert::kCloseNotify) Break(Alert::kCloseNotify);
    closed_ = true;
}

/// A key update, in TLS 1.3; all else would be a renegotiation.
void Records::TakeHandshake(std::span<const std::byte> content) {
    const bool update = version_ == Version::k13 && content.size() == 5 &&
                        content[0] == kHandshakeKeyUpdate && content[1] == std::byte{0} &&
                        content[2] == std::byte{0} && content[3] == std::byte{1} &&
                        content[4] <= std::byte{1};
    if (!update || ++empty_ > kEmptyMax || ++updates_ > kUpdatesMax) {
        Break(Alert::kUnexpectedMessage);
        return;
    }
    update_asked_ = update_asked_ || content[4] == std::byte{1};
    Renew(read_, Gcm::Direction::kDecrypt);
}

// ---------------------------------------------------------------------------------------------
// Sending

void Records::Seal(std::span<const iovec> pieces, std::byte* head, std::byte* tail) {
    VARVE_CHECK(!KeyUpdateDue());
    SealAs(Type::kData, pieces, head, tail);
}

void Records::SealAs(Type type, std::span<const iovec> pieces, std::byte* head, std::byte* tail) {
    const size_t bytes = BytesOf(pieces);
    VARVE_CHECK(bytes <= kDataMax);
    const auto type_byte = static_cast<std::byte>(type);
    if (version_ == Version::k13) {
        WriteHeader(head, static_cast<std::byte>(Type::kData), bytes + kTailBytesMax);
        write_.gcm->Begin(NonceOf(write_).data(), std::span(head, kHeaderBytes));
    } else {
        WriteHeader(head, type_byte, kExplicitNonceBytes + bytes + kTagBytes);
        const uint64_t number = nonce_ + write_.number;  // goes on from the handshake's
        StoreBig(head + kHeaderBytes, number);
        Nonce nonce = write_.iv;
        StoreBig(&nonce[4], number);
        write_.gcm->Begin(nonce.data(), Also12(write_.number, type_byte, bytes));
    }
    ++write_.number;
    ++sealed_;
    for (const iovec& piece : pieces) {
        auto* memory = static_cast<std::byte*>(piece.iov_base);
        write_.gcm->Update(memory, memory, piece.iov_len);
    }
    if (version_ == Version::k13) {
        *tail = type_byte;
        write_.gcm->Update(tail, tail, 1);
        ++tail;
    }
    write_.gcm->Tag(tail);
}

std::string Records::SealWhole(Type type, std::string content) {
    const size_t data = head_bytes();
    const size_t bytes = content.size();
    content.insert(0, data, '\0');
    content.append(tail_bytes(), '\0');
    auto* memory = reinterpret_cast<std::byte*>(content.data());
    const iovec piece{memory + data, bytes};
    SealAs(type, std::span(&piece, 1), memory, memory + data + bytes);
    return content;
}

std::array<std::byte, Records::kKeyUpdateBytes> Records::SealKeyUpdate() {
    VARVE_CHECK(version_ == Version::k13);
    // It answers the client, or needs no answer.
    const std::string record = SealWhole(Type::kHandshake, std::string("\x18\0\0\1\0", 5));
    std::array<std::byte, kKeyUpdateBytes> out;
    VARVE_CHECK(record.size() == out.size());
    std::memcpy(out.data(), record.data(), out.size());
    Renew(write_, Gcm::Direction::kEncrypt);
    sealed_ = 0;
    update_asked_ = false;
    return out;
}

std::string Records::SealAlert(Alert alert) {
    const bool closing = alert == Alert::kCloseNotify;
    return SealWhole(Type::kAlert, {closing ? '\1' : '\2', static_cast<char>(alert)});
}

void Records::SealCopy(std::string_view data, std::string& out) {
    while (!data.empty()) {
        if (KeyUpdateDue()) {
            const auto update = SealKeyUpdate();
            out.append(reinterpret_cast<const char*>(update.data()), update.size());
        }
        const std::string_view part = data.substr(0, fragment_max_);
        out += SealWhole(Type::kData, std::string(part));
        data.remove_prefix(part.size());
    }
}

}  // namespace varve::nbdserver::tls
