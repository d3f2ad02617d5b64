#include "attach/table.h"

#include <fmt/format.h>

#include <sstream>

namespace varve::attach {

Result<std::vector<std::string>> FindInTable(std::string_view text, std::string_view name,
                                             const std::string& path) {
    std::istringstream lines{std::string(text)};
    std::string line;
    for (unsigned number = 1; std::getline(lines, line); ++number) {
        std::istringstream words(line.substr(0, line.find('#')));
        std::string first, word;
        if (!(words >> first) || first != name) continue;
        std::vector<std::string> rest;
        while (words >> word) rest.push_back(word);
        if (!rest.empty()) return rest;
        return MakeError(ErrorKind::kInvalid,
                         fmt::format("{}, line {}: '{}' has no target; write NAME, then a disk or "
                                     "an NBD URI, then options",
                                     path, number, name));
    }
    return MakeError(ErrorKind::kNotFound,
                     fmt::format("{} has no line that begins with '{}'", path, name));
}

}  // namespace varve::attach
