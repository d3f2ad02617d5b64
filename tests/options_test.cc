// Options: the command line, the configuration file, and every way to get them wrong.
#include "nbdserver/daemon/options.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace varve::nbdserver {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> UnixPaths(const Options& options) {
    std::vector<std::string> paths;
    for (const UnixAddress& address : options.listen_unix) paths.push_back(address.path);
    return paths;
}

class OptionsTest : public testing::Test {
  protected:
    OptionsTest() {
        std::string pattern = (fs::temp_directory_path() / "varve-options-XXXXXX").string();
        root_ = ::mkdtemp(pattern.data());
        file_ = root_ / "varved.conf";
    }
    ~OptionsTest() override { fs::remove_all(root_); }

    void Write(const std::string& text) { std::ofstream(file_) << text; }

    static Options Good(const std::vector<std::string>& arguments) {
        const Result<Options> options = ParseOptions(arguments);
        EXPECT_TRUE(options.ok()) << options.error().message;
        return options.ok() ? options.value() : Options{};
    }
    static void Bad(const std::vector<std::string>& arguments, const std::string& message) {
        const Result<Options> options = ParseOptions(arguments);
        ASSERT_FALSE(options.ok()) << message;
        EXPECT_EQ(options.error().kind, ErrorKind::kInvalid);
        EXPECT_EQ(options.error().message, message);
    }
    std::string Where(int line) const { return file_.string() + ":" + std::to_string(line) + ": "; }

    fs::path root_, file_;
};

TEST_F(OptionsTest, DefaultsAreTheContracts) {
    const Options options = Good({"--pool", "/p"});
    EXPECT_EQ(options.pool, "/p");
    EXPECT_EQ(options.data, "");
    EXPECT_TRUE(options.listen.empty());
    EXPECT_TRUE(options.listen_unix.empty());
    EXPECT_EQ(options.admin, "");
    EXPECT_EQ(options.threads, 0U);
    EXPECT_EQ(options.poll_us, 50U);
    EXPECT_TRUE(options.direct);
    EXPECT_EQ(options.pool_options.map_cache_bytes, 256U << 20);
    EXPECT_EQ(options.pool_options.ring_bytes, 64U << 20);
    EXPECT_EQ(options.negotiation_timeout_s, 10U);
    EXPECT_EQ(options.negotiation.options_max, 32U);
    EXPECT_EQ(options.negotiation.option_bytes_max, 8192U);
    EXPECT_EQ(options.connection.stall_ms_max, 5000U);
}

TEST_F(OptionsTest, EveryOptionIsRead) {
    const Options options = Good(
        {"--pool=/p",         "--data", "/dev/x",       "--listen",  "0.0.0.0:0",       "--listen",
         "[::1]:10810",       "--unix", "/a",           "--unix=/b", "--admin",         "/admin",
         "--threads",         "3",      "--poll",       "0",         "--cache",         "buffered",
         "--map-cache",       "1G",     "--log-format", "json",      "--log-level",     "debug",
         "--connections-max", "7",      "--capacity",   "10G",       "--stall-timeout", "9",
         "--journal",         "8M"});
    EXPECT_EQ(options.connection.stall_ms_max, 9000U);
    EXPECT_EQ(options.data, "/dev/x");
    ASSERT_EQ(options.listen.size(), 2U);
    EXPECT_EQ(options.listen[0].host, "0.0.0.0");
    EXPECT_EQ(options.listen[0].port, 0);
    EXPECT_EQ(options.listen[1].host, "::1");
    EXPECT_EQ(options.listen[1].port, 10810);
    EXPECT_EQ(UnixPaths(options), (std::vector<std::string>{"/a", "/b"}));
    EXPECT_EQ(options.admin, "/admin");
    EXPECT_EQ(options.threads, 3U);
    EXPECT_EQ(options.poll_us, 0U);
    EXPECT_FALSE(options.direct);
    EXPECT_EQ(options.pool_options.map_cache_bytes, 1U << 30);
    EXPECT_EQ(options.pool_options.ring_bytes, 8U << 20);
    EXPECT_EQ(options.log_format, LogFormat::kJson);
    EXPECT_EQ(options.log_level, LogLevel::kDebug);
    EXPECT_EQ(options.connections_max, 7U);
    EXPECT_EQ(options.pool_options.capacity_max, uint64_t{10} << 30);
}

TEST_F(OptionsTest, HelpVersionAndCheckNeedNoPool) {
    EXPECT_TRUE(Good({"--help"}).help);
    EXPECT_TRUE(Good({"--version"}).version);
    EXPECT_TRUE(Good({"--check-config"}).check_config);
    for (const char* option : {"--pool", "--listen", "--cache", "--negotiation-timeout"}) {
        EXPECT_NE(HelpText().find(option), std::string::npos) << option;
    }
}

TEST_F(OptionsTest, WrongUseIsOneClearLine) {
    Bad({}, "which pool? give --pool DIR; see varved --help");
    Bad({"--nope"}, "there is no option '--nope'; see varved --help");
    Bad({"pool"}, "there is no option 'pool'; see varved --help");
    Bad({"--pool"}, "--pool needs a value: DIR");
    Bad({"--pool="}, "--pool: the value is empty");
    Bad({"--pool", "/a", "--pool", "/b"}, "--pool is given twice");
    Bad({"--help=yes"}, "--help takes no value");
    Bad({"--pool", "/p", "--threads", "0"}, "--threads: '0' is not a number from 1 to 1024");
    Bad({"--pool", "/p", "--poll", "1001"}, "--poll: '1001' is not a number from 0 to 1000");
    Bad({"--pool", "/p", "--threads", "2x"}, "--threads: '2x' is not a number from 1 to 1024");
    Bad({"--pool", "/p", "--cache", "none"}, "--cache: 'none' is not direct or buffered");
    Bad({"--pool", "/p", "--map-cache", "1K"},
        "--map-cache: '1K' is not a size from 1.0 MiB to 1.0 TiB");
    Bad({"--pool", "/p", "--journal", "2G"},
        "--journal: '2G' is not a size from 1.0 MiB to 1.0 GiB");
    Bad({"--pool", "/p", "--map-cache", "much"},
        "--map-cache: 'much' is not a size; write bytes or a binary unit, as in 4096, 512M, 10G, "
        "2T");
    Bad({"--pool", "/p", "--log-level", "loud"},
        "--log-level: 'loud' is not a log level; use debug, info, warning or error");
}

TEST_F(OptionsTest, AddressesAreHostAndPort) {
    for (const char* text : {"localhost", "localhost:", ":10809", "::1:10809", "[::1]", "[]:1",
                             "a:65536", "a:-1", "a:1x", ""}) {
        EXPECT_FALSE(ParseTcpAddress(text).ok()) << text;
    }
    for (const char* text : {"localhost:0", "127.0.0.1:65535", "[::]:10809", "[fe80::1%lo]:1"}) {
        EXPECT_TRUE(ParseTcpAddress(text).ok()) << text;
    }
}

TEST_F(OptionsTest, ListenersHaveTheirOwnPolicy) {
    const Options options =
        Good({"--pool", "/p", "--listen", "[::1]:1,tls=require", "--listen",
              "a:2,read-only,tls=allow", "--listen", "a:3", "--unix", "/a,b,tls=off", "--tls-psk",
              "/keys", "--tls-certificates", "/c", "--tls-verify-peer"});
    ASSERT_EQ(options.listen.size(), 3U);
    EXPECT_EQ(options.listen[0].host, "::1");
    EXPECT_EQ(options.listen[0].policy.tls, TlsMode::kRequire);
    EXPECT_FALSE(options.listen[0].policy.read_only);
    EXPECT_EQ(options.listen[1].port, 2);
    EXPECT_EQ(options.listen[1].policy.tls, TlsMode::kAllow);
    EXPECT_TRUE(options.listen[1].policy.read_only);
    EXPECT_FALSE(options.listen[2].policy.tls);
    EXPECT_EQ(options.listen_unix.at(0).path, "/a,b");
    EXPECT_EQ(options.tls.psk, "/keys");
    EXPECT_TRUE(options.tls.verify_peer);
    Bad({"--pool", "/p", "--listen", "a:1,tls=on"},
        "--listen: 'tls=on' is not tls=off, tls=allow or tls=require");
    Bad({"--pool", "/p", "--unix", "/a,tls="},
        "--unix: 'tls=' is not tls=off, tls=allow or tls=require");
    Bad({"--pool", "/p", "--listen", "a:1,tls=allow"},
        "tls= needs --tls-certificates DIR or --tls-psk FILE");
    Bad({"--pool", "/p", "--tls-psk", "/k", "--tls-verify-peer"},
        "--tls-verify-peer needs --tls-certificates");
    Write("pool = /p\ntls-certificates = /c\ntls-verify-peer = off\n");
    EXPECT_FALSE(Good({"--config", file_}).tls.verify_peer);
    Write("tls-verify-peer = yes\n");
    Bad({"--config", file_}, Where(1) + "tls-verify-peer: 'yes' is not on or off");
}

TEST_F(OptionsTest, FileSaysTheSame) {
    Write(
        "# a comment\n\n"
        "pool = /var/lib/varve\n"
        "  listen=127.0.0.1:1 # behind a value\r\n"
        "listen = [::1]:2\n"
        "unix = /run/a#b\n"
        "map-cache = 2G");
    const Options options = Good({"--config", file_});
    EXPECT_EQ(options.pool, "/var/lib/varve");
    ASSERT_EQ(options.listen.size(), 2U);
    EXPECT_EQ(options.listen[1].port, 2);
    EXPECT_EQ(UnixPaths(options), std::vector<std::string>{"/run/a#b"});
    EXPECT_EQ(options.pool_options.map_cache_bytes, uint64_t{2} << 30);
}

TEST_F(OptionsTest, CommandLineGoesBeforeTheFile) {
    Write("pool = /file\nthreads = 4\nlisten = a:1\nlisten = b:2\nunix = /u\n");
    const Options options =
        Good({"--pool", "/line", "--listen", "c:3", "--config", file_.string()});
    EXPECT_EQ(options.pool, "/line");
    EXPECT_EQ(options.threads, 4U);
    ASSERT_EQ(options.listen.size(), 1U);
    EXPECT_EQ(options.listen[0].host, "c");
    EXPECT_EQ(UnixPaths(options), std::vector<std::string>{"/u"});
}

TEST_F(OptionsTest, ErrorsInTheFileNameFileAndLine) {
    const std::vector<std::string> arguments = {"--config", file_, "--check-config"};
    Write("pool = /p\n\nnope = 1\n");
    Bad(arguments, Where(3) + "there is no setting 'nope'; `varved --help` lists them");
    Write("help = 1\n");
    Bad(arguments, Where(1) + "there is no setting 'help'; `varved --help` lists them");
    Write("config = other\n");
    Bad(arguments, Where(1) + "there is no setting 'config'; `varved --help` lists them");
    Write("pool /p\n");
    Bad(arguments, Where(1) + "this is not of the form name = value");
    Write("threads = many\n");
    Bad(arguments, Where(1) + "threads: 'many' is not a number from 1 to 1024");
    Write("pool = /a\npool = /b\n");
    Bad(arguments, Where(2) + "pool is given twice");
    Write("pool =\n");
    Bad(arguments, Where(1) + "pool: the value is empty");
    fs::remove(file_);
    Bad(arguments, "cannot read " + file_.string() + ": No such file or directory");
}

}  // namespace
}  // namespace varve::nbdserver
