#include "attach/record.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace varve::attach {
namespace fs = std::filesystem;
namespace json = boost::json;

const char* Record::state() const {
    if (dead == 0) return "connected";
    return dead < connections ? "degraded" : "reconnecting";
}

json::object ToJson(const Record& record) {
    return {{"device", record.device()},
            {"index", record.index},
            {"name", record.name},
            {"uri", record.uri},
            {"state", record.state()},
            {"size", record.size},
            {"block_size", record.block_size},
            {"read_only", record.read_only},
            {"connections", record.connections},
            {"dead", record.dead},
            {"reconnects", record.reconnects},
            {"error", record.error},
            {"attached_ms", record.attached_ms},
            {"changed_ms", record.changed_ms},
            {"pid", record.pid}};
}

namespace {

Result<Record> FromJson(const json::object& object) {
    try {
        Record record;
        record.index = json::value_to<uint32_t>(object.at("index"));
        record.name = json::value_to<std::string>(object.at("name"));
        record.uri = json::value_to<std::string>(object.at("uri"));
        record.size = json::value_to<uint64_t>(object.at("size"));
        record.block_size = json::value_to<uint32_t>(object.at("block_size"));
        record.read_only = object.at("read_only").as_bool();
        record.connections = json::value_to<uint32_t>(object.at("connections"));
        record.dead = json::value_to<uint32_t>(object.at("dead"));
        record.reconnects = json::value_to<uint64_t>(object.at("reconnects"));
        record.error = json::value_to<std::string>(object.at("error"));
        record.attached_ms = json::value_to<int64_t>(object.at("attached_ms"));
        record.changed_ms = json::value_to<int64_t>(object.at("changed_ms"));
        record.pid = json::value_to<pid_t>(object.at("pid"));
        return record;
    } catch (const std::exception& e) {
        return MakeError(ErrorKind::kDamaged, e.what());
    }
}

}  // namespace

Records::Records(std::string directory) : directory_(std::move(directory)) {
    std::error_code ignored;  // Write() says what is wrong
    fs::create_directories(directory_, ignored);
}

std::string Records::PathOf(uint32_t index, const char* ending) const {
    return fmt::format("{}/nbd{}.{}", directory_, index, ending);
}

Status Records::Write(const Record& record) const {
    const std::string path = PathOf(record.index, "json");
    const std::string fresh = path + ".new";
    {
        std::ofstream file(fresh, std::ios::trunc);
        file << json::serialize(ToJson(record)) << '\n';
        if (!file.flush()) return SystemError(errno, "cannot write " + fresh);
    }
    if (std::rename(fresh.c_str(), path.c_str()) != 0) {
        return SystemError(errno, "cannot write " + path);
    }
    return Status();
}

Result<Record> Records::Read(uint32_t index) const {
    const std::string path = PathOf(index, "json");
    std::ifstream file(path);
    if (!file) {
        return MakeError(ErrorKind::kNotFound,
                         fmt::format("/dev/nbd{} is not attached by varve; 'varve attached' lists "
                                     "what is",
                                     index));
    }
    std::stringstream text;
    text << file.rdbuf();
    boost::system::error_code error;
    const json::value value = json::parse(text.str(), error);
    Result<Record> record = error || !value.is_object()
                                ? MakeError(ErrorKind::kDamaged, "it is no JSON object")
                                : FromJson(value.get_object());
    if (record.ok() && record.value().index == index) return record;
    return MakeError(ErrorKind::kDamaged,
                     fmt::format("{} cannot be read; detach the device with 'nbd-client -d' and "
                                 "remove the file",
                                 path));
}

std::vector<Record> Records::All() const {
    std::vector<Record> records;
    std::error_code error;
    for (const auto& entry : fs::directory_iterator(directory_, error)) {
        unsigned index = 0;
        int length = 0;
        const std::string name = entry.path().filename().string();
        if (std::sscanf(name.c_str(), "nbd%u.json%n", &index, &length) != 1 ||
            static_cast<size_t>(length) != name.size()) {
            continue;
        }
        Result<Record> record = Read(index);
        if (record.ok()) records.push_back(std::move(record.value()));
    }
    std::sort(records.begin(), records.end(),
              [](const Record& a, const Record& b) { return a.index < b.index; });
    return records;
}

void Records::Remove(uint32_t index) const {
    ::unlink(PathOf(index, "json").c_str());
}

int Records::Lock(uint32_t index, bool wait) const {
    const int fd = ::open(PathOf(index, "lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0) return -1;
    if (::flock(fd, LOCK_EX | (wait ? 0 : LOCK_NB)) == 0) return fd;
    ::close(fd);
    return -1;
}

}  // namespace varve::attach
