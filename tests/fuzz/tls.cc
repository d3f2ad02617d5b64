// Fuzz target: what TLS makes of foreign bytes. A file of keys that is accepted holds what it says.
// A handshake never succeeds by chance. Records give the data that was sealed, in order, however
// they are cut and wherever they are opened, up to the first that was touched.
// Input: a byte that says which, then the bytes.
#include <sys/mman.h>
#include <unistd.h>

#include <memory>

#include "nbdserver/tls/credentials.h"
#include "nbdserver/tls/handshake.h"
#include "nbdserver/tls/psk_file.h"
#include "nbdserver/tls/records.h"
#include "tests/fuzz/fuzz.h"
#include "tests/tls_agreement.h"

namespace varve::nbdserver::tls {
namespace {

void KeyFile(std::string_view text) {
    const Result<PskTable> users = ParsePskFile(text);
    if (!users.ok()) {
        VARVE_CHECK(users.error().kind == ErrorKind::kInvalid);
        VARVE_CHECK(users.error().message.find('\n') == std::string::npos);
        return;
    }
    VARVE_CHECK(!users.value().empty());
    for (const auto& [user, key] : users.value()) {
        VARVE_CHECK(!user.empty() && user.size() <= 128 && user.front() != '#');
        VARVE_CHECK(key.bytes().size() >= 16 && key.bytes().size() <= 64);
        VARVE_CHECK(text.find(user + ":") != std::string_view::npos);
    }
}

std::shared_ptr<const Credentials> MakeCredentials() {
    const int fd = memfd_create("keys", MFD_CLOEXEC);
    const std::string_view keys = "alice:00112233445566778899aabbccddeeff\n";
    VARVE_CHECK(write(fd, keys.data(), keys.size()) == static_cast<ssize_t>(keys.size()));
    CredentialFiles files;
    files.psk = "/proc/self/fd/" + std::to_string(fd);
    const auto loaded = Credentials::Load(files);
    VARVE_CHECK(loaded.ok());
    close(fd);
    return loaded.value();
}

void Shake(fuzz::Input input) {
    static const std::shared_ptr<const Credentials> credentials = MakeCredentials();
    Handshake handshake(credentials);
    const size_t piece = 1 + input.Byte();
    std::string_view bytes = input.rest();
    while (!bytes.empty() && handshake.step() == Handshake::Step::kInput) {
        handshake.Feed(bytes.substr(0, piece));
        bytes.remove_prefix(std::min(bytes.size(), piece));
    }
    VARVE_CHECK(handshake.step() != Handshake::Step::kDone);
    if (handshake.step() == Handshake::Step::kFailed) VARVE_CHECK(!handshake.failure().empty());
    handshake.TakeOutput();
}

struct Sealed {
    std::string bytes;
    std::string data;      // what they hold
    size_t untouched = 0;  // so much of it is in records that nobody changed
    bool changed = false;
};

/// Each record by a byte: data of some length, a key update, an alert, rubbish, or a changed bit.
Sealed Seal(fuzz::Input& input, Records& client, Version version) {
    Sealed sealed;
    while (!input.empty() && sealed.bytes.size() < 1 << 18) {
        const uint8_t kind = input.Byte();
        if (kind == 0xff && version == Version::k13) {
            const auto update = client.SealKeyUpdate();
            sealed.bytes.append(reinterpret_cast<const char*>(update.data()), update.size());
            continue;
        }
        std::string record;
        bool whole = true;
        if (kind == 0xfe) {
            record = client.SealAlert(static_cast<Alert>(input.Byte()));
            whole = false;  // it ends the data, or says nothing
        } else if (kind == 0xfd) {
            record = input.Bytes(input.Byte());
            whole = false;
        } else {
            const std::string data(1 + kind * kind % 16384, static_cast<char>(kind));
            client.SealCopy(data, record);
            if (kind % 32 == 31) {
                record[input.Number(2) % record.size()] ^= static_cast<char>(1 << kind / 32);
                whole = false;
            } else {
                sealed.data += data;
            }
        }
        sealed.bytes += record;
        sealed.changed = sealed.changed || !whole;
        if (!sealed.changed) sealed.untouched = sealed.data.size();
    }
    return sealed;
}

/// Opens records as a connection would: whole ones where they lie or into `room` bytes elsewhere.
std::string OpenAll(Records& records, std::string bytes, size_t room) {
    std::string data, direct(room, '\0');
    std::span<std::byte> rest = std::as_writable_bytes(std::span(bytes));
    while (const size_t record = records.Measure(rest)) {
        VARVE_CHECK(record <= kRecordBytesMax);
        if (record > rest.size()) break;
        const auto opened =
            records.Open(rest.first(record), std::as_writable_bytes(std::span(direct)));
        VARVE_CHECK(opened.empty() || (!records.broken() && !records.closed()));
        data.append(reinterpret_cast<const char*>(opened.data()), opened.size());
        rest = rest.subspan(record);
    }
    return data;
}

void TryRecords(fuzz::Input input) {
    const uint8_t choice = input.Byte();
    const Version version = choice & 1 ? Version::k12 : Version::k13;
    const Agreement agreement = MakeAgreement(version, 16384);
    Records client(OtherSide(agreement));
    const Sealed sealed = Seal(input, client, version);
    Records here(agreement), there(agreement);
    const std::string in_place = OpenAll(here, sealed.bytes, 0);
    const std::string elsewhere = OpenAll(there, sealed.bytes, size_t{choice} * 130);
    VARVE_CHECK(in_place == elsewhere);
    VARVE_CHECK(here.broken() == there.broken() && here.closed() == there.closed());
    // Key updates in a row may be too many.
    const bool cut = sealed.changed || here.broken();
    VARVE_CHECK(cut ? sealed.data.starts_with(in_place) : in_place == sealed.data);
    VARVE_CHECK(in_place.size() >= sealed.untouched || here.broken() == Alert::kUnexpectedMessage);
}

}  // namespace
}  // namespace varve::nbdserver::tls

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace varve::nbdserver::tls;  // NOLINT: a function of C's
    varve::fuzz::Input input(data, size);
    const uint8_t which = input.Byte() % 3;
    if (which == 0) KeyFile(input.rest());
    if (which == 1) Shake(input);
    if (which == 2) TryRecords(input);
    return 0;
}
