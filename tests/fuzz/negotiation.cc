// Fuzz target: any bytes of a client against the Negotiator. What it says does not depend on how
// the bytes were cut; every answer is well-formed; only a granted lookup opens an export.
// With TLS the bytes behind STARTTLS stand for what was decrypted.
// Input: size of the pieces, whether the server is stopping and its TLS mode, the client's bytes.
#include "nbdserver/negotiation/negotiation.h"

#include <algorithm>
#include <map>

#include "cow/volume/changes.h"
#include "nbdserver/wire/wire.h"
#include "tests/fuzz/fuzz.h"

namespace varve::nbdserver {
namespace {

using Step = Negotiator::Step;

const std::map<std::string, ExportDescription> kExports = {
    {"", {.name = "disk0", .size = 1 << 20, .base = "a"}},
    {"disk0", {.name = "disk0", .size = 1 << 20, .base = "a"}},
    {"disk0@a", {.name = "disk0@a", .size = 1 << 19, .read_only = true}},
    {"disk0@b~a",
     {.name = "disk0@b~a", .size = 1 << 19, .read_only = true, .diff = true, .base = "a"}},
};

/// With those of the bases asked about that there are: "a", and of what is no diff, all that begin
/// with a "b".
ExportDescription Described(const Negotiator& negotiator, ExportDescription description) {
    for (const std::string& base : negotiator.lookup_bases()) {
        const bool there = base == "a" || (!description.diff && base.starts_with('b'));
        if (there) description.bases.push_back(base);
    }
    return description;
}

/// A whole negotiation, as far as the bytes go.
struct Played {
    Step step = Step::kInput;
    std::string output;
    std::string export_name;
    std::string behind;  // the client's bytes that are not negotiation's
    bool structured = false;
    bool extended = false;
    std::vector<ContextName> contexts;
};

Step AnswerLookup(Negotiator& negotiator, bool shutdown) {
    VARVE_CHECK(!shutdown);
    const auto found = kExports.find(negotiator.lookup_name());
    if (found != kExports.end()) {
        return negotiator.AnswerLookup(Described(negotiator, found->second));
    }
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
    played.extended = result.extended_headers;
    VARVE_CHECK(!played.extended || played.structured);
    played.contexts = result.contexts;
    size_t bitmaps = 0;
    for (const ContextName& context : played.contexts) {
        const bool diff = played.export_name.find('~') != std::string::npos;
        const bool bitmap = context.kind == ContextKind::kBitmap;
        bitmaps += bitmap;
        VARVE_CHECK(bitmap ? context.base == "a" || (!diff && context.base.starts_with('b'))
                           : context.base.empty());
        VARVE_CHECK(!diff || context.kind != ContextKind::kDepth);
        VARVE_CHECK(std::count(played.contexts.begin(), played.contexts.end(), context) == 1);
    }
    VARVE_CHECK(bitmaps <= cow::kBasesMax && played.contexts.size() <= 2 + bitmaps);
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
    VARVE_CHECK(whole.structured == cut.structured && whole.contexts == cut.contexts);
    VARVE_CHECK(whole.extended == cut.extended);
    VARVE_CHECK(whole.structured || whole.contexts.empty());
    return 0;
}
