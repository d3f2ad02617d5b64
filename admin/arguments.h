// The command line's grammar: verbs, operands, options, and the help text made of them.
// Not what the verbs do: that is cli.h.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "base/result.h"

namespace varve::admin {

struct Verb {
    const char* name;
    const char* operands;  // as the usage line shows them
    size_t least, most;    // number of operands
    std::vector<const char*> options;
    const char* summary;  // one line
    const char* details;  // of `varve VERB --help`: lines
    const char* example;
};

/// A parsed command line.
struct Arguments {
    std::string admin;  // path of the socket: --admin, else $VARVE_ADMIN, else the default
    bool json = false;
    bool yes = false;
    bool help = false;
    bool version = false;
    bool snapshots = false;
    bool disconnect = false;
    bool shrink = false;
    bool wait = false;
    bool dry_run = false;
    bool online = false;
    bool bookmark = false;
    std::optional<std::string> keep_as;
    std::optional<std::string> pool;  // a directory
    const Verb* verb = nullptr;       // null only with help or version
    std::vector<std::string> operands;
};

/// Options may stand anywhere, as `--option VALUE` or `--option=VALUE`; after `--` everything is an
/// operand. kInvalid for what does not fit the grammar.
Result<Arguments> ParseArguments(const std::vector<std::string>& arguments);

/// Where the verb stands in `arguments`, behind global options perhaps; their number if there is
/// none. It may be a verb of another program's.
size_t FindVerbIn(const std::vector<std::string>& arguments);

/// What is wrong with a command line: exit code 2.
Error Usage(std::string message);

/// The text of `varve --help` or `varve VERB --help`.
std::string HelpText(const Verb* verb);

}  // namespace varve::admin
