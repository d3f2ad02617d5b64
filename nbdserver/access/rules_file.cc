// The form of an access file: Rules::Parse() and Rules::Load().
#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <utility>

#include "base/small_file.h"
#include "nbdserver/access/rules.h"

namespace varve::nbdserver::access {
namespace {

constexpr size_t kWordBytesMax = 1024;

Error Wrong(std::string message) {
    return MakeError(ErrorKind::kInvalid, std::move(message));
}

bool IsBlank(char c) {
    return c == ' ' || c == '\t';
}

/// The words of a line. What is between two " belongs to one word, blanks and # too; a # at the
/// beginning of a word ends the line.
Result<std::vector<std::string>> Split(std::string_view line) {
    std::vector<std::string> words;
    for (size_t i = 0; i < line.size();) {
        if (IsBlank(line[i])) {
            ++i;
            continue;
        }
        if (line[i] == '#') break;
        std::string word;
        bool quoted = false;
        for (; i < line.size() && (quoted || !IsBlank(line[i])); ++i) {
            if (line[i] == '"') {
                quoted = !quoted;
            } else if (std::iscntrl(static_cast<unsigned char>(line[i]))) {
                return Wrong("there is a control character in it");
            } else {
                word += line[i];
            }
        }
        if (quoted) return Wrong("a \" has no second one");
        if (word.size() > kWordBytesMax) {
            return Wrong(fmt::format("a word has more than {} bytes", kWordBytesMax));
        }
        words.push_back(std::move(word));
    }
    return words;
}

Result<uint32_t> ParseUid(std::string_view text) {
    uint32_t uid = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), uid);
    if (error == std::errc() && end == text.data() + text.size()) return uid;
    return Wrong(fmt::format("'{}' is not the number of a user", text));
}

/// Takes a condition. False: it is none.
Result<bool> TakeCondition(std::string_view word, Who& who) {
    const size_t equals = word.find('=');
    if (equals == std::string_view::npos) return false;
    const std::string_view name = word.substr(0, equals), value = word.substr(equals + 1);
    if (value.empty()) return Wrong(fmt::format("{}= has no value", name));
    bool twice = false;
    if (name == "address") {
        const Result<AddressRange> range = ParseAddressRange(value);
        if (!range.ok()) return range.error();
        twice = std::exchange(who.range, range.value()).has_value();
    } else if (name == "uid") {
        const Result<uint32_t> uid = ParseUid(value);
        if (!uid.ok()) return uid.error();
        twice = std::exchange(who.uid, uid.value()).has_value();
    } else if (name == "certificate") {
        twice = std::exchange(who.certificate, std::string(value)).has_value();
    } else if (name == "psk") {
        twice = std::exchange(who.psk, std::string(value)).has_value();
    } else {
        return Wrong(fmt::format(
            "there is no condition '{}='; there are address=, uid=, certificate= and psk=", name));
    }
    if (twice) return Wrong(fmt::format("{}= is there twice; write a line for each", name));
    return true;
}

/// A name of an export with * and ? in it: letters, digits, . _ : + - and one @.
Status CheckPattern(std::string_view text) {
    const size_t at = text.find('@');
    const auto legal = [](char c) {
        return std::isalnum(static_cast<unsigned char>(c)) ||
               std::string_view("._:+-*?@").find(c) != std::string_view::npos;
    };
    const bool whole = !text.empty() && at != 0 && at != text.size() - 1;
    const bool once = at == std::string_view::npos || text.find('@', at + 1) == text.npos;
    if (whole && once && std::all_of(text.begin(), text.end(), legal)) return Status();
    return Wrong(fmt::format(
        "'{}' is no export; write DISK or DISK@SNAPSHOT, where * and ? stand for others", text));
}

/// Conditions that never hold together are a mistake: perhaps one or the other was meant.
Status CheckWho(const Who& who) {
    const bool places = who.range && who.uid, proofs = who.psk && who.certificate;
    if (!places && !proofs) return Status();
    return Wrong(
        fmt::format("{} never hold together, and all on a line must; write a line for each",
                    places ? "address= and uid=" : "psk= and certificate="));
}

Result<Rule> ParseRule(const std::vector<std::string>& words) {
    static const char* const kForm =
        "this is not of the form WHO... EXPORT... read-only|read-write, where WHO is any, "
        "address=RANGE, certificate=NAME, psk=USER or uid=NUMBER";
    Rule rule;
    size_t at = 0;
    if (words[0] == "any") {
        at = 1;
    } else {
        for (; at < words.size(); ++at) {
            const Result<bool> taken = TakeCondition(words[at], rule.who);
            if (!taken.ok()) return taken.error();
            if (!taken.value()) break;
        }
    }
    if (at == 0 || words.size() < at + 2) return Wrong(kForm);
    if (const Status possible = CheckWho(rule.who); !possible.ok()) return possible.error();
    if (words.back() == "read-write") {
        rule.right = Right::kWrite;
    } else if (words.back() == "read-only") {
        rule.right = Right::kRead;
    } else {
        return Wrong(kForm);
    }
    for (; at + 1 < words.size(); ++at) {
        const Status status = CheckPattern(words[at]);
        if (!status.ok()) return status.error();
        rule.exports.push_back(words[at]);
    }
    return rule;
}

}  // namespace

Result<std::shared_ptr<const Rules>> Rules::Parse(std::string_view text) {
    auto rules = std::make_shared<Rules>();
    size_t patterns = 0;
    for (unsigned number = 1; !text.empty(); ++number) {
        std::string_view line = text.substr(0, text.find('\n'));
        text.remove_prefix(std::min(text.size(), line.size() + 1));
        if (line.ends_with('\r')) line.remove_suffix(1);
        const Result<std::vector<std::string>> words = Split(line);
        if (words.ok() && words.value().empty()) continue;
        const Result<Rule> rule = words.ok() ? ParseRule(words.value()) : words.error();
        if (!rule.ok()) return Wrong(fmt::format("line {}: {}", number, rule.error().message));
        patterns += rule.value().exports.size();
        if (patterns > kPatternsMax) {
            return Wrong(
                fmt::format("line {}: there are more than {} exports in it", number, kPatternsMax));
        }
        rules->rules_.push_back(rule.value());
    }
    if (rules->rules_.empty())
        return Wrong("there is no rule in it, so nobody could open anything");
    return std::shared_ptr<const Rules>(std::move(rules));
}

Result<std::shared_ptr<const Rules>> Rules::Load(const std::string& path) {
    const Result<std::string> text = ReadSmallFile(path, kFileBytesMax);
    if (!text.ok()) return text.error();
    Result<std::shared_ptr<const Rules>> rules = Parse(text.value());
    if (rules.ok()) return rules;
    return Wrong(fmt::format("cannot use {}: {}", path, rules.error().message));
}

}  // namespace varve::nbdserver::access
