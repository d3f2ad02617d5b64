#include "nbdserver/access/rules.h"

#include <algorithm>

namespace varve::nbdserver::access {
namespace {

constexpr std::string_view kAny = "*";

bool HasName(const tls::Identity& identity, std::string_view name) {
    const std::vector<std::string>& names = identity.names;
    if (name == kAny) return !identity.common_name.empty() || !names.empty();
    return identity.common_name == name ||
           std::find(names.begin(), names.end(), name) != names.end();
}

bool HasKey(const tls::Identity& identity, std::string_view user) {
    return user == kAny ? !identity.psk_user.empty() : identity.psk_user == user;
}

}  // namespace

bool Who::Is(const Subject& subject) const {
    if (range && !(subject.address && range->Contains(*subject.address))) return false;
    if (uid && uid != subject.uid) return false;
    if (certificate && !HasName(subject.identity, *certificate)) return false;
    return !psk || HasKey(subject.identity, *psk);
}

bool Matches(std::string_view pattern, std::string_view name) {
    constexpr size_t kNone = std::string_view::npos;
    size_t p = 0, n = 0;
    size_t star = kNone, resume = 0;  // the last *, and where what follows it is tried next
    while (n < name.size()) {
        if (p < pattern.size() && pattern[p] == '*') {
            star = p++;
            resume = n;
        } else if (p < pattern.size() &&
                   (pattern[p] == name[n] || (pattern[p] == '?' && name[n] != '@'))) {
            ++p;
            ++n;
        } else if (star != kNone && name[resume] != '@') {
            p = star + 1;
            n = ++resume;
        } else {
            return false;
        }
    }
    return pattern.find_first_not_of('*', p) == kNone;
}

Grants::Grants(std::shared_ptr<const Rules> rules, const Subject& subject)
    : rules_(std::move(rules)) {
    if (!rules_) return;
    for (uint32_t i = 0; i < rules_->rules().size(); ++i) {
        const Rule& rule = rules_->rules()[i];
        if (!rule.who.Is(subject)) continue;
        fitting_.push_back(i);
        patterns_ += rule.exports.size();
    }
}

Right Grants::Of(std::string_view name) const {
    const size_t tilde = name.find('~'), at = name.find('@');
    if (tilde == std::string_view::npos) return OfOne(name);
    if (at == std::string_view::npos || at > tilde) return Right::kNone;
    std::string older(name.substr(0, at + 1));
    older += name.substr(tilde + 1);
    return std::min({Right::kRead, OfOne(name.substr(0, tilde)), OfOne(older)});
}

Right Grants::OfOne(std::string_view name) const {
    if (!rules_) return Right::kWrite;
    Right right = Right::kNone;
    for (const uint32_t i : fitting_) {
        const Rule& rule = rules_->rules()[i];
        if (rule.right <= right) continue;
        const bool named =
            std::any_of(rule.exports.begin(), rule.exports.end(),
                        [name](const std::string& pattern) { return Matches(pattern, name); });
        if (named) right = rule.right;
        if (right == Right::kWrite) break;
    }
    return right;
}

}  // namespace varve::nbdserver::access
