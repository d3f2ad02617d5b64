// Rude clients: they ask for much at once, all of it in the same places, and go away in the middle.
// The next client comes at once, and what it is answered counts.
#include "base/sync.h"
#include "tests/simulation/runner.h"

namespace varve::simulation {
namespace {

constexpr uint64_t kTimes = 3;         // that one goes away in a round
constexpr uint64_t kRequestsMax = 4;   // that it has under way then
constexpr uint64_t kPatienceMax = 80;  // turns of its lane that it waits
constexpr uint64_t kLargest = 768 << 10;

}  // namespace

/// What one that goes away has asked for.
struct Runner::Abandoned {
    explicit Abandoned(uint32_t requests) : left(requests), ended(requests) {}
    cow::Requester requester;
    uint64_t left;  // requests that are not over
    Join ended;
};

/// Returns how many.
uint64_t Runner::StartRude(std::vector<uint64_t>* exports) {
    if (!Begin(kLeaver, 0) || !dice_.Chance(0.4)) return 0;
    auto disk = disks_.begin();
    std::advance(disk, static_cast<std::ptrdiff_t>(dice_.Draw(disks_.size())));
    const auto opened = machine_->Do(pool().OpenExport(disk->first));
    if (!opened.ok()) {
        Violation(opened.error().message);
        return 0;
    }
    exports->push_back(opened.value().id);
    Spawn(RudeClient(disk->first, &disk->second, opened.value().volume));
    return 1;
}

Task<void> Runner::RudeClient(std::string name, Disk* disk, cow::Volume* volume) {
    co_await Hop(volume->executor());
    for (uint64_t i = 1; i <= kTimes && media_.power() && Fine(); ++i) {
        if (!Begin(kLeaver, i)) continue;
        co_await GoAway(name, disk, volume);
    }
    co_await Hop(machine_->home());
    --clients_;
}

Task<void> Runner::GoAway(const std::string& name, Disk* disk, cow::Volume* volume) {
    const uint64_t patience = dice_.Draw(kPatienceMax);
    const auto requests = static_cast<uint32_t>(1 + dice_.Draw(kRequestsMax));
    const Range range = DrawLarge(disk->model.size());
    Note("go away from {} after {} turns with {} requests", name, patience, requests);
    Abandoned abandoned(requests);
    for (uint32_t i = 0; i < requests; ++i) {
        Spawn(Abandon(name, disk, volume, range, &abandoned));
    }
    const Dice mine = dice_;
    for (uint64_t i = 0; i < patience && abandoned.left > 0; ++i) co_await Hop(volume->executor());
    abandoned.requester.Leave();
    co_await abandoned.ended;
    if (media_.abandoned_begun) Violation("a write of a client that has gone begins");
    if (!media_.power() || !Fine()) co_return;
    dice_ = mine;
    co_await WriteOnce(name, disk, volume, range, dice_.Chance(0.5));
    dice_ = mine;
    co_await ReadOnce(name, disk, volume, range);
}

Runner::Range Runner::DrawLarge(uint64_t size) {
    if (dice_.Chance(0.3)) return {0, std::min<uint64_t>(size, 4096)};  // all on one block
    const uint64_t length = std::min(size, kLargest);
    return {(size - length) / 4096 * 4096, length};
}

/// One request of a client that goes away. On the volume's executor.
Task<void> Runner::Abandon(const std::string& name, Disk* disk, cow::Volume* volume, Range range,
                           Abandoned* abandoned) {
    ++result_.requests;
    cow::Requester* const requester = &abandoned->requester;
    const uint64_t kind = dice_.Draw(100);
    const bool writes = kind < 60;
    const std::string data = writes ? Fill(name, range.length) : std::string();
    Buffer buffer(range.length, dice_.Chance(0.9));
    if (writes) buffer.Fill(data);
    const std::span<std::byte> bytes = buffer.span();
    const Change change = BeginChange(disk->model, range, writes ? &data : nullptr);
    Errno error = 0;
    if (writes) {
        const Media::Payload payload(media_, bytes, *requester);
        error = co_await volume->Write(range.offset, bytes, requester);
    } else if (kind < 75) {
        error = co_await volume->Trim(range.offset, range.length / 4096 * 4096, requester);
    } else {
        error = co_await volume->WriteZeroes(range.offset, range.length, kind < 90, requester);
    }
    // What a trim leaves of a block at the end is as unknown as what was given up.
    const bool part = !writes && kind < 75 && range.length % 4096 != 0;
    EndChange(disk->model, change, part ? ECANCELED : error);
    if (error != ECANCELED || !requester->gone()) Judge(error, "a request of one that goes away");
    --abandoned->left;
    abandoned->ended.Done();
}

}  // namespace varve::simulation
