// The real varve program against the real admin service over a pool of names and numbers.
// Not the engine, and not varved: tests/e2e runs those.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <sys/wait.h>

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>

#include "tests/admin_server.h"

extern char** environ;

namespace varve {
namespace {

namespace json = boost::json;
using Strings = std::vector<std::string>;
using testing::AdminServer;
using testing::FakeClients;
using testing::FakePool;
using testing::TemporaryDirectory;

struct Outcome {
    int code = -1;
    std::string out;
    std::string err;
};

/// What a child needs to become varve, made before the fork: the child of a process with threads
/// must not allocate.
class Program {
  public:
    explicit Program(const Strings& arguments) : words_(arguments) {
        for (std::string& each : words_) argv_.push_back(each.data());
        argv_.push_back(nullptr);
    }
    [[noreturn]] void Become() {
        ::execv(path_.c_str(), argv_.data());
        ::_exit(127);
    }

  private:
    Strings words_;
    std::string name_ = "varve";
    std::vector<char*> argv_ = {name_.data()};
    const std::string path_ = std::filesystem::read_symlink("/proc/self/exe").parent_path() / name_;
};

int ExitCodeOf(pid_t child) {
    int status = 0;
    VARVE_CHECK(::waitpid(child, &status, 0) == child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

/// Runs varve without a terminal.
Outcome Invoke(const Strings& arguments) {
    Program program(arguments);
    int out[2], err[2];
    VARVE_CHECK(::pipe2(out, O_CLOEXEC) == 0 && ::pipe2(err, O_CLOEXEC) == 0);
    const pid_t child = ::fork();
    VARVE_CHECK(child >= 0);
    if (child == 0) {
        ::dup2(::open("/dev/null", O_RDONLY), STDIN_FILENO);
        ::dup2(out[1], STDOUT_FILENO);
        ::dup2(err[1], STDERR_FILENO);
        program.Become();
    }
    ::close(out[1]);
    ::close(err[1]);
    Outcome outcome;
    pollfd ends[2] = {{out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
    for (int open = 2; open > 0;) {
        VARVE_CHECK(::poll(ends, 2, -1) > 0);
        for (pollfd& end : ends) {
            if (!end.revents) continue;
            char chunk[4096];
            const ssize_t count = ::read(end.fd, chunk, sizeof chunk);
            if (count > 0) {
                (end.fd == out[0] ? outcome.out : outcome.err)
                    .append(chunk, static_cast<size_t>(count));
            } else {
                end.fd = -1;
                --open;
            }
        }
    }
    ::close(out[0]);
    ::close(err[0]);
    outcome.code = ExitCodeOf(child);
    return outcome;
}

/// Runs varve on a terminal, types `answer` at its prompt, and returns all it printed as `out`.
Outcome RunOnTerminal(const Strings& arguments, const std::string& answer) {
    Program program(arguments);
    int terminal = -1;
    const pid_t child = ::forkpty(&terminal, nullptr, nullptr, nullptr);
    VARVE_CHECK(child >= 0);
    if (child == 0) program.Become();
    Outcome outcome;
    bool answered = false;
    char chunk[4096];
    for (ssize_t count; (count = ::read(terminal, chunk, sizeof chunk)) > 0;) {
        outcome.out.append(chunk, static_cast<size_t>(count));
        if (!answered && outcome.out.find("[y/N] ") != std::string::npos) {
            answered = true;
            EXPECT_EQ(::write(terminal, answer.data(), answer.size()),
                      static_cast<ssize_t>(answer.size()));
        }
    }
    ::close(terminal);
    outcome.code = ExitCodeOf(child);
    return outcome;
}

json::value Parsed(const std::string& text) {
    boost::system::error_code failure;
    json::value value = json::parse(text, failure);
    EXPECT_FALSE(failure) << text;
    return value;
}

bool Contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

class Cli : public ::testing::Test {
  protected:
    Outcome Varve(Strings arguments) {
        arguments.insert(arguments.begin(), {"--admin", server_.path()});
        return Invoke(arguments);
    }
    /// Must succeed; what it printed.
    std::string Done(Strings arguments) {
        const Outcome outcome = Varve(std::move(arguments));
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_EQ(outcome.err, "");
        return outcome.out;
    }
    json::value DoneJson(Strings arguments) {
        arguments.push_back("--json");
        return Parsed(Done(std::move(arguments)));
    }
    /// Must fail with `code`, one line on stderr and nothing on stdout.
    std::string Refused(int code, Strings arguments) {
        const Outcome outcome = Varve(std::move(arguments));
        EXPECT_EQ(outcome.code, code) << outcome.err;
        EXPECT_EQ(outcome.out, "");
        EXPECT_EQ(outcome.err.rfind("varve: ", 0), 0u) << outcome.err;
        EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
        return outcome.err;
    }
    void MakeDisk() {
        Done({"create", "disk0", "10G"});
        Done({"snapshot", "disk0@a"});
        Done({"snapshot", "disk0@b"});
    }
    Strings SnapshotNames(const std::string& disk) {
        Strings names;
        const json::value list = DoneJson({"list", disk});
        for (const json::value& each : list.at("snapshots").as_array()) {
            names.emplace_back(each.at("name").as_string());
        }
        return names;
    }

    AdminServer server_;
};

// ---- what the verbs do

TEST_F(Cli, CreatesAndListsDisks) {
    EXPECT_EQ(Done({"create", "disk0", "10G"}), "");
    EXPECT_EQ(Done({"create", "d", "512M"}), "");
    Done({"snapshot", "disk0@s"});
    EXPECT_EQ(Done({"list"}),
              "NAME        SIZE     USED  SNAPSHOTS  CLIENTS  CREATED\n"
              "d      512.0 MiB  1.0 MiB          0        0  2023-11-14T22:13:20.000Z\n"
              "disk0   10.0 GiB  1.0 MiB          1        0  2023-11-14T22:13:20.000Z\n");
    const json::value disk = DoneJson({"list"}).at("disks").at(1);
    EXPECT_EQ(disk.at("name"), "disk0");
    EXPECT_EQ(disk.at("size"), uint64_t{10} << 30);
    EXPECT_EQ(disk.at("used"), 1 << 20);
    EXPECT_EQ(disk.at("snapshots"), 1);
    EXPECT_EQ(disk.at("clients"), 0);
    EXPECT_EQ(disk.at("created"), "2023-11-14T22:13:20.000Z");
}

TEST_F(Cli, ListsSnapshotsOldestFirst) {
    MakeDisk();
    EXPECT_EQ(Done({"list", "disk0"}),
              "NAME  CREATED                       SIZE  REFERENCED   UNIQUE  GENERATION\n"
              "a     2023-11-14T22:13:22.000Z  10.0 GiB    40.0 KiB  8.0 KiB           2\n"
              "b     2023-11-14T22:13:23.000Z  10.0 GiB    40.0 KiB  8.0 KiB           3\n");
    const json::value list = DoneJson({"list", "disk0"});
    EXPECT_EQ(list.at("disk"), "disk0");
    EXPECT_EQ(list.at("snapshots").at(1), (json::value{{"name", "b"},
                                                       {"created", "2023-11-14T22:13:23.000Z"},
                                                       {"size", uint64_t{10} << 30},
                                                       {"generation", 3},
                                                       {"unique", 8192},
                                                       {"referenced", 40960}}));
}

TEST_F(Cli, ShowsADiskOrASnapshot) {
    MakeDisk();
    EXPECT_TRUE(Contains(Done({"show", "disk0"}), "10.0 GiB (10737418240 bytes)"));
    EXPECT_TRUE(Contains(Done({"show", "disk0@b"}), "disk0@b"));
    EXPECT_EQ(DoneJson({"show", "disk0"}).at("snapshots"), 2);
    const json::value snapshot = DoneJson({"show", "disk0@b"});
    EXPECT_EQ(snapshot.at("disk"), "disk0");
    EXPECT_EQ(snapshot.at("name"), "b");
    EXPECT_EQ(snapshot.at("unique"), 8192);
}

TEST_F(Cli, SnapshotsSeveralDisksInOneCut) {
    Done({"create", "a", "1M"});
    Done({"create", "b", "1M"});
    Done({"snapshot", "a@x", "b@y"});
    EXPECT_EQ(DoneJson({"show", "a@x"}).at("generation"),
              DoneJson({"show", "b@y"}).at("generation"));
    Refused(3, {"snapshot", "a@z", "none@z"});
    EXPECT_EQ(SnapshotNames("a"), (Strings{"x"}));
}

TEST_F(Cli, RestoresAndKeepsThePresentState) {
    MakeDisk();
    EXPECT_EQ(Done({"restore", "disk0@a", "--keep-as", "c", "--yes"}), "");
    EXPECT_EQ(SnapshotNames("disk0"), (Strings{"a", "b", "c"}));
    Refused(2, {"restore", "disk0@a", "--keep-as", "disk0@c", "--yes"});
    Refused(3, {"restore", "disk0@none", "--yes"});
}

TEST_F(Cli, ClonesRenamesResizes) {
    MakeDisk();
    Done({"clone", "disk0@a", "copy"});
    Done({"rename", "copy", "copy2"});
    Done({"rename", "disk0@a", "c"});
    EXPECT_EQ(SnapshotNames("disk0"), (Strings{"c", "b"}));
    Refused(2, {"rename", "disk0@c", "disk0@d"});
    Done({"resize", "copy2", "20G"});
    EXPECT_EQ(DoneJson({"show", "copy2"}).at("size"), uint64_t{20} << 30);
    Refused(2, {"resize", "copy2", "5G"});
    Done({"resize", "copy2", "5G", "--shrink", "--yes"});
    EXPECT_EQ(DoneJson({"show", "copy2"}).at("size"), uint64_t{5} << 30);
}

TEST_F(Cli, DeletesSnapshotsAndDisks) {
    MakeDisk();
    EXPECT_EQ(Done({"delete", "disk0@a", "--yes"}), "");
    EXPECT_EQ(SnapshotNames("disk0"), (Strings{"b"}));
    EXPECT_TRUE(Contains(Refused(2, {"delete", "disk0", "--yes"}), "--snapshots"));
    Done({"delete", "disk0", "--snapshots", "--yes"});
    EXPECT_EQ(Done({"list"}), "NAME  SIZE  USED  SNAPSHOTS  CLIENTS  CREATED\n");
}

TEST_F(Cli, RefusesWhileAClientIsAttachedUnlessItIsToDisconnect) {
    MakeDisk();
    const std::vector<Strings> verbs = {{"restore", "disk0@a"},
                                        {"resize", "disk0", "1G", "--shrink"},
                                        {"delete", "disk0@a"},
                                        {"delete", "disk0", "--snapshots"}};
    for (Strings verb : verbs) {
        server_.OnPool([](FakePool& pool) { pool.SetClients("disk0", 1); });
        verb.push_back("--yes");
        EXPECT_TRUE(Contains(Refused(5, verb), "--disconnect"));
        verb.push_back("--disconnect");
        Done(verb);
    }
}

TEST_F(Cli, WaitsForTheSpaceToComeBackWithProgress) {
    MakeDisk();
    server_.OnPool([](FakePool& pool) { pool.SetReclaimSteps(3); });
    const Outcome outcome = Varve({"delete", "disk0@a", "--yes", "--wait"});
    EXPECT_EQ(outcome.code, 0);
    EXPECT_EQ(outcome.out, "");
    EXPECT_TRUE(Contains(outcome.err, "reclaiming: 1 pending")) << outcome.err;
    EXPECT_EQ(DoneJson({"status"}).at("reclaim_pending"), 0);
    server_.OnPool([](FakePool& pool) { EXPECT_GT(pool.hurries(), 0u); });
    const Outcome document = Varve({"delete", "disk0@b", "--yes", "--wait", "--json"});
    EXPECT_EQ(Parsed(document.out).at("snapshot"), "disk0@b");
}

TEST_F(Cli, DoesNotWaitForAPoolThatHasFailed) {
    MakeDisk();
    server_.OnPool([](FakePool& pool) {
        pool.SetReclaimSteps(1'000'000);
        pool.SetFailure("fdatasync: Input/output error");
    });
    EXPECT_TRUE(Contains(Refused(1, {"delete", "disk0@a", "--yes", "--wait"}), "varve status"));
    EXPECT_TRUE(Contains(Done({"status"}), "FAILED, writes are refused: fdatasync"));
}

TEST_F(Cli, ListsAndDisconnectsClients) {
    MakeDisk();
    server_.OnClients([](FakeClients& clients) {
        clients.clients = {
            {1, "127.0.0.1:40000", "disk0", 0, 7, false, 12, 4096, 8192, true, "psk:alice"},
            {2, "unix:uid=0,pid=77", "disk0@a", 0, 61, true, 3, 0, 0}};
    });
    EXPECT_EQ(
        Done({"clients"}),
        "ID  EXPORT   ADDRESS            IDENTITY   ACCESS      SINCE                     IDLE  "
        "REQUESTS     READ  WRITTEN\n"
        " 1  disk0    127.0.0.1:40000    psk:alice  read-write  1970-01-01T00:00:00.000Z   7 s  "
        "      12  4.0 KiB  8.0 KiB\n"
        " 2  disk0@a  unix:uid=0,pid=77  -          read-only   1970-01-01T00:00:00.000Z  61 s  "
        "       3      0 B      0 B\n");
    EXPECT_EQ(DoneJson({"clients", "disk0@a"}).at("clients").as_array().size(), 1u);
    EXPECT_EQ(Done({"disconnect", "disk0"}), "disconnected 2\n");
    EXPECT_TRUE(DoneJson({"clients"}).at("clients").as_array().empty());
    Refused(3, {"disconnect", "none"});
    Refused(3, {"clients", "none"});
}

TEST_F(Cli, ShowsTheStatus) {
    MakeDisk();
    const std::string text = Done({"status"});
    EXPECT_TRUE(Contains(text, "/var/lib/varve")) << text;
    EXPECT_TRUE(Contains(text, "health     ok")) << text;
    const json::value status = DoneJson({"status"});
    EXPECT_EQ(status.at("version"), VARVE_VERSION);
    EXPECT_EQ(status.at("pool"), "/var/lib/varve");
    EXPECT_EQ(status.at("capacity").to_number<uint64_t>(),
              status.at("used").to_number<uint64_t>() + status.at("free").to_number<uint64_t>());
    EXPECT_EQ(status.at("disks"), 1);
    EXPECT_EQ(status.at("snapshots"), 2);
    EXPECT_TRUE(status.at("uptime_s").is_number());
}

TEST_F(Cli, ChecksAndExitsWith8OnDamage) {
    EXPECT_TRUE(Contains(Done({"check"}), "no damage found"));
    EXPECT_EQ(DoneJson({"check"}).at("ok"), true);
    server_.OnPool([](FakePool& pool) { pool.SetDamage({"block 7 has two owners", "x\ny"}); });
    const Outcome text = Varve({"check"});
    EXPECT_EQ(text.code, 8);
    EXPECT_TRUE(Contains(text.out, "block 7 has two owners\nx?y\n")) << text.out;
    EXPECT_EQ(std::count(text.err.begin(), text.err.end(), '\n'), 1) << text.err;
    const Outcome document = Varve({"check", "--json"});
    EXPECT_EQ(document.code, 8);
    const json::value report = Parsed(document.out);
    EXPECT_EQ(report.at("ok"), false);
    EXPECT_EQ(report.at("errors").as_array().size(), 2u);
    EXPECT_EQ(report.at("leaked_blocks"), 0);
}

TEST_F(Cli, ScrubsAndExitsWith8OnDamage) {
    EXPECT_TRUE(Contains(Done({"scrub"}), "no damage found"));
    EXPECT_EQ(DoneJson({"scrub"}).at("ok"), true);
    EXPECT_EQ(Varve({"scrub", "nobody"}).code, 3);
    server_.OnPool([](FakePool& pool) { pool.SetDamage({"something"}); });
    const Outcome text = Varve({"scrub"});
    EXPECT_EQ(text.code, 8);
    EXPECT_TRUE(Contains(text.out, "disk0@snap: offset 8192: 4096 bytes are damaged (block 77"))
        << text.out;
    EXPECT_TRUE(Contains(text.out, "\ndisk0: offset 8192: ")) << text.out;
    const Outcome document = Varve({"scrub", "--json"});
    EXPECT_EQ(document.code, 8);
    const json::value report = Parsed(document.out);
    EXPECT_EQ(report.at("damage").at(0).at("snapshot"), "snap");
    EXPECT_TRUE(report.at("damage").at(1).at("snapshot").is_null());
}

TEST_F(Cli, JsonOfAChangeSaysWhatWasDone) {
    EXPECT_EQ(DoneJson({"create", "d", "1M"}), (json::value{{"name", "d"}, {"size", 1 << 20}}));
    EXPECT_EQ(DoneJson({"snapshot", "d@s"}), (json::value{{"snapshots", {"d@s"}}}));
}

TEST_F(Cli, DiffTellsItAllInOneDocument) {
    Done({"create", "d", "4M"});
    Done({"snapshot", "d@a"});
    Done({"snapshot", "d@b"});
    const json::value told = DoneJson({"diff", "d@a", "d@b"});
    EXPECT_EQ(told, (json::value{{"disk", "d"},
                                 {"from", "a"},
                                 {"to", "b"},
                                 {"extents",
                                  {{{"offset", 0}, {"length", 4096}, {"zero", false}},
                                   {{"offset", 1 << 20}, {"length", 4096}, {"zero", true}},
                                   {{"offset", 2 << 20}, {"length", 4096}, {"zero", true}},
                                   {{"offset", 3 << 20}, {"length", 4096}, {"zero", true}}}}}));
    EXPECT_EQ(Done({"diff", "d@a", "d@b"}),
              " OFFSET  LENGTH  NOW\n"
              "      0    4096  data\n"
              "1048576    4096  zeros\n"
              "2097152    4096  zeros\n"
              "3145728    4096  zeros\n");
    Refused(3, {"diff", "d@a", "d@c"});
    Refused(2, {"diff", "d@a"});
}

TEST_F(Cli, ABookmarkIsListedBehindTheSnapshots) {
    Done({"create", "d", "4M"});
    Done({"snapshot", "d@a"});
    Done({"snapshot", "d@b"});
    Done({"delete", "d@a", "--bookmark", "--yes"});
    const json::value list = DoneJson({"list", "d"});
    EXPECT_EQ(list.at("snapshots").as_array().size(), 1u);
    EXPECT_EQ(list.at("bookmarks").at(0).at("name"), "a");
    EXPECT_TRUE(Contains(Done({"list", "d"}), "bookmark"));
    EXPECT_TRUE(Contains(Refused(2, {"delete", "d", "--bookmark", "--yes"}), "DISK@SNAP"));
}

TEST_F(Cli, PrintsTenThousandSnapshots) {
    Done({"create", "d", "1M"});
    server_.OnPool([](FakePool& pool) {
        Strings names;
        for (int i = 0; i < 10'000; ++i) names.push_back(fmt::format("d@s{}", i));
        Spawn([](FakePool* target, Strings all) -> Task<void> {
            (void)co_await target->CreateSnapshots(std::move(all));
        }(&pool, std::move(names)));
    });
    EXPECT_EQ(SnapshotNames("d").size(), 10'000u);
}

// ---- asking

TEST_F(Cli, WithoutATerminalDangerousVerbsNeedYes) {
    MakeDisk();
    const std::vector<Strings> verbs = {{"restore", "disk0@a"},
                                        {"resize", "disk0", "1G", "--shrink"},
                                        {"delete", "disk0@a"},
                                        {"delete", "disk0", "--snapshots"}};
    for (const Strings& verb : verbs) EXPECT_TRUE(Contains(Refused(2, verb), "--yes"));
    EXPECT_EQ(SnapshotNames("disk0"), (Strings{"a", "b"}));
    EXPECT_EQ(DoneJson({"show", "disk0"}).at("size"), uint64_t{10} << 30);
}

TEST_F(Cli, OnATerminalItAsksFirst) {
    MakeDisk();
    const Strings verb = {"--admin", server_.path(), "delete", "disk0@a"};
    for (const char* no : {"n\n", "\n", "nonsense\n", "\x04"}) {
        const Outcome refused = RunOnTerminal(verb, no);
        EXPECT_EQ(refused.code, 1);
        EXPECT_TRUE(Contains(refused.out, "Delete snapshot 'disk0@a'? [y/N]")) << refused.out;
        EXPECT_TRUE(Contains(refused.out, "nothing was changed")) << refused.out;
        EXPECT_EQ(SnapshotNames("disk0"), (Strings{"a", "b"}));
    }
    EXPECT_EQ(RunOnTerminal(verb, "y\n").code, 0);
    EXPECT_EQ(SnapshotNames("disk0"), (Strings{"b"}));
}

TEST_F(Cli, OnATerminalYesAnswersForYou) {
    MakeDisk();
    const Outcome done =
        RunOnTerminal({"--admin", server_.path(), "delete", "disk0@a", "--yes"}, "");
    EXPECT_EQ(done.code, 0);
    EXPECT_FALSE(Contains(done.out, "[y/N]"));
}

// ---- the grammar

TEST_F(Cli, OptionsMayStandAnywhere) {
    const std::string& path = server_.path();
    for (const Strings& words :
         std::vector<Strings>{{"--admin", path, "--json", "list"},
                              {"list", "--json", "--admin", path},
                              {"--json", "list", "--admin=" + path},
                              {"--yes", "list", "--json", "--admin", path}}) {
        const Outcome outcome = Invoke(words);
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_TRUE(Parsed(outcome.out).at("disks").as_array().empty());
    }
}

TEST_F(Cli, FindsTheSocketInTheEnvironment) {
    ::setenv("VARVE_ADMIN", server_.path().c_str(), 1);
    const Outcome found = Invoke({"list"});
    const Outcome overruled = Invoke({"list", "--admin", "/nonexistent/admin.sock"});
    ::unsetenv("VARVE_ADMIN");
    EXPECT_EQ(found.code, 0) << found.err;
    EXPECT_EQ(overruled.code, 7);
}

TEST_F(Cli, UsageErrorsExitWith2AndPointToHelp) {
    const std::vector<Strings> wrong = {{},
                                        {"frobnicate"},
                                        {"list", "--frobnicate"},
                                        {"-x", "list"},
                                        {"list", "a", "b"},
                                        {"list", "d@s"},
                                        {"create", "d"},
                                        {"create", "d", "1M", "2M"},
                                        {"create", "d", "1M", "--shrink"},
                                        {"snapshot"},
                                        {"restore", "d@s", "--keep-as"},
                                        {"restore", "d@s", "--keep-as="},
                                        {"list", "--json=yes"},
                                        {"delete", "d@s", "--snapshots", "--yes"},
                                        {"status", "now"},
                                        {"create", "d", "4k5"},
                                        {"create", "d", "0"},
                                        {"create", "d", "1000"},
                                        {"create", "--", "-d", "1M"},
                                        {"create", "", "1M"},
                                        {"create", "a b", "1M"},
                                        {"create", "a\nb", "1M"},
                                        {"create", "\xff", "1M"},
                                        {"create", std::string(5000, 'x'), "1M"},
                                        {"snapshot", "no-at"}};
    for (const Strings& words : wrong) Refused(2, words);
    EXPECT_EQ(Done({"list"}), "NAME  SIZE  USED  SNAPSHOTS  CLIENTS  CREATED\n");
}

TEST_F(Cli, ADiskIsSetOfflineAndOnline) {
    Done({"create", "disk0", "1G"});
    EXPECT_EQ(Done({"offline", "disk0"}), "");
    EXPECT_TRUE(Contains(Done({"show", "disk0"}), "the disk is offline"));
    EXPECT_TRUE(Contains(Done({"list", "--json"}), "\"offline\":true"));
    EXPECT_EQ(Done({"online", "disk0"}), "");
    EXPECT_FALSE(Contains(Done({"show", "disk0"}), "offline"));
    Refused(3, {"offline", "none"});
    Refused(2, {"online", "disk0", "--disconnect"});
}

TEST_F(Cli, HelpHasExamplesForEveryVerb) {
    const Outcome help = Invoke({"--help"});
    EXPECT_EQ(help.code, 0);
    for (const char* verb :
         {"create", "list", "show", "snapshot", "restore", "clone", "rename", "resize", "delete",
          "diff", "offline", "online", "clients", "disconnect", "status", "check", "scrub"}) {
        EXPECT_TRUE(Contains(help.out, std::string("\n  varve ") + verb)) << verb;
        const Outcome more = Invoke({verb, "--help"});
        EXPECT_EQ(more.code, 0);
        EXPECT_TRUE(Contains(more.out, std::string("Example:\n  varve ") + verb)) << verb;
    }
    EXPECT_TRUE(Contains(Invoke({"restore", "-h"}).out, "--keep-as SNAP"));
    EXPECT_EQ(Invoke({"--version"}).out, std::string("varve ") + VARVE_VERSION + "\n");
}

// ---- servers that are not there, or not what they should be

TEST_F(Cli, ExitCodesFollowTheKindsOfErrors) {
    MakeDisk();
    Refused(3, {"show", "none"});
    Refused(3, {"show", "disk0@none"});
    Refused(3, {"list", "none"});
    Refused(4, {"create", "disk0", "1G"});
    Refused(4, {"snapshot", "disk0@a"});
    server_.OnPool([](FakePool& pool) { pool.SetFull(true); });
    Refused(6, {"create", "d", "1G"});
}

TEST(CliWithoutServer, AnUnreachableServerIsExit7) {
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/admin.sock";
    EXPECT_EQ(Invoke({"list", "--admin", path}).code, 7);
    EXPECT_EQ(Invoke({"list", "--admin", directory.path() + "/none/admin.sock"}).code, 7);
    EXPECT_EQ(Invoke({"list", "--admin", "/"}).code, 7);
    EXPECT_EQ(Invoke({"delete", "d", "--admin", path}).code, 7);
    { const auto dead = admin::ListenUnix(path, 0660); }
    const Outcome dead = Invoke({"list", "--admin", path});
    EXPECT_EQ(dead.code, 7);
    EXPECT_TRUE(Contains(dead.err, "start varved")) << dead.err;
}

// They belong to another program, which varve becomes.
TEST(CliWithoutServer, OptionsMayStandBeforeTheVerbsOfThisMachineToo) {
    const testing::TemporaryDirectory nothing;
    ASSERT_EQ(::setenv("VARVE_ATTACH_STATE", nothing.path().c_str(), 1), 0);
    for (const Strings& words : {Strings{"--json", "attached"}, Strings{"attached", "--json"},
                                 Strings{"--admin", "attach", "--json", "attached"},
                                 Strings{"--admin=list", "attached", "--json", "--yes"}}) {
        const Outcome outcome = Invoke(words);
        EXPECT_EQ(outcome.code, 0) << outcome.err;
        EXPECT_EQ(outcome.out, "{\"attached\":[]}\n");
    }
    for (const Strings& words : {Strings{"--yes", "detach", "/dev/nbd15"},
                                 Strings{"detach", "/dev/nbd15", "-y", "--admin", "nowhere"}}) {
        const Outcome outcome = Invoke(words);
        EXPECT_EQ(outcome.code, 3) << outcome.err;
        EXPECT_NE(outcome.err.find("not attached"), std::string::npos) << outcome.err;
    }
    EXPECT_EQ(Invoke({"--json", "detach"}).code, 2);
    EXPECT_EQ(Invoke({"attach", "--version"}).out.rfind("varve ", 0), 0U);
    ::unsetenv("VARVE_ATTACH_STATE");
}

TEST(CliWithoutServer, TheOfflineCheckMakesNoPool) {
    TemporaryDirectory directory;
    for (const std::string& path : {directory.path(), directory.path() + "/none"}) {
        const Outcome outcome = Invoke({"check", "--pool", path});
        EXPECT_EQ(outcome.code, 3);
        EXPECT_TRUE(Contains(outcome.err, path)) << outcome.err;
    }
    EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
}

/// Answers one connection with fixed bytes, whatever it says, and closes.
Outcome RunAgainst(const std::string& answer, const Strings& arguments) {
    TemporaryDirectory directory;
    const std::string path = directory.path() + "/admin.sock";
    Result<admin::ListeningSocket> listening = admin::ListenUnix(path, 0660);
    VARVE_CHECK(listening.ok());
    std::thread server([&] {
        pollfd ready{listening.value().fd.get(), POLLIN, 0};
        VARVE_CHECK(::poll(&ready, 1, 60'000) == 1);
        const admin::OwnedFd client(::accept(ready.fd, nullptr, nullptr));
        char request[4096];
        (void)!::read(client.get(), request, sizeof request);
        (void)!::write(client.get(), answer.data(), answer.size());
    });
    Strings words = arguments;
    words.insert(words.begin(), {"--admin", path});
    Outcome outcome = Invoke(words);
    server.join();
    return outcome;
}

TEST(CliWithoutServer, AServerThatGoesAwayBeforeItAnswersIsExit7) {
    const Outcome lost = RunAgainst("", {"create", "d", "1G"});
    EXPECT_EQ(lost.code, 7);
    EXPECT_TRUE(Contains(lost.err, "before it answered")) << lost.err;
    EXPECT_EQ(RunAgainst("{\"jsonrpc\":\"2.0\",\"id\":1,\"res", {"list"}).code, 7);
}

TEST(CliWithoutServer, NonsenseFromTheServerIsOneClearLine) {
    for (const char* answer :
         {"HTTP/1.1 400 Bad Request\r\n", "{}\n", "[]\n", "null\n", "{\"error\":7}\n"}) {
        const Outcome outcome = RunAgainst(answer, {"list"});
        EXPECT_EQ(outcome.code, 1) << answer;
        EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    }
    const Outcome escape =
        RunAgainst(R"({"id":1,"error":{"message":"a\n\u001b[2Jb","data":{"kind":"busy"}}})"
                   "\n",
                   {"list"});
    EXPECT_EQ(escape.code, 5);
    EXPECT_EQ(escape.err, "varve: a??[2Jb\n");
}

TEST(CliWithoutServer, ResultsOfAnotherVersionAreShownAsFarAsKnown) {
    const Outcome list = RunAgainst(R"({"id":1,"result":{"disks":[{"name":"d","new":1},7]}})"
                                    "\n",
                                    {"list"});
    EXPECT_EQ(list.code, 0);
    EXPECT_EQ(list.out,
              "NAME  SIZE  USED  SNAPSHOTS  CLIENTS  CREATED\n"
              "d        -     -          -        -  -\n"
              "-        -     -          -        -  -\n");
}

}  // namespace
}  // namespace varve
