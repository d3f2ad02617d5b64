// FileLog: what was done to the files of one directory, in order, and what a power cut at any point
// of that may leave of them.
// Not a file system: logged_env.h lets RocksDB work on a real one and tells the log.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <vector>

namespace varve::power_cut {

using Random = std::mt19937_64;
using Files = std::map<std::string, std::string>;  // name -> content

inline bool Chance(Random& random, double probability) {
    return std::uniform_real_distribution<>()(random) < probability;
}

/// Any thread. Positions count operations: position p is after the first p of them.
class FileLog {
  public:
    using FileId = size_t;

    /// Begins with files that are durable already.
    explicit FileLog(const Files& durable = {});

    FileId Create(const std::string& name);  // a new, empty file in the place of what has that name
    FileId Find(const std::string& name) const;  // REQUIRES: there is one
    void Write(FileId file, uint64_t offset, std::string_view bytes);
    /// A sync has completed: what was written before position `before`, when it began, is durable,
    /// and the name that the file was made with, as on ext4, XFS and btrfs.
    void Sync(FileId file, size_t before);
    void Rename(const std::string& from, const std::string& to);
    void Remove(const std::string& name);
    void SyncNames(size_t before);  // likewise, of the directory

    size_t position() const;
    /// Positions just before and just after each sync, in order.
    std::vector<size_t> AroundSyncs() const;
    /// Positions just before each sync of a file that was made with a name that begins like this.
    std::vector<size_t> BeforeSyncs(std::string_view prefix) const;

    /// What a cut at `position` leaves. Of the names that were not synced, either those up to some
    /// moment are kept, or any; of each file's bytes that were not synced: none, all, those up to
    /// some byte, or any of its sectors or pages, with zeros in the place of those that are
    /// missing.
    Files Cut(size_t position, Random& random) const;
    /// As if nothing was lost.
    Files All(size_t position) const;
    /// What is durable of a file's bytes.
    std::string Durable(const std::string& name, size_t position) const;

  private:
    struct Op {
        enum class Kind : uint8_t { kCreate, kRename, kRemove, kWrite, kSync, kSyncNames } kind;
        FileId file = 0;
        uint64_t offset = 0;
        size_t before = 0;
        std::string name, to;  // names; kWrite: `name` is what was written
    };
    struct Content {
        std::string durable;
        std::vector<const Op*> loose;  // writes, in order
    };
    struct State {
        std::map<std::string, FileId> names;  // durable
        std::vector<const Op*> loose;         // changes of names
        std::vector<Content> contents;
    };

    size_t Add(Op op);
    static void SettleName(State& state, FileId file, size_t before, const Op* ops);
    State StateAt(size_t position) const;
    static void Apply(const Op& op, std::map<std::string, FileId>& names);
    static void Apply(const Op& op, std::string& content);
    static std::string Tear(const Content& content, Random& random);

    mutable std::mutex mutex_;
    std::vector<std::string> initial_;  // contents of the first files
    std::map<std::string, FileId> initial_names_;
    std::map<std::string, FileId> names_;
    size_t files_ = 0;
    std::vector<Op> ops_;
};

}  // namespace varve::power_cut
