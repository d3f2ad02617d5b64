// The admin socket and what it is made of: lines, JSON-RPC, commands, hostile clients.
// Not the command line: that is cli_test.cc.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/stat.h>

#include <algorithm>
#include <boost/json/array.hpp>
#include <boost/json/object.hpp>
#include <boost/json/serialize.hpp>
#include <deque>
#include <fstream>
#include <random>

#include "admin/command.h"
#include "admin/jsonrpc.h"
#include "admin/slots.h"
#include "tests/admin_server.h"

namespace varve::admin {
namespace {

namespace json = boost::json;
using testing::AdminServer;
using testing::FakeClients;
using testing::FakePool;
using testing::RawClient;

std::string Call(const std::string& method, const std::string& params = "{}",
                 const std::string& id = "1") {
    return R"({"jsonrpc":"2.0","id":)" + id + R"(,"method":")" + method + R"(","params":)" +
           params + "}";
}

int64_t CodeOf(const json::value& answer) {
    return answer.at("error").at("code").as_int64();
}

std::string KindOf(const json::value& answer) {
    return std::string(answer.at("error").at("data").at("kind").as_string());
}

bool IsResult(const json::value& answer) {
    return answer.is_object() && answer.as_object().contains("result");
}

// ---- lines

std::vector<std::string> Lines(LineSplitter& splitter) {
    std::vector<std::string> lines;
    while (const auto line = splitter.Next()) {
        lines.push_back(line->too_long ? "<too long>" : std::string(line->text));
    }
    return lines;
}

using Strings = std::vector<std::string>;

TEST(LineSplitter, CutsAtNewlines) {
    LineSplitter splitter(100);
    splitter.Append("one\ntwo\n\nthr");
    EXPECT_EQ(Lines(splitter), (Strings{"one", "two", ""}));
    splitter.Append("ee\n");
    EXPECT_EQ(Lines(splitter), (Strings{"three"}));
    EXPECT_EQ(splitter.buffered(), 0u);
}

TEST(LineSplitter, TheEndOfTheStreamEndsALine) {
    LineSplitter splitter(100);
    splitter.Append("half");
    EXPECT_EQ(Lines(splitter), Strings{});
    splitter.End();
    EXPECT_EQ(Lines(splitter), (Strings{"half"}));
    EXPECT_EQ(Lines(splitter), Strings{});
}

TEST(LineSplitter, ALineOverTheLimitIsReportedOnceAndDropped) {
    LineSplitter splitter(4);
    splitter.Append("1234\n12345\nab\n");
    EXPECT_EQ(Lines(splitter), (Strings{"1234", "<too long>", "ab"}));
    splitter.Append("123456");  // no newline yet, and no need to wait for it
    EXPECT_EQ(Lines(splitter), (Strings{"<too long>"}));
    EXPECT_EQ(splitter.buffered(), 0u);
    splitter.Append("78901234567890");
    EXPECT_EQ(Lines(splitter), Strings{});
    EXPECT_EQ(splitter.buffered(), 0u);
    splitter.Append("1\nnext\n");
    EXPECT_EQ(Lines(splitter), (Strings{"next"}));
}

TEST(LineSplitter, CutsTheSameLinesHoweverTheBytesArrive) {
    const uint32_t seed = std::random_device()();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    for (int round = 0; round < 200; ++round) {
        std::string bytes;
        for (int i = 0; i < 200; ++i) bytes += random() % 8 == 0 ? '\n' : 'x';
        const size_t limit = 1 + random() % 12;
        LineSplitter whole(limit), pieces(limit);
        whole.Append(bytes);
        whole.End();
        Strings got;
        for (size_t at = 0; at < bytes.size();) {
            const size_t count = 1 + random() % 20;
            pieces.Append(std::string_view(bytes).substr(at, count));
            at += count;
            for (std::string& line : Lines(pieces)) got.push_back(std::move(line));
        }
        pieces.End();
        for (std::string& line : Lines(pieces)) got.push_back(std::move(line));
        ASSERT_EQ(Lines(whole), got);
    }
}

// ---- messages

Request One(const std::string& line) {
    Message message = ParseMessage(line, 10);
    EXPECT_FALSE(message.batch);
    EXPECT_EQ(message.requests.size(), 1u);
    return message.requests[0];
}

RpcCode ErrorOf(const std::string& line) {
    const Request request = One(line);
    EXPECT_TRUE(request.error.has_value()) << line;
    return request.error ? request.error->code : RpcCode::kServerError;
}

TEST(ParseMessage, ReadsARequest) {
    const Request request = One(Call("disk.show", R"({"name":"d"})", "\"x\""));
    EXPECT_FALSE(request.error);
    EXPECT_EQ(request.method, "disk.show");
    EXPECT_EQ(*request.id, "x");
    EXPECT_EQ(request.params.at("name"), "d");
}

TEST(ParseMessage, ParamsMayBeLeftOutOrAnEmptyList) {
    EXPECT_FALSE(One(R"({"jsonrpc":"2.0","id":1,"method":"disk.list"})").error);
    EXPECT_FALSE(One(R"({"jsonrpc":"2.0","id":1,"method":"disk.list","params":[]})").error);
}

TEST(ParseMessage, WithoutIdItIsANotification) {
    EXPECT_FALSE(One(R"({"jsonrpc":"2.0","method":"disk.list"})").id);
    EXPECT_TRUE(One(R"({"jsonrpc":"2.0","method":"disk.list","id":null})").id->is_null());
}

TEST(ParseMessage, WhatIsNoJsonIsAParseError) {
    for (const char* line : {"x", "{", "{}}", "{\"a\":}", "\"\x01\"", "\xff\xfe", "[1,2", "nul",
                             "{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"disk.list\"", "1 2"}) {
        EXPECT_EQ(ErrorOf(line), RpcCode::kParseError) << line;
    }
}

TEST(ParseMessage, DeepNestingIsAParseError) {
    EXPECT_EQ(ErrorOf(std::string(100'000, '[')), RpcCode::kParseError);
    std::string nested;
    for (int i = 0; i < 50'000; ++i) nested += "{\"a\":";
    EXPECT_EQ(ErrorOf(nested), RpcCode::kParseError);
}

TEST(ParseMessage, WhatIsNoRequestIsAnInvalidRequest) {
    for (const char* line :
         {"1", "\"text\"", "null", "true", "{}", "[]", R"({"jsonrpc":"1.0","id":1,"method":"m"})",
          R"({"id":1,"method":"m"})", R"({"jsonrpc":2.0,"id":1,"method":"m"})",
          R"({"jsonrpc":"2.0","id":1})", R"({"jsonrpc":"2.0","id":1,"method":7})",
          R"({"jsonrpc":"2.0","id":{},"method":"m"})", R"({"jsonrpc":"2.0","id":[],"method":"m"})",
          R"({"jsonrpc":"2.0","id":true,"method":"m"})",
          R"({"jsonrpc":"2.0","id":-1.5e315,"method":"m"})"}) {
        EXPECT_EQ(ErrorOf(line), RpcCode::kInvalidRequest) << line;
    }
}

TEST(ParseMessage, PositionalParametersAreInvalid) {
    EXPECT_EQ(ErrorOf(Call("disk.show", R"(["d"])")), RpcCode::kInvalidParams);
    EXPECT_EQ(ErrorOf(Call("disk.show", R"("d")")), RpcCode::kInvalidParams);
    EXPECT_EQ(ErrorOf(Call("disk.show", "null")), RpcCode::kInvalidParams);
}

TEST(ParseMessage, InABatchEachElementIsForItself) {
    const Message message = ParseMessage("[" + Call("disk.list") + ",1,[]]", 10);
    EXPECT_TRUE(message.batch);
    ASSERT_EQ(message.requests.size(), 3u);
    EXPECT_FALSE(message.requests[0].error);
    EXPECT_TRUE(message.requests[1].error);
    EXPECT_TRUE(message.requests[2].error);
}

TEST(ParseMessage, ABatchOverTheLimitIsRefusedAsAWhole) {
    const Request request = One("[1,2,3,4,5,6,7,8,9,10,11]");
    ASSERT_TRUE(request.error);
    EXPECT_EQ(request.error->error.kind, ErrorKind::kLimit);
}

TEST(ParseMessage, NoBytesAtAllMakeItFail) {
    const uint32_t seed = std::random_device()();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    const std::string good = "[" + Call("disk.create", R"({"name":"d","size":"10G"})") + "]";
    for (int round = 0; round < 20'000; ++round) {
        std::string bytes = good;
        for (uint32_t changes = 1 + random() % 4; changes > 0; --changes) {
            const size_t at = random() % bytes.size();
            switch (random() % 3) {
                case 0:
                    bytes[at] = static_cast<char>(random());
                    break;
                case 1:
                    bytes.erase(at, 1 + random() % 8);
                    break;
                default:
                    bytes.insert(at, good.substr(random() % good.size(), random() % 16));
            }
            if (bytes.empty()) bytes = "x";
        }
        for (const Request& request : ParseMessage(bytes, 10).requests) {
            if (!request.error) (void)DecodeCommand(request);
        }
    }
}

// ---- commands

std::variant<Command, RpcError> Decode(const std::string& method, const std::string& params) {
    return DecodeCommand(One(Call(method, params)));
}

std::string RefusalOf(const std::string& method, const std::string& params) {
    const auto decoded = Decode(method, params);
    const RpcError* error = std::get_if<RpcError>(&decoded);
    if (!error) return "accepted";
    EXPECT_EQ(error->code, RpcCode::kInvalidParams);
    EXPECT_EQ(error->error.kind, ErrorKind::kInvalid);
    return error->error.message;
}

TEST(DecodeCommand, KnowsTheMethodsOfTheContract) {
    EXPECT_EQ(MethodNames(), (Strings{"disk.create",          "disk.list",        "disk.show",
                                      "disk.resize",          "disk.rename",      "disk.clone",
                                      "disk.flatten",         "disk.delete",      "disk.offline",
                                      "disk.online",          "snapshot.create",  "snapshot.list",
                                      "snapshot.show",        "snapshot.restore", "snapshot.rename",
                                      "snapshot.delete",      "snapshot.diff",    "client.list",
                                      "client.disconnect",    "pool.status",      "pool.check",
                                      "pool.estimate_delete", "pool.scrub"}));
    const auto decoded = Decode("disk.destroy", "{}");
    EXPECT_EQ(std::get<RpcError>(decoded).code, RpcCode::kMethodNotFound);
}

TEST(DecodeCommand, SizesAreBytesOrText) {
    const auto size = [](const std::string& text) {
        const auto decoded = Decode("disk.create", R"({"name":"d","size":)" + text + "}");
        const Command* command = std::get_if<Command>(&decoded);
        return command ? command->size : 0;
    };
    EXPECT_EQ(size("4096"), 4096u);
    EXPECT_EQ(size("\"4096\""), 4096u);
    EXPECT_EQ(size("\"10G\""), uint64_t{10} << 30);
    EXPECT_EQ(size("\"2t\""), uint64_t{2} << 40);
    EXPECT_EQ(size("9223372036854771712"), 9223372036854771712u);
    for (const char* wrong :
         {"0", "-4096", "4097", "4096.0", "1e6", "\"\"", "\"-1\"", "\"10X\"", "\"1.5G\"",
          "\" 4096\"", "\"99999999999T\"", "null", "true", "[4096]", "18446744073709551616"}) {
        EXPECT_NE(RefusalOf("disk.create", std::string(R"({"name":"d","size":)") + wrong + "}")
                      .find("'size'"),
                  std::string::npos)
            << wrong;
    }
}

TEST(DecodeCommand, NamesTheParameterThatIsWrong) {
    EXPECT_EQ(RefusalOf("disk.create", R"({"size":4096})"),
              "disk.create: parameter 'name' is missing");
    EXPECT_EQ(RefusalOf("disk.create", R"({"name":"d"})"),
              "disk.create: parameter 'size' is missing");
    EXPECT_EQ(RefusalOf("disk.create", R"({"name":1,"size":4096})"),
              "disk.create: parameter 'name' must be a string");
    EXPECT_EQ(RefusalOf("disk.create", R"({"name":"d","size":4096,"colour":"red"})"),
              "disk.create has no parameter 'colour'");
    EXPECT_EQ(RefusalOf("disk.list", R"({"disk":"d"})"), "disk.list has no parameter 'disk'");
    EXPECT_EQ(RefusalOf("disk.resize", R"({"name":"d","size":4096,"shrink":1})"),
              "disk.resize: parameter 'shrink' must be true or false");
    EXPECT_EQ(RefusalOf("snapshot.create", R"({"snapshots":"d@s"})"),
              "snapshot.create: parameter 'snapshots' must be a list of at least one name");
    EXPECT_EQ(RefusalOf("snapshot.create", R"({"snapshots":[]})"),
              "snapshot.create: parameter 'snapshots' must be a list of at least one name");
    EXPECT_EQ(RefusalOf("snapshot.create", R"({"snapshots":["d@s",null]})"),
              "snapshot.create: parameter 'snapshots' must be a list of names: strings");
    EXPECT_EQ(RefusalOf("snapshot.restore", R"({"snapshot":"d@s","keep_as":false})"),
              "snapshot.restore: parameter 'keep_as' must be a string");
}

TEST(DecodeCommand, OptionalParametersMayBeLeftOutOrNull) {
    for (const char* params : {R"({"snapshot":"d@s"})", R"({"snapshot":"d@s","keep_as":null})"}) {
        const auto decoded = Decode("snapshot.restore", params);
        EXPECT_FALSE(std::get<Command>(decoded).keep_as);
        EXPECT_FALSE(std::get<Command>(decoded).disconnect);
    }
}

TEST(DecodeCommand, DoesNotRepeatEndlessNames) {
    const std::string huge(100'000, 'x');
    EXPECT_LT(RefusalOf("disk.show", R"({"name":")" + huge + "\"}").size(), 200u);
    EXPECT_LT(RefusalOf("disk.show", "{\"" + huge + "\":1}").size(), 200u);
    const auto decoded = DecodeCommand(One(Call(huge)));
    EXPECT_LT(std::get<RpcError>(decoded).error.message.size(), 200u);
}

// ---- slots

/// How many enter, of one kind, until one is refused. Those that wait: no `turn` may come.
size_t Fill(Slots& slots, Pace pace) {
    Slots::Ticket ticket;
    for (size_t entered = 0;; ++entered) {
        const auto turn = [] { ADD_FAILURE() << "nobody has left"; };
        if (slots.Enter(pace, turn, &ticket) == Slots::Entry::kRefused) return entered;
    }
}

/// How many of `kind` begin where as many of `other` as may have entered; and where nobody has.
std::pair<size_t, size_t> BegunBeside(size_t places, Pace other, Pace kind) {
    Slots alone(places), slots(places);
    Fill(alone, kind);
    Fill(slots, other);
    Fill(slots, kind);
    EXPECT_EQ(Slots::Entry::kBegins, slots.Enter(Pace::kGlance, {}, nullptr));
    return {slots.begun(kind), alone.begun(kind)};
}

TEST(Slots, WorkTakesNoPlaceInWhichAChangeCouldBegin) {
    for (const size_t places : {3, 4, 8, 16, 128, 1000}) {
        const auto [beside, alone] = BegunBeside(places, Pace::kWork, Pace::kChange);
        EXPECT_EQ(alone, beside) << places << " places";
    }
}

TEST(Slots, ChangesLeaveRoomForSomeWork) {
    for (const size_t places : {3, 4, 8, 16, 128, 1000}) {
        const auto [beside, alone] = BegunBeside(places, Pace::kChange, Pace::kWork);
        EXPECT_GE(beside, std::max<size_t>(alone / 4, 1)) << places << " places";
    }
}

TEST(Slots, TheNumbersOfTheManual) {
    Slots changes(128), works(128);
    EXPECT_EQ(Fill(changes, Pace::kChange), 104U);
    EXPECT_EQ(changes.begun(Pace::kChange), 64U);
    EXPECT_EQ(Fill(changes, Pace::kWork), 8U);
    EXPECT_EQ(Fill(works, Pace::kWork), 48U);
    EXPECT_EQ(works.begun(Pace::kWork), 32U);
    EXPECT_EQ(Fill(works, Pace::kChange), 64U);
}

TEST(Slots, WhoLeavesMakesRoomForTheNextInLine) {
    Slots slots(8);  // 2 for work that has begun, 1 for work that waits
    Slots::Ticket ticket;
    int turns = 0;
    const auto enter = [&] {
        return slots.Enter(
            Pace::kWork, [&turns] { ++turns; }, &ticket);
    };
    EXPECT_EQ(enter(), Slots::Entry::kBegins);
    EXPECT_EQ(enter(), Slots::Entry::kBegins);
    EXPECT_EQ(enter(), Slots::Entry::kWaits);
    EXPECT_EQ(enter(), Slots::Entry::kRefused);
    slots.Leave(Pace::kWork);
    EXPECT_EQ(turns, 1);
    EXPECT_EQ(enter(), Slots::Entry::kWaits);
    slots.LeaveLine(ticket);
    EXPECT_EQ(enter(), Slots::Entry::kWaits);
    EXPECT_EQ(turns, 1);
}

// ---- the socket

TEST(Service, ServesTheVerbsOfADiskAndItsSnapshots) {
    AdminServer server;
    ASSERT_TRUE(server.status().ok());
    RawClient client(server.path());
    const json::value created = client.Ask(Call("disk.create", R"({"name":"d","size":"1G"})", "7"));
    EXPECT_EQ(created.at("jsonrpc"), "2.0");
    EXPECT_EQ(created.at("id"), 7);
    EXPECT_EQ(created.at("result"), (json::value{{"name", "d"}, {"size", 1 << 30}}));

    EXPECT_TRUE(IsResult(client.Ask(Call("snapshot.create", R"({"snapshots":["d@a","d@b"]})"))));
    const json::value list = client.Ask(Call("snapshot.list", R"({"disk":"d"})")).at("result");
    EXPECT_EQ(list.at("disk"), "d");
    ASSERT_EQ(list.at("snapshots").as_array().size(), 2u);
    for (const char* key : {"name", "created", "size", "generation", "unique", "referenced"}) {
        EXPECT_TRUE(list.at("snapshots").at(0).as_object().contains(key)) << key;
    }
    const json::value show = client.Ask(Call("snapshot.show", R"({"snapshot":"d@b"})"));
    EXPECT_EQ(show.at("result").at("disk"), "d");
    EXPECT_EQ(show.at("result").at("name"), "b");
    EXPECT_EQ(show.at("result").at("created"), "2023-11-14T22:13:22.000Z");

    EXPECT_TRUE(IsResult(client.Ask(Call("disk.clone", R"({"snapshot":"d@a","name":"c"})"))));
    const json::value disks = client.Ask(Call("disk.list")).at("result").at("disks");
    ASSERT_EQ(disks.as_array().size(), 2u);
    for (const char* key : {"name", "size", "used", "snapshots", "clients", "created"}) {
        EXPECT_TRUE(disks.at(1).as_object().contains(key)) << key;
    }
    EXPECT_EQ(disks.at(1).at("snapshots"), 2);

    const json::value status = client.Ask(Call("pool.status")).at("result");
    for (const char* key : {"version", "pool", "capacity", "used", "free", "disks", "snapshots",
                            "reclaim_pending", "uptime_s"}) {
        EXPECT_TRUE(status.as_object().contains(key)) << key;
    }
    const json::value check = client.Ask(Call("pool.check")).at("result");
    EXPECT_EQ(check.at("ok"), true);
    EXPECT_TRUE(check.at("errors").as_array().empty());
    EXPECT_EQ(check.at("leaked_blocks"), 0);
    const json::value scrub = client.Ask(Call("pool.scrub", R"({"disk":"d"})")).at("result");
    EXPECT_EQ(scrub.at("ok"), true);
    EXPECT_EQ(scrub.at("verified_blocks"), 10);
    EXPECT_TRUE(scrub.at("damage").as_array().empty());
}

TEST(Service, ErrorsOfThePoolCarryTheirKind) {
    AdminServer server;
    RawClient client(server.path());
    const json::value missing = client.Ask(Call("disk.show", R"({"name":"none"})"));
    EXPECT_EQ(CodeOf(missing), -32000);
    EXPECT_EQ(KindOf(missing), "not_found");
    client.Ask(Call("disk.create", R"({"name":"d","size":4096})"));
    EXPECT_EQ(KindOf(client.Ask(Call("disk.create", R"({"name":"d","size":4096})"))), "exists");
    EXPECT_EQ(KindOf(client.Ask(Call("disk.create", R"({"name":"a/b","size":4096})"))), "invalid");
    server.OnPool([](FakePool& pool) { pool.SetClients("d", 1); });
    EXPECT_EQ(KindOf(client.Ask(Call("disk.delete", R"({"name":"d"})"))), "busy");
    EXPECT_TRUE(IsResult(client.Ask(Call("disk.delete", R"({"name":"d","disconnect":true})"))));
}

TEST(Service, ListsAndDisconnectsClientsOfADiskAndItsSnapshots) {
    AdminServer server;
    RawClient client(server.path());
    client.Ask(Call("disk.create", R"({"name":"d","size":4096})"));
    client.Ask(Call("disk.create", R"({"name":"dd","size":4096})"));
    client.Ask(Call("snapshot.create", R"({"snapshots":["d@s"]})"));
    server.OnClients([](FakeClients& clients) {
        clients.clients = {{3, "127.0.0.1:5", "dd", 0, 9, false, 1, 2, 3},
                           {2, "unix:", "d@s", 0, 9, true, 1, 2, 3},
                           {1, "127.0.0.1:4", "d", 0, 9, false, 1, 2, 3, true, "psk:alice"}};
    });
    EXPECT_EQ(client.Ask(Call("client.list")).at("result").at("clients").as_array().size(), 3u);
    const json::value of_disk = client.Ask(Call("client.list", R"({"disk":"d"})"));
    ASSERT_EQ(of_disk.at("result").at("clients").as_array().size(), 2u);
    EXPECT_EQ(of_disk.at("result").at("clients").at(0),
              (json::value{{"id", 1},
                           {"address", "127.0.0.1:4"},
                           {"export", "d"},
                           {"read_only", false},
                           {"since", "1970-01-01T00:00:00.000Z"},
                           {"idle_s", 9},
                           {"requests", 1},
                           {"bytes_read", 2},
                           {"bytes_written", 3},
                           {"tls", true},
                           {"identity", "psk:alice"}}));
    const json::value of_snapshot = client.Ask(Call("client.list", R"({"disk":"d@s"})"));
    EXPECT_EQ(of_snapshot.at("result").at("clients").as_array().size(), 1u);
    EXPECT_EQ(KindOf(client.Ask(Call("client.list", R"({"disk":"none"})"))), "not_found");
    EXPECT_EQ(KindOf(client.Ask(Call("client.disconnect", R"({"disk":"none"})"))), "not_found");

    const json::value gone = client.Ask(Call("client.disconnect", R"({"disk":"d"})"));
    EXPECT_EQ(gone.at("result").at("disconnected"), 2);
    EXPECT_EQ(client.Ask(Call("client.list")).at("result").at("clients").as_array().size(), 1u);
}

TEST(Service, AnswersPipelinedRequestsInOrder) {
    AdminServer server;
    RawClient client(server.path());
    std::string lines;
    for (int i = 0; i < 1000; ++i) lines += Call("disk.list", "{}", std::to_string(i)) + "\n";
    std::thread sender([&] { EXPECT_TRUE(client.Send(lines)); });
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(client.Json().at("id"), i);
    sender.join();
}

TEST(Service, AnswersRequestsWithTheSameIdEach) {
    AdminServer server;
    RawClient client(server.path());
    client.Send(Call("disk.list") + "\n" + Call("pool.status") + "\n");
    EXPECT_TRUE(client.Json().at("result").as_object().contains("disks"));
    EXPECT_TRUE(client.Json().at("result").as_object().contains("capacity"));
}

TEST(Service, ABatchIsAnsweredByABatch) {
    AdminServer server;
    RawClient client(server.path());
    const json::value answers = client.Ask(
        "[" + Call("disk.create", R"({"name":"d","size":4096})", "1") + ",5," +
        R"({"jsonrpc":"2.0","method":"snapshot.create","params":{"snapshots":["d@s"]}},)" +
        Call("snapshot.show", R"({"snapshot":"d@s"})", "\"b\"") + "]");
    ASSERT_TRUE(answers.is_array());
    ASSERT_EQ(answers.as_array().size(), 3u);
    EXPECT_EQ(answers.at(0).at("id"), 1);
    EXPECT_EQ(CodeOf(answers.at(1)), -32600);
    EXPECT_EQ(answers.at(2).at("id"), "b");
    EXPECT_EQ(answers.at(2).at("result").at("name"), "s");
}

TEST(Service, NotificationsAreCarriedOutWithoutAnAnswer) {
    AdminServer server;
    RawClient client(server.path());
    client.Send(R"({"jsonrpc":"2.0","method":"disk.create","params":{"name":"d","size":4096}})"
                "\n"
                R"({"jsonrpc":"2.0","method":"nonsense"})"
                "\n["
                R"({"jsonrpc":"2.0","method":"disk.list"})"
                "]\n");
    const json::value next = client.Ask(Call("disk.show", R"({"name":"d"})", "9"));
    EXPECT_EQ(next.at("id"), 9);
    EXPECT_EQ(next.at("result").at("name"), "d");
}

TEST(Service, GarbageGetsAnErrorAndTheConnectionGoesOn) {
    AdminServer server;
    RawClient client(server.path());
    const json::value garbage = client.Ask("\x16\x03\x01 GET / HTTP/1.1");
    EXPECT_EQ(CodeOf(garbage), -32700);
    EXPECT_EQ(KindOf(garbage), "invalid");
    EXPECT_TRUE(garbage.at("id").is_null());
    EXPECT_EQ(CodeOf(client.Ask(std::string(500'000, '['))), -32700);
    EXPECT_EQ(CodeOf(client.Ask(Call("disk.burn"))), -32601);
    EXPECT_EQ(CodeOf(client.Ask(Call("disk.show", R"({"name":{"a":1}})"))), -32602);
    client.Send("\n \r\n\n");  // blank lines are nothing at all
    EXPECT_TRUE(IsResult(client.Ask(Call("disk.list") + "\r")));
}

TEST(Service, RandomBytesNeverEndIt) {
    const uint32_t seed = std::random_device()();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    AdminServer server;
    for (int round = 0; round < 50; ++round) {
        RawClient client(server.path());
        std::string bytes;
        for (uint32_t i = random() % 4000; i > 0; --i) bytes += static_cast<char>(random());
        client.Send(bytes);
        client.EndInput();
        while (!client.Line().empty()) {
        }
    }
    RawClient client(server.path());
    EXPECT_TRUE(IsResult(client.Ask(Call("disk.list"))));
}

TEST(Service, ALineOverAMebibyteGetsAnErrorAndIsSkipped) {
    AdminServer server;
    RawClient client(server.path());
    const std::string huge = Call("disk.show", R"({"name":")" + std::string(3 << 20, 'x') + "\"}");
    std::thread sender([&] { client.Send(huge + "\n" + Call("disk.list", "{}", "2") + "\n"); });
    const json::value refused = client.Json();
    EXPECT_EQ(CodeOf(refused), -32000);
    EXPECT_EQ(KindOf(refused), "limit");
    EXPECT_EQ(client.Json().at("id"), 2);
    sender.join();
}

TEST(Service, ALineOfJustAMebibyteIsServed) {
    AdminServer server;
    RawClient client(server.path());
    std::string line = Call("disk.list");
    line.append((size_t{1} << 20) - line.size(), ' ');
    EXPECT_TRUE(IsResult(client.Ask(line)));
}

TEST(Service, ABatchTooBigGetsOneError) {
    AdminServer server;
    RawClient client(server.path());
    std::string batch = "[" + Call("disk.list");
    for (int i = 0; i < 200; ++i) batch += "," + Call("disk.list");
    const json::value answer = client.Ask(batch + "]");
    ASSERT_TRUE(answer.is_object());
    EXPECT_EQ(KindOf(answer), "limit");
    EXPECT_EQ(CodeOf(client.Ask("[]")), -32600);
}

TEST(Service, AHalfLineChangesNothing) {
    AdminServer server;
    const std::string line = Call("disk.create", R"({"name":"d","size":4096})");
    for (size_t length = 1; length < line.size(); length += 7) {
        RawClient client(server.path());
        client.Send(line.substr(0, length));
        client.EndInput();
        EXPECT_EQ(CodeOf(client.Json()), -32700);
        EXPECT_TRUE(client.AtEnd());
    }
    RawClient client(server.path());
    EXPECT_TRUE(client.Ask(Call("disk.list")).at("result").at("disks").as_array().empty());
}

TEST(Service, WhatWasSentBeforeTheEndOfInputIsStillAnswered) {
    AdminServer server;
    RawClient client(server.path());
    client.Send(Call("disk.list", "{}", "1") + "\n" + Call("pool.check", "{}", "2"));
    client.EndInput();
    EXPECT_EQ(client.Json().at("id"), 1);
    EXPECT_EQ(client.Json().at("id"), 2);
    EXPECT_TRUE(client.AtEnd());
}

TEST(Service, AClientThatLeavesWhileItsCommandRunsHarmsNobody) {
    AdminServer server;
    server.OnPool([](FakePool& pool) { pool.Hold(); });
    {
        RawClient client(server.path());
        client.Send(Call("disk.create", R"({"name":"d","size":4096})") + "\n");
        server.AwaitWaiting(1);
    }
    server.OnPool([](FakePool& pool) { pool.Release(); });
    RawClient other(server.path());
    EXPECT_TRUE(IsResult(other.Ask(Call("disk.show", R"({"name":"d"})"))));
}

TEST(Service, ASlowCommandDelaysNobodyElse) {
    AdminServer server;
    server.OnPool([](FakePool& pool) { pool.Hold(); });
    RawClient slow(server.path());
    slow.Send(Call("pool.check") + "\n");
    server.AwaitWaiting(1);
    RawClient other(server.path());
    EXPECT_EQ(CodeOf(other.Ask("x")), -32700);
    server.OnPool([](FakePool& pool) { pool.Release(); });
    EXPECT_TRUE(IsResult(slow.Json()));
}

TEST(Service, SilentClientsDelayNobody) {
    AdminServer server;
    std::vector<std::unique_ptr<RawClient>> silent;
    for (int i = 0; i < 100; ++i) {
        silent.push_back(std::make_unique<RawClient>(server.path()));
        silent.back()->Send(R"({"jsonrpc":"2.0","id":)");
    }
    RawClient client(server.path());
    EXPECT_TRUE(IsResult(client.Ask(Call("disk.list"))));
    for (auto& each : silent) EXPECT_TRUE(IsResult(each->Ask(R"(1,"method":"disk.list"})")));
}

TEST(Service, AClientThatNeverReadsStopsBeingServedAndNobodyElse) {
    AdminServer server;
    RawClient glutton(server.path());
    // Send without reading until the server stops taking requests.
    ASSERT_EQ(::fcntl(glutton.fd(), F_SETFL, O_NONBLOCK), 0);
    const std::string request = Call("pool.status") + "\n";
    RawClient other(server.path());
    uint64_t accepted = 0;
    for (int refused = 0; refused < 20;) {
        if (::send(glutton.fd(), request.data(), request.size(), MSG_NOSIGNAL) > 0) {
            ++accepted;
            refused = 0;
        } else {
            ++refused;  // each question to the other client lets the server go on
            ASSERT_TRUE(IsResult(other.Ask(Call("disk.list"))));
        }
        ASSERT_LT(accepted * request.size(), 64u << 20) << "the server buffers without a bound";
    }
    EXPECT_TRUE(IsResult(other.Ask(Call("pool.status"))));
}

TEST(Service, ANewClientReplacesTheOneThatIsSilentLongest) {
    ServiceOptions options;
    options.connections_max = 3;
    AdminServer server(options);
    RawClient a(server.path()), b(server.path()), c(server.path());
    for (RawClient* client : {&a, &b, &c}) {
        ASSERT_TRUE(IsResult(client->Ask(Call("disk.list"))));
    }
    ASSERT_TRUE(IsResult(a.Ask(Call("disk.list"))));  // so that b is the silent one
    RawClient d(server.path());
    EXPECT_TRUE(IsResult(d.Ask(Call("disk.list"))));
    EXPECT_TRUE(b.AtEnd());
    EXPECT_TRUE(IsResult(a.Ask(Call("disk.list"))));
    EXPECT_TRUE(IsResult(c.Ask(Call("disk.list"))));
}

TEST(Service, WhenAllConnectionsRunCommandsANewOneWaitsForOneToEnd) {
    ServiceOptions options;
    options.connections_max = 2;
    AdminServer server(options);
    server.OnPool([](FakePool& pool) { pool.Hold(); });
    RawClient a(server.path()), b(server.path());
    a.Send(Call("disk.list") + "\n");
    b.Send(Call("disk.list") + "\n");
    server.AwaitWaiting(2);
    RawClient c(server.path()), d(server.path());
    c.Send(Call("disk.list") + "\n");
    d.Send(Call("disk.list") + "\n");
    server.OnPool([](FakePool& pool) { pool.Release(); });
    EXPECT_TRUE(IsResult(a.Json()));
    EXPECT_TRUE(IsResult(b.Json()));
    EXPECT_TRUE(IsResult(c.Json()));
    EXPECT_TRUE(IsResult(d.Json()));
}

std::string Create(const std::string& name) {
    return Call("disk.create", R"({"name":")" + name + R"(","size":4096})");
}

/// The one of `clients` that is answered first, moved out of it.
RawClient TakeAnswered(std::deque<RawClient>& clients) {
    std::vector<pollfd> polled;
    for (const RawClient& client : clients) polled.push_back({client.fd(), POLLIN, 0});
    VARVE_CHECK(::poll(polled.data(), polled.size(), 60'000) > 0);
    const auto at = std::find_if(polled.begin(), polled.end(),
                                 [](const pollfd& one) { return one.revents != 0; });
    RawClient answered = std::move(clients.at(static_cast<size_t>(at - polled.begin())));
    clients.erase(clients.begin() + (at - polled.begin()));
    return answered;
}

TEST(Service, ChangesThatHangLeaveRoomForWhoAsksWhatHangs) {
    ServiceOptions options;
    options.connections_max = 8;  // of them 4 for changes that have begun, 2 for those that wait
    AdminServer server(options);
    server.OnPool([](FakePool& pool) { pool.HoldCreation(); });
    std::deque<RawClient> stuck;
    for (int i = 0; i < 7; ++i) {
        stuck.emplace_back(server.path()).Send(Create("d" + std::to_string(i)) + "\n");
    }
    RawClient other = TakeAnswered(stuck);
    EXPECT_EQ(KindOf(other.Json()), "limit");
    EXPECT_EQ(KindOf(other.Ask(Create("more"))), "limit");
    for (const char* method : {"pool.status", "disk.list", "client.list", "pool.check"}) {
        EXPECT_TRUE(IsResult(other.Ask(Call(method)))) << method;
    }
    for (int i = 0; i < 3; ++i) {  // one after the other on a place that is left
        RawClient observer(server.path());
        EXPECT_TRUE(IsResult(observer.Ask(Call("pool.status"))));
    }
    server.OnPool([](FakePool& pool) { pool.Release(); });
    for (RawClient& client : stuck) EXPECT_TRUE(IsResult(client.Json()));
}

TEST(Service, AChangeThatWaitsInLineIsNotBegunWhenItsClientHasGone) {
    ServiceOptions options;
    options.connections_max = 16;  // of them 8 for changes that have begun, 5 for those that wait
    AdminServer server(options);
    server.OnPool([](FakePool& pool) { pool.HoldCreation(); });
    std::deque<RawClient> begun;
    for (int i = 0; i < 8; ++i) {
        begun.emplace_back(server.path()).Send(Create("begun" + std::to_string(i)) + "\n");
    }
    server.AwaitWaiting(8);
    RawClient patient(server.path());
    patient.Send(Create("patient") + "\n");
    patient.EndInput();  // it still takes its answer
    for (int i = 0; i < 50; ++i) RawClient(server.path()).Send(Create("gone") + "\n");
    // They are gone once seven connections at a time stay open.
    for (bool open = false; !open;) {
        std::deque<RawClient> idle;
        open = true;
        for (int i = 0; i < 7; ++i) idle.emplace_back(server.path()).Ask(Call("disk.list"));
        for (RawClient& client : idle) open = open && IsResult(client.Ask(Call("disk.list")));
    }
    server.OnPool([](FakePool& pool) { pool.Release(); });
    for (RawClient& client : begun) EXPECT_TRUE(IsResult(client.Json()));
    EXPECT_TRUE(IsResult(patient.Json()));
    RawClient other(server.path());
    const json::value disks = other.Ask(Call("disk.list"));
    EXPECT_EQ(disks.at("result").at("disks").as_array().size(), 9u) << disks;
}

TEST(Service, AChangeThatWaitsInLineIsRefusedWhenTheServerStops) {
    ServiceOptions options;
    options.connections_max = 8;
    AdminServer server(options);
    server.OnPool([](FakePool& pool) { pool.HoldCreation(); });
    std::deque<RawClient> begun, more;
    for (int i = 0; i < 4; ++i) {
        begun.emplace_back(server.path()).Send(Create("begun" + std::to_string(i)) + "\n");
    }
    server.AwaitWaiting(4);
    for (int i = 0; i < 3; ++i) {
        more.emplace_back(server.path()).Send(Create("more" + std::to_string(i)) + "\n");
    }
    EXPECT_EQ(KindOf(TakeAnswered(more).Json()), "limit");  // so the other one waits
    std::future<void> stopped = server.BeginStop();
    EXPECT_EQ(KindOf(more.front().Json()), "busy");
    server.OnPool([](FakePool& pool) { pool.Release(); });
    for (RawClient& client : begun) EXPECT_TRUE(IsResult(client.Json()));
    stopped.wait();
}

TEST(Service, AnswersThatNobodyReadsAreBoundedInAll) {
    ServiceOptions options;
    options.output_bytes_max = 10'000;
    AdminServer server(options);
    RawClient client(server.path());
    std::string batch = "[" + Call("pool.status");
    for (int i = 0; i < 99; ++i) batch += "," + Call("pool.status");
    const json::value answers = client.Ask(batch + "]");
    ASSERT_EQ(answers.as_array().size(), 100u);
    EXPECT_TRUE(IsResult(answers.at(0)));
    EXPECT_EQ(KindOf(answers.at(99)), "limit");
    EXPECT_TRUE(IsResult(client.Ask(Call("pool.status"))));  // taken answers count no more
}

TEST(Service, ErrorsStayWhatTheyAreHoweverManyAnswersWait) {
    ServiceOptions options;
    options.output_bytes_max = 10'000;
    AdminServer server(options);
    RawClient client(server.path());
    std::string batch = "[";
    for (int i = 0; i < 99; ++i) batch += Call("pool.status") + ",";
    const json::value answers =
        client.Ask(batch + Call("no.method") + "," + Call("disk.show", R"({"name":"none"})") + "]");
    ASSERT_EQ(answers.as_array().size(), 101u);
    EXPECT_EQ(KindOf(answers.at(98)), "limit");
    EXPECT_EQ(CodeOf(answers.at(99)), -32601);
    EXPECT_EQ(KindOf(answers.at(100)), "not_found");
}

TEST(Service, AHundredClientsAtOnceAreServed) {
    ServiceOptions options;
    options.connections_max = 512;  // places for a hundred, whichever command they are at
    AdminServer server(options);
    std::vector<std::thread> threads;
    std::atomic<int> good = 0;
    for (int i = 0; i < 100; ++i) {
        threads.emplace_back([&, i] {
            RawClient client(server.path());
            const std::string disk = "d" + std::to_string(i);
            client.Ask(Call("disk.create", R"({"name":")" + disk + R"(","size":4096})"));
            client.Ask(Call("snapshot.create", R"({"snapshots":[")" + disk + R"(@s"]})"));
            const json::value list =
                client.Ask(Call("snapshot.list", R"({"disk":")" + disk + "\"}"));
            good += IsResult(list) && list.at("result").at("snapshots").as_array().size() == 1;
        });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(good, 100);
}

TEST(Service, LogsChangesThatWereCarriedOutAndByWhom) {
    std::vector<std::string> lines;
    ServiceOptions options;
    options.log = [&](const std::string& line) { lines.push_back(line); };
    {
        AdminServer server(options);
        RawClient client(server.path());
        client.Ask(Call("disk.create", R"({"name":"d","size":4096})"));
        client.Ask(Call("disk.create", R"({"name":"d","size":4096})"));  // fails
        client.Ask(Call("disk.list"));
        client.Ask(Call("snapshot.create", R"({"snapshots":["d@s"]})"));
    }
    const std::string peer = fmt::format(" by uid {}, pid {}", ::getuid(), ::getpid());
    EXPECT_EQ(lines, (Strings{R"(disk.create {"name":"d","size":4096})" + peer,
                              R"(snapshot.create {"snapshots":["d@s"]})" + peer}));
}

// ---- the socket's file, start and stop

TEST(Socket, HasModeForOwnerAndGroup) {
    const mode_t umask_before = ::umask(0077);
    AdminServer server;
    ::umask(umask_before);
    struct stat file {};
    ASSERT_EQ(::stat(server.path().c_str(), &file), 0);
    EXPECT_EQ(file.st_mode & 07777, 0660u);
    EXPECT_TRUE(S_ISSOCK(file.st_mode));
}

TEST(Socket, ReplacesWhatADeadServerLeft) {
    testing::TemporaryDirectory directory;
    const std::string path = directory.path() + "/admin.sock";
    { const Result<ListeningSocket> dead = ListenUnix(path, 0660); }
    ASSERT_TRUE(std::filesystem::exists(path));
    ServiceOptions options;
    options.path = path;
    AdminServer server(options);
    ASSERT_TRUE(server.status().ok()) << server.status().error().message;
    RawClient client(path);
    EXPECT_TRUE(IsResult(client.Ask(Call("disk.list"))));
}

TEST(Socket, LeavesAnotherServersSocketAlone) {
    AdminServer first;
    ServiceOptions options;
    options.path = first.path();
    {
        AdminServer second(options);
        ASSERT_FALSE(second.status().ok());
        EXPECT_EQ(second.status().error().kind, ErrorKind::kBusy);
    }
    RawClient client(first.path());
    EXPECT_TRUE(IsResult(client.Ask(Call("disk.list"))));
}

TEST(Socket, LeavesAFileThatIsNoSocketAlone) {
    testing::TemporaryDirectory directory;
    const std::string path = directory.path() + "/precious";
    std::ofstream(path) << "data";
    const Result<ListeningSocket> refused = ListenUnix(path, 0660);
    ASSERT_FALSE(refused.ok());
    EXPECT_EQ(refused.error().kind, ErrorKind::kExists);
    EXPECT_EQ(std::filesystem::file_size(path), 4u);
}

TEST(Socket, WorksInADirectoryWithALongName) {
    testing::TemporaryDirectory directory;
    const std::string deep = directory.path() + "/" + std::string(200, 'x');
    std::filesystem::create_directory(deep);
    ServiceOptions options;
    options.path = deep + "/admin.sock";
    AdminServer server(options);
    ASSERT_TRUE(server.status().ok()) << server.status().error().message;
    RawClient client(options.path);
    EXPECT_TRUE(IsResult(client.Ask(Call("disk.list"))));
}

TEST(Socket, RefusesPathsThatCannotNameOne) {
    for (const std::string& path :
         {std::string(), std::string("/"), std::string("/tmp/"), std::string("/tmp/.."),
          "/tmp/" + std::string(300, 'x'), std::string("/nonexistent-directory/admin.sock")}) {
        EXPECT_FALSE(ListenUnix(path, 0660).ok()) << path;
    }
}

TEST(Stop, RemovesTheSocketAndClosesSilentClients) {
    AdminServer server;
    RawClient client(server.path());
    ASSERT_TRUE(IsResult(client.Ask(Call("disk.list"))));
    server.Stop();
    EXPECT_TRUE(client.AtEnd());
    EXPECT_FALSE(std::filesystem::exists(server.path()));
}

TEST(Stop, WaitsForTheRunningCommandAndAnswersIt) {
    AdminServer server;
    server.OnPool([](FakePool& pool) { pool.Hold(); });
    RawClient client(server.path());
    client.Send("[" + Call("disk.create", R"({"name":"d","size":4096})", "1") + "," +
                Call("disk.create", R"({"name":"e","size":4096})", "2") + "]\n");
    server.AwaitWaiting(1);
    std::future<void> stopped = server.BeginStop();
    EXPECT_EQ(stopped.wait_for(std::chrono::seconds(0)), std::future_status::timeout);
    server.OnPool([](FakePool& pool) { pool.Release(); });
    const json::value answers = client.Json();
    EXPECT_TRUE(IsResult(answers.at(0)));
    EXPECT_EQ(KindOf(answers.at(1)), "busy");
    EXPECT_TRUE(client.AtEnd());
    stopped.wait();
}

TEST(Stop, RefusesALineBehindTheRunningCommand) {
    AdminServer server;
    server.OnPool([](FakePool& pool) { pool.Hold(); });
    RawClient client(server.path());
    client.Send(Create("d") + "\n" + Create("e") + "\n");
    server.AwaitWaiting(1);
    std::future<void> stopped = server.BeginStop();
    server.OnPool([](FakePool& pool) { pool.Release(); });
    EXPECT_TRUE(IsResult(client.Json()));
    EXPECT_EQ(KindOf(client.Json()), "busy");
    EXPECT_TRUE(client.AtEnd());
    stopped.wait();
}

TEST(Stop, RefusesALineThatHasJustArrived) {
    AdminServer server;
    RawClient client(server.path());
    ASSERT_TRUE(IsResult(client.Ask(Call("disk.list"))));
    std::future<void> stopped =
        server.BeginStop([&] { client.Send(Create("d") + "\n" + Create("e") + "\n"); });
    EXPECT_EQ(KindOf(client.Json()), "busy");
    EXPECT_EQ(KindOf(client.Json()), "busy");
    EXPECT_TRUE(client.AtEnd());
    stopped.wait();
}

TEST(Stop, RefusesAllLinesThatHaveArrived) {
    AdminServer server;
    RawClient client(server.path());
    ASSERT_TRUE(IsResult(client.Ask(Call("disk.list"))));
    std::string lines;
    constexpr int kLines = 600;
    for (int i = 0; i < kLines; ++i) lines += Create("d" + std::to_string(i)) + "\n";
    const std::string batch = "[" + Create("e") + "," + Create("f") + "]\n";
    lines += batch + batch + "half a line";
    ASSERT_GT(lines.size(), 32u << 10);
    std::future<void> stopped = server.BeginStop([&] { client.Send(lines); });
    stopped.wait();
    for (int i = 0; i < kLines; ++i) ASSERT_EQ(KindOf(client.Json()), "busy") << i;
    for (int i = 0; i < 2; ++i) {
        const json::value answers = client.Json();
        ASSERT_EQ(answers.as_array().size(), 2u);
        EXPECT_EQ(KindOf(answers.at(1)), "busy");
    }
    EXPECT_TRUE(client.AtEnd());
    server.OnPool([](FakePool& pool) { EXPECT_EQ(pool.commands(), 1u); });
}

TEST(Stop, ReadsUpToItsBound) {
    ServiceOptions options;
    options.line_bytes_max = 20 << 10;
    AdminServer server(options);
    RawClient client(server.path());
    ASSERT_TRUE(IsResult(client.Ask(Call("disk.list"))));
    std::string lines;
    for (int i = 0; i < 600; ++i) lines += Create("d") + "\n";
    server.BeginStop([&] { client.Send(lines); }).wait();
    const size_t least = options.line_bytes_max / (Create("d").size() + 1);
    size_t refused = 0;
    for (; !client.Line().empty(); ++refused) ASSERT_LT(refused, 600u);
    EXPECT_GE(refused, least);
    EXPECT_LT(refused, 600u);
}

TEST(Stop, RefusesALastLineWithoutANewline) {
    AdminServer server;
    RawClient client(server.path());
    ASSERT_TRUE(IsResult(client.Ask(Call("disk.list"))));
    server
        .BeginStop([&] {
            client.Send(Create("d") + "\n" + Create("e"));
            client.EndInput();
        })
        .wait();
    EXPECT_EQ(KindOf(client.Json()), "busy");
    EXPECT_EQ(KindOf(client.Json()), "busy");
    EXPECT_TRUE(client.AtEnd());
}

TEST(Stop, RefusesWhatWasSentOnConnectionsThatWereNotAcceptedYet) {
    AdminServer server;
    std::deque<RawClient> clients;
    std::future<void> stopped = server.BeginStop([&] {
        for (int i = 0; i < 3; ++i) {
            clients.emplace_back(server.path()).Send(Create("d") + "\n");
        }
    });
    stopped.wait();
    for (RawClient& client : clients) {
        EXPECT_EQ(KindOf(client.Json()), "busy");
        EXPECT_TRUE(client.AtEnd());
    }
}

TEST(Stop, RefusesWhoWaitsForAPlace) {
    ServiceOptions options;
    options.connections_max = 1;
    AdminServer server(options);
    server.OnPool([](FakePool& pool) { pool.Hold(); });
    RawClient first(server.path());
    first.Send(Call("disk.list") + "\n");
    server.AwaitWaiting(1);
    RawClient second(server.path()), third(server.path());
    second.Send(Create("d") + "\n");
    third.Send(Create("e") + "\n");
    std::future<void> stopped = server.BeginStop();
    const json::value answers{second.Json(), third.Json()};
    server.OnPool([](FakePool& pool) { pool.Release(); });
    EXPECT_EQ(KindOf(answers.at(0)), "busy");
    EXPECT_EQ(KindOf(answers.at(1)), "busy");
    EXPECT_TRUE(IsResult(first.Json()));
    stopped.wait();
}

TEST(Stop, AnswersACommandThatIsLeftBehind) {
    AdminServer server;
    server.OnPool([](FakePool& pool) { pool.Hold(); });
    RawClient client(server.path());
    client.Send("[" + Create("d") + "," + Create("e") + "]\n" + Create("f") + "\n");
    server.AwaitWaiting(1);
    std::future<void> stopped = server.BeginStop();
    server.LeaveBehind();
    const json::value answers = client.Json();
    EXPECT_EQ(KindOf(answers.at(0)), "io");
    EXPECT_EQ(KindOf(answers.at(1)), "busy");
    EXPECT_EQ(KindOf(client.Json()), "busy");
    EXPECT_TRUE(client.AtEnd());
    server.OnPool([](FakePool& pool) { pool.Release(); });
    stopped.wait();
}

TEST(Stop, DoesNotWaitForAClientThatNeverReads) {
    AdminServer server;
    RawClient glutton(server.path());
    ASSERT_EQ(::fcntl(glutton.fd(), F_SETFL, O_NONBLOCK), 0);
    std::string requests;
    for (int i = 0; i < 20'000; ++i) requests += Call("pool.status") + "\n";
    (void)::send(glutton.fd(), requests.data(), requests.size(), MSG_NOSIGNAL);
    server.Stop();
}

}  // namespace
}  // namespace varve::admin
