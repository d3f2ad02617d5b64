// The engine's metadata store on the real RocksDB, and power cuts at any operation on its files.
// Not the engine: engine_power_cut_test has both. VARVE_SEED=n replays the draws (RocksDB's threads
// have an order of their own); VARVE_CUTS=n cuts at n places more, 0 at every operation.
#include <gtest/gtest.h>
#include <rocksdb/db.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <optional>

#include "cow/store/rocks_store.h"
#include "tests/power_cut/logged_env.h"
#include "tests/power_cut/places.h"

namespace varve::power_cut {
namespace {

constexpr char kCounter[] = "!commits";  // how many commits there were; sorts before all rows
constexpr uint64_t kBufferBytes = 64 << 10;

using Rows = std::map<std::string, std::string>;
using Batches = std::vector<cow::Batch>;

cow::Batch DrawBatch(Random& random, size_t number) {
    cow::Batch batch;
    batch.Put(kCounter, std::to_string(number));
    const size_t rows = 1 + random() % 5;
    for (size_t i = 0; i < rows; ++i) {
        const std::string key = "k" + std::to_string(100 + random() % 200);
        if (Chance(random, 0.2)) {
            batch.Delete(key);
            continue;
        }
        size_t length = random() % 2000;
        if (Chance(random, 0.04)) length = random() % 70'000;  // over two of the log's blocks
        std::string value(length, '\0');
        for (char& c : value) c = static_cast<char>(random() % 8);
        batch.Put(key, value + std::to_string(number));
    }
    return batch;
}

/// What is there after the first `count` batches.
Rows After(const Batches& batches, size_t count) {
    Rows rows;
    for (size_t i = 0; i < count; ++i) {
        for (const cow::Batch::Op& op : batches[i].ops()) {
            if (op.value) {
                rows[op.key] = *op.value;
            } else {
                rows.erase(op.key);
            }
        }
    }
    return rows;
}

Result<Rows> RowsOf(cow::MetadataStore& store) {
    Rows rows;
    const auto view = store.View();
    const auto cursor = view->Range("!", "z");
    for (cursor->Seek("!"); cursor->valid(); cursor->Next()) {
        rows.emplace(cursor->key(), cursor->value());
    }
    if (!cursor->status().ok()) return cursor->status().error();
    return rows;
}

Result<std::unique_ptr<cow::MetadataStore>> Open(const std::string& path, rocksdb::Env* env,
                                                 bool create = false) {
    cow::RocksOptions options;
    options.create = create;
    options.buffer_bytes = kBufferBytes;
    options.env = env;
    return cow::OpenRocksStore(path, options);
}

/// Commits in some lives of a store, and where in the log each began and was answered.
struct History {
    FileLog log;
    Batches batches;
    std::vector<size_t> began, answered;  // positions

    size_t Promised(size_t position) const { return CountUpTo(answered, position); }
    size_t Begun(size_t position) const { return CountUpTo(began, position); }

  private:
    static size_t CountUpTo(const std::vector<size_t>& positions, size_t position) {
        const auto end = std::upper_bound(positions.begin(), positions.end(), position);
        return static_cast<size_t>(end - positions.begin());
    }
};

/// The file with the greatest name that begins so.
std::string Latest(const Files& files, const std::string& prefix, const std::string& suffix = "") {
    std::string latest;
    for (const auto& [name, content] : files) {
        if (name.starts_with(prefix) && name.ends_with(suffix)) latest = name;
    }
    return latest;
}

class RocksPowerCutTest : public testing::Test {
  protected:
    RocksPowerCutTest() : seed_(Setting("VARVE_SEED", std::random_device()())), random_(seed_) {
        std::printf("seed %llu\n", static_cast<unsigned long long>(seed_));
    }

    void Record(History& history, size_t commits, unsigned lives, bool lying = false) {
        const auto env = NewLoggedEnv(history.log, lying);
        const std::string path = place_.New();
        for (unsigned life = 0; life < lives; ++life) {
            auto store = Open(path, env.get(), life == 0);
            ASSERT_TRUE(store.ok()) << store.error().message;
            for (size_t i = 0; i < commits; ++i) {
                history.batches.push_back(DrawBatch(random_, history.batches.size() + 1));
                history.began.push_back(history.log.position() + 1);
                const Status status = store.value()->Commit(history.batches.back());
                ASSERT_TRUE(status.ok()) << status.error().message;
                history.answered.push_back(history.log.position());
            }
        }
    }

    /// How many of the commits are there, whole and in order. Nothing if it does not open, or if
    /// something else is there than after `least` to `most` commits; `wrong_` says what.
    std::optional<size_t> Verify(cow::MetadataStore& store, const Batches& batches, size_t least,
                                 size_t most) {
        const Result<Rows> read = RowsOf(store);
        if (!read.ok()) {
            wrong_ = "cannot be read: " + read.error().message;
            return std::nullopt;
        }
        const Rows& rows = read.value();
        const auto counter = rows.find(kCounter);
        const size_t count = counter == rows.end() ? 0 : std::stoull(counter->second);
        if (count < least || count > most) {
            wrong_ = std::to_string(count) + " commits are there, not " + std::to_string(least) +
                     " to " + std::to_string(most);
            return std::nullopt;
        }
        if (rows != After(batches, count)) {
            wrong_ = "commit " + std::to_string(count) + " is not whole";
            return std::nullopt;
        }
        return count;
    }

    /// Opens what a cut left, goes on, and has the power fail again on the way.
    bool Survives(const Files& files, const Batches& batches, size_t least, size_t most) {
        FileLog log(files);
        const auto env = NewLoggedEnv(log);
        const std::string path = place_.New(files);
        auto store = Open(path, env.get());
        if (!store.ok()) {
            wrong_ = "does not open: " + store.error().message;
            return false;
        }
        const size_t opened = log.position();
        const auto count = Verify(*store.value(), batches, least, most);
        if (!count) return false;
        // What it shows once, it has for good.
        Batches more(batches.begin(), batches.begin() + static_cast<std::ptrdiff_t>(*count));
        more.push_back(DrawBatch(random_, *count + 1));
        const Status status = store.value()->Commit(more.back());
        const size_t answered = log.position();
        store.value().reset();
        if (!status.ok()) {
            wrong_ = "does not go on: " + status.error().message;
            return false;
        }
        const size_t again = random_() % (log.position() + 1);
        store = Open(place_.New(log.Cut(again, random_)), nullptr);
        if (!store.ok()) {
            wrong_ = "does not open after a second cut: " + store.error().message;
            return false;
        }
        const bool second =
            again < opened ? Verify(*store.value(), batches, least, most).has_value()
                           : Verify(*store.value(), more, *count + (again >= answered), *count + 1)
                                 .has_value();
        if (!second) wrong_ += ", after a second cut";
        return second;
    }

    bool Survives(const History& history, size_t position) {
        const Files files = history.log.Cut(position, random_);
        return Survives(files, history.batches, history.Promised(position),
                        history.Begun(position));
    }

    std::vector<size_t> DrawCuts(const History& history, size_t otherwise) {
        const size_t end = history.log.position();
        std::vector<size_t> cuts = history.log.AroundSyncs();
        const size_t more = Setting("VARVE_CUTS", otherwise);
        if (more == 0) {
            cuts.clear();
            for (size_t at = 0; at <= end; ++at) cuts.push_back(at);
        }
        for (size_t i = 0; i < more; ++i) cuts.push_back(random_() % (end + 1));
        // Before the first answer there is no store: the pool directory would begin again.
        std::erase_if(cuts, [&](size_t at) { return history.Promised(at) == 0; });
        return cuts;
    }

    const uint64_t seed_;
    Random random_;
    Place place_;
    std::string wrong_;
};

TEST_F(RocksPowerCutTest, CommitsSurviveAtEverySyncAndBetween) {
    History history;
    Record(history, 25, 3);
    const std::vector<size_t> cuts = DrawCuts(history, 40);
    for (const size_t at : cuts) {
        ASSERT_TRUE(Survives(history, at)) << wrong_ << "; cut at " << at << " of "
                                           << history.log.position() << ", seed " << seed_;
    }
    std::printf("%zu commits, %zu operations on files, %zu cuts\n", history.batches.size(),
                history.log.position(), cuts.size());
}

/// Of what was not synced of a file, that up to some byte has arrived: where the file has grown the
/// rest is missing, or is zeros from a sector on; in place it is as before, from a sector on.
class TornTailTest : public RocksPowerCutTest {
  protected:
    void TearAt(const History& history, size_t position, const std::string& prefix,
                const std::string& suffix, size_t step) {
        const Files all = history.log.All(position);
        const std::string name = Latest(all, prefix, suffix);
        const std::string& whole = all.at(name);
        const std::string durable = history.log.Durable(name, position);
        // Of zeros that were written ahead, a sector's worth shows as much as all of them.
        const size_t used = std::min(whole.size(), whole.find_last_not_of('\0') + 1 + 512);
        const auto arrived =
            std::mismatch(whole.begin(), whole.end(), durable.begin(), durable.end());
        const size_t first = static_cast<size_t>(arrived.first - whole.begin());
        for (size_t length = first; length <= used; length += 1 + random_() % step) {
            const bool sector = length % 512 == 0 || length == first;
            const std::string begin = whole.substr(0, length);
            std::vector<std::string> torn;
            if (length >= durable.size()) torn.push_back(begin);
            if (length >= durable.size() && sector) {
                torn.push_back(begin + std::string(whole.size() - length, '\0'));
            }
            const std::string sectors = whole.substr(0, std::max(first, length / 512 * 512));
            if (sectors.size() < durable.size()) {
                torn.push_back(sectors + durable.substr(sectors.size()));
            }
            for (std::string& content : torn) {
                const size_t size = content.size();
                Files files = all;
                files[name] = std::move(content);
                ++cuts_;
                ASSERT_TRUE(Opens(history, files, position))
                    << wrong_ << "; " << length << " of " << used << " bytes of " << name
                    << ", which has " << size << ", durable " << durable.size() << ", seed "
                    << seed_;
            }
        }
    }
    bool Opens(const History& history, const Files& files, size_t position) {
        auto store = Open(place_.New(files), nullptr);
        if (!store.ok()) {
            wrong_ = store.error().message;
            return false;
        }
        return Verify(*store.value(), history.batches, history.Promised(position),
                      history.Begun(position))
            .has_value();
    }
    size_t cuts_ = 0;
};

TEST_F(TornTailTest, LogTornAtAnyByteIsNoDamage) {
    History history;
    Record(history, 3, 1);
    for (const size_t at : history.log.BeforeSyncs("")) {
        const size_t step = Setting("VARVE_CUTS", 1) == 0 ? 1 : 100;
        if (history.Promised(at) > 0) TearAt(history, at, "", ".log", step);
    }
    std::printf("%zu cuts\n", cuts_);
    EXPECT_GT(cuts_, 0U);
}

TEST_F(TornTailTest, ListOfFilesTornAtAnyByteIsNoDamage) {
    History history;
    Record(history, 60, 2);
    for (const size_t at : history.log.BeforeSyncs("MANIFEST")) {
        if (history.Promised(at) > 0) TearAt(history, at, "MANIFEST", "", 30);
    }
    std::printf("%zu cuts\n", cuts_);
    EXPECT_GT(cuts_, 0U);
}

/// How many commits a mode of RocksDB's finds, or nothing if it refuses to open.
std::optional<size_t> CommitsIn(const std::string& path, rocksdb::WALRecoveryMode mode) {
    rocksdb::Options options;
    options.wal_recovery_mode = mode;
    rocksdb::DB* raw = nullptr;
    if (!rocksdb::DB::Open(options, path, &raw).ok()) return std::nullopt;
    const std::unique_ptr<rocksdb::DB> db(raw);
    std::string counter = "0";
    db->Get(rocksdb::ReadOptions(), kCounter, &counter);
    return std::stoull(counter);
}

// Why the store scans its logs and chooses a mode by what it finds.
TEST_F(RocksPowerCutTest, NoModeOfRocksDBsTellsTornFromDamaged) {
    using Mode = rocksdb::WALRecoveryMode;
    FileLog log;
    const auto env = NewLoggedEnv(log);
    auto store = Open(place_.New(), env.get(), true);
    ASSERT_TRUE(store.ok());
    for (size_t number = 1; number <= 3; ++number) {
        cow::Batch batch;
        batch.Put(kCounter, std::to_string(number));
        batch.Put("row", std::string(3000, 'x'));
        ASSERT_TRUE(store.value()->Commit(batch).ok());
    }
    Files torn = log.All(log.position());  // the third commit lacks a sector, and was not answered
    Files damaged = torn;                  // the first one was answered
    std::string& content = torn.at(Latest(torn, "", ".log"));
    const size_t last = content.find_last_not_of('\0') / 512 * 512;
    content.replace(last - 512, 512, std::string(512, '\0'));
    damaged.at(Latest(damaged, "", ".log"))[1000] ^= 1;

    EXPECT_EQ(CommitsIn(place_.New(torn), Mode::kTolerateCorruptedTailRecords), std::nullopt);
    EXPECT_EQ(CommitsIn(place_.New(torn), Mode::kAbsoluteConsistency), std::nullopt);
    EXPECT_EQ(CommitsIn(place_.New(torn), Mode::kPointInTimeRecovery), 2U);
    EXPECT_EQ(CommitsIn(place_.New(damaged), Mode::kTolerateCorruptedTailRecords), std::nullopt);
    EXPECT_EQ(CommitsIn(place_.New(damaged), Mode::kAbsoluteConsistency), std::nullopt);
    EXPECT_EQ(CommitsIn(place_.New(damaged), Mode::kPointInTimeRecovery), 0U);  // without a word

    EXPECT_TRUE(Open(place_.New(torn), nullptr).ok());
    EXPECT_EQ(Open(place_.New(damaged), nullptr).status().error().kind, ErrorKind::kDamaged);
}

TEST_F(RocksPowerCutTest, ADeviceThatLiesIsFound) {
    History history;
    Record(history, 20, 1, true);
    size_t found = 0;
    for (const size_t at : DrawCuts(history, 20)) found += !Survives(history, at);
    EXPECT_GT(found, 0U);
}

}  // namespace
}  // namespace varve::power_cut
