// Access files in front of the whole server: who may not is told nothing; who may no longer is cut
// off, and nobody else.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <random>
#include <thread>

#include "tests/server_fixture.h"

namespace varve::nbdserver {
namespace {

std::string Name(const std::string& name) {
    std::string data;
    AppendBig(data, static_cast<uint32_t>(name.size()));
    return data + name;
}

class AccessServerTest : public ServerTest {
  protected:
    /// Disks mine, secret and shared; a snapshot `s` of the first two. `who` in rules is this
    /// process, by its unix socket.
    void StartWith(const std::string& rules) {
        options_.access = root_ / "access";
        Write(rules);
        Start();
        for (const char* name : {"mine", "secret", "shared"}) {
            Expect("disk.create", fmt::format(R"({{"name":"{}","size":1048576}})", name));
        }
        Expect("snapshot.create", R"({"snapshots":["mine@s","secret@s"]})");
    }
    void Expect(const std::string& method, const std::string& params) {
        const std::string reply = Call(method, params);
        EXPECT_EQ(reply.find("error"), std::string::npos) << reply;
    }
    void Write(const std::string& rules) const {
        std::ofstream(options_.access, std::ios::trunc) << rules;
    }
    /// As an administrator does. The rules hold once this returns: they give an export that those
    /// before did not.
    void Reload(const std::string& rules) {
        const std::string marker = fmt::format("marker-{}", ++markers_);
        Expect("disk.create", fmt::format(R"({{"name":"{}","size":4096}})", marker));
        Write(rules + "\nany " + marker + " read-only\n");
        ::kill(::getpid(), SIGHUP);
        while (!Nbd(Uri(marker)).connected()) std::this_thread::yield();
    }
    std::string who() const { return fmt::format("uid={} ", ::getuid()); }

    /// All replies to one option, as bytes; "closed" if that is the answer.
    std::string Answer(uint32_t option, const std::string& data) {
        OwnedFd fd = ConnectGreeted();
        SendAll(fd.get(), kHello + Option(wire::kOptStructuredReply));
        Receive(fd.get(), sizeof(wire::OptionReply));
        SendAll(fd.get(), Option(option, data));
        std::string all;
        for (uint32_t type = wire::kRepInfo; !Ends(type);) {
            const std::string head = Receive(fd.get(), sizeof(wire::OptionReply));
            if (head.size() < sizeof(wire::OptionReply)) return "closed";
            wire::OptionReply reply;
            std::memcpy(static_cast<void*>(&reply), head.data(), sizeof reply);
            all += head + Receive(fd.get(), reply.length);
            type = reply.type;
        }
        return all;
    }
    static bool Ends(uint32_t type) { return type == wire::kRepAck || type >> 31 != 0; }

    /// What LIST names.
    std::string Listed(const std::string& uri) {
        nbd_handle* nbd = nbd_create();
        nbd_set_opt_mode(nbd, true);
        EXPECT_EQ(nbd_connect_uri(nbd, uri.c_str()), 0);
        std::string names;
        nbd_list_callback each{};
        each.user_data = &names;
        each.callback = [](void* data, const char* name, const char*) {
            *static_cast<std::string*>(data) += std::string(name) + " ";
            return 0;
        };
        EXPECT_GE(nbd_opt_list(nbd, each), 0);
        nbd_close(nbd);
        return names;
    }
    /// Whether it has no client, soon.
    bool IsLeft(const std::string& name) {
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(30);
        while (Call("client.list").find("\"export\":\"" + name + "\"") != std::string::npos) {
            if (std::chrono::steady_clock::now() > end) return false;
            std::this_thread::yield();
        }
        return true;
    }

    int markers_ = 0;
};

bool Reads(nbd_handle* nbd) {
    char byte = 0;
    return nbd_pread(nbd, &byte, 1, 0, 0) == 0;
}

bool Writes(nbd_handle* nbd) {
    return nbd_pwrite(nbd, "x", 1, 0, 0) == 0;
}

/// Whether the list of clients has one of the export with that right.
bool Shows(const std::string& clients, const std::string& name, bool read_only) {
    const size_t at = clients.find(fmt::format(R"("export":"{}")", name));
    if (at == std::string::npos) return false;
    const std::string one = clients.substr(at, clients.find('}', at) - at);
    return one.find(fmt::format(R"("read_only":{})", read_only)) != std::string::npos;
}

TEST_F(AccessServerTest, WhatIsForbiddenLooksLikeWhatThereIsNot) {
    StartWith(who() + "mine read-write");
    // No state of the export shows, either: one is in use, one offline.
    Expect("disk.offline", R"({"name":"shared"})");
    const std::string none(2, '\0'), query = std::string("\0\0\0\0", 4);
    for (const auto& [option, rest] :
         {std::pair(uint32_t{wire::kOptInfo}, none), std::pair(uint32_t{wire::kOptGo}, none),
          std::pair(uint32_t{wire::kOptListMetaContext}, query),
          std::pair(uint32_t{wire::kOptSetMetaContext}, query)}) {
        const std::string nothing = Answer(option, Name("nothing") + rest);
        for (const char* name : {"secret", "secret@s", "mine@s", "shared", "", "mine@nothing"}) {
            EXPECT_EQ(Answer(option, Name(name) + rest), nothing) << option << " " << name;
        }
        EXPECT_NE(Answer(option, Name("mine") + rest), nothing);
    }
    EXPECT_EQ(Answer(wire::kOptExportName, "secret"), "closed");
    EXPECT_EQ(Listed(Uri("")), "mine ");
}

TEST_F(AccessServerTest, ListNamesWhatMayBeOpened) {
    StartWith(who() + "mine mine@* read-write\naddress=127.0.0.0/8 *@* shared read-only");
    EXPECT_EQ(Listed(Uri("")), "mine mine@s ");
    EXPECT_EQ(Listed(daemon_->uris()[0]), "shared mine@s secret@s ");
    Reload("any nothing read-only");
    EXPECT_EQ(Listed(Uri("")), "marker-1 ");
}

TEST_F(AccessServerTest, ReadOnlyRulesTakeNoWrites) {
    StartWith(who() + "mine read-only\n" + who() + "shared *@s read-write");
    Nbd mine(Uri("mine")), shared(Uri("shared")), snapshot(Uri("mine@s"));
    ASSERT_TRUE(mine.connected() && shared.connected() && snapshot.connected());
    EXPECT_EQ(nbd_is_read_only(mine), 1);
    EXPECT_EQ(nbd_is_read_only(snapshot), 1);
    EXPECT_EQ(nbd_is_read_only(shared), 0);
    EXPECT_TRUE(Writes(shared));
    nbd_set_strict_mode(mine, 0);  // libnbd would not send them
    EXPECT_FALSE(Writes(mine));
    EXPECT_EQ(nbd_get_errno(), EPERM);
    EXPECT_EQ(nbd_trim(mine, 4096, 0, 0), -1);
    EXPECT_EQ(nbd_get_errno(), EPERM);
    EXPECT_EQ(nbd_zero(mine, 4096, 0, 0), -1);
    EXPECT_EQ(nbd_get_errno(), EPERM);
    EXPECT_TRUE(Reads(mine));
    const std::string clients = Call("client.list");
    for (const auto& [name, read_only] : {std::pair("mine", true), std::pair("shared", false)}) {
        EXPECT_TRUE(Shows(clients, name, read_only)) << name << ": " << clients;
    }
}

TEST_F(AccessServerTest, TheEmptyNameIsNoWayIn) {
    options_.access = root_ / "access";
    Write(who() + "other read-only");
    Start();
    Expect("disk.create", R"({"name":"disk0","size":4096})");
    EXPECT_FALSE(Nbd(Uri("")).connected());
    Reload(who() + "disk0 read-only");
    EXPECT_FALSE(Nbd(Uri("")).connected());  // there are two by now
    Expect("disk.delete", R"({"name":"marker-1","disconnect":true})");
    Nbd nbd(Uri(""));
    EXPECT_TRUE(nbd.connected()) << nbd.error();
}

TEST_F(AccessServerTest, AReloadCutsOffWhoMayNoLongerAndNobodyElse) {
    StartWith(who() + "mine secret shared *@s read-write");
    Nbd stays(Uri("mine")), loses(Uri("secret")), less(Uri("shared")), snapshot(Uri("mine@s"));
    ASSERT_TRUE(Writes(stays) && Writes(loses) && Writes(less) && Reads(snapshot));
    Reload(who() + "mine read-write\n" + who() + "shared *@s read-only");
    EXPECT_TRUE(IsLeft("secret") && IsLeft("shared"));
    EXPECT_TRUE(Writes(stays));
    EXPECT_FALSE(Reads(loses));
    EXPECT_FALSE(Reads(less));     // could write, and must not go on believing it
    EXPECT_TRUE(Reads(snapshot));  // never could
    EXPECT_FALSE(Nbd(Uri("secret")).connected());
    Nbd again(Uri("shared"));
    ASSERT_TRUE(again.connected());
    EXPECT_EQ(nbd_is_read_only(again), 1);
    // More than before: when they connect again.
    Reload(who() + "mine secret shared *@s read-write");
    EXPECT_TRUE(Writes(stays) && Reads(again) && Reads(snapshot));
    nbd_set_strict_mode(again, 0);
    EXPECT_FALSE(Writes(again));
    Nbd back(Uri("secret"));
    EXPECT_TRUE(back.connected() && Writes(back));
}

/// Everything on its way is given up or has landed by then.
TEST_F(AccessServerTest, NothingLandsOfWhoWasCutOff) {
    const std::string reader = "address=127.0.0.0/8 shared read-only\n";
    StartWith(reader + who() + "shared read-write");
    const auto content = [&] {
        Nbd nbd(daemon_->uris()[0] + "/shared");
        std::string bytes(1 << 20, '\0');
        EXPECT_EQ(nbd_pread(nbd, bytes.data(), bytes.size(), 0, 0), 0) << nbd_get_error();
        return bytes;
    };
    std::vector<std::thread> writers;
    std::atomic<uint64_t> sent = 0;
    for (int i = 0; i < 3; ++i) {
        writers.emplace_back([&, i, fd = Attach("shared")] {
            std::mt19937_64 random(static_cast<unsigned>(i));
            for (;;) {  // without a look at the replies
                std::string write = RequestHeader(wire::kCmdWrite, random() % 255 << 12, 4096);
                write.append(4096, static_cast<char>(random()));
                if (::send(fd.get(), write.data(), write.size(), MSG_NOSIGNAL) < 0) break;
                ++sent;
                char replies[4096];
                ::recv(fd.get(), replies, sizeof replies, MSG_DONTWAIT);
            }
        });
    }
    while (sent < 1000) std::this_thread::yield();
    Reload(reader);
    while (Call("client.list").find("\"read_only\":false") != std::string::npos) {
        std::this_thread::yield();
    }
    const std::string then = content();
    for (std::thread& writer : writers) writer.join();
    EXPECT_EQ(content(), then);
    Stop();
    Start();
    EXPECT_EQ(content(), then);
}

TEST_F(AccessServerTest, RightsFollowThePresentName) {
    StartWith(who() + "mine read-write");
    Nbd nbd(Uri("mine"));
    ASSERT_TRUE(Writes(nbd));
    Expect("disk.rename", R"({"name":"mine","to":"theirs"})");
    EXPECT_FALSE(Nbd(Uri("theirs")).connected());
    EXPECT_TRUE(Writes(nbd));  // until the rules are looked at again
    Reload(who() + "mine read-write");
    EXPECT_TRUE(IsLeft("theirs"));
    EXPECT_FALSE(Reads(nbd));
}

// A bitmap shows where its snapshot had other content, so it is for who may read that.
TEST_F(AccessServerTest, ABitmapNeedsTheRightToItsSnapshot) {
    const char* const bitmap = "qemu:dirty-bitmap:s";
    StartWith(who() + "mine read-write");
    const auto listed = [this](const std::string& query) {
        std::string data = Name("mine");
        AppendBig(data, uint32_t{query.empty() ? 0u : 1u});
        return Answer(wire::kOptListMetaContext, query.empty() ? data : data + Name(query));
    };
    EXPECT_EQ(listed("").find(bitmap), std::string::npos);
    EXPECT_EQ(listed(bitmap).find(bitmap), std::string::npos);
    Nbd without(Uri("mine"), bitmap);
    ASSERT_TRUE(without.connected());
    EXPECT_EQ(nbd_can_meta_context(without, bitmap), 0);
    Reload(who() + "mine read-write\n" + who() + "mine@s read-only");
    EXPECT_NE(listed("").find(bitmap), std::string::npos);
    Nbd with(Uri("mine"), bitmap);
    ASSERT_TRUE(with.connected());
    EXPECT_EQ(nbd_can_meta_context(with, bitmap), 1);
    EXPECT_TRUE(Writes(with));
    Reload(who() + "mine read-write");
    EXPECT_TRUE(Writes(without));
    EXPECT_FALSE(Writes(with));
    EXPECT_FALSE(Nbd(Uri("mine@s")).connected());
}

/// Whoever is let in by the old rules while new ones come is seen by the pass that they make.
TEST_F(AccessServerTest, NobodySlipsThroughWhileRulesChange) {
    const std::string yes = who() + "shared read-write\n" + who() + "mine read-write";
    const std::string no = who() + "mine read-write";
    StartWith(yes);
    Nbd stays(Uri("mine"));
    std::atomic<bool> stop = false;
    std::atomic<uint64_t> entered = 0;
    std::vector<std::thread> threads;
    for (int i = 0; i < 3; ++i) {
        threads.emplace_back([&] {
            std::vector<std::unique_ptr<Nbd>> stay;  // for as long as they may
            while (!stop) {
                auto one = std::make_unique<Nbd>(Uri("shared"));
                entered += one->connected();
                if (one->connected()) stay.push_back(std::move(one));
                if (stay.size() > 8) stay.erase(stay.begin());
                std::erase_if(stay, [](const auto& nbd) { return !Reads(*nbd); });
            }
        });
    }
    for (int round = 0; round < 12; ++round) {
        const uint64_t before = entered;
        Reload(yes);
        while (entered < before + 5) std::this_thread::yield();
        Reload(no);
        EXPECT_TRUE(IsLeft("shared")) << round;
        EXPECT_TRUE(Writes(stays));
    }
    stop = true;
    for (std::thread& thread : threads) thread.join();
}

TEST_F(AccessServerTest, AWrongFileIsNoStart) {
    StartWith(who() + "mine read-write");
    Stop();
    for (const char* text : {"", "any * read-write\nany nonsense", "any * read-writ"}) {
        Write(text);
        EXPECT_EQ(Daemon::Start(options_).status().error().kind, ErrorKind::kInvalid);
    }
    fs::remove(options_.access);
    EXPECT_FALSE(Daemon::Start(options_).ok());
}

}  // namespace
}  // namespace varve::nbdserver
