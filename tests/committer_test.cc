// The committer: however many wait, a batch has a bound.
#include "cow/head/committer.h"

#include "tests/engine_fixture.h"

namespace varve {
namespace {

using namespace simulation;  // NOLINT
using cow::Committer;

constexpr unsigned kWaiting = 100;
constexpr size_t kRowBytes = 64 << 10;

class CommitterTest : public EngineTest {
  protected:
    std::string Key(unsigned i) { return "Z" + std::to_string(i); }
    Task<void> Hand(Committer* committer, unsigned i, unsigned* done) {
        co_await Hop(machine->home());
        cow::Change change = [this, i](cow::CommitContext& context) {
            context.batch.Put(Key(i), std::string(kRowBytes, 'v'));
            return Status();
        };
        const Status s = co_await committer->Commit(std::move(change), machine->home());
        EXPECT_TRUE(s.ok());
        ++*done;
    }
    Task<void> HandPlain(Committer* committer, Executor* lane, unsigned i, unsigned* done) {
        co_await Hop(*lane);
        cow::PlainRows rows;
        rows.batch.Put(Key(i), std::string(kRowBytes, 'p'));
        const Status s = co_await committer->CommitPlain(std::move(rows), *lane);
        EXPECT_TRUE(s.ok());
        ++*done;
    }
};

TEST_F(CommitterTest, ThoseWhoWaitDoNotAllShareABatch) {
    const auto before = media.metadata();
    cow::Core core(machine->environment());
    const cow::Lanes core_lanes(core, 1 << 20);
    const auto view = core.metadata().View();
    auto catalog = cow::Catalog::Load(*view);
    ASSERT_TRUE(catalog.ok());
    cow::PoolRecord& record = catalog.value().mutable_pool();
    cow::Allocator allocator(core.metadata(), *core.environment.space, record, 0);
    cow::Leases leases(core, allocator);
    Committer committer(core, core_lanes, catalog.value(), allocator, leases,
                        [](const std::vector<cow::NotePlace>&) {});
    unsigned done = 0;
    for (unsigned i = 0; i < kWaiting; ++i) {
        Spawn(Hand(&committer, 2 * i, &done));
        Executor* lane = core.environment.lanes[i % lanes].executor;
        Spawn(HandPlain(&committer, lane, 2 * i + 1, &done));
    }
    ASSERT_TRUE(scheduler.RunUntil([&] { return done == 2 * kWaiting; }));
    scheduler.RunAll();
    for (unsigned i = 0; i < 2 * kWaiting; ++i) EXPECT_TRUE(media.metadata()->contains(Key(i)));
    const uint64_t bound = 2 * (Committer::kGroupBytes + kRowBytes) + 4096;
    EXPECT_LE(media.largest_batch, bound);
    EXPECT_LE(kWaiting * kRowBytes / bound, committer.commits());
    media.SetMetadata(before);
}

}  // namespace
}  // namespace varve
