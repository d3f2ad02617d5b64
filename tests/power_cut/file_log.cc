#include "tests/power_cut/file_log.h"

#include <algorithm>
#include <array>
#include <set>

#include "base/check.h"

namespace varve::power_cut {

FileLog::FileLog(const Files& durable) {
    for (const auto& [name, content] : durable) {
        initial_names_[name] = initial_.size();
        initial_.push_back(content);
    }
    names_ = initial_names_;
    files_ = initial_.size();
}

size_t FileLog::Add(Op op) {
    ops_.push_back(std::move(op));
    return ops_.size();
}

FileLog::FileId FileLog::Create(const std::string& name) {
    std::lock_guard lock(mutex_);
    Add({.kind = Op::Kind::kCreate, .file = files_, .name = name});
    names_[name] = files_;
    return files_++;
}

FileLog::FileId FileLog::Find(const std::string& name) const {
    std::lock_guard lock(mutex_);
    return names_.at(name);
}

void FileLog::Write(FileId file, uint64_t offset, std::string_view bytes) {
    std::lock_guard lock(mutex_);
    Add({.kind = Op::Kind::kWrite, .file = file, .offset = offset, .name = std::string(bytes)});
}

void FileLog::Sync(FileId file, size_t before) {
    std::lock_guard lock(mutex_);
    Add({.kind = Op::Kind::kSync, .file = file, .before = before});
}

void FileLog::Rename(const std::string& from, const std::string& to) {
    std::lock_guard lock(mutex_);
    Add({.kind = Op::Kind::kRename, .name = from, .to = to});
    Apply(ops_.back(), names_);
}

void FileLog::Remove(const std::string& name) {
    std::lock_guard lock(mutex_);
    Add({.kind = Op::Kind::kRemove, .name = name});
    Apply(ops_.back(), names_);
}

void FileLog::SyncNames(size_t before) {
    std::lock_guard lock(mutex_);
    Add({.kind = Op::Kind::kSyncNames, .before = before});
}

size_t FileLog::position() const {
    std::lock_guard lock(mutex_);
    return ops_.size();
}

std::vector<size_t> FileLog::AroundSyncs() const {
    std::lock_guard lock(mutex_);
    std::vector<size_t> positions;
    for (size_t i = 0; i < ops_.size(); ++i) {
        if (ops_[i].kind < Op::Kind::kSync) continue;
        if (positions.empty() || positions.back() != i) positions.push_back(i);
        positions.push_back(i + 1);
    }
    return positions;
}

std::vector<size_t> FileLog::BeforeSyncs(std::string_view prefix) const {
    std::lock_guard lock(mutex_);
    std::vector<size_t> positions;
    std::set<FileId> files;
    for (size_t i = 0; i < ops_.size(); ++i) {
        const Op& op = ops_[i];
        if (op.kind == Op::Kind::kCreate && op.name.starts_with(prefix)) files.insert(op.file);
        if (op.kind == Op::Kind::kSync && files.contains(op.file)) positions.push_back(i);
    }
    return positions;
}

void FileLog::Apply(const Op& op, std::map<std::string, FileId>& names) {
    if (op.kind == Op::Kind::kCreate) {
        names[op.name] = op.file;
    } else if (op.kind == Op::Kind::kRemove) {
        names.erase(op.name);
    } else if (const auto found = names.find(op.name); found != names.end()) {
        names[op.to] = found->second;
        names.erase(op.name);
    }
}

void FileLog::Apply(const Op& op, std::string& content) {
    const size_t end = op.offset + op.name.size();
    if (content.size() < end) content.resize(end, '\0');
    content.replace(op.offset, op.name.size(), op.name);
}

void FileLog::SettleName(State& state, FileId file, size_t before, const Op* ops) {
    const auto made = std::find_if(state.loose.begin(), state.loose.end(), [&](const Op* op) {
        return op->kind == Op::Kind::kCreate && op->file == file && op < ops + before;
    });
    if (made == state.loose.end()) return;
    const Op& create = **made;
    Apply(create, state.names);
    // What was to become of that name before has been overtaken.
    const auto end = std::remove_if(state.loose.begin(), made + 1,
                                    [&](const Op* op) { return op->name == create.name; });
    state.loose.erase(end, made + 1);
}

/// What is durable at `position`, and what is loose.
FileLog::State FileLog::StateAt(size_t position) const {
    State state;
    state.names = initial_names_;
    state.contents.resize(files_);
    for (size_t i = 0; i < initial_.size(); ++i) state.contents[i].durable = initial_[i];
    const auto settle = [this](std::vector<const Op*>& loose, size_t before, auto& target) {
        auto at = loose.begin();
        for (; at != loose.end() && *at < ops_.data() + before; ++at) Apply(**at, target);
        loose.erase(loose.begin(), at);
    };
    for (size_t i = 0; i < position; ++i) {
        const Op& op = ops_[i];
        Content& content = state.contents[op.file];
        if (op.kind == Op::Kind::kWrite) {
            content.loose.push_back(&op);
        } else if (op.kind == Op::Kind::kSync) {
            settle(content.loose, op.before, content.durable);
            SettleName(state, op.file, op.before, ops_.data());
        } else if (op.kind == Op::Kind::kSyncNames) {
            settle(state.loose, op.before, state.names);
        } else {
            state.loose.push_back(&op);
        }
    }
    return state;
}

Files FileLog::Cut(size_t position, Random& random) const {
    std::lock_guard lock(mutex_);
    State state = StateAt(position);
    const bool in_order = Chance(random, 0.5);
    const double keep = std::array{0.0, 0.5, 1.0}[random() % 3];
    const size_t arrived = random() % (state.loose.size() + 1);
    for (size_t i = 0; i < state.loose.size(); ++i) {
        const bool kept = in_order ? i < arrived : Chance(random, keep);
        if (kept) Apply(*state.loose[i], state.names);
    }
    Files files;
    for (const auto& [name, file] : state.names) {
        files[name] = Tear(state.contents[file], random);
    }
    return files;
}

Files FileLog::All(size_t position) const {
    std::lock_guard lock(mutex_);
    State state = StateAt(position);
    for (const Op* op : state.loose) Apply(*op, state.names);
    Files files;
    for (const auto& [name, file] : state.names) {
        Content& content = state.contents[file];
        for (const Op* op : content.loose) Apply(*op, content.durable);
        files[name] = content.durable;
    }
    return files;
}

std::string FileLog::Durable(const std::string& name, size_t position) const {
    std::lock_guard lock(mutex_);
    State state = StateAt(position);
    for (const Op* op : state.loose) Apply(*op, state.names);
    return state.contents[state.names.at(name)].durable;
}

std::string FileLog::Tear(const Content& content, Random& random) {
    enum { kNone, kAll, kShort, kPieces, kPiecesAndShort, kWays };
    const auto way = random() % kWays;
    std::string torn = content.durable;
    if (way == kNone || content.loose.empty()) return torn;
    std::string full = torn;
    size_t first = full.size(), end = 0;
    for (const Op* op : content.loose) {
        Apply(*op, full);
        first = std::min<size_t>(first, op->offset);
        end = std::max<size_t>(end, op->offset + op->name.size());
    }
    const size_t before = torn.size();
    if (way == kAll || way == kShort) {
        torn = full;
    } else {
        // Each piece is as it was after some of the writes to it.
        const size_t piece = Chance(random, 0.5) ? 512 : 4096;
        const double keep = std::array{0.1, 0.5, 0.95}[random() % 3];
        torn.resize(full.size(), '\0');
        for (size_t at = first / piece * piece; at < end; at += piece) {
            const size_t to = std::min(at + piece, full.size());
            const bool whole = Chance(random, keep);
            for (const Op* op : content.loose) {
                const size_t from = std::max<size_t>(at, op->offset);
                const size_t stop = std::min<size_t>(to, op->offset + op->name.size());
                if (from >= stop) continue;
                if (!whole && Chance(random, 0.6)) break;
                torn.replace(from, stop - from, op->name, from - op->offset, stop - from);
            }
        }
    }
    const bool grown = full.size() > before;
    if (grown && (way == kShort || way == kPiecesAndShort)) {
        torn.resize(before + random() % (full.size() - before));
    }
    return torn;
}

}  // namespace varve::power_cut
