// Negotiator: every option of the protocol, well-formed and hostile, against a table of exports.
#include "nbdserver/negotiation/negotiation.h"

#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "nbdserver/connection/connection.h"
#include "nbdserver/wire/wire.h"
#include "tests/raw_nbd.h"

namespace varve::nbdserver {
namespace {

using Step = Negotiator::Step;

const std::map<std::string, ExportDescription> kExports = {
    {"disk0", {.name = "disk0", .size = 1 << 20}},
    {"disk0@a", {.name = "disk0@a", .size = 1 << 19, .read_only = true}},
    {"", {.name = "disk0", .size = 1 << 20}},
    {"disk1", {.name = "disk1", .size = 1 << 20, .base = "new"}},
    {"disk1@new~old",
     {.name = "disk1@new~old", .size = 1 << 20, .read_only = true, .diff = true, .base = "old"}},
};

/// What kExports' disk1 can be compared with.
const std::set<std::string> kBases = {"old", "new", "b0", "b1", "b2", "b3",
                                      "b4",  "b5",  "b6", "b7", "b8"};

ExportDescription Describe(const Negotiator& negotiator) {
    ExportDescription description = kExports.at(negotiator.lookup_name());
    if (description.base.empty()) return description;
    for (const std::string& base : negotiator.lookup_bases()) {
        const bool there = description.diff ? base == description.base : kBases.contains(base);
        if (there) description.bases.push_back(base);
    }
    return description;
}

struct Reply {
    uint32_t option = 0;
    uint32_t type = 0;
    std::string data;
};

std::string Flags(uint32_t flags = wire::kClientFixedNewstyle | wire::kClientNoZeroes) {
    std::string out;
    AppendBig(out, flags);
    return out;
}

std::string Text(const std::string& text) {
    std::string out;
    AppendBig(out, static_cast<uint32_t>(text.size()));
    return out + text;
}

std::string InfoData(const std::string& name, const std::vector<uint16_t>& infos = {}) {
    std::string out = Text(name);
    AppendBig(out, static_cast<uint16_t>(infos.size()));
    for (const uint16_t info : infos) AppendBig(out, info);
    return out;
}

std::string ContextData(const std::string& name, const std::vector<std::string>& queries) {
    std::string out = Text(name);
    AppendBig(out, static_cast<uint32_t>(queries.size()));
    for (const std::string& query : queries) out += Text(query);
    return out;
}

std::string Go(const std::string& name) {
    return Option(wire::kOptGo, InfoData(name));
}
const std::string kStructured = Option(wire::kOptStructuredReply);

/// Plays a server that has kExports.
struct Client {
    Negotiator negotiator;
    std::string output;  // of the server, without the greeting
    int lookups = 0;

    explicit Client(NegotiationLimits limits = {}, TlsMode tls = TlsMode::kOff)
        : negotiator(limits, tls) {
        EXPECT_EQ(negotiator.TakeOutput().size(), sizeof(wire::Greeting));
    }

    Step Say(const std::string& bytes) {
        Step step = negotiator.Feed(bytes);
        while (step == Step::kList || step == Step::kLookup) {
            output += negotiator.TakeOutput();
            if (step == Step::kList) {
                step = AnswerList({"disk0", "disk0@a"});
                continue;
            }
            ++lookups;
            const bool found = kExports.contains(negotiator.lookup_name());
            step = found ? negotiator.AnswerLookup(Describe(negotiator))
                         : negotiator.AnswerLookup(LookupError::kUnknown);
        }
        output += negotiator.TakeOutput();
        return step;
    }

    /// The negotiator's output has been taken.
    Step AnswerList(const std::vector<std::string>& names, uint64_t bytes_max = 1 << 20) {
        ListEncoder encoder(bytes_max);
        for (const std::string& name : names) {
            if (!encoder.Add(name)) break;
        }
        const ListReply list = encoder.Finish();
        for (const std::string& piece : list.pieces) output += piece;
        return negotiator.AnswerList(list);
    }

    /// Says `bytes` one at a time, as long as the server listens.
    Step Dribble(const std::string& bytes) {
        Step step = negotiator.step();
        for (const char c : bytes) {
            if (step != Step::kInput) break;
            step = Say(std::string(1, c));
        }
        return step;
    }

    std::vector<Reply> TakeReplies() {
        std::vector<Reply> replies;
        std::string_view rest = output;
        while (!rest.empty()) {
            EXPECT_GE(rest.size(), sizeof(wire::OptionReply));
            EXPECT_EQ(LoadBig<uint64_t>(rest.data()), wire::kOptionReplyMagic);
            const auto length = LoadBig<uint32_t>(rest.data() + 16);
            EXPECT_LE(length, rest.size() - 20);
            replies.push_back({LoadBig<uint32_t>(rest.data() + 8),
                               LoadBig<uint32_t>(rest.data() + 12),
                               std::string(rest.substr(20, length))});
            rest.remove_prefix(20 + length);
        }
        output.clear();
        return replies;
    }
    /// The types of the replies to `bytes`; each must echo `option`.
    std::vector<uint32_t> Types(const std::string& bytes, uint32_t option) {
        EXPECT_EQ(Say(bytes), Step::kInput);
        std::vector<uint32_t> types;
        for (const Reply& reply : TakeReplies()) {
            EXPECT_EQ(reply.option, option);
            types.push_back(reply.type);
        }
        return types;
    }
};

using Types = std::vector<uint32_t>;

TEST(NegotiationTest, GreetingOffersFixedNewstyleWithoutZeroes) {
    Negotiator negotiator;
    EXPECT_EQ(negotiator.TakeOutput(), std::string("NBDMAGICIHAVEOPT\0\3", 18));
    EXPECT_EQ(negotiator.step(), Step::kInput);
}

TEST(NegotiationTest, UnknownClientFlagEndsIt) {
    for (const uint32_t flags : {4U, 0x80000000U, 7U}) {
        Client client;
        EXPECT_EQ(client.Say(Flags(flags)), Step::kHangUp);
        EXPECT_EQ(client.output, "");
    }
}

TEST(NegotiationTest, WrongOptionMagicEndsIt) {
    Client client;
    std::string option = Option(wire::kOptList);
    option[3] ^= 1;
    EXPECT_EQ(client.Say(Flags() + option), Step::kHangUp);
    EXPECT_EQ(client.output, "");
}

TEST(NegotiationTest, UnknownOptionsAreConsumedAndRefused) {
    for (const uint32_t option : {0U, 4U, 12U, 0xffffffffU}) {
        Client client;
        client.Say(Flags());
        EXPECT_EQ(client.Types(Option(option, "some data"), option),
                  Types{wire::kRepErrUnsupported});
        EXPECT_EQ(client.Types(Option(wire::kOptList), wire::kOptList).size(), 3U);
    }
}

TEST(NegotiationTest, GoWithoutRequestsGivesTheExportOnly) {
    Client client;
    EXPECT_EQ(client.Say(Flags() + Go("disk0")), Step::kDone);
    const std::vector<Reply> replies = client.TakeReplies();
    ASSERT_EQ(replies.size(), 2U);
    EXPECT_EQ(replies[0].type, wire::kRepInfo);
    ASSERT_EQ(replies[0].data.size(), sizeof(wire::InfoExport));
    EXPECT_EQ(LoadBig<uint16_t>(replies[0].data.data()), wire::kInfoExport);
    EXPECT_EQ(LoadBig<uint64_t>(replies[0].data.data() + 2), 1U << 20);
    EXPECT_EQ(LoadBig<uint16_t>(replies[0].data.data() + 10), TransmissionFlags(false, false));
    EXPECT_EQ(replies[1].type, wire::kRepAck);
    EXPECT_EQ(replies[1].data, "");
    const NegotiationResult result = client.negotiator.TakeResult();
    EXPECT_EQ(result.export_name, "disk0");
    EXPECT_FALSE(result.structured_replies);
    EXPECT_TRUE(result.contexts.empty());
    EXPECT_EQ(result.leftover, "");
}

TEST(NegotiationTest, FlagsFollowExportAndStructuredReplies) {
    const uint16_t plain = TransmissionFlags(false, false);
    EXPECT_EQ(plain & wire::kTransmissionSendDf, 0);
    const uint16_t always = wire::kTransmissionHasFlags | wire::kTransmissionSendFlush |
                            wire::kTransmissionSendFua | wire::kTransmissionSendTrim |
                            wire::kTransmissionSendWriteZeroes | wire::kTransmissionCanMultiConn |
                            wire::kTransmissionSendCache | wire::kTransmissionSendFastZero;
    EXPECT_EQ(plain, always);
    EXPECT_EQ(TransmissionFlags(false, true), always | wire::kTransmissionSendDf);
    const uint16_t snapshot = TransmissionFlags(true, true);
    EXPECT_NE(snapshot & wire::kTransmissionReadOnly, 0);
    EXPECT_NE(snapshot & wire::kTransmissionCanMultiConn, 0);
    EXPECT_NE(snapshot & wire::kTransmissionSendDf, 0);
}

TEST(NegotiationTest, InfoAnswersWhatWasAskedAndStays) {
    Client client;
    client.Say(Flags() + kStructured);
    client.TakeReplies();
    // 77 is unknown, 2 (description) has no answer: both are left out.
    const std::string ask = InfoData("disk0@a", {3, 77, 2, 1, 1});
    ASSERT_EQ(client.Say(Option(wire::kOptInfo, ask)), Step::kInput);
    const std::vector<Reply> info = client.TakeReplies();
    ASSERT_EQ(info.size(), 4U);
    EXPECT_EQ(LoadBig<uint16_t>(info[0].data.data() + 10), TransmissionFlags(true, true));
    EXPECT_EQ(info[1].data, std::string("\0\1disk0@a", 9));
    ASSERT_EQ(info[2].data.size(), sizeof(wire::InfoBlockSize));
    EXPECT_EQ(LoadBig<uint32_t>(info[2].data.data() + 2), 1U);
    EXPECT_EQ(LoadBig<uint32_t>(info[2].data.data() + 6), 4096U);
    EXPECT_EQ(LoadBig<uint32_t>(info[2].data.data() + 10), 32U << 20);
    // The same as GO gives the same.
    ASSERT_EQ(client.Say(Option(wire::kOptGo, ask)), Step::kDone);
    const std::vector<Reply> go = client.TakeReplies();
    ASSERT_EQ(go.size(), info.size());
    for (size_t i = 0; i < go.size(); ++i) {
        EXPECT_EQ(go[i].type, info[i].type);
        EXPECT_EQ(go[i].data, info[i].data);
    }
}

TEST(NegotiationTest, DefaultExportTellsItsName) {
    Client client;
    EXPECT_EQ(client.Say(Flags() + Option(wire::kOptGo, InfoData("", {1}))), Step::kDone);
    EXPECT_EQ(client.TakeReplies().at(1).data, std::string("\0\1disk0", 7));
    EXPECT_EQ(client.negotiator.TakeResult().export_name, "");
}

TEST(NegotiationTest, UnknownExportIsRefusedAndHagglingGoesOn) {
    Client client;
    client.Say(Flags());
    EXPECT_EQ(client.Types(Go("nope"), wire::kOptGo), Types{wire::kRepErrUnknown});
    EXPECT_EQ(client.Types(Option(wire::kOptInfo, InfoData("nope")), wire::kOptInfo),
              Types{wire::kRepErrUnknown});
    EXPECT_EQ(client.Say(Go("disk0")), Step::kDone);
}

TEST(NegotiationTest, EachLookupErrorHasItsReply) {
    const std::map<LookupError, uint32_t> expected = {
        {LookupError::kUnknown, wire::kRepErrUnknown},
        {LookupError::kBusy, wire::kRepErrPolicy},
        {LookupError::kFailed, wire::kRepErrPlatform},
        {LookupError::kShutdown, wire::kRepErrShutdown},
    };
    for (const auto& [error, type] : expected) {
        Client client;
        ASSERT_EQ(client.negotiator.Feed(Flags() + Go("disk0")), Step::kLookup);
        EXPECT_TRUE(client.negotiator.opens());
        EXPECT_EQ(client.negotiator.AnswerLookup(error), Step::kInput);
        client.output = client.negotiator.TakeOutput();
        EXPECT_EQ(client.TakeReplies().at(0).type, type);
    }
}

TEST(NegotiationTest, MessagesEndWithAByteThatMayBeLost) {
    Client client;
    client.Say(Flags() + Go("nope"));
    EXPECT_EQ(client.TakeReplies().at(0).data, "no such export.");
}

TEST(NegotiationTest, ExportNameAnswersWithAndWithoutZeroes) {
    for (const bool no_zeroes : {false, true}) {
        Client client;
        const uint32_t flags = 1U | (no_zeroes ? 2U : 0U);
        EXPECT_EQ(client.Say(Flags(flags) + Option(wire::kOptExportName, "disk0@a") + "next"),
                  Step::kDone);
        ASSERT_EQ(client.output.size(), no_zeroes ? 10U : 134U);
        EXPECT_EQ(LoadBig<uint64_t>(client.output.data()), 1U << 19);
        EXPECT_EQ(LoadBig<uint16_t>(client.output.data() + 8), TransmissionFlags(true, false));
        EXPECT_EQ(client.output.find_first_not_of('\0', 10), std::string::npos);
        EXPECT_EQ(client.negotiator.TakeResult().leftover, "next");
    }
}

TEST(NegotiationTest, ExportNameHasNoErrorButHangingUp) {
    for (const std::string& name :
         {std::string("nope"), std::string("disk0\0", 6), std::string(4097, 'x')}) {
        Client client;
        EXPECT_EQ(client.Say(Flags() + Option(wire::kOptExportName, name)), Step::kHangUp);
        EXPECT_EQ(client.output, "");
    }
}

TEST(NegotiationTest, OldNewstyleClientMayOnlyNameItsExport) {
    Client client;
    EXPECT_EQ(client.Say(Flags(0) + Option(wire::kOptExportName, "disk0")), Step::kDone);
    EXPECT_EQ(client.output.size(), 134U);
    Client other;
    EXPECT_EQ(other.Say(Flags(0) + Option(wire::kOptList)), Step::kHangUp);
}

TEST(NegotiationTest, AbortIsAcknowledged) {
    Client client;
    EXPECT_EQ(client.Say(Flags() + Option(wire::kOptAbort, "ignored")), Step::kHangUp);
    const std::vector<Reply> replies = client.TakeReplies();
    ASSERT_EQ(replies.size(), 1U);
    EXPECT_EQ(replies[0].option, wire::kOptAbort);
    EXPECT_EQ(replies[0].type, wire::kRepAck);
}

TEST(NegotiationTest, ListNamesEveryExport) {
    Client client;
    client.Say(Flags() + Option(wire::kOptList));
    const std::vector<Reply> replies = client.TakeReplies();
    ASSERT_EQ(replies.size(), 3U);
    EXPECT_EQ(replies[0].type, wire::kRepServer);
    EXPECT_EQ(replies[0].data, Text("disk0"));
    EXPECT_EQ(replies[1].data, Text("disk0@a"));
    EXPECT_EQ(replies[2].type, wire::kRepAck);
    EXPECT_EQ(client.Types(Option(wire::kOptList, "x"), wire::kOptList),
              Types{wire::kRepErrInvalid});
}

TEST(NegotiationTest, LongListIsMadeOfPieces) {
    Client client;
    ASSERT_EQ(client.negotiator.Feed(Flags() + Option(wire::kOptList)), Step::kList);
    std::vector<std::string> names;
    for (int i = 0; i < 20'000; ++i) names.push_back("disk0@" + std::to_string(i));
    ListEncoder encoder(4 << 20);
    for (const std::string& name : names) ASSERT_TRUE(encoder.Add(name));
    const ListReply list = encoder.Finish();
    EXPECT_EQ(list.exports, names.size());
    EXPECT_GT(list.pieces.size(), 5U);
    for (const std::string& piece : list.pieces) {
        EXPECT_LE(piece.size(), (64U << 10) + sizeof(wire::OptionReply));
        client.output += piece;
    }
    EXPECT_EQ(client.negotiator.AnswerList(list), Step::kInput);
    const std::vector<Reply> replies = client.TakeReplies();
    ASSERT_EQ(replies.size(), names.size() + 1);
    for (size_t i = 0; i < names.size(); ++i) ASSERT_EQ(replies[i].data, Text(names[i]));
}

TEST(NegotiationTest, ListThatWouldBeHugeIsAnError) {
    Client client;
    ASSERT_EQ(client.negotiator.Feed(Flags() + Option(wire::kOptList)), Step::kList);
    const std::vector<std::string> names(100, "disk");
    EXPECT_EQ(client.AnswerList(names, 1000), Step::kInput);
    const std::vector<Reply> replies = client.TakeReplies();
    ASSERT_EQ(replies.size(), 1U);
    EXPECT_EQ(replies[0].type, wire::kRepErrTooBig);
}

TEST(NegotiationTest, StartTlsIsNotOffered) {
    Client client;
    client.Say(Flags());
    EXPECT_EQ(client.Types(Option(wire::kOptStartTls), wire::kOptStartTls),
              Types{wire::kRepErrUnsupported});
    EXPECT_EQ(client.Types(Option(wire::kOptStartTls, "x"), wire::kOptStartTls),
              Types{wire::kRepErrInvalid});
}

Client TlsClient(TlsMode mode) {
    return Client(NegotiationLimits(), mode);
}

TEST(NegotiationTest, RequiredTlsIsRequiredForAllButStartTlsAndAbort) {
    Client client = TlsClient(TlsMode::kRequire);
    client.Say(Flags());
    const std::string info = InfoData("disk0"), context = ContextData("disk0", {"base:"});
    const std::pair<uint32_t, std::string> options[] = {{wire::kOptList, ""},
                                                        {wire::kOptList, "x"},
                                                        {wire::kOptInfo, info},
                                                        {wire::kOptGo, info},
                                                        {wire::kOptStructuredReply, ""},
                                                        {wire::kOptListMetaContext, context},
                                                        {wire::kOptSetMetaContext, context},
                                                        {99, "?"},
                                                        {wire::kOptGo, std::string(100'000, 'x')}};
    for (const auto& [option, data] : options) {
        EXPECT_EQ(client.Types(Option(option, data), option), Types{wire::kRepErrTlsRequired});
    }
    EXPECT_EQ(client.lookups, 0);
    EXPECT_EQ(client.Types(Option(wire::kOptStartTls, "x"), wire::kOptStartTls),
              Types{wire::kRepErrInvalid});
    EXPECT_EQ(client.Say(Option(wire::kOptAbort)), Step::kHangUp);
    EXPECT_EQ(client.TakeReplies().at(0).type, wire::kRepAck);

    Client other = TlsClient(TlsMode::kRequire);
    other.Say(Flags());
    EXPECT_EQ(other.Say(Option(wire::kOptExportName, "disk0")), Step::kHangUp);
    EXPECT_EQ(other.output, "");
}

TEST(NegotiationTest, StartTlsForgetsWhatWasAgreedOn) {
    for (const TlsMode mode : {TlsMode::kAllow, TlsMode::kRequire}) {
        Client client = TlsClient(mode);
        client.Say(Flags());
        const std::string select =
            Option(wire::kOptSetMetaContext, ContextData("disk0", {"base:allocation"}));
        if (mode == TlsMode::kAllow) {
            client.Say(kStructured + select);
            EXPECT_EQ(client.TakeReplies().size(), 3U);
        }
        EXPECT_EQ(client.Say(Option(wire::kOptStartTls)), Step::kStartTls);
        EXPECT_EQ(client.TakeReplies().at(0).type, wire::kRepAck);
        EXPECT_EQ(client.negotiator.TlsStarted(), Step::kInput);
        EXPECT_EQ(client.Types(Option(wire::kOptStartTls), wire::kOptStartTls),
                  Types{wire::kRepErrInvalid});
        // Structured replies were not negotiated: neither are contexts possible.
        EXPECT_EQ(client.Types(select, wire::kOptSetMetaContext), Types{wire::kRepErrInvalid});
        EXPECT_EQ(client.Say(Go("disk0")), Step::kDone);
        const NegotiationResult result = client.negotiator.TakeResult();
        EXPECT_FALSE(result.structured_replies);
        EXPECT_TRUE(result.contexts.empty());
    }
}

TEST(NegotiationTest, PlaintextBehindStartTlsEndsIt) {
    for (const std::string& behind : {std::string("x"), kStructured}) {
        Client client = TlsClient(TlsMode::kAllow);
        EXPECT_EQ(client.Say(Flags() + Option(wire::kOptStartTls) + behind), Step::kHangUp);
        EXPECT_EQ(client.output, "");
    }
}

TEST(NegotiationTest, OptionsBeforeTlsCountAgainstTheLimit) {
    NegotiationLimits limits;
    limits.options_max = 8;
    Client client(limits, TlsMode::kRequire);
    client.Say(Flags());
    for (int i = 0; i < 7; ++i) EXPECT_EQ(client.Say(kStructured), Step::kInput);
    EXPECT_EQ(client.Say(Option(wire::kOptStartTls)), Step::kStartTls);
    client.negotiator.TlsStarted();
    EXPECT_EQ(client.Say(kStructured), Step::kHangUp);
}

TEST(NegotiationTest, StructuredRepliesOnceAndWithoutData) {
    Client client;
    client.Say(Flags());
    const uint32_t option = wire::kOptStructuredReply;
    EXPECT_EQ(client.Types(Option(option, "x"), option), Types{wire::kRepErrInvalid});
    EXPECT_EQ(client.Types(Option(option), option), Types{wire::kRepAck});
    EXPECT_EQ(client.Types(Option(option), option), Types{wire::kRepErrInvalid});
    EXPECT_EQ(client.Say(Go("disk0")), Step::kDone);
    EXPECT_EQ(LoadBig<uint16_t>(client.TakeReplies().at(0).data.data() + 10),
              TransmissionFlags(false, true));
    EXPECT_TRUE(client.negotiator.TakeResult().structured_replies);
}

TEST(NegotiationTest, ExtendedHeadersBringStructuredReplies) {
    Client client;
    client.Say(Flags());
    const uint32_t option = wire::kOptExtendedHeaders;
    EXPECT_EQ(client.Types(Option(option, "x"), option), Types{wire::kRepErrInvalid});
    EXPECT_EQ(client.Types(Option(option), option), Types{wire::kRepAck});
    EXPECT_EQ(client.Types(Option(option), option), Types{wire::kRepErrInvalid});
    EXPECT_EQ(client.Types(kStructured, wire::kOptStructuredReply),
              Types{wire::kRepErrExtendedHeadersRequired});
    client.Say(Option(wire::kOptSetMetaContext, ContextData("disk0", {"base:allocation"})));
    client.TakeReplies();
    EXPECT_EQ(client.Say(Go("disk0")), Step::kDone);
    EXPECT_EQ(LoadBig<uint16_t>(client.TakeReplies().at(0).data.data() + 10),
              TransmissionFlags(false, true) | wire::kTransmissionBlockStatusPayload);
    const NegotiationResult result = client.negotiator.TakeResult();
    EXPECT_TRUE(result.extended_headers && result.structured_replies);
    EXPECT_EQ(result.contexts.size(), 1u);
}

TEST(NegotiationTest, ExportNameIsForbiddenWithExtendedHeaders) {
    Client client;
    client.Say(Flags() + kStructured);
    client.TakeReplies();
    EXPECT_EQ(client.Types(Option(wire::kOptExtendedHeaders), wire::kOptExtendedHeaders).back(),
              wire::kRepAck);
    EXPECT_EQ(client.Say(Option(wire::kOptExportName, "disk0")), Step::kHangUp);
}

TEST(NegotiationTest, MetaContextsNeedStructuredReplies) {
    for (const uint32_t option : {wire::kOptListMetaContext, wire::kOptSetMetaContext}) {
        Client client;
        client.Say(Flags());
        EXPECT_EQ(client.Types(Option(option, ContextData("disk0", {})), option),
                  Types{wire::kRepErrInvalid});
    }
}

TEST(NegotiationTest, ListMetaContextKnowsQueriesAndWildcard) {
    const uint32_t option = wire::kOptListMetaContext;
    const Types found = {wire::kRepMetaContext, wire::kRepAck};
    const Types nothing = {wire::kRepAck};
    const std::vector<std::pair<std::vector<std::string>, Types>> cases = {
        {{}, {wire::kRepMetaContext, wire::kRepMetaContext, wire::kRepAck}},
        {{"base:"}, found},
        {{"base:allocation"}, found},
        {{"x:y", "base:allocation", "base:"}, found},
        {{"base"}, nothing},
        {{"base:other"}, nothing},
        {{"qemu:"}, found},
        {{"qemu:dirty-bitmap:"}, nothing},
        {{"qemu:dirty-bitmap:a"}, nothing},
        {{""}, nothing},
    };
    for (const auto& [queries, types] : cases) {
        Client client;
        client.Say(Flags() + kStructured);
        client.TakeReplies();
        EXPECT_EQ(client.Types(Option(option, ContextData("disk0", queries)), option), types);
    }
    Client client;
    client.Say(Flags() + kStructured + Option(option, ContextData("disk0", {})));
    EXPECT_EQ(client.TakeReplies().at(1).data, std::string("\0\0\0\0base:allocation", 19));
    EXPECT_EQ(client.Say(Go("disk0")), Step::kDone);
    EXPECT_TRUE(client.negotiator.TakeResult().contexts.empty()) << "listing selects nothing";
}

std::string Set(const std::string& name, const std::vector<std::string>& queries) {
    return Option(wire::kOptSetMetaContext, ContextData(name, queries));
}

TEST(NegotiationTest, SetMetaContextSelectsForItsExport) {
    struct Case {
        std::string said;
        std::string went_to;
        bool selected;
    };
    const std::string all = "base:allocation";
    const std::vector<Case> cases = {
        {Set("disk0", {all}), "disk0", true},
        {Set("disk0", {"x:y", all, all}), "disk0", true},
        {Set("disk0", {all}), "disk0@a", false},
        {Set("disk0", {"base:"}), "disk0", false},
        {Set("disk0", {}), "disk0", false},
        {Set("disk0", {all}) + Set("disk0", {}), "disk0", false},
        {Set("disk0", {all}) + Set("nope", {all}), "disk0", false},
        {Set("disk0", {all}) + Option(wire::kOptSetMetaContext, "bad"), "disk0", false},
        {Set("disk0@a", {}) + Set("disk0", {all}), "disk0", true},
        {Set("disk0", {all}) + Go("nope"), "disk0", true},
        {Set("disk0", {all}) + Option(wire::kOptInfo, InfoData("disk0@a")), "disk0", true},
        {Set("disk0", {all}) + Option(wire::kOptListMetaContext, ContextData("disk0", {})), "disk0",
         true},
    };
    for (size_t i = 0; i < cases.size(); ++i) {
        SCOPED_TRACE(i);
        Client client;
        ASSERT_EQ(client.Say(Flags() + kStructured + cases[i].said), Step::kInput);
        ASSERT_EQ(client.Say(Go(cases[i].went_to)), Step::kDone);
        EXPECT_EQ(client.negotiator.TakeResult().contexts.size(), cases[i].selected ? 1u : 0u);
    }
}

TEST(NegotiationTest, SetMetaContextTellsTheId) {
    Client client;
    client.Say(Flags() + kStructured + Set("disk0", {"base:allocation"}));
    EXPECT_EQ(client.TakeReplies().at(1).data, std::string("\0\0\0\1base:allocation", 19));
}

/// The contexts that an option answers with, and their ids.
std::string ContextsOf(Client& client, const std::string& option) {
    client.Say(option);
    std::string text;
    for (const Reply& reply : client.TakeReplies()) {
        if (reply.type != wire::kRepMetaContext) continue;
        const auto id = LoadBig<uint32_t>(reply.data.data());
        text += (text.empty() ? "" : " ") + std::to_string(id) + "=" + reply.data.substr(4);
    }
    return text;
}

TEST(NegotiationTest, OneBitmapIsShownAndAllAreFoundByName) {
    Client client;
    client.Say(Flags() + kStructured);
    client.TakeReplies();
    const auto list = [&](const std::string& name, const std::vector<std::string>& queries) {
        return ContextsOf(client, Option(wire::kOptListMetaContext, ContextData(name, queries)));
    };
    EXPECT_EQ(list("disk1", {}),
              "0=base:allocation 0=qemu:allocation-depth 0=qemu:dirty-bitmap:new");
    EXPECT_EQ(list("disk1", {"qemu:"}), "0=qemu:allocation-depth 0=qemu:dirty-bitmap:new");
    EXPECT_EQ(list("disk1", {"qemu:dirty-bitmap:"}), "0=qemu:dirty-bitmap:new");
    EXPECT_EQ(list("disk1", {"qemu:dirty-bitmap:old", "qemu:dirty-bitmap:"}),
              "0=qemu:dirty-bitmap:new 0=qemu:dirty-bitmap:old");
    EXPECT_EQ(list("disk1", {"qemu:dirty-bitmap:other", "qemu:allocation"}), "");
    EXPECT_EQ(list("disk1@new~old", {}), "0=base:allocation 0=qemu:dirty-bitmap:old");
    EXPECT_EQ(list("disk1@new~old", {"qemu:dirty-bitmap:new", "qemu:"}), "0=qemu:dirty-bitmap:old");
}

TEST(NegotiationTest, OnlyWhatIsNamedIsSelected) {
    Client client;
    client.Say(Flags() + kStructured);
    client.TakeReplies();
    EXPECT_EQ(ContextsOf(client, Set("disk1", {"qemu:", "qemu:dirty-bitmap:", "base:"})), "");
    EXPECT_EQ(ContextsOf(client, Set("disk1", {"qemu:dirty-bitmap:old", "base:allocation",
                                               "qemu:dirty-bitmap:old", "qemu:dirty-bitmap:x"})),
              "1=base:allocation 2=qemu:dirty-bitmap:old");
    ASSERT_EQ(client.Say(Option(wire::kOptInfo, InfoData("disk1"))), Step::kInput);
    ASSERT_EQ(client.Say(Go("disk1")), Step::kDone);
    EXPECT_EQ(client.negotiator.lookup_bases(), std::vector<std::string>{"old"});
    const std::vector<ContextName> selected = client.negotiator.TakeResult().contexts;
    ASSERT_EQ(selected.size(), 2u);
    EXPECT_EQ(selected[1], (ContextName{ContextKind::kBitmap, "old"}));
}

TEST(NegotiationTest, BitmapsOfAConnectionAreBounded) {
    Client client;
    client.Say(Flags() + kStructured);
    client.TakeReplies();
    std::vector<std::string> queries;
    for (unsigned i = 0; i < 8; ++i) queries.push_back("qemu:dirty-bitmap:b" + std::to_string(i));
    EXPECT_EQ(client.Types(Set("disk1", queries), wire::kOptSetMetaContext).size(), 9u);
    queries.emplace_back("qemu:dirty-bitmap:b8");
    EXPECT_EQ(client.Types(Set("disk1", queries), wire::kOptSetMetaContext),
              Types{wire::kRepErrTooBig});
    ASSERT_EQ(client.Say(Go("disk1")), Step::kDone);
    EXPECT_TRUE(client.negotiator.lookup_bases().empty());
    EXPECT_TRUE(client.negotiator.TakeResult().contexts.empty());
}

TEST(NegotiationTest, SetMetaContextOfUnknownExportIsRefused) {
    Client client;
    client.Say(Flags() + kStructured);
    client.TakeReplies();
    EXPECT_EQ(client.Types(Set("nope", {"base:allocation"}), wire::kOptSetMetaContext),
              Types{wire::kRepErrUnknown});
}

TEST(NegotiationTest, TooManyQueriesAreTooBig) {
    Client client;
    client.Say(Flags() + kStructured);
    client.TakeReplies();
    EXPECT_EQ(
        client.Types(Set("disk0", std::vector<std::string>(65, "a:b")), wire::kOptSetMetaContext),
        Types{wire::kRepErrTooBig});
}

TEST(NegotiationTest, LengthsThatDoNotFitAreInvalid) {
    const std::string good_info = InfoData("disk0", {3});
    const std::string good_context = ContextData("disk0", {"base:allocation"});
    std::vector<std::string> infos = {"",
                                      "\xff",
                                      std::string("\xff\xff\xff\xff", 4) + "disk0",
                                      Text("disk0"),
                                      Text("disk0") + "\1",
                                      good_info + "x",
                                      std::string("\0\0\0\7", 4) + "disk0"};
    for (size_t i = 0; i < good_info.size(); ++i) infos.push_back(good_info.substr(0, i));
    for (const std::string& data : infos) {
        for (const uint32_t option : {wire::kOptInfo, wire::kOptGo}) {
            Client client;
            client.Say(Flags());
            EXPECT_EQ(client.Types(Option(option, data), option), Types{wire::kRepErrInvalid});
            EXPECT_EQ(client.lookups, 0);
        }
    }
    std::vector<std::string> contexts = {
        good_context + "x", Text("disk0") + std::string("\0\0\0\1\xff\xff\xff\xff", 8)};
    for (size_t i = 0; i < good_context.size(); ++i) contexts.push_back(good_context.substr(0, i));
    for (const std::string& data : contexts) {
        for (const uint32_t option : {wire::kOptListMetaContext, wire::kOptSetMetaContext}) {
            Client client;
            client.Say(Flags() + kStructured);
            client.TakeReplies();
            EXPECT_EQ(client.Types(Option(option, data), option), Types{wire::kRepErrInvalid});
        }
    }
}

TEST(NegotiationTest, NamesHaveABoundAndNoNul) {
    Client client;
    client.Say(Flags());
    const std::string longest(4096, 'x');
    EXPECT_EQ(client.Types(Go(longest), wire::kOptGo), Types{wire::kRepErrUnknown});
    EXPECT_EQ(client.Types(Go(longest + "x"), wire::kOptGo), Types{wire::kRepErrTooBig});
    EXPECT_EQ(client.Types(Go(std::string("disk0\0", 6)), wire::kOptGo),
              Types{wire::kRepErrInvalid});
    EXPECT_EQ(client.lookups, 1);
}

TEST(NegotiationTest, LongOptionIsSkippedAndRefused) {
    Client client;
    client.Say(Flags());
    EXPECT_EQ(client.Types(Option(wire::kOptGo, std::string(8193, 'x')), wire::kOptGo),
              Types{wire::kRepErrTooBig});
    EXPECT_EQ(client.Types(Option(99, std::string(1 << 20, 'x')), 99), Types{wire::kRepErrTooBig});
    EXPECT_EQ(client.Say(Go("disk0")), Step::kDone);
}

TEST(NegotiationTest, AbsurdlyLongOptionEndsIt) {
    for (const uint32_t option : {7U, 1U, 99U}) {
        Client client;
        std::string header = Option(option);
        StoreBig(header.data() + 12, uint32_t{0xffffffff});
        EXPECT_EQ(client.Say(Flags() + header), Step::kHangUp);
        EXPECT_EQ(client.output, "");
    }
}

TEST(NegotiationTest, FloodOfOptionsEndsIt) {
    Client client;
    client.Say(Flags());
    for (int i = 0; i < 32; ++i) ASSERT_EQ(client.Say(Option(99)), Step::kInput);
    EXPECT_EQ(client.Say(Option(99)), Step::kHangUp);
    EXPECT_EQ(client.TakeReplies().size(), 32U);
}

// Clients that show all exports ask several options about each.
TEST(NegotiationTest, WhoListsMayAskAboutEachExport) {
    Client client;
    client.Say(Flags() + kStructured);
    EXPECT_EQ(client.Say(Option(wire::kOptList)), Step::kInput);
    EXPECT_EQ(client.negotiator.options_for_list(), 0U);
    for (int i = 2; i < 32 + 2 * 8; ++i) {
        ASSERT_EQ(client.Say(Option(wire::kOptInfo, InfoData("disk0"))), Step::kInput) << i;
    }
    EXPECT_EQ(client.negotiator.options_for_list(), 2U * 8);
    EXPECT_EQ(client.Say(Option(wire::kOptInfo, InfoData("disk0"))), Step::kHangUp);
}

TEST(NegotiationTest, ListsThemselvesAreNotMore) {
    Client client;
    client.Say(Flags());
    for (int i = 0; i < 32; ++i) ASSERT_EQ(client.Say(Option(wire::kOptList)), Step::kInput);
    EXPECT_EQ(client.Say(Option(wire::kOptList)), Step::kHangUp);
}

TEST(NegotiationTest, ShutdownIsAnsweredToEverythingButAbort) {
    Client client;
    client.Say(Flags());
    client.negotiator.Shutdown();
    EXPECT_EQ(client.Types(Go("disk0"), wire::kOptGo), Types{wire::kRepErrShutdown});
    EXPECT_EQ(client.Types(Option(99), 99), Types{wire::kRepErrShutdown});
    EXPECT_EQ(client.Say(Option(wire::kOptAbort)), Step::kHangUp);
    EXPECT_EQ(client.TakeReplies().at(0).type, wire::kRepAck);
}

TEST(NegotiationTest, BytesBehindGoAreLeftOver) {
    Client client;
    const std::string request(28, 'r');
    EXPECT_EQ(client.Say(Flags() + Go("disk0") + request), Step::kDone);
    EXPECT_EQ(client.negotiator.TakeResult().leftover, request);
}

TEST(NegotiationTest, NothingBehindAPendingLookupIsLookedAt) {
    Client client;
    EXPECT_EQ(client.negotiator.Feed(Flags() + Option(wire::kOptInfo, InfoData("disk0")) +
                                     Option(wire::kOptAbort)),
              Step::kLookup);
    EXPECT_FALSE(client.negotiator.opens());
    EXPECT_EQ(client.negotiator.TakeOutput(), "");
    EXPECT_EQ(client.negotiator.AnswerLookup(kExports.at("disk0")), Step::kHangUp);
}

TEST(NegotiationTest, ByteByByteGivesTheSame) {
    const std::string all = Flags() + kStructured + Option(wire::kOptList) + Option(77, "data") +
                            Set("disk0", {"base:allocation"}) +
                            Option(wire::kOptInfo, InfoData("disk0", {1, 3})) +
                            Option(wire::kOptGo, std::string(9000, 'x')) + Go("nope") +
                            Option(wire::kOptGo, InfoData("disk0", {3}));
    Client whole, dribbled;
    EXPECT_EQ(whole.Say(all), Step::kDone);
    EXPECT_EQ(dribbled.Dribble(all), Step::kDone);
    EXPECT_EQ(whole.output, dribbled.output);
    EXPECT_EQ(1u, whole.negotiator.TakeResult().contexts.size());
    EXPECT_EQ(1u, dribbled.negotiator.TakeResult().contexts.size());
}

TEST(NegotiationTest, MutatedConversationsNeverBreakIt) {
    const std::string all = Flags() + kStructured + Option(wire::kOptList) +
                            Set("disk0", {"base:allocation", "base:"}) +
                            Option(wire::kOptInfo, InfoData("disk0", {1, 3})) + Go("nope") +
                            Option(wire::kOptListMetaContext, ContextData("", {})) +
                            Option(wire::kOptExportName, "nope");
    const uint64_t seed = std::random_device()();
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    for (int round = 0; round < 20'000; ++round) {
        std::string said = all;
        for (uint64_t n = 1 + random() % 4; n > 0; --n) {
            const size_t at = random() % said.size();
            switch (random() % 3) {
                case 0:
                    said[at] = static_cast<char>(random());
                    break;
                case 1:
                    said.erase(at, 1 + random() % 8);
                    break;
                default:
                    said.insert(at, random() % 16, static_cast<char>(random() % 3));
                    break;
            }
        }
        Client client;
        Step step = Step::kInput;
        for (size_t at = 0; at < said.size() && step == Step::kInput;) {
            const size_t piece = 1 + random() % 64;
            step = client.Say(said.substr(at, piece));
            at += piece;
        }
        ASSERT_TRUE(step == Step::kInput || step == Step::kHangUp || step == Step::kDone);
        if (step != Step::kDone) client.TakeReplies();
        ASSERT_LT(client.output.size(), 10'000U);
    }
}

}  // namespace
}  // namespace varve::nbdserver
