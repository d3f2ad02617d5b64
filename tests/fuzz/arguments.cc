// Fuzz target: the command lines of varve and varved. What is accepted fits the grammar and means
// the same when it is written out in another form; what is refused is refused in one line.
// Input: one argument a line.
#include "admin/arguments.h"

#include "nbdserver/daemon/options.h"
#include "tests/fuzz/fuzz.h"

namespace varve {
namespace {

void VerifyError(const Error& error) {
    VARVE_CHECK(error.kind == ErrorKind::kInvalid);
    VARVE_CHECK(!error.message.empty() && error.message.find('\n') == std::string::npos);
}

/// Options first, each in one word, then -- and the operands.
std::vector<std::string> Rewrite(const admin::Arguments& a) {
    std::vector<std::string> words = {"--admin=" + a.admin};
    const std::pair<bool, const char*> flags[] = {{a.json, "--json"},
                                                  {a.yes, "-y"},
                                                  {a.help, "-h"},
                                                  {a.version, "--version"},
                                                  {a.snapshots, "--snapshots"},
                                                  {a.disconnect, "--disconnect"},
                                                  {a.shrink, "--shrink"},
                                                  {a.online, "--online"},
                                                  {a.wait, "--wait"}};
    for (const auto& [set, word] : flags) {
        if (set) words.emplace_back(word);
    }
    if (a.keep_as) words.push_back("--keep-as=" + *a.keep_as);
    if (a.pool) words.push_back("--pool=" + *a.pool);
    words.emplace_back("--");
    if (a.verb) words.emplace_back(a.verb->name);
    words.insert(words.end(), a.operands.begin(), a.operands.end());
    return words;
}

bool Same(const admin::Arguments& a, const admin::Arguments& b) {
    return Rewrite(a) == Rewrite(b) && a.verb == b.verb;
}

void Varve(const std::vector<std::string>& words) {
    const Result<admin::Arguments> parsed = admin::ParseArguments(words);
    if (!parsed.ok()) return VerifyError(parsed.error());
    const admin::Arguments& arguments = parsed.value();
    VARVE_CHECK(!arguments.admin.empty());
    VARVE_CHECK(!admin::HelpText(arguments.verb).empty());
    if (!arguments.help && !arguments.version) {
        VARVE_CHECK(arguments.verb);
        VARVE_CHECK(arguments.operands.size() >= arguments.verb->least);
        VARVE_CHECK(arguments.operands.size() <= arguments.verb->most);
    }
    const Result<admin::Arguments> again = admin::ParseArguments(Rewrite(arguments));
    VARVE_CHECK(again.ok() && Same(arguments, again.value()));
}

void Varved(const std::vector<std::string>& words) {
    for (const std::string& word : words) {
        // The target config.cc has the file; here it would be any file of this machine.
        if (word.substr(0, 8) == "--config") return;
    }
    const Result<nbdserver::Options> parsed = nbdserver::ParseOptions(words);
    if (!parsed.ok()) return VerifyError(parsed.error());
    const nbdserver::Options& options = parsed.value();
    VARVE_CHECK(options.help || options.version || options.check_config || !options.pool.empty());
}

}  // namespace
}  // namespace varve

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const std::vector<std::string> words = varve::fuzz::Lines(text);
    varve::Varve(words);
    varve::Varved(words);
    return 0;
}
