#include "base/small_file.h"

#include <fmt/format.h>

#include <fstream>

#include "base/units.h"

namespace varve {

Result<std::string> ReadSmallFile(const std::string& path, size_t bytes_max) {
    std::ifstream file(path, std::ios::binary);
    std::string text(bytes_max + 1, '\0');
    if (file) file.read(text.data(), static_cast<std::streamsize>(text.size()));
    if (!file && !file.eof()) {
        return MakeError(ErrorKind::kInvalid, SystemError(errno, "cannot read " + path).message);
    }
    text.resize(static_cast<size_t>(file.gcount()));
    if (text.size() <= bytes_max) return text;
    return MakeError(ErrorKind::kInvalid, fmt::format("cannot use {}: it is larger than {}", path,
                                                      FormatSize(bytes_max)));
}

}  // namespace varve
