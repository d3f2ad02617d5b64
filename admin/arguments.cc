#include "admin/arguments.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <string_view>
#include <variant>

namespace varve::admin {
namespace {

constexpr const char* kDefaultSocket = "/run/varve/admin.sock";

struct Option {
    const char* name;
    const char* value;  // what stands for it in the usage line; null for a flag
    bool global;        // taken by every verb
    std::variant<bool Arguments::*, std::string Arguments::*,
                 std::optional<std::string> Arguments::*>
        field;
    const char* help;
};

const std::vector<Option>& Options() {
    using A = Arguments;
    static const std::vector<Option> options = {
        {"--admin", "PATH", true, &A::admin,
         "the server's admin socket (default $VARVE_ADMIN, else /run/varve/admin.sock)"},
        {"--json", nullptr, true, &A::json, "print one JSON document instead of text"},
        {"--yes", nullptr, true, &A::yes, "do not ask; required when there is no terminal"},
        {"--help", nullptr, true, &A::help, "this text; after a verb, more about it"},
        {"--version", nullptr, true, &A::version, "print the version"},
        {"--snapshots", nullptr, false, &A::snapshots, "delete the disk's snapshots too"},
        {"--dry-run", nullptr, false, &A::dry_run, "say what would be freed, delete nothing"},
        {"--bookmark", nullptr, false, &A::bookmark,
         "free the data, keep the name as something to compare with"},
        {"--disconnect", nullptr, false, &A::disconnect,
         "fence and disconnect attached clients first, instead of refusing"},
        {"--shrink", nullptr, false, &A::shrink, "allow a smaller size: what lies beyond is lost"},
        {"--keep-as", "SNAP", false, &A::keep_as, "first freeze the present state under this name"},
        {"--online", nullptr, false, &A::online,
         "let clients in again, also those that were cut off"},
        {"--wait", nullptr, false, &A::wait, "return when the space has been given back"},
        {"--pool", "DIR", false, &A::pool, "check a pool that no server has open"},
    };
    return options;
}

const std::vector<Verb>& Verbs() {
    static const std::vector<Verb> verbs = {
        {"create",
         "DISK SIZE",
         2,
         2,
         {},
         "a new thin disk that reads as zeros",
         "SIZE is in bytes, or with a binary unit: 512M, 10G, 2T; a multiple of 4096.",
         "varve create disk0 10G"},
        {"list",
         "[DISK]",
         0,
         1,
         {},
         "disks; or one disk's snapshots, oldest first",
         "USED is what the disk maps; UNIQUE is what deleting the snapshot would free.",
         "varve list disk0"},
        {"show",
         "DISK | DISK@SNAP",
         1,
         1,
         {},
         "everything about a disk or a snapshot",
         "",
         "varve show disk0@before"},
        {"snapshot",
         "DISK@SNAP [DISK@SNAP ...]",
         1,
         SIZE_MAX,
         {},
         "freeze the present state; of several disks at one moment",
         "Costs nothing that depends on the size of the disk; clients go on meanwhile.",
         "varve snapshot disk0@before disk1@before"},
        {"restore",
         "DISK@SNAP",
         1,
         1,
         {"--keep-as", "--disconnect", "--online"},
         "put the disk back to the state of a snapshot",
         "No snapshot is lost by it. Refuses (exit 5) while a client is attached to the disk. With "
         "--disconnect the disk stays offline if it cut clients off: see varve online.",
         "varve restore disk0@before --keep-as undo"},
        {"clone",
         "DISK@SNAP NEWDISK",
         2,
         2,
         {},
         "a new writable disk that starts as the snapshot",
         "",
         "varve clone disk0@before copy0"},
        {"flatten",
         "DISK",
         1,
         1,
         {},
         "make the disk's map its own: depth goes back to 1",
         "Copies no data. Clients stay attached. Waits until it is done, but goes on if you do "
         "not.",
         "varve flatten copy0"},
        {"rename",
         "DISK NEW | DISK@SNAP NEW",
         2,
         2,
         {},
         "rename a disk or a snapshot",
         "Attached clients stay attached.",
         "varve rename disk0@before before-upgrade"},
        {"resize",
         "DISK SIZE",
         2,
         2,
         {"--shrink", "--disconnect"},
         "change the size of a disk",
         "Attached clients see a new size when they connect again. Snapshots keep theirs.",
         "varve resize disk0 20G"},
        {"delete",
         "DISK | DISK@SNAP",
         1,
         SIZE_MAX,
         {"--snapshots", "--bookmark", "--disconnect", "--wait", "--dry-run"},
         "delete a disk, or any snapshot",
         "Returns at once; the space is given back in the background (see varve status). With "
         "--dry-run several may be named: what they share is counted. A bookmark is deleted like a "
         "snapshot.",
         "varve delete disk0@before --wait"},
        {"diff",
         "DISK@OLD DISK@NEW",
         2,
         2,
         {},
         "what changed between two snapshots",
         "OLD may be a bookmark. Reads no data; what was written with what it held already counts "
         "as changed.",
         "varve diff disk0@monday disk0@tuesday"},
        {"clients",
         "[DISK]",
         0,
         1,
         {},
         "who is attached",
         "With DISK, those of the disk and its snapshots; DISK@SNAP: of that snapshot.",
         "varve clients disk0"},
        {"offline",
         "DISK",
         1,
         1,
         {"--disconnect"},
         "keep clients away from a disk until it is online again",
         "Its snapshots can still be read. Refuses (exit 5) while a client is attached.",
         "varve offline disk0 --disconnect"},
        {"online",
         "DISK",
         1,
         1,
         {},
         "let clients attach to an offline disk again",
         "",
         "varve online disk0"},
        {"disconnect",
         "DISK",
         1,
         1,
         {},
         "disconnect the clients of a disk and its snapshots",
         "They may connect again: restore, delete and resize have --disconnect, which fences.",
         "varve disconnect disk0"},
        {"status", "", 0, 0, {}, "capacity, use, background work", "", "varve status --json"},
        {"check",
         "",
         0,
         0,
         {"--pool"},
         "verify every invariant of the metadata",
         "Runs in the server beside its clients, or with --pool on a pool that no server has\n"
         "open. Exit 8 if anything is wrong.",
         "varve check --pool /var/lib/varve"},
        {"scrub",
         "[DISK]",
         0,
         1,
         {},
         "verify the data of snapshots against their checksums",
         "Reads all that is frozen: of DISK and its snapshots, or of all disks. Exit 8 if "
         "anything\n"
         "is damaged. Ending the command does not end the scrub.",
         "varve scrub disk0"},
    };
    return verbs;
}

constexpr std::string_view kExitCodes =
    "Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 exists, 5 busy,\n"
    "6 no space or over a limit, 7 server unreachable, 8 damage found.\n";

/// "varve VERB --help" or "varve --help".
std::string WhereToLook(const Verb* verb) {
    return verb ? fmt::format("varve {} --help", verb->name) : "varve --help";
}

const Option* FindOption(std::string_view name) {
    if (name == "-h") name = "--help";
    if (name == "-y") name = "--yes";
    for (const Option& option : Options()) {
        if (name == option.name) return &option;
    }
    return nullptr;
}

const Verb* FindVerb(std::string_view name) {
    for (const Verb& verb : Verbs()) {
        if (name == verb.name) return &verb;
    }
    return nullptr;
}

bool Takes(const Verb& verb, const Option& option) {
    return option.global ||
           std::any_of(verb.options.begin(), verb.options.end(),
                       [&](const char* name) { return FindOption(name) == &option; });
}

/// What has been read so far.
struct Reader {
    const std::vector<std::string>& words;
    size_t next = 0;
    Arguments result;
    std::vector<const Option*> seen;

    Status ReadOption(std::string_view word) {
        const size_t equals = word.find('=');
        const std::string_view name = word.substr(0, equals);
        const Option* option = FindOption(name);
        if (!option)
            return Usage(
                fmt::format("there is no option '{}'; see {}", name, WhereToLook(result.verb)));
        seen.push_back(option);
        std::string value;
        if (equals != std::string_view::npos) {
            if (!option->value) return Usage(fmt::format("option {} takes no value", name));
            value = word.substr(equals + 1);
        } else if (option->value) {
            if (next == words.size())
                return Usage(
                    fmt::format("option {} needs a value: {} {}", name, name, option->value));
            value = words[next++];
        }
        if (option->value && value.empty()) {
            return Usage(fmt::format("the value of option {} is empty", name));
        }
        if (const auto* flag = std::get_if<bool Arguments::*>(&option->field)) {
            result.** flag = true;
        } else if (const auto* text = std::get_if<std::string Arguments::*>(&option->field)) {
            result.** text = value;
        } else {
            result.*std::get<std::optional<std::string> Arguments::*>(option->field) = value;
        }
        return Status();
    }

    Status ReadWord(const std::string& word) {
        if (result.verb) {
            result.operands.push_back(word);
            return Status();
        }
        result.verb = FindVerb(word);
        if (result.verb) return Status();
        return Usage(fmt::format("there is no verb '{}'; see varve --help", word));
    }

    Status ReadAll() {
        bool operands_only = false;
        while (next < words.size()) {
            const std::string& word = words[next++];
            Status status;
            if (!operands_only && word == "--") {
                operands_only = true;
            } else if (!operands_only && word.size() > 1 && word[0] == '-') {
                status = ReadOption(word);
            } else {
                status = ReadWord(word);
            }
            if (!status.ok()) return status;
        }
        return Status();
    }

    Status Verify() const {
        if (result.help || result.version) return Status();
        const Verb* verb = result.verb;
        if (!verb) return Usage("say what to do, as in 'varve list'; see varve --help");
        for (const Option* option : seen) {
            if (Takes(*verb, *option)) continue;
            return Usage(fmt::format("varve {} has no option {}; see {}", verb->name, option->name,
                                     WhereToLook(verb)));
        }
        const size_t count = result.operands.size();
        if (count < verb->least || count > verb->most) {
            return Usage(fmt::format("too {} operands; use: varve {} {}",
                                     count < verb->least ? "few" : "many", verb->name,
                                     verb->operands));
        }
        return Status();
    }
};

std::string OptionLine(const Option& option) {
    const std::string form =
        option.value ? fmt::format("{} {}", option.name, option.value) : option.name;
    return fmt::format("  {:<15} {}\n", form, option.help);
}

}  // namespace

Error Usage(std::string message) {
    return MakeError(ErrorKind::kInvalid, std::move(message));
}

size_t FindVerbIn(const std::vector<std::string>& arguments) {
    size_t at = 0;
    for (; at < arguments.size(); ++at) {
        const std::string& word = arguments[at];
        if (word == "--") return std::min(at + 1, arguments.size());
        if (word.size() < 2 || word[0] != '-') break;
        const Option* option = FindOption(word.substr(0, word.find('=')));
        if (option && option->value && word.find('=') == std::string::npos) ++at;
    }
    return std::min(at, arguments.size());
}

Result<Arguments> ParseArguments(const std::vector<std::string>& arguments) {
    Reader reader{arguments, 0, {}, {}};
    if (Status status = reader.ReadAll(); !status.ok()) return status.error();
    if (Status status = reader.Verify(); !status.ok()) return status.error();
    if (reader.result.admin.empty()) {
        const char* environment = std::getenv("VARVE_ADMIN");
        reader.result.admin = environment && *environment ? environment : kDefaultSocket;
    }
    return std::move(reader.result);
}

std::string HelpText(const Verb* verb) {
    std::string text;
    if (verb) {
        std::string flags;
        for (const char* name : verb->options) {
            const Option* option = FindOption(name);
            flags += option->value ? fmt::format(" [{} {}]", name, option->value)
                                   : fmt::format(" [{}]", name);
        }
        std::string summary = verb->summary;
        summary[0] = static_cast<char>(std::toupper(summary[0]));
        text = fmt::format("varve {}{}{}{}\n\n{}.\n", verb->name, *verb->operands ? " " : "",
                           verb->operands, flags, summary);
        if (*verb->details) text += fmt::format("{}\n", verb->details);
        text += "\nOptions:\n";
        for (const Option& option : Options()) {
            if (Takes(*verb, option)) text += OptionLine(option);
        }
        return text + fmt::format("\nExample:\n  {}\n\n{}", verb->example, kExitCodes);
    }
    text =
        "varve [--admin PATH] [--json] VERB ... [--yes]\n\n"
        "Disks and snapshots of a running varved. Options may stand before or after the verb.\n\n";
    for (const Verb& each : Verbs()) {
        text += fmt::format("  {:<36} {}\n", fmt::format("{} {}", each.name, each.operands),
                            each.summary);
    }
    text +=
        "\nOn the machine that uses a disk (varve attach --help):\n\n"
        "  attach DISK|NBD-URI [/dev/nbdN]      make a disk a device, and keep it one\n"
        "  detach DEVICE                        end that\n"
        "  attached                             the devices of this machine\n"
        "\nOptions of every verb:\n";
    for (const Option& option : Options()) {
        if (option.global) text += OptionLine(option);
    }
    text += "\nMore about a verb and its options: varve VERB --help\n\nExamples:\n";
    for (const Verb& each : Verbs()) text += fmt::format("  {}\n", each.example);
    return text + "\n" + std::string(kExitCodes);
}

}  // namespace varve::admin
