// Places for files during a test, and its settings.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>

#include "tests/power_cut/file_log.h"

namespace varve::power_cut {

/// A number from the environment.
inline uint64_t Setting(const char* name, uint64_t otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}

/// Directories below a temporary one. The two latest exist.
class Place {
  public:
    Place() {
        std::string pattern =
            (std::filesystem::temp_directory_path() / "varve-powercut-XXXXXX").string();
        if (!::mkdtemp(pattern.data())) throw std::runtime_error("no temporary directory");
        root_ = pattern;
    }
    ~Place() { std::filesystem::remove_all(root_); }
    Place(const Place&) = delete;

    /// A new directory with these files.
    std::string New(const Files& files = {}) {
        if (count_ >= 2) std::filesystem::remove_all(Path(count_ - 2));
        const std::string path = Path(count_++);
        std::filesystem::create_directory(path);
        for (const auto& [name, content] : files) {
            std::ofstream file(path + "/" + name, std::ios::binary);
            file.write(content.data(), static_cast<std::streamsize>(content.size()));
            if (!file) throw std::runtime_error("cannot write " + path + "/" + name);
        }
        return path;
    }

  private:
    std::string Path(size_t number) const { return root_ + "/" + std::to_string(number); }

    std::string root_;
    size_t count_ = 0;
};

}  // namespace varve::power_cut
