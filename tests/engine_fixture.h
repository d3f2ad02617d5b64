// EngineTest: a pool on the simulated disk, with words for what tests do to it.
// Not the simulation: each test says what happens, the seed only decides the order of completions.
#pragma once

#include <gtest/gtest.h>

#include "tests/simulation/world.h"

namespace varve::simulation {

inline constexpr uint64_t kMiB = 1 << 20;

class EngineTest : public testing::Test {
  protected:
    explicit EngineTest(unsigned lane_count = 2, uint64_t capacity = 64 * kMiB, uint64_t seed = 1)
        : lanes(lane_count), scheduler(seed), media(scheduler, capacity) {}

    const unsigned lanes;
    Scheduler scheduler;
    Media media;
    std::unique_ptr<Machine> machine;
    std::map<std::string, cow::Export> exports;

    void SetUp() override { Start(); }
    void TearDown() override { Stop(); }

    void Start(cow::PoolOptions options = {}) {
        machine = std::make_unique<Machine>(scheduler, media, lanes, options);
        const Status s = machine->Start();
        ASSERT_TRUE(s.ok()) << s.error().message;
    }
    void Stop() {
        if (!machine) return;
        for (const auto& [name, e] : exports) Detach(e);
        exports.clear();
        const Status s = machine->Stop();
        ASSERT_TRUE(s.ok()) << s.error().message;
        CheckClean();
        machine.reset();
    }
    void Detach(const cow::Export& e) {
        bool done = false;
        Spawn(DetachTask(&machine->home(), &machine->pool(), e.id, &done));
        scheduler.RunUntil([&] { return done; });
    }
    static Task<void> DetachTask(Executor* home, cow::Pool* pool, uint64_t id, bool* done) {
        co_await Hop(*home);
        co_await pool->CloseExport(id);
        *done = true;
    }
    void CheckClean() {
        const auto report = cow::CheckMetadata(machine->metadata());
        ASSERT_TRUE(report.ok());
        EXPECT_TRUE(report.value().ok())
            << report.value().leaked_blocks << " leaked; "
            << (report.value().errors.empty() ? "" : report.value().errors[0]);
    }
    void Reclaim() {
        bool done = false;
        Spawn(ReclaimTask(&machine->home(), &machine->pool(), &done));
        ASSERT_TRUE(scheduler.RunUntil([&] { return done; }));
    }
    static Task<void> ReclaimTask(Executor* home, cow::Pool* pool, bool* done) {
        co_await Hop(*home);
        co_await pool->WaitForReclaim();
        *done = true;
    }

    /// Until all that can have checksums has them.
    void Checksum() {
        bool done = false;
        Spawn(ChecksumTask(&machine->home(), &machine->pool(), &done));
        ASSERT_TRUE(scheduler.RunUntil([&] { return done; }));
    }
    static Task<void> ChecksumTask(Executor* home, cow::Pool* pool, bool* done) {
        co_await Hop(*home);
        co_await pool->WaitForChecksums();
        *done = true;
    }

    void Ok(Task<Status> task) {
        const Status s = machine->Do(std::move(task));
        EXPECT_TRUE(s.ok()) << s.error().message;
    }
    ErrorKind Fails(Task<Status> task) {
        const Status s = machine->Do(std::move(task));
        EXPECT_FALSE(s.ok());
        return s.ok() ? ErrorKind::kFailed : s.error().kind;
    }
    cow::Volume& Volume(const std::string& name) {
        if (!exports.contains(name)) {
            auto e = machine->Do(machine->pool().OpenExport(name));
            VARVE_CHECK(e.ok());
            exports[name] = e.value();
        }
        return *exports[name].volume;
    }
    void Close(const std::string& name) {
        Detach(exports.at(name));
        exports.erase(name);
    }
    Errno Write(const std::string& name, uint64_t offset, uint64_t length, char fill) {
        const std::string data(length, fill);
        cow::Volume& v = Volume(name);
        const std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data.data()),
                                               data.size());
        return Await(scheduler, v.executor(), v.Write(offset, bytes));
    }
    Errno Flush(const std::string& name) {
        cow::Volume& v = Volume(name);
        return Await(scheduler, v.executor(), v.Flush());
    }
    std::string Read(const std::string& name, uint64_t offset, uint64_t length) {
        std::string data(length, '?');
        cow::Volume& v = Volume(name);
        const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(data.data()), data.size());
        EXPECT_EQ(0, Await(scheduler, v.executor(), v.Read(offset, bytes, nullptr)));
        return data;
    }
    void Expect(const std::string& name, uint64_t offset, uint64_t length, char fill) {
        const std::string data = Read(name, offset, length);
        const size_t wrong = data.find_first_not_of(fill);
        EXPECT_EQ(std::string::npos, wrong) << name << " differs at " << offset + wrong;
    }
    uint64_t Used() { return machine->Do(machine->pool().GetStatus()).value().used; }
    uint64_t Unique(const std::string& name) {
        return machine->Do(machine->pool().ShowSnapshot(name)).value().unique;
    }
    cow::Pool& pool() { return machine->pool(); }
};

}  // namespace varve::simulation
