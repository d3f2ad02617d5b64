// Fuzz target: access files. One that is accepted gives what its lines give, each alone, together
// and in any order, to whoever they are for, and of a diff no more than of its snapshots; ranges
// and patterns agree with slower ways to decide. An error is one line that names its line. Input:
// the file.
#include <cctype>

#include "nbdserver/access/rules.h"
#include "tests/fuzz/fuzz.h"

namespace varve::nbdserver::access {
namespace {

/// Bit by bit.
bool HoldsSlowly(const AddressRange& range, const Address& address) {
    for (unsigned bit = 0; bit < range.bits; ++bit) {
        const unsigned mask = 0x80U >> bit % 8;
        if ((range.first.bytes[bit / 8] & mask) != (address.bytes[bit / 8] & mask)) return false;
    }
    return range.first.is_v4() == address.is_v4();
}

/// By a table: whether the first p of the pattern stand for the first n of the name.
bool MatchesSlowly(std::string_view pattern, std::string_view name) {
    std::vector<bool> reached(name.size() + 1);
    reached[0] = true;
    for (const char c : pattern) {
        if (c == '*') {
            for (size_t n = 0; n < name.size(); ++n) {
                if (reached[n] && name[n] != '@') reached[n + 1] = true;
            }
            continue;
        }
        for (size_t n = name.size(); n > 0; --n) {
            reached[n] = reached[n - 1] && (c == name[n - 1] || (c == '?' && name[n - 1] != '@'));
        }
        reached[0] = false;
    }
    return reached[name.size()];
}

/// People at the borders of what a rule is for.
std::vector<Subject> SubjectsFor(const Who& who) {
    std::vector<Subject> subjects(1);
    if (who.range) {
        Address last = who.range->first;
        for (unsigned bit = who.range->bits; bit < 128; ++bit)
            last.bytes[bit / 8] |= 0x80U >> bit % 8;
        Address outside = last;
        if (who.range->bits > 0) {
            const unsigned bit = who.range->bits - 1;
            outside.bytes[bit / 8] ^= 0x80U >> bit % 8;
        }
        for (const Address& address : {who.range->first, last, outside}) {
            VARVE_CHECK(who.range->Contains(address) == HoldsSlowly(*who.range, address));
            subjects.push_back({address, {}, {}});
        }
        VARVE_CHECK(who.range->Contains(who.range->first));
        VARVE_CHECK(who.range->bits == 0 || !who.range->Contains(outside));
    }
    if (who.uid) subjects.push_back({{}, who.uid, {}});
    Subject all;
    if (who.range) all.address = who.range->first;
    all.uid = who.uid;
    all.identity.psk_user = who.psk.value_or("");
    all.identity.common_name = who.certificate.value_or("");
    VARVE_CHECK(who.Is(all));
    subjects.push_back(all);
    all.identity.psk_user += "x";
    subjects.push_back(std::move(all));
    return subjects;
}

std::vector<std::string> NamesFor(const std::vector<std::string>& patterns) {
    std::vector<std::string> names = {"disk0", "disk0@monday"};
    for (std::string name : patterns) {
        names.push_back(name);
        std::replace(name.begin(), name.end(), '*', 'a');
        std::replace(name.begin(), name.end(), '?', '@');
        names.push_back(std::move(name));
    }
    for (const std::string& pattern : patterns) {
        for (const std::string& name : names) {
            VARVE_CHECK(Matches(pattern, name) == MatchesSlowly(pattern, name));
        }
    }
    return names;
}

/// What the lines give one by one, parsed each for itself.
Right Together(const std::vector<std::shared_ptr<const Rules>>& lines, const Subject& subject,
               std::string_view name) {
    Right right = Right::kNone;
    for (const auto& line : lines) right = std::max(right, Grants(line, subject).Of(name));
    return right;
}

void Judge(std::string_view text) {
    const auto whole = Rules::Parse(text);
    if (!whole.ok()) {
        VARVE_CHECK(whole.error().kind == ErrorKind::kInvalid);
        const std::string& message = whole.error().message;
        VARVE_CHECK(message.starts_with("line ") || message.starts_with("there is no rule"));
        VARVE_CHECK(message.find('\n') == std::string::npos);
        return;
    }
    std::vector<std::shared_ptr<const Rules>> lines;
    std::string reversed;
    for (const std::string& line : fuzz::Lines(text)) {
        reversed = line + "\n" + reversed;
        const auto alone = Rules::Parse(line);
        if (alone.ok()) lines.push_back(alone.value());
    }
    const std::vector<Rule>& rules = whole.value()->rules();
    VARVE_CHECK(lines.size() == rules.size());
    const auto backwards = Rules::Parse(reversed);
    VARVE_CHECK(backwards.ok());
    for (size_t i = 0; i < std::min<size_t>(rules.size(), 8); ++i) {
        const std::vector<std::string> patterns(
            rules[i].exports.begin(),
            rules[i].exports.begin() + std::min<ptrdiff_t>(rules[i].exports.size(), 8));
        for (const Subject& subject : SubjectsFor(rules[i].who)) {
            const Grants grants(whole.value(), subject), others(backwards.value(), subject);
            for (const std::string& name : NamesFor(patterns)) {
                const Right right = grants.Of(name);
                VARVE_CHECK(right == others.Of(name));
                VARVE_CHECK(right == Together(lines, subject, name));
                if (name.find('@') == std::string::npos) continue;
                const Right diff = grants.Of(name + "~monday");
                VARVE_CHECK(diff <= std::min(right, Right::kRead));
                VARVE_CHECK(diff <= grants.Of(name.substr(0, name.find('@')) + "@monday"));
            }
        }
    }
}

}  // namespace
}  // namespace varve::nbdserver::access

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    varve::nbdserver::access::Judge({reinterpret_cast<const char*>(data), size});
    return 0;
}
