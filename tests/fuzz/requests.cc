// Fuzz target: any bytes behind negotiation, over a socket pair, into a real connection on a real
// reactor. Each request that a plain reading of the protocol finds in the bytes is answered once,
// in the form that was negotiated; what follows a refused request is still understood.
// With one option the bytes are under TLS, in records as long as the stream says, of which one may
// be damaged.
// Input: a byte of options, then items - the first byte of each says what it is: a well-formed
// header of few bytes, or as many raw bytes as the second says.
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <map>
#include <memory>

#include "nbdserver/connection/connection.h"
#include "nbdserver/wire/wire.h"
#include "tests/fake_volume.h"
#include "tests/fuzz/fuzz.h"
#include "tests/request_header.h"
#include "tests/run_on.h"
#include "tests/tls_agreement.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kSize = 256 << 10;
constexpr uint32_t kPayloadMax = 16 << 10;
constexpr uint32_t kSkippedMax = 4 * kPayloadMax;  // of a refused WRITE
constexpr uint32_t kFirstContext = 70;
constexpr size_t kStreamMax = 64 << 10;  // sent before anything is read: the socket must hold it

/// One server for all inputs: a reactor for each would cost a thread and a ring.
struct Server {
    std::unique_ptr<Reactor> reactor;
    std::unique_ptr<FakeVolume> volume;
    std::unique_ptr<ConnectionHost> host;

    Server() {
        Result<std::unique_ptr<Reactor>> started = Reactor::Start({});
        VARVE_CHECK(started.ok());
        reactor = std::move(started.value());
        volume = std::make_unique<FakeVolume>(*reactor, kSize);
        ConnectionLimits limits;
        limits.payload_max = kPayloadMax;
        limits.requests_max = 8;  // so that inputs of a few hundred bytes meet the limits
        limits.bytes_max = 64 << 10;
        host = std::make_unique<ConnectionHost>(*reactor, limits);
    }
};

/// Turns the input into a client's stream: mutations of raw bytes alone would hardly ever keep
/// the magic number and the lengths right.
std::string MakeStream(fuzz::Input input, bool extended) {
    std::string stream;
    while (!input.empty() && stream.size() < kStreamMax) {
        const uint8_t kind = input.Byte();
        if (kind >= 0xf0) {
            stream += input.Bytes(input.Byte());
            continue;
        }
        wire::ExtendedRequest request;
        request.type = kind % 10;
        request.flags = input.Byte() % 64;
        request.cookie = stream.size();
        request.offset = input.Number(2) * (kind & 0x20 ? 1 : 512);
        uint64_t length = input.Number(2) % (kPayloadMax + 100);
        if (kind & 0x40) length = length / 4096 * 4096;
        request.length = length;
        if (!extended) {
            stream += RequestHeader(request.type, request.offset, static_cast<uint32_t>(length),
                                    request.cookie, request.flags);
            if (request.type == wire::kCmdWrite) stream.append(length, static_cast<char>(kind));
            continue;
        }
        const bool payload = (request.flags & wire::kFlagPayloadLength) != 0;
        std::string behind;
        if (request.type == wire::kCmdWrite || payload)
            behind.assign(length, static_cast<char>(kind));
        if (request.type == wire::kCmdBlockStatus && payload) {
            behind.clear();
            AppendBig<uint64_t>(behind, length);
            for (unsigned n = kind / 10 % 7; n > 0; --n) {
                AppendBig<uint32_t>(behind, kFirstContext + input.Byte() % 5);
            }
            request.length = behind.size();
        }
        // A length of 64 bits for what needs no memory.
        if (behind.empty() && kind & 0x80) request.length = length << (kind % 56);
        stream.append(reinterpret_cast<const char*>(&request), sizeof request);
        stream += behind;
    }
    stream.resize(std::min(stream.size(), kStreamMax));
    return stream;
}

struct Asked {
    uint16_t type = 0;
    uint64_t offset = 0;
    uint64_t length = 0;
    uint16_t flags = 0;
    std::vector<uint32_t> contexts;  // ids
    uint64_t answers = 0;
};

/// The requests in a stream, by cookie, as the protocol tells to read it.
struct Reading {
    std::map<uint64_t, std::vector<Asked>> asked;
    uint64_t requests = 0;
    bool broken = false;  // the server may hang up without answering
};

/// What a BLOCK_STATUS asks for in its payload.
void ReadStatusPayload(std::string_view payload, Asked& asked) {
    asked.contexts.clear();
    if (payload.size() < 8) return;
    asked.length = LoadBig<uint64_t>(payload.data());
    std::vector<uint32_t> ids;
    for (size_t at = 8; at + 4 <= payload.size(); at += 4) {
        ids.push_back(LoadBig<uint32_t>(payload.data() + at));
    }
    std::sort(ids.begin(), ids.end());
    asked.contexts = std::move(ids);
}

Reading Read(std::string_view stream, bool extended, size_t contexts) {
    Reading reading;
    const size_t header_bytes = extended ? sizeof(wire::ExtendedRequest) : sizeof(wire::Request);
    while (stream.size() >= header_bytes) {
        const char* const header = stream.data();
        Asked asked;
        asked.flags = LoadBig<uint16_t>(header + 4);
        asked.type = LoadBig<uint16_t>(header + 6);
        const auto cookie = LoadBig<uint64_t>(header + 8);
        asked.offset = LoadBig<uint64_t>(header + 16);
        asked.length = extended ? LoadBig<uint64_t>(header + 24) : LoadBig<uint32_t>(header + 24);
        for (uint32_t i = 0; i < contexts; ++i) asked.contexts.push_back(kFirstContext + i);
        const uint32_t magic = extended ? wire::kExtendedRequestMagic : wire::kRequestMagic;
        if (LoadBig<uint32_t>(header) != magic) reading.broken = true;
        stream.remove_prefix(header_bytes);
        if (reading.broken || asked.type == wire::kCmdDisconnect) return reading;
        const bool follows =
            asked.type == wire::kCmdWrite || (extended && asked.flags & wire::kFlagPayloadLength);
        const uint64_t payload = follows ? asked.length : 0;
        // A payload far over the limit is not skipped, and one cut off is a request cut off.
        if (payload > kSkippedMax || payload > stream.size()) reading.broken = true;
        const std::string_view behind = stream.substr(0, payload);
        stream.remove_prefix(behind.size());
        if (asked.type == wire::kCmdBlockStatus && follows) ReadStatusPayload(behind, asked);
        ++reading.requests;
        reading.asked[cookie].push_back(std::move(asked));
        if (reading.broken) return reading;
    }
    return reading;
}

std::string ReceiveAll(int fd) {
    std::string bytes;
    static char buffer[256 << 10];
    for (;;) {
        const ssize_t n = recv(fd, buffer, sizeof buffer, 0);
        if (n < 0 && errno == EINTR) continue;  // by libFuzzer's own timer
        if (n <= 0) return bytes;
        bytes.append(buffer, static_cast<size_t>(n));
    }
}

/// The answers of a connection, one behind the other.
class Answers {
  public:
    Answers(std::string bytes, Reading& reading, bool structured, bool extended)
        : bytes_(std::move(bytes)),
          rest_(bytes_),
          reading_(reading),
          structured_(structured),
          extended_(extended) {}

    /// How many there are. Half an answer at the end is allowed if the server hung up.
    uint64_t Verify() {
        uint64_t count = 0;
        while (!rest_.empty()) {
            if (!Has(4)) return count;
            const auto magic = LoadBig<uint32_t>(rest_.data());
            const bool chunk =
                magic == (extended_ ? wire::kExtendedReplyMagic : wire::kStructuredReplyMagic);
            VARVE_CHECK(chunk ? structured_ : !extended_ && magic == wire::kSimpleReplyMagic);
            if (!(chunk ? TakeChunk() : TakeSimple())) return count;
            if (last_) ++count;
        }
        return count;
    }

  private:
    bool Has(size_t bytes) {
        VARVE_CHECK(rest_.size() >= bytes || reading_.broken);
        return rest_.size() >= bytes;
    }

    /// The request that an answer is for: the first with its cookie and form that has none.
    Asked& Find(uint64_t cookie, bool chunks) {
        const auto found = reading_.asked.find(cookie);
        VARVE_CHECK(found != reading_.asked.end());
        for (Asked& asked : found->second) {
            const bool in_chunks =
                extended_ || (structured_ && (asked.type == wire::kCmdRead ||
                                              asked.type == wire::kCmdBlockStatus));
            if (!asked.answers && in_chunks == chunks) return asked;
        }
        VARVE_CHECK(!"an answer that nobody asked for");
        std::abort();
    }

    bool TakeSimple() {
        if (!Has(sizeof(wire::SimpleReply))) return false;
        const auto error = LoadBig<uint32_t>(rest_.data() + 4);
        Asked& asked = Find(LoadBig<uint64_t>(rest_.data() + 8), false);
        ++asked.answers;
        rest_.remove_prefix(sizeof(wire::SimpleReply));
        last_ = true;
        const bool fits = asked.offset <= kSize && asked.length <= kSize - asked.offset;
        VARVE_CHECK(error || fits || asked.type == wire::kCmdFlush);
        if (error || asked.type != wire::kCmdRead) return true;
        if (!Has(asked.length)) return false;
        rest_.remove_prefix(asked.length);
        return true;
    }

    bool TakeChunk() {
        const size_t head = extended_ ? sizeof(wire::ExtendedChunk) : sizeof(wire::Chunk);
        if (!Has(head)) return false;
        const auto flags = LoadBig<uint16_t>(rest_.data() + 4);
        const auto type = LoadBig<uint16_t>(rest_.data() + 6);
        const uint64_t length =
            extended_ ? LoadBig<uint64_t>(rest_.data() + 24) : LoadBig<uint32_t>(rest_.data() + 16);
        Asked& asked = Find(LoadBig<uint64_t>(rest_.data() + 8), true);
        VARVE_CHECK(!extended_ || LoadBig<uint64_t>(rest_.data() + 16) == asked.offset);
        if (!Has(head + length)) return false;
        const std::string_view body = rest_.substr(head, length);
        rest_.remove_prefix(head + length);
        last_ = flags & wire::kChunkDone;
        if (last_) ++asked.answers;
        const bool read = type == wire::kChunkOffsetData || type == wire::kChunkOffsetHole;
        if (read) {
            const uint64_t bytes = type == wire::kChunkOffsetData
                                       ? body.size() - 8
                                       : LoadBig<uint32_t>(body.data() + 8);
            VARVE_CHECK(LoadBig<uint64_t>(body.data()) == asked.offset + read_);
            read_ += bytes;
            VARVE_CHECK(!last_ || read_ == asked.length);
            VARVE_CHECK(last_ || !(asked.flags & wire::kFlagDf));
        }
        const bool fits = asked.offset <= kSize && asked.length <= kSize - asked.offset;
        VARVE_CHECK(type == wire::kChunkError || fits || asked.type == wire::kCmdFlush);
        if (type == wire::kChunkBlockStatus || type == wire::kChunkBlockStatusExtended) {
            VARVE_CHECK(extended_ == (type == wire::kChunkBlockStatusExtended));
            VARVE_CHECK(asked.type == wire::kCmdBlockStatus);
            TakeStatus(asked, body);
        }
        if (last_) read_ = told_ = 0;
        return true;
    }

    /// Each context that was asked for once, in order, and all of the same bytes.
    void TakeStatus(const Asked& asked, std::string_view body) {
        const size_t head = extended_ ? 8 : 4, each = extended_ ? 16 : 8;
        VARVE_CHECK(body.size() >= head + each && (body.size() - head) % each == 0);
        VARVE_CHECK(told_ < asked.contexts.size());
        VARVE_CHECK(LoadBig<uint32_t>(body.data()) == asked.contexts[told_]);
        const size_t count = (body.size() - head) / each;
        VARVE_CHECK(!extended_ || LoadBig<uint32_t>(body.data() + 4) == count);
        uint64_t bytes = 0;
        for (size_t at = head; at < body.size(); at += each) {
            const uint64_t length = extended_ ? LoadBig<uint64_t>(body.data() + at)
                                              : LoadBig<uint32_t>(body.data() + at);
            VARVE_CHECK(length > 0);
            bytes += length;
        }
        VARVE_CHECK(bytes <= asked.length);
        VARVE_CHECK(!(asked.flags & wire::kFlagReqOne) || count == 1);
        VARVE_CHECK(told_ == 0 || bytes == covered_);
        covered_ = bytes;
        ++told_;
        VARVE_CHECK(last_ == (told_ == asked.contexts.size()));
    }

    const std::string bytes_;
    std::string_view rest_;
    Reading& reading_;
    const bool structured_;
    const bool extended_;
    bool last_ = false;
    uint64_t read_ = 0;     // bytes of the READ whose chunks are coming
    size_t told_ = 0;       // contexts of the BLOCK_STATUS whose chunks are coming
    uint64_t covered_ = 0;  // bytes of each of them
};

tls::Agreement AgreementFor(uint8_t choice) {
    return MakeAgreement(choice & 0x20 ? tls::Version::k12 : tls::Version::k13, 16384);
}

/// What a client sends of `data`: records of lengths that depend on it, and not too many updates of
/// its keys for one receive.
std::string Seal(tls::Records& records, std::string_view data) {
    std::string sealed;
    unsigned updates = 0;
    while (!data.empty()) {
        const auto seed = static_cast<uint8_t>(data.front() ^ data.back());
        const std::string_view part = data.substr(0, 1 + seed * seed % 20000);
        const bool tls13 = records.tail_bytes() == tls::kTailBytesMax;
        if (seed % 16 == 3 && tls13 && ++updates <= 64) {
            const auto update = records.SealKeyUpdate();
            sealed.append(reinterpret_cast<const char*>(update.data()), update.size());
        }
        records.SealCopy(part, sealed);
        data.remove_prefix(part.size());
    }
    return sealed;
}

/// The data that a server has sent in records, as far as they are whole.
std::string Open(tls::Records& records, std::string sealed) {
    std::string data;
    records.OpenCopy(sealed, data);
    VARVE_CHECK(!records.broken() || records.broken() == tls::Alert::kCloseNotify);
    return data;
}

Task<std::shared_ptr<const cow::Layers>> GiveLayers() {
    co_return std::make_shared<const cow::Layers>();
}

std::shared_ptr<const cow::Base> BaseOf(uint64_t generation) {
    auto base = std::make_shared<cow::Base>();
    base->generation.value = generation;
    return base;
}

/// Contexts with the ids 70, 71, ...
void Select(uint8_t choice, TransmissionOptions& options) {
    const auto add = [&options](ContextKind kind, uint8_t base) {
        const auto id = static_cast<uint32_t>(kFirstContext + options.contexts.size());
        options.contexts.push_back({id, kind, base});
    };
    if (choice & 2) add(ContextKind::kAllocation, 0);
    if (!(choice & 0x80)) return;
    options.bases = {BaseOf(0)};
    if (choice & 2) {
        options.bases.push_back(BaseOf(2));
        options.layers = GiveLayers;
        add(ContextKind::kDepth, 0);
        add(ContextKind::kBitmap, 1);
    } else {
        add(ContextKind::kDiffAllocation, 0);
    }
    add(ContextKind::kBitmap, 0);
}

/// Without TLS, whose versions that bit tells apart.
bool IsExtended(uint8_t choice) {
    return (choice & 0x30) == 0x20;
}

void Try(Server& server, uint8_t choice, const std::string& stream) {
    TransmissionOptions options;
    options.extended_headers = IsExtended(choice);
    options.structured_replies = choice & 1 || options.extended_headers;
    const bool structured = options.structured_replies, extended = options.extended_headers;
    Select(choice, options);
    const size_t contexts = options.contexts.size();
    const size_t early = choice & 4 ? stream.size() / 2 : 0;  // arrived during negotiation
    const auto* bytes = reinterpret_cast<const std::byte*>(stream.data());
    options.received.assign(bytes, bytes + early);

    int fds[2];
    VARVE_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    const int room = 1 << 20;
    setsockopt(fds[1], SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    // The server may hang up in the middle: then the rest is not taken, which is no finding.
    std::string late = stream.substr(early);
    const bool encrypted = choice & 0x10;
    const bool damaged = encrypted && choice & 0x40 && !late.empty();
    tls::Records client(OtherSide(AgreementFor(choice)));
    if (encrypted) {
        options.tls = std::make_unique<tls::Records>(AgreementFor(choice));
        late = Seal(client, late);
        if (damaged) late[stream.size() * 7 % late.size()] ^= 0x10;
        const size_t begun = choice & 4 ? late.size() % 5 : 0;
        options.tls_received = late.substr(0, begun);
        late.erase(0, begun);
    }
    if (!late.empty()) {
        VARVE_CHECK(send(fds[1], late.data(), late.size(), MSG_NOSIGNAL | MSG_DONTWAIT) ==
                    static_cast<ssize_t>(late.size()));
    }
    shutdown(fds[1], SHUT_WR);

    std::promise<void> ended;
    RunOn(*server.reactor, [&] {
        server.volume->read_only_export = choice & 8;
        server.host->Start(fds[0], std::move(options), *server.volume,
                           [&ended] { ended.set_value(); });
    });
    Reading reading = Read(stream, extended, contexts);
    reading.broken = reading.broken || damaged;
    std::string received = ReceiveAll(fds[1]);
    if (encrypted) received = Open(client, std::move(received));
    Answers answers(std::move(received), reading, structured, extended);
    const uint64_t count = answers.Verify();
    VARVE_CHECK(reading.broken ? count <= reading.requests : count == reading.requests);
    ended.get_future().wait();
    close(fds[1]);
    const uint64_t held = RunOn(*server.reactor, [&] { return server.host->bytes_in_flight(); });
    VARVE_CHECK(held == 0);
}

}  // namespace
}  // namespace varve::nbdserver

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    // First, so that the reactor's thread ends before the library of ciphers is cleaned up.
    static const varve::nbdserver::tls::Records library(varve::nbdserver::AgreementFor(0));
    static varve::nbdserver::Server server;
    varve::fuzz::Input input(data, size);
    const uint8_t choice = input.Byte();
    varve::nbdserver::Try(
        server, choice, varve::nbdserver::MakeStream(input, varve::nbdserver::IsExtended(choice)));
    return 0;
}
