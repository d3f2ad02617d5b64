// Fuzz target: any bytes of a client against the Negotiator. What it says does not depend on how
// the bytes were cut; every answer is well-formed; only a granted lookup opens an export.
// With TLS the bytes behind STARTTLS stand for what was decrypted.
// Input: size of the pieces, whether the server is stopping and its TLS mode, the client's bytes.
#include "nbdserver/negotiation/negotiation.h"

#include <map>

#include "nbdserver/wire/wire.h"
#include "tests/fuzz/fuzz.h"

namespace varve::nbdserver {
namespace {

using Step = Negotiator::Step;

const std::map<std::string, ExportDescription> kExports = {
    {"", {"disk0", 1 << 20, false}},
    {"disk0", {"disk0", 1 << 20, false}},
    {"disk0@a", {"disk0@a", 1 << 19, true}},
};

/// A whole negotiation, as far as the bytes go.
struct Played {
    Step step = Step::kInput;
    std::string output;
    std::string export_name;
    std::string behind;  // the client's bytes that are not negotiation's
    bool structured = false;
    bool allocation = false;
};

Step AnswerLookup(Negotiator& negotiator, bool shutdown) {
    VARVE_CHECK(!shutdown);
    const auto found = kExports.find(negotiator.lookup_name());
    if (found != kExports.end()) return negotiator.AnswerLookup(found->second);
    const size_t kind = negotiator.lookup_name().size() % 3;
    constexpr LookupError kErrors[] = {LookupError::kUnknown, LookupError::kBusy,
                                       LookupError::kFailed};
    return negotiator.AnswerLookup(kErrors[kind]);
}

Played Play(std::string_view bytes, size_t piece, bool shutdown, TlsMode tls) {
    Negotiator negotiator(NegotiationLimits(), tls);
    bool encrypted = false;
    Played played;
    if (shutdown) negotiator.Shutdown();
    played.output = negotiator.TakeOutput();
    bool opened = false;
    while (!bytes.empty() && negotiator.step() == Step::kInput) {
        Step step = negotiator.Feed(bytes.substr(0, piece));
        bytes.remove_prefix(std::min(bytes.size(), piece));
        while (step == Step::kList || step == Step::kLookup) {
            opened = false;
            if (step == Step::kList) {
                VARVE_CHECK(!shutdown);
                ListEncoder encoder(1 << 20);
                encoder.Add("disk0");
                encoder.Add("disk0@a");
                const ListReply list = encoder.Finish();
                played.output += negotiator.TakeOutput() + list.pieces.at(0);
                step = negotiator.AnswerList(list);
                continue;
            }
            opened = negotiator.opens() && kExports.count(negotiator.lookup_name());
            step = AnswerLookup(negotiator, shutdown);
        }
        played.output += negotiator.TakeOutput();
        if (step == Step::kStartTls) {
            VARVE_CHECK(tls != TlsMode::kOff && !encrypted && !shutdown);
            encrypted = true;
            negotiator.TlsStarted();
        }
    }
    played.step = negotiator.step();
    if (played.step != Step::kDone) return played;
    VARVE_CHECK(opened && (encrypted || tls != TlsMode::kRequire));
    NegotiationResult result = negotiator.TakeResult();
    played.export_name = result.export_name;
    played.structured = result.structured_replies;
    played.allocation = result.base_allocation;
    played.behind = result.leftover + std::string(bytes);
    return played;
}

/// The greeting, replies to options, and perhaps what answers EXPORT_NAME.
void VerifyOutput(const Played& played) {
    std::string_view rest = played.output;
    VARVE_CHECK(rest.size() >= sizeof(wire::Greeting));
    rest.remove_prefix(sizeof(wire::Greeting));
    while (rest.size() >= sizeof(wire::OptionReply) &&
           LoadBig<uint64_t>(rest.data()) == wire::kOptionReplyMagic) {
        const auto length = LoadBig<uint32_t>(rest.data() + 16);
        rest.remove_prefix(sizeof(wire::OptionReply));
        VARVE_CHECK(length <= rest.size());
        rest.remove_prefix(length);
    }
    if (rest.empty()) return;
    VARVE_CHECK(played.step == Step::kDone);
    VARVE_CHECK(rest.size() == 10 || rest.size() == 134);
}

}  // namespace
}  // namespace varve::nbdserver

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace varve::nbdserver;  // NOLINT: a function of C's
    varve::fuzz::Input input(data, size);
    const size_t piece = 1 + input.Byte();
    const uint8_t choice = input.Byte();
    const bool shutdown = choice % 8 == 7;
    const auto tls = static_cast<TlsMode>(choice / 8 % 3);
    const std::string_view bytes = input.rest();
    const Played whole = Play(bytes, std::string_view::npos, shutdown, tls);
    const Played cut = Play(bytes, piece, shutdown, tls);
    VerifyOutput(whole);
    VerifyOutput(cut);
    // What came behind STARTTLS in one piece ends the connection; in the next it may be TLS.
    if (tls != TlsMode::kOff) return 0;
    VARVE_CHECK(whole.step == cut.step);
    VARVE_CHECK(whole.output == cut.output);
    VARVE_CHECK(whole.export_name == cut.export_name);
    VARVE_CHECK(whole.behind == cut.behind);
    VARVE_CHECK(whole.structured == cut.structured && whole.allocation == cut.allocation);
    VARVE_CHECK(whole.structured || !whole.allocation);
    return 0;
}
