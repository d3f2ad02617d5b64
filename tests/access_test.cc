// Who may open what: ranges of addresses, patterns of names, rules and what they give together.
#include <arpa/inet.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <netinet/in.h>

#include <random>
#include <set>

#include "nbdserver/access/rules.h"

namespace varve::nbdserver::access {
namespace {

Address Parsed(const std::string& text) {
    const std::optional<Address> address = ParseAddress(text);
    VARVE_CHECK(address);
    return *address;
}

bool Holds(const std::string& range, const std::string& address) {
    const Result<AddressRange> parsed = ParseAddressRange(range);
    VARVE_CHECK(parsed.ok());
    return parsed.value().Contains(Parsed(address));
}

/// Why it is refused; empty if it is not.
std::string WhyNoRange(const std::string& text) {
    const Result<AddressRange> parsed = ParseAddressRange(text);
    return parsed.ok() ? "" : parsed.error().message;
}

TEST(AddressTest, IsReadFromSocketsAndText) {
    sockaddr_in v4{};
    v4.sin_family = AF_INET;
    ::inet_pton(AF_INET, "192.0.2.7", &v4.sin_addr);
    EXPECT_EQ(AddressOf(reinterpret_cast<sockaddr&>(v4)), Parsed("192.0.2.7"));
    sockaddr_in6 v6{};
    v6.sin6_family = AF_INET6;
    ::inet_pton(AF_INET6, "::ffff:192.0.2.7", &v6.sin6_addr);  // as a listener on [::] sees it
    EXPECT_EQ(AddressOf(reinterpret_cast<sockaddr&>(v6)), Parsed("192.0.2.7"));
    ::inet_pton(AF_INET6, "fd00::1", &v6.sin6_addr);
    EXPECT_EQ(AddressOf(reinterpret_cast<sockaddr&>(v6)), Parsed("FD00:0::1"));
    sockaddr local{};
    local.sa_family = AF_UNIX;
    EXPECT_FALSE(AddressOf(local));
    EXPECT_TRUE(Parsed("::ffff:1.2.3.4").is_v4());
    EXPECT_FALSE(Parsed("::1.2.3.4").is_v4());
    EXPECT_EQ(Format(Parsed("::ffff:1.2.3.4")), "1.2.3.4");
    EXPECT_EQ(Format(Parsed("fd00:0:0::1")), "fd00::1");
}

TEST(AddressRangeTest, IsExactAtItsEnds) {
    EXPECT_TRUE(Holds("10.0.0.0/8", "10.0.0.0"));
    EXPECT_TRUE(Holds("10.0.0.0/8", "10.255.255.255"));
    EXPECT_FALSE(Holds("10.0.0.0/8", "11.0.0.0"));
    EXPECT_FALSE(Holds("10.0.0.0/8", "9.255.255.255"));
    // Not as text: "192.168.1" begins all of these.
    EXPECT_TRUE(Holds("192.168.1.0/24", "192.168.1.9"));
    EXPECT_FALSE(Holds("192.168.1.0/24", "192.168.10.9"));
    EXPECT_FALSE(Holds("192.168.1.0/24", "192.168.100.1"));
    EXPECT_TRUE(Holds("10.1.2.64/26", "10.1.2.127"));
    EXPECT_FALSE(Holds("10.1.2.64/26", "10.1.2.128"));
    EXPECT_FALSE(Holds("10.1.2.64/26", "10.1.2.63"));
    EXPECT_TRUE(Holds("10.0.0.4/31", "10.0.0.5"));
    EXPECT_FALSE(Holds("10.0.0.4/31", "10.0.0.6"));
    EXPECT_FALSE(Holds("10.0.0.4/31", "10.0.0.3"));
    for (const char* alone : {"10.0.0.4/32", "10.0.0.4"}) {
        EXPECT_TRUE(Holds(alone, "10.0.0.4"));
        EXPECT_FALSE(Holds(alone, "10.0.0.5"));
    }
    EXPECT_TRUE(Holds("0.0.0.0/0", "255.255.255.255"));
    EXPECT_TRUE(Holds("128.0.0.0/1", "128.0.0.0"));
    EXPECT_FALSE(Holds("128.0.0.0/1", "127.255.255.255"));
    EXPECT_TRUE(Holds("fd00::/8", "fdff:ffff::1"));
    EXPECT_FALSE(Holds("fd00::/8", "fe00::"));
    EXPECT_TRUE(Holds("2001:db8::2/127", "2001:db8::3"));
    EXPECT_FALSE(Holds("2001:db8::2/127", "2001:db8::4"));
    EXPECT_FALSE(Holds("2001:db8::2/127", "2001:db8::1"));
    EXPECT_FALSE(Holds("2001:db8::2/128", "2001:db8::3"));
    EXPECT_TRUE(Holds("2001:db8:0:8000::/49", "2001:db8:0:ffff::"));
    EXPECT_FALSE(Holds("2001:db8:0:8000::/49", "2001:db8:0:7fff::"));
}

TEST(AddressRangeTest, Ipv4AndIpv6ShareNothing) {
    EXPECT_TRUE(Holds("::/0", "fd00::1"));
    EXPECT_FALSE(Holds("::/0", "10.0.0.1"));
    EXPECT_FALSE(Holds("::/0", "::ffff:10.0.0.1"));
    EXPECT_FALSE(Holds("::/80", "10.0.0.1"));
    EXPECT_FALSE(
        Holds("::fffe:0:0/95", "10.0.0.1"));  // all bits but the last are the mapped form's
    EXPECT_FALSE(Holds("0.0.0.0/0", "::1"));
    EXPECT_FALSE(Holds("0.0.0.0/0", "::"));
    // The mapped form is the address of IPv4, in a rule as on a socket.
    EXPECT_TRUE(Holds("::ffff:0:0/96", "10.0.0.1"));
    EXPECT_TRUE(Holds("::ffff:10.0.0.0/104", "10.9.9.9"));
    EXPECT_FALSE(Holds("::ffff:10.0.0.0/104", "11.0.0.0"));
    EXPECT_TRUE(Holds("10.0.0.0/8", "::ffff:10.9.9.9"));
    EXPECT_TRUE(Holds("::ffff:10.0.0.4", "10.0.0.4"));
}

/// Every prefix of random addresses: the range's ends are in it, their neighbours are not.
TEST(AddressRangeTest, AgreesWithWideArithmetic) {
    const unsigned seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937_64 random(seed);
    __extension__ typedef unsigned __int128 Wide;  // NOLINT: ISO C++ has none
    const auto address = [](Wide number) {
        Address a;
        for (size_t i = 16; i-- > 0; number >>= 8) a.bytes[i] = static_cast<uint8_t>(number);
        return a;
    };
    const Wide mapped = Wide{0xffff} << 32;
    for (int round = 0; round < 2000; ++round) {
        const bool v4 = round % 2 == 0;
        const unsigned width = v4 ? 32 : 128,
                       prefix = static_cast<unsigned>(round / 2) % (width + 1);
        const Wide all = v4 ? 0xffff'ffff : ~Wide{0};
        const Wide behind = prefix == width ? 0 : all >> prefix;
        const Wide base = v4 ? mapped : Wide{0x20} << 120;  // far from the other kind
        const Wide any = v4 ? Wide{random() & 0xffff'ffff} : (Wide{random()} << 64 | random()) >> 3;
        const Wide first = prefix == 0 ? (v4 ? mapped : Wide{0}) : (base | any) & ~behind;
        const Wide last = first | behind;
        const std::string text = fmt::format("{}/{}", Format(address(first)), prefix);
        const Result<AddressRange> range = ParseAddressRange(text);
        ASSERT_TRUE(range.ok()) << range.error().message;
        EXPECT_TRUE(range.value().Contains(address(first))) << text;
        EXPECT_TRUE(range.value().Contains(address(last))) << text;
        EXPECT_TRUE(range.value().Contains(address(first | (behind & random())))) << text;
        if (prefix == 0) continue;
        EXPECT_FALSE(range.value().Contains(address(first - 1))) << text;
        EXPECT_FALSE(range.value().Contains(address(last + 1))) << text;
    }
}

TEST(AddressRangeTest, WhatIsNoneIsRefused) {
    for (const char* text : {"",
                             "/",
                             "/8",
                             "10",
                             "10.0.0",
                             "10.0.0.0/",
                             "10.0.0.0/33",
                             "10.0.0.0/-1",
                             "10.0.0.0/+8",
                             "10.0.0.0/08",
                             "10.0.0.0/8 ",
                             " 10.0.0.0/8",
                             "10.0.0.0/8/8",
                             "10.0.0.0/255.0.0.0",
                             "010.0.0.0/8",
                             "0x0a.0.0.0/8",
                             "10.0.0.256",
                             "::/129",
                             "::g",
                             "[::1]",
                             "fe80::1%lo",
                             "10.0.0.1:10809",
                             "localhost",
                             "any",
                             "10.0.0.0/99999999999999999999"}) {
        EXPECT_NE(WhyNoRange(text), "") << text;
    }
    EXPECT_NE(WhyNoRange(std::string("10.0.0.1\0", 9)), "");
    EXPECT_EQ(WhyNoRange("10.1.2.3/8"),
              "'10.1.2.3/8' has bits behind its prefix; write 10.0.0.0/8, or 10.1.2.3 alone");
    EXPECT_EQ(WhyNoRange("fd00::1/8"),
              "'fd00::1/8' has bits behind its prefix; write fd00::/8, or fd00::1 alone");
    EXPECT_NE(WhyNoRange("10.0.0.1/31"), "");
    EXPECT_NE(WhyNoRange("::ffff:10.1.2.3/104"), "");
    EXPECT_NE(WhyNoRange("::ffff:10.0.0.0/64"), "");  // would be ::/64, which holds no IPv4
    EXPECT_NE(WhyNoRange("1.0.0.0/0"), "");
}

TEST(MatchesTest, StarsAndQuestionMarks) {
    EXPECT_TRUE(Matches("disk0", "disk0"));
    EXPECT_FALSE(Matches("disk0", "disk00"));
    EXPECT_FALSE(Matches("disk0", "disk"));
    EXPECT_FALSE(Matches("disk0", "Disk0"));
    EXPECT_TRUE(Matches("*", "disk0"));
    EXPECT_TRUE(Matches("disk?", "disk0"));
    EXPECT_FALSE(Matches("disk?", "disk"));
    EXPECT_FALSE(Matches("disk?", "disk00"));
    EXPECT_TRUE(Matches("vm-*", "vm-"));
    EXPECT_TRUE(Matches("vm-*", "vm-a-b"));
    EXPECT_FALSE(Matches("vm-*", "vm"));
    EXPECT_FALSE(Matches("vm-*", "my-vm-1"));
    EXPECT_TRUE(Matches("*-vm-*", "my-vm-1"));
    EXPECT_TRUE(Matches("*a*b*c*", "xxaxxbxxbxxc"));
    EXPECT_FALSE(Matches("*a*b*c*", "xxaxxcxxb"));
    EXPECT_TRUE(Matches("**", "a"));
    EXPECT_TRUE(Matches("*aab", "aaaaaab"));
    EXPECT_FALSE(Matches("disk.", "disk0"));
}

TEST(MatchesTest, NothingStandsForTheAtSign) {
    EXPECT_FALSE(Matches("*", "disk0@monday"));
    EXPECT_FALSE(Matches("disk0*", "disk0@monday"));
    EXPECT_FALSE(Matches("disk0?monday", "disk0@monday"));
    EXPECT_FALSE(Matches("*monday", "disk0@monday"));
    EXPECT_FALSE(Matches("disk0", "disk0@monday"));
    EXPECT_TRUE(Matches("*@*", "disk0@monday"));
    EXPECT_TRUE(Matches("disk0@*", "disk0@monday"));
    EXPECT_TRUE(Matches("*@m?nday", "disk0@monday"));
    EXPECT_FALSE(Matches("*@tues*", "disk0@monday"));
    EXPECT_FALSE(Matches("*@*", "disk0"));
    EXPECT_FALSE(Matches("disk0@*", "disk1@monday"));
    EXPECT_FALSE(Matches("a@*", "b@a@c"));
}

/// Against a matcher that tries everything.
bool Slowly(std::string_view pattern, std::string_view name) {
    if (pattern.empty()) return name.empty();
    const bool one =
        !name.empty() && (pattern[0] == name[0] || (pattern[0] == '?' && name[0] != '@'));
    if (pattern[0] != '*') return one && Slowly(pattern.substr(1), name.substr(1));
    return Slowly(pattern.substr(1), name) ||
           (!name.empty() && name[0] != '@' && Slowly(pattern, name.substr(1)));
}

TEST(MatchesTest, AgreesWithATrialOfEverything) {
    const unsigned seed = std::random_device{}();
    SCOPED_TRACE(fmt::format("seed {}", seed));
    std::mt19937 random(seed);
    const auto word = [&](std::string_view letters, size_t most) {
        std::string text(random() % (most + 1), ' ');
        for (char& c : text) c = letters[random() % letters.size()];
        return text;
    };
    unsigned matched = 0;
    for (int round = 0; round < 200'000; ++round) {
        const std::string pattern = word("ab@*?*", 8), name = word("aab@", 8);
        const bool expected = Slowly(pattern, name);
        matched += expected;
        ASSERT_EQ(Matches(pattern, name), expected) << pattern << " " << name;
    }
    EXPECT_GT(matched, 1000U);
}

std::shared_ptr<const Rules> Good(const std::string& text) {
    const auto rules = Rules::Parse(text);
    if (!rules.ok()) ADD_FAILURE() << rules.error().message;
    return rules.ok() ? rules.value() : nullptr;
}

std::string WhyWrong(const std::string& text) {
    const auto rules = Rules::Parse(text);
    return rules.ok() ? "" : rules.error().message;
}

Subject From(const std::string& address) {
    return {Parsed(address), {}, {}};
}
Subject Local(uint32_t uid) {
    return {{}, uid, {}};
}
Subject User(const std::string& user, const std::string& address = "10.0.0.1") {
    Subject subject = From(address);
    subject.identity.psk_user = user;
    return subject;
}
Subject Certified(const std::string& name, std::vector<std::string> names = {}) {
    Subject subject = From("10.0.0.1");
    subject.identity.common_name = name;
    subject.identity.names = std::move(names);
    return subject;
}

Right Of(const std::shared_ptr<const Rules>& rules, const Subject& subject,
         const std::string& name) {
    return Grants(rules, subject).Of(name);
}

TEST(RulesTest, WithoutRulesEverybodyMayEverything) {
    EXPECT_EQ(Of(nullptr, From("10.0.0.1"), "disk0"), Right::kWrite);
    EXPECT_EQ(Grants().Of("disk0@monday"), Right::kWrite);
}

TEST(RulesTest, WhatNoRuleGivesNobodyMay) {
    const auto rules = Good("address=10.0.0.0/8 vm-* read-write\nany public read-only");
    EXPECT_EQ(Of(rules, From("10.1.1.1"), "vm-1"), Right::kWrite);
    EXPECT_EQ(Of(rules, From("10.1.1.1"), "other"), Right::kNone);
    EXPECT_EQ(Of(rules, From("11.1.1.1"), "vm-1"), Right::kNone);
    EXPECT_EQ(Of(rules, From("11.1.1.1"), "public"), Right::kRead);
    EXPECT_EQ(Of(rules, Local(0), "vm-1"), Right::kNone);
    EXPECT_EQ(Of(rules, Local(0), "public"), Right::kRead);
    EXPECT_EQ(Of(rules, Subject{}, "public"), Right::kRead);
}

TEST(RulesTest, GiveTogetherInAnyOrder) {
    for (const char* text : {"any * read-only\npsk=alice a b read-write\n",
                             "psk=alice a b read-write\nany * read-only\n"}) {
        const auto rules = Good(text);
        EXPECT_EQ(Of(rules, User("alice"), "a"), Right::kWrite);
        EXPECT_EQ(Of(rules, User("alice"), "b"), Right::kWrite);
        EXPECT_EQ(Of(rules, User("alice"), "c"), Right::kRead);
        EXPECT_EQ(Of(rules, User("bob"), "a"), Right::kRead);
        EXPECT_EQ(Of(rules, User("bob"), "a@s"), Right::kNone);
    }
}

TEST(RulesTest, AllConditionsOfALineMustHold) {
    const auto rules = Good("psk=alice address=10.0.0.0/8 disk0 read-write\n");
    EXPECT_EQ(Of(rules, User("alice", "10.9.9.9"), "disk0"), Right::kWrite);
    EXPECT_EQ(Of(rules, User("alice", "11.0.0.1"), "disk0"), Right::kNone);
    EXPECT_EQ(Of(rules, User("bob", "10.9.9.9"), "disk0"), Right::kNone);
}

/// A diff shows the newer snapshot's content, and where the older one had other.
TEST(RulesTest, ADiffNeedsTheRightToBothOfItsSnapshots) {
    const auto rules = Good(
        "psk=both d@new d@old read-write\npsk=new d@new d e@* read-write\npsk=old d@old "
        "read-write\n"
        "psk=glob d@n* read-only\npsk=all *@* read-only\nuid=0 * read-write");
    EXPECT_EQ(Of(rules, User("both"), "d@new~old"), Right::kRead);
    EXPECT_EQ(Of(rules, User("all"), "d@new~old"), Right::kRead);
    EXPECT_EQ(Of(rules, User("new"), "d@new~old"), Right::kNone);
    EXPECT_EQ(Of(rules, User("old"), "d@new~old"), Right::kNone);
    EXPECT_EQ(Of(rules, User("glob"), "d@new~old"), Right::kNone);  // as d@n* it would fit
    EXPECT_EQ(Of(rules, User("glob"), "d@new~nearly"), Right::kRead);
    EXPECT_EQ(Of(rules, Local(0), "d@new~old"), Right::kNone);
    EXPECT_EQ(Of(rules, User("all"), "d~old"), Right::kNone);
    EXPECT_EQ(Of(rules, User("all"), "d~old@new"), Right::kNone);
    EXPECT_EQ(Grants().Of("d@new~old"), Right::kRead);
}

TEST(RulesTest, EachKindOfIdentity) {
    const auto rules = Good(
        "uid=1000 u read-write\npsk=alice p read-write\npsk=* anykey read-only\n"
        "certificate=backup c read-write\ncertificate=* anycert read-only\n"
        "certificate=\"Doe, John # 1\" q read-write\n");
    EXPECT_EQ(Of(rules, Local(1000), "u"), Right::kWrite);
    EXPECT_EQ(Of(rules, Local(0), "u"), Right::kNone);
    EXPECT_EQ(Of(rules, From("0.0.3.232"), "u"), Right::kNone);
    EXPECT_EQ(Of(rules, User("alice"), "p"), Right::kWrite);
    EXPECT_EQ(Of(rules, User("Alice"), "p"), Right::kNone);
    EXPECT_EQ(Of(rules, User("alice2"), "p"), Right::kNone);
    EXPECT_EQ(Of(rules, User(""), "anykey"), Right::kNone);
    EXPECT_EQ(Of(rules, User("bob"), "anykey"), Right::kRead);
    EXPECT_EQ(Of(rules, Certified("alice"), "p"), Right::kNone);  // a name, but not a key's
    EXPECT_EQ(Of(rules, User("backup"), "c"), Right::kNone);
    EXPECT_EQ(Of(rules, Certified("backup"), "c"), Right::kWrite);
    EXPECT_EQ(Of(rules, Certified("x", {"y", "backup"}), "c"), Right::kWrite);
    EXPECT_EQ(Of(rules, Certified("x", {"backup.example"}), "c"), Right::kNone);
    EXPECT_EQ(Of(rules, Certified("", {"x"}), "anycert"), Right::kRead);
    EXPECT_EQ(Of(rules, Certified(""), "anycert"), Right::kNone);
    EXPECT_EQ(Of(rules, Certified("Doe, John # 1"), "q"), Right::kWrite);
}

TEST(RulesTest, CommentsBlanksAndLineEnds) {
    const auto rules =
        Good("# nothing\n\n  \t\r\n\tany\ta   b\tread-only  # why\r\nany c read-only");
    ASSERT_EQ(rules->rules().size(), 2U);
    EXPECT_EQ(rules->rules()[0].exports, (std::vector<std::string>{"a", "b"}));
    EXPECT_EQ(Of(rules, From("::1"), "c"), Right::kRead);
    // Within a word it is one of its characters.
    EXPECT_EQ(Of(Good("psk=a#b x read-only"), User("a#b"), "x"), Right::kRead);
}

TEST(RulesTest, WhatIsWrongIsSaidWithItsLine) {
    EXPECT_EQ(WhyWrong(""), "there is no rule in it, so nobody could open anything");
    EXPECT_EQ(WhyWrong("# any * read-write\n"), WhyWrong(""));
    const std::string good = "any a read-only\n";
    for (const char* line : {"any",
                             "any read-only",
                             "any a",
                             "any a read",
                             "any a rw",
                             "any a read-only read-write x",
                             "a read-only",
                             "* read-write",
                             "read-write",
                             "psk=alice read-only",
                             "psk=alice a",
                             "psk=alice any read",
                             "psk= a read-only",
                             "psk a read-only",
                             "user=alice a read-only",
                             "psk=a psk=b x read-only",
                             "uid=1 uid=1 x read-only",
                             "certificate=a certificate=b x read-only",
                             "address=::1 address=::1 x read-only",
                             "uid=-1 a read-only",
                             "uid=root a read-only",
                             "uid=4294967296 a read-only",
                             "uid=1x a read-only",
                             "address=10.1.1.1/8 a read-only",
                             "address=host a read-only",
                             "address= a read-only",
                             "any a/b read-only",
                             "any @a read-only",
                             "any a@ read-only",
                             "any a@b@c read-only",
                             "any a@b~c read-only",
                             "any [a-z] read-only",
                             "any \"a read-only",
                             "any \"\" read-only",
                             "any a,b read-only",
                             "any a\x01 read-only",
                             "any psk=alice a read-only",
                             "address=::/0 uid=0 a read-only",
                             "certificate=* uid=0 psk=alice a read-only"}) {
        const std::string why = WhyWrong(good + line + "\n" + good);
        EXPECT_EQ(why.substr(0, 8), "line 2: ") << line << ": " << why;
        EXPECT_EQ(why.find('\n'), std::string::npos);
    }
    EXPECT_EQ(WhyWrong("uid=0 address=::1 a read-only"),
              "line 1: address= and uid= never hold together, and all on a line must; write a line "
              "for each");
    EXPECT_EQ(WhyWrong("uid=0 psk=alice a read-only\naddress=::1 certificate=a a read-only"), "");
    EXPECT_NE(WhyWrong(std::string("any a\0b read-only", 17)), "");
    EXPECT_NE(WhyWrong("any " + std::string(1025, 'a') + " read-only"), "");
}

/// A file that is being written, or whose disk was full: no beginning of a rule is another rule.
TEST(RulesTest, NoBeginningOfALineGivesAnything) {
    const std::string line = "psk=alice address=10.0.0.0/8 vm-1 vm-2@* read-write";
    for (size_t length = 0; length < line.size(); ++length) {
        EXPECT_NE(WhyWrong(line.substr(0, length)), "") << line.substr(0, length);
    }
}

TEST(RulesTest, HaveABound) {
    std::string text;
    for (size_t i = 0; i < kPatternsMax / 2; ++i) text += "any a b read-only\n";
    EXPECT_EQ(WhyWrong(text), "");
    EXPECT_EQ(WhyWrong(text + "any a read-only\n"),
              "line 5001: there are more than 10000 exports in it");
}

TEST(GrantsTest, AreTheSameForThoseWhomTheSameRulesFit) {
    const std::string text =
        "address=10.0.0.0/8 a b read-only\npsk=alice a read-write\nany c read-only";
    const auto rules = Good(text), others = Good(text);
    EXPECT_EQ(Grants(rules, From("10.0.0.1")), Grants(rules, From("10.0.0.2")));
    EXPECT_EQ(Grants(rules, From("10.0.0.1")), Grants(rules, User("bob")));
    EXPECT_FALSE(Grants(rules, From("10.0.0.1")) == Grants(rules, User("alice")));
    EXPECT_FALSE(Grants(rules, From("10.0.0.1")) == Grants(others, From("10.0.0.1")));
    EXPECT_FALSE(Grants(rules, From("10.0.0.1")) == Grants());
    EXPECT_EQ(Grants(rules, From("10.0.0.1")).patterns(), 3U);
    EXPECT_EQ(Grants().patterns(), 0U);
}

}  // namespace
}  // namespace varve::nbdserver::access
