// FakeVolume: a volume in memory that can hold its requests back and fail on demand.
// Not an engine: no map, no durability; it shows what a connection asks for.
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "base/sync.h"
#include "cow/volume/changes.h"
#include "cow/volume/volume.h"

namespace varve {

/// All members on the executor only.
class FakeVolume : public cow::Volume {
  public:
    FakeVolume(Executor& executor, uint64_t size)
        : executor_(executor), waiting_(executor), data_(size), mapped_(size / cow::kBlockBytes) {}
    ~FakeVolume() override { VARVE_CHECK(running_ == 0); }

    // ---- for the test
    bool read_only_export = false;
    bool hold = false;                      // requests wait until Release()
    std::map<std::string, Errno> errors;    // by call: "read", "write", ...
    std::map<std::string, uint64_t> calls;  // how often
    uint64_t running_max = 0;
    bool last_allocate = false;  // of WriteZeroes

    void Release() {
        hold = false;
        waiting_.WakeAll();
    }
    /// Lets the one that has waited longest go on, while the others stay.
    void ReleaseOne() {
        ++let_go_;
        waiting_.WakeOne();
    }
    uint64_t running() const { return running_; }
    /// How many of those that are held back are of clients that are known to be gone.
    uint64_t abandoned() const {
        return static_cast<uint64_t>(std::count_if(held_.begin(), held_.end(),
                                                   [](const auto* r) { return r && r->gone(); }));
    }
    std::byte* data() { return data_.data(); }
    void Map(uint64_t offset, uint64_t length, bool mapped) {
        for (uint64_t b = offset / cow::kBlockBytes; b * cow::kBlockBytes < offset + length; ++b) {
            mapped_[b] = mapped;
        }
    }

    // ---- cow::Volume
    Executor& executor() override { return executor_; }
    uint64_t size() const override { return data_.size(); }
    bool read_only() const override { return read_only_export; }

    Task<Errno> Read(uint64_t offset, std::span<std::byte> buffer,
                     std::vector<cow::Allocation>* map, cow::Requester* requester) override {
        const Errno error = co_await Enter("read", requester);
        if (!error) {
            std::memcpy(buffer.data(), data_.data() + offset, buffer.size());
            if (map) Describe(offset, buffer.size(), ~0u, map);
        }
        --running_;
        co_return error;
    }
    Task<Errno> Write(uint64_t offset, std::span<const std::byte> buffer,
                      cow::Requester* requester) override {
        VARVE_CHECK(reinterpret_cast<uintptr_t>(buffer.data()) % 4096 == 0);
        const Errno error = co_await Enter("write", requester);
        if (!error) {
            std::memcpy(data_.data() + offset, buffer.data(), buffer.size());
            Map(offset, buffer.size(), true);
        }
        --running_;
        co_return error;
    }
    Task<Errno> Trim(uint64_t offset, uint64_t length, cow::Requester* requester) override {
        const Errno error = co_await Enter("trim", requester);
        const uint64_t first = (offset + 4095) / 4096 * 4096;
        const uint64_t end = (offset + length) / 4096 * 4096;
        if (!error && first < end) Zero(first, end - first, false);
        --running_;
        co_return error;
    }
    Task<Errno> WriteZeroes(uint64_t offset, uint64_t length, bool allocate,
                            cow::Requester* requester) override {
        const Errno error = co_await Enter("zero", requester);
        last_allocate = allocate;
        if (!error) Zero(offset, length, allocate);
        --running_;
        co_return error;
    }
    Task<Errno> Flush() override {
        const Errno error = co_await Enter("flush", nullptr);
        --running_;
        co_return error;
    }
    Task<Errno> Status(uint64_t offset, uint64_t length, uint32_t most, const cow::Layers* layers,
                       std::vector<cow::Allocation>* map, cow::Requester* requester) override {
        const Errno error = co_await Enter("status", requester);
        if (!error) Describe(offset, length, most, map);
        if (layers) {
            for (cow::Allocation& part : *map) part.depth = part.hole ? 0 : layers->DepthOf({5});
        }
        --running_;
        co_return error;
    }
    /// Stretches of 2^generation blocks are the same and changed in turns.
    Task<Errno> Changes(const cow::Base* base, uint64_t offset, uint64_t length, uint32_t most,
                        std::vector<cow::Delta>* changes, cow::Requester* requester) override {
        const Errno error = co_await Enter("changes", requester);
        const uint64_t end = offset + length;
        while (!error && offset < end) {
            const uint64_t block = offset / cow::kBlockBytes;
            const bool changed = (block >> base->generation.value & 1) != 0;
            const bool zero = changed && !mapped_[block];
            const uint64_t to = std::min(end, (block + 1) * cow::kBlockBytes);
            cow::Delta next{to - offset, changed, zero};
            const bool joins = !changes->empty() && changes->back().changed == changed &&
                               changes->back().zero == zero;
            if (!joins && changes->size() == most) break;
            if (joins) {
                changes->back().length += next.length;
            } else {
                changes->push_back(next);
            }
            offset = to;
        }
        --running_;
        co_return error;
    }

  private:
    Task<Errno> Enter(const char* call, const cow::Requester* requester) {
        ++calls[call];
        running_max = std::max(running_max, ++running_);
        const auto held = held_.insert(requester);
        while (hold && let_go_ == 0) co_await waiting_.Wait();
        held_.erase(held);
        let_go_ -= std::min<uint64_t>(let_go_, 1);
        if (requester && requester->gone()) co_return ECANCELED;
        const auto found = errors.find(call);
        co_return found == errors.end() ? 0 : found->second;
    }
    void Zero(uint64_t offset, uint64_t length, bool mapped) {
        std::memset(data_.data() + offset, 0, length);
        Map(offset, length, mapped);
    }
    void Describe(uint64_t offset, uint64_t length, uint32_t most,
                  std::vector<cow::Allocation>* map) {
        const uint64_t end = offset + length;
        for (uint32_t n = 0; offset < end && n < most; ++n) {
            const bool hole = !mapped_[offset / 4096];
            const uint64_t first = offset;
            while (offset < end && mapped_[offset / 4096] == !hole) {
                offset = std::min(end, (offset / 4096 + 1) * 4096);
            }
            map->push_back({offset - first, hole});
        }
    }

    Executor& executor_;
    WaitList waiting_;
    std::multiset<const cow::Requester*> held_;
    std::vector<std::byte> data_;
    std::vector<bool> mapped_;
    uint64_t let_go_ = 0;
    uint64_t running_ = 0;
};

}  // namespace varve
