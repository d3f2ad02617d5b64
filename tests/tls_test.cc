// TLS without sockets: files of keys, handshakes, records, against OpenSSL as the client.
#include <gtest/gtest.h>
#include <malloc.h>
#ifdef VARVE_SANITIZED
#include <sanitizer/allocator_interface.h>
#endif

#include <filesystem>
#include <fstream>
#include <random>

#include "base/endian.h"
#include "nbdserver/tls/credentials.h"
#include "nbdserver/tls/gcm.h"
#include "nbdserver/tls/handshake.h"
#include "nbdserver/tls/records.h"
#include "tests/tls_client.h"

namespace varve::nbdserver::tls {
namespace {

namespace fs = std::filesystem;

const std::string kKey(32, 'k');
const std::string kHexKey = [] {
    std::string hex;
    for (int i = 0; i < 32; ++i) hex += "6b";
    return hex;
}();

std::string Noise(std::mt19937_64& dice, size_t bytes) {
    std::string noise(bytes, '\0');
    for (char& c : noise) c = static_cast<char>(dice());
    return noise;
}

std::span<std::byte> BytesOf(std::string& text) {
    return std::as_writable_bytes(std::span(text));
}

class TlsTest : public testing::Test {
  protected:
    TlsTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-tls-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
        seed_ = std::random_device()();
        dice_.seed(seed_);
        RecordProperty("seed", std::to_string(seed_));
        std::printf("seed %lu\n", seed_);
        WriteServerCertificate(root_, "localhost");
        std::ofstream(root_ / "keys") << "bob:" << std::string(32, '7') << "\nalice:" << kHexKey;
        Load();
    }
    ~TlsTest() override { fs::remove_all(root_); }

    void Load() {
        CredentialFiles files;
        files.certificates = root_;
        files.psk = root_ / "keys";
        Result<std::shared_ptr<const Credentials>> loaded = Credentials::Load(files);
        ASSERT_TRUE(loaded.ok()) << loaded.error().message;
        credentials_ = loaded.value();
    }

    /// Makes a handshake, cut into pieces of `piece` bytes; `early` comes behind it at once.
    bool Shake(TlsClient& client, size_t piece = 1000) {
        handshake_ = std::make_unique<Handshake>(credentials_);
        bool done = client.Shake("");
        while (handshake_->step() == Handshake::Step::kInput) {
            const std::string said = client.TakeOutput();
            if (said.empty()) return false;
            for (size_t i = 0; i < said.size(); i += piece) {
                if (handshake_->step() != Handshake::Step::kInput) break;
                handshake_->Feed(std::string_view(said).substr(i, piece));
            }
            const std::string answer = handshake_->TakeOutput();
            if (!answer.empty()) last_answer_ = answer;
            done = client.Shake(answer) || done;
        }
        if (handshake_->step() != Handshake::Step::kDone || !done) return false;
        EXPECT_EQ(handshake_->TakeLeftover(), "");
        records_ = std::make_unique<Records>(handshake_->agreement(), records_max_);
        return true;
    }

    /// The data in `stream`, as far as it is whole; opened in place, or where there is room.
    std::string OpenAll(std::string stream) {
        std::string data;
        std::string direct(20000, '\0');
        std::span<std::byte> rest = BytesOf(stream);
        while (const size_t bytes = records_->Measure(rest)) {
            if (bytes > rest.size()) break;
            const size_t room = dice_() % 2 ? direct.size() : dice_() % 100;
            const std::span<std::byte> opened =
                records_->Open(rest.first(bytes), BytesOf(direct).first(room));
            data.append(reinterpret_cast<const char*>(opened.data()), opened.size());
            rest = rest.subspan(bytes);
        }
        return data;
    }
    /// One record of `data`, in pieces.
    std::string SealInPieces(std::string data) {
        std::vector<iovec> pieces;
        for (size_t at = 0; at < data.size();) {
            const size_t bytes = std::min<size_t>(data.size() - at, dice_() % 5000);
            pieces.push_back({data.data() + at, bytes});
            at += bytes;
        }
        std::array<std::byte, kHeadBytesMax> head;
        std::array<std::byte, kTailBytesMax> tail;
        records_->Seal(pieces, head.data(), tail.data());
        return std::string(reinterpret_cast<char*>(head.data()), records_->head_bytes()) + data +
               std::string(reinterpret_cast<char*>(tail.data()), records_->tail_bytes());
    }

    fs::path root_;
    uint64_t seed_;
    std::mt19937_64 dice_;
    uint64_t records_max_ = uint64_t{1} << 24;
    std::shared_ptr<const Credentials> credentials_;
    std::unique_ptr<Handshake> handshake_;
    std::unique_ptr<Records> records_;
    std::string last_answer_;  // of the handshake
};

TEST_F(TlsTest, CiphersAgreeHoweverTheMessageIsCut) {
    for (const size_t key_bytes : {16, 32}) {
        std::string key = Noise(dice_, key_bytes), nonce = Noise(dice_, kNonceBytes);
        const auto bytes = BytesOf(key);
        const auto fast = Gcm::Make(Gcm::Direction::kEncrypt, bytes);
        const auto slow = Gcm::MakeWithOpenSsl(Gcm::Direction::kDecrypt, bytes);
        const auto back = Gcm::Make(Gcm::Direction::kDecrypt, bytes);
        const auto other = Gcm::MakeWithOpenSsl(Gcm::Direction::kEncrypt, bytes);
        for (int round = 0; round < 200; ++round) {
            const std::string plain = Noise(dice_, dice_() % 20000);
            std::string also = Noise(dice_, 5 + dice_() % 9);
            const auto run = [&](Gcm& gcm, std::string text) {
                gcm.Begin(BytesOf(nonce).data(), BytesOf(also));
                std::byte* at = BytesOf(text).data();
                for (size_t done = 0; done < text.size();) {
                    const size_t piece = std::min<size_t>(text.size() - done, dice_() % 6000);
                    gcm.Update(at + done, at + done, piece);
                    done += piece;
                }
                return text;
            };
            std::array<std::byte, kTagBytes> tag, same;
            const std::string sealed = run(*fast, plain);
            fast->Tag(tag.data());
            EXPECT_EQ(run(*other, plain), sealed);
            other->Tag(same.data());
            EXPECT_EQ(tag, same);
            EXPECT_EQ(run(*slow, sealed), plain);
            EXPECT_TRUE(slow->Verify(tag.data()));
            EXPECT_EQ(run(*back, sealed), plain);
            tag[dice_() % kTagBytes] ^= std::byte{1};
            EXPECT_FALSE(back->Verify(tag.data()));
        }
    }
}

TEST_F(TlsTest, KeyFilesOfPsktool) {
    const auto users =
        ParsePskFile("# comment\nalice:" + kHexKey + "\r\n\nb:c:" + std::string(32, 'A') + "\n");
    ASSERT_TRUE(users.ok()) << users.error().message;
    ASSERT_EQ(users.value().size(), 2U);
    EXPECT_EQ(users.value().at("alice").bytes(), kKey);
    EXPECT_EQ(users.value().at("b:c").bytes(), std::string(16, '\xaa'));
    for (const std::string& wrong :
         {std::string(), std::string("# nobody\n"), std::string("alice"), ":" + kHexKey,
          "alice:" + kHexKey + "6", "alice:6x" + kHexKey, std::string("alice:6b6b"),
          "alice:" + std::string(130, '6'), std::string(129, 'a') + ":" + kHexKey,
          "alice:" + kHexKey + "\nalice:" + kHexKey, std::string("a\0b:", 4) + kHexKey}) {
        const auto refused = ParsePskFile(wrong);
        ASSERT_FALSE(refused.ok()) << wrong;
        EXPECT_EQ(refused.error().message.find("6b6b"), std::string::npos);  // no key in a log
    }
}

struct Way {
    int version;
    bool psk;
    const char* ciphers;
};
const Way kWays[] = {
    {TLS1_3_VERSION, true, "TLS_AES_128_GCM_SHA256"},
    {TLS1_3_VERSION, true, ""},
    {TLS1_3_VERSION, false, "TLS_AES_128_GCM_SHA256"},
    {TLS1_3_VERSION, false, "TLS_AES_256_GCM_SHA384"},
    {TLS1_2_VERSION, true, "DHE-PSK-AES128-GCM-SHA256"},
    {TLS1_2_VERSION, true, "DHE-PSK-AES256-GCM-SHA384"},
    {TLS1_2_VERSION, false, "ECDHE-ECDSA-AES128-GCM-SHA256"},
    {TLS1_2_VERSION, false, "ECDHE-ECDSA-AES256-GCM-SHA384"},
};

TEST_F(TlsTest, EveryVersionAndCipherCarriesDataBothWays) {
    for (const Way& way : kWays) {
        SCOPED_TRACE(std::string(way.psk ? "psk " : "certificate ") + way.ciphers);
        TlsSetup setup;
        setup.version = way.version;
        setup.ciphers = way.ciphers;
        if (way.psk) setup.key = kKey;
        TlsClient client(setup);
        ASSERT_TRUE(Shake(client, 1 + dice_() % 2000)) << handshake_->failure();
        EXPECT_EQ(handshake_->identity().psk_user, way.psk ? "alice" : "");
        for (int round = 0; round < 30; ++round) {
            const std::string up = Noise(dice_, 1 + dice_() % 70000);
            EXPECT_EQ(OpenAll(client.Seal(up)), up);
            const std::string down = Noise(dice_, 1 + dice_() % 16384);
            client.Feed(SealInPieces(down));
            EXPECT_EQ(client.Read(), down);
        }
        std::string sealed;
        const std::string large = Noise(dice_, 100'000);
        records_->SealCopy(large, sealed);
        client.Feed(sealed + records_->SealAlert(Alert::kCloseNotify));
        EXPECT_EQ(client.Read(), large);
        EXPECT_TRUE(client.closed());
        SSL_shutdown(client.ssl());
        EXPECT_EQ(OpenAll(client.TakeOutput()), "");
        EXPECT_TRUE(records_->closed());
        EXPECT_FALSE(records_->broken());
    }
}

TEST_F(TlsTest, AUserWhoseKeyWasNotUsedIsNobody) {
    // A key goes with SHA-256 only: the library looks the user up, and then takes a certificate.
    TlsSetup setup;
    setup.ciphers = "TLS_AES_256_GCM_SHA384";
    setup.key = std::string(32, 'x');  // not alice's
    TlsClient client(setup);
    ASSERT_TRUE(Shake(client)) << handshake_->failure();
    EXPECT_EQ(handshake_->identity().psk_user, "");
}

TEST_F(TlsTest, WhoSomebodyIsCanBeShown) {
    const auto shown = [](const std::string& user) {
        Identity identity;
        identity.psk_user = user;
        return Describe(identity);
    };
    EXPECT_EQ(Describe(Identity()), "");
    EXPECT_EQ(shown("m\xc3\xbcller \xf0\x9f\x92\xbe"), "psk:m\xc3\xbcller \xf0\x9f\x92\xbe");
    EXPECT_EQ(shown("m\xfcller"), "psk:m?ller");                   // Latin 1
    EXPECT_EQ(shown("a\x1b[1m\x7f\xc2\x9b"), "psk:a?[1m??");       // control characters
    EXPECT_EQ(shown("a\xed\xa0\x80\xc3").substr(0, 6), "psk:a?");  // no characters
    EXPECT_EQ(shown("a\xed\xa0\x80\xc3").find('\xed'), std::string::npos);
}

TEST_F(TlsTest, PaddingIsTakenOff) {
    TlsSetup setup;
    setup.padding = 4096;
    TlsClient client(setup);
    ASSERT_TRUE(Shake(client));
    for (const size_t bytes : {1, 4095, 4096, 16384, 40000}) {
        const std::string data = std::string(bytes, '\0');  // zeros are data, too
        EXPECT_EQ(OpenAll(client.Seal(data)), data);
    }
}

TEST_F(TlsTest, ShortRecordsForWhoAsksForThem) {
    for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
        TlsSetup setup;
        setup.version = version;
        setup.fragment = TLSEXT_max_fragment_length_1024;
        TlsClient client(setup);
        ASSERT_TRUE(Shake(client));
        EXPECT_EQ(records_->fragment_max(), 1024U);
        std::string sealed;
        records_->SealCopy(std::string(3000, 'x'), sealed);
        client.Feed(sealed);
        EXPECT_EQ(client.Read(), std::string(3000, 'x'));
    }
}

TEST_F(TlsTest, KeysAreRenewedByTheClientAndByTheServer) {
    records_max_ = 3;
    TlsClient client({});
    ASSERT_TRUE(Shake(client));
    for (const int kind : {SSL_KEY_UPDATE_NOT_REQUESTED, SSL_KEY_UPDATE_REQUESTED}) {
        for (int round = 0; round < 5; ++round) {
            ASSERT_EQ(SSL_key_update(client.ssl(), kind), 1);
            EXPECT_EQ(OpenAll(client.Seal("up")), "up");
            EXPECT_EQ(records_->KeyUpdateDue(), kind == SSL_KEY_UPDATE_REQUESTED);
            std::string sealed;
            records_->SealCopy("down", sealed);
            EXPECT_FALSE(kind == SSL_KEY_UPDATE_REQUESTED && records_->KeyUpdateDue());
            client.Feed(sealed);
            EXPECT_EQ(client.Read(), "down");
            if (records_->KeyUpdateDue()) {
                sealed.clear();
                records_->SealCopy("by itself", sealed);
                client.Feed(sealed);
                EXPECT_EQ(client.Read(), "by itself");
            }
        }
    }
}

TEST_F(TlsTest, AChangedByteIsSeen) {
    for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
        TlsSetup setup;
        setup.version = version;
        TlsClient client(setup);
        ASSERT_TRUE(Shake(client));
        std::string record = client.Seal("some data");
        record[dice_() % record.size()] ^= static_cast<char>(1 + dice_() % 255);
        record.append(1 << 16, 'x');  // behind it, in case it seems longer
        EXPECT_EQ(OpenAll(record), "");
        EXPECT_TRUE(records_->broken());
    }
}

TEST_F(TlsTest, ARecordTwiceOrMissingIsSeen) {
    TlsClient client({});
    ASSERT_TRUE(Shake(client));
    const std::string first = client.Seal("1"), second = client.Seal("2"), third = client.Seal("3");
    EXPECT_EQ(OpenAll(first + third + second), "1");
    EXPECT_EQ(records_->broken(), Alert::kBadRecordMac);
    ASSERT_TRUE(Shake(*std::make_unique<TlsClient>(TlsSetup())));
    TlsClient other({});
    ASSERT_TRUE(Shake(other));
    const std::string once = other.Seal("1");
    EXPECT_EQ(OpenAll(once + once), "1");
    EXPECT_EQ(records_->broken(), Alert::kBadRecordMac);
}

TEST_F(TlsTest, NoncesGoOnFromTheHandshakes) {
    for (const bool psk : {true, false}) {
        TlsSetup setup;
        setup.version = TLS1_2_VERSION;
        if (psk) setup.key = kKey;
        if (psk) setup.ciphers = "DHE-PSK-AES128-GCM-SHA256";
        TlsClient client(setup);
        ASSERT_TRUE(Shake(client));
        const auto nonce = LoadBig<uint64_t>(&last_answer_.at(last_answer_.size() - 40));
        for (uint64_t i = 1; i < 4; ++i) {
            std::string sealed;
            records_->SealCopy("some data", sealed);
            EXPECT_EQ(LoadBig<uint64_t>(&sealed.at(kHeaderBytes)), nonce + i);
            client.Feed(sealed);
            EXPECT_EQ(client.Read(), "some data");
        }
    }
}

TEST_F(TlsTest, RenegotiationIsRefused) {
    TlsSetup setup;
    setup.version = TLS1_2_VERSION;
    TlsClient client(setup);
    ASSERT_TRUE(Shake(client));
    ASSERT_EQ(SSL_renegotiate(client.ssl()), 1);
    SSL_do_handshake(client.ssl());
    EXPECT_EQ(OpenAll(client.TakeOutput()), "");
    EXPECT_EQ(records_->broken(), Alert::kUnexpectedMessage);
    client.Feed(records_->SealAlert(*records_->broken()));
    client.Read();
    EXPECT_TRUE(client.failed());
}

TEST_F(TlsTest, EndlessRecordsWithoutDataEndTheConnection) {
    TlsClient client({});
    ASSERT_TRUE(Shake(client));
    for (int i = 0; i < 1000 && !records_->broken(); ++i) {
        ASSERT_EQ(SSL_key_update(client.ssl(), SSL_KEY_UPDATE_NOT_REQUESTED), 1);
        SSL_do_handshake(client.ssl());
        EXPECT_EQ(OpenAll(client.TakeOutput()), "");
    }
    EXPECT_EQ(records_->broken(), Alert::kUnexpectedMessage);
}

TEST_F(TlsTest, KeyUpdatesByTheHundredAtOnceEndTheConnection) {
    TlsClient client({});
    ASSERT_TRUE(Shake(client));
    std::string stream;
    for (int i = 0; i < 60; ++i) {
        ASSERT_EQ(SSL_key_update(client.ssl(), SSL_KEY_UPDATE_NOT_REQUESTED), 1);
        stream += client.Seal("x");
    }
    for (int i = 0; i < 5; ++i) {  // not at once: that is no fault
        records_->BeginReceive();
        ASSERT_EQ(SSL_key_update(client.ssl(), SSL_KEY_UPDATE_NOT_REQUESTED), 1);
        EXPECT_EQ(OpenAll(std::exchange(stream, {}) + client.Seal("y")).back(), 'y');
    }
    for (int i = 0; i < 300; ++i) {
        ASSERT_EQ(SSL_key_update(client.ssl(), SSL_KEY_UPDATE_NOT_REQUESTED), 1);
        stream += client.Seal("x");
    }
    EXPECT_LT(OpenAll(stream).size(), 100U);
    EXPECT_EQ(records_->broken(), Alert::kUnexpectedMessage);
}

TEST_F(TlsTest, HeadersThatAreNone) {
    for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
        for (const std::string& header :
             {std::string("\x16\3\1\0\x20", 5), std::string("GET /", 5),
              std::string("\x17\3\3\xff\xff", 5), std::string("\x17\3\3\0\0", 5),
              std::string("\x17\3\3\0\x10", 5), std::string("\x14\3\3\0\x20", 5)}) {
            TlsSetup setup;
            setup.version = version;
            TlsClient client(setup);
            ASSERT_TRUE(Shake(client));
            EXPECT_EQ(OpenAll(header + std::string(1 << 16, 'x')), "");
            EXPECT_TRUE(records_->broken());
        }
    }
}

TEST_F(TlsTest, WrongKeysAndUnknownUsersFail) {
    for (const int version : {TLS1_2_VERSION, TLS1_3_VERSION}) {
        for (const bool known : {true, false}) {
            TlsSetup setup;
            setup.version = version;
            setup.key = known ? std::string(32, 'x') : kKey;
            setup.user = known ? "alice" : "mallory";
            if (version == TLS1_2_VERSION) setup.ciphers = "DHE-PSK-AES128-GCM-SHA256";
            TlsClient client(setup);
            // In TLS 1.3 a user whom nobody knows is nobody in particular.
            const bool nobody = Shake(client);
            EXPECT_EQ(nobody, !known && version == TLS1_3_VERSION) << handshake_->failure();
            EXPECT_EQ(nobody, handshake_->failure().empty());
            if (nobody) {
                EXPECT_EQ(handshake_->identity().psk_user, "");
            }
        }
    }
}

TEST_F(TlsTest, OldVersionsAndWeakCiphersAreRefused) {
    EXPECT_GE(SSL_CTX_get_security_level(credentials_->context()), 2);
    for (const char* ciphers :
         {"ECDHE-ECDSA-AES128-SHA256", "PSK-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"}) {
        TlsSetup setup;
        setup.version = TLS1_2_VERSION;
        setup.ciphers = ciphers;
        setup.key = kKey;
        TlsClient client(setup);
        EXPECT_FALSE(Shake(client)) << ciphers;
        EXPECT_NE(handshake_->failure(), "");
    }
}

size_t AllocatedBytes() {
#ifdef VARVE_SANITIZED
    return __sanitizer_get_current_allocated_bytes();
#else
    return ::mallinfo2().uordblks;
#endif
}

TEST_F(TlsTest, AConnectionCostsLittleAfterItsHandshake) {
    TlsClient client({});
    ASSERT_TRUE(Shake(client));
    constexpr size_t kConnections = 200;
    std::vector<std::unique_ptr<Records>> all(kConnections);
    const size_t before = AllocatedBytes();
    for (auto& one : all) one = std::make_unique<Records>(handshake_->agreement());
    EXPECT_LT(AllocatedBytes() - before, kConnections * 4096);
}

TEST_F(TlsTest, FilesThatCannotBeUsedAreNamed) {
    const auto refused = [&](const fs::path& certificates, const fs::path& psk, bool verify) {
        CredentialFiles files{certificates, psk, verify};
        const auto loaded = Credentials::Load(files);
        EXPECT_FALSE(loaded.ok());
        return loaded.ok() ? "" : loaded.error().message;
    };
    EXPECT_NE(refused(root_ / "none", "", false).find("none/server-cert.pem: No such file"),
              std::string::npos);
    EXPECT_NE(refused("", root_ / "none", false).find("none"), std::string::npos);
    EXPECT_NE(refused("", root_, false).find(root_.string()), std::string::npos);
    EXPECT_NE(refused(root_, "", true).find("ca-cert.pem"), std::string::npos);
    std::ofstream(root_ / "server-key.pem") << "no key\n";
    EXPECT_NE(refused(root_, "", false).find("server-key.pem"), std::string::npos);
    fs::create_directory(root_ / "other");
    WriteServerCertificate(root_ / "other", "other");
    fs::copy_file(root_ / "other/server-key.pem", root_ / "server-key.pem",
                  fs::copy_options::overwrite_existing);
    EXPECT_NE(refused(root_, "", false).find("key values mismatch"), std::string::npos);
}

TEST_F(TlsTest, AKeyOfAnotherKindThanTheCertificateIsRefused) {
    EVP_PKEY* key = EVP_RSA_gen(2048);
    BIO* file = BIO_new_file((root_ / "server-key.pem").c_str(), "w");
    ASSERT_EQ(PEM_write_bio_PrivateKey(file, key, nullptr, nullptr, 0, nullptr, nullptr), 1);
    BIO_free(file);
    EVP_PKEY_free(key);
    const auto loaded = Credentials::Load({root_, "", false});
    ASSERT_FALSE(loaded.ok());
    EXPECT_NE(loaded.error().message.find("server-key.pem: it is not the key of"),
              std::string::npos);
}

TEST_F(TlsTest, ARevocationListThatCannotBeReadIsNotTakenForNone) {
    fs::copy_file(root_ / "server-cert.pem", root_ / "ca-cert.pem");
    const auto load = [&] { return Credentials::Load({root_, "", true}); };
    EXPECT_TRUE(load().ok());
    fs::create_symlink("nowhere", root_ / "ca-crl.pem");
    const auto loaded = load();
    ASSERT_FALSE(loaded.ok());
    EXPECT_NE(loaded.error().message.find("ca-crl.pem: No such file"), std::string::npos)
        << loaded.error().message;
}

}  // namespace
}  // namespace varve::nbdserver::tls
