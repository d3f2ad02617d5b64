// Runner: one simulation: clients, commands, power cuts and restarts, and what was promised.
// Not the model, which is model.h; not the engine's surroundings, which are world.h.
//
// simulation.cc: rounds; clients.cc, rude.cc: requests; commands.cc: commands; settle.cc: what must
// be there; damage.cc: checksums.
#pragma once

#include <fmt/format.h>

#include <map>

#include "cow/volume/transfers.h"
#include "tests/simulation/model.h"
#include "tests/simulation/simulation.h"
#include "tests/simulation/world.h"

namespace varve::simulation {

/// How much there is of everything.
struct Scale {
    uint64_t disks_min, disks;
    uint64_t snapshots;  // of one disk
    uint64_t sizes[4];   // of disks; a chunk has 256 KiB
    uint64_t clients;    // of one disk
    uint64_t requests;   // of one client
    uint64_t commands;
};
inline constexpr Scale kLarge{
    2, 4, 6, {64 << 10, (200 << 10) + 512, (300 << 10) - 1024, 528 << 10}, 3, 30, 10};
/// Many disks, each with little: they share regions, and lanes.
inline constexpr Scale kMany{10, 16, 2, {12 << 10, (64 << 10) + 3584, 200 << 10, 264 << 10},
                             1,  8,  8};
/// Few disks, of tens of chunks.
inline constexpr Scale kWide{2, 3,  2, {2 << 20, (3 << 20) + 512, (5 << 20) - 1536, 8 << 20},
                             2, 20, 6};
inline constexpr Scale kSmall{2, 3, 3, {12 << 10, (20 << 10) + 1536, (40 << 10) - 512, 264 << 10},
                              2, 6, 4};
inline constexpr uint64_t kRoomy = 256 << 20;
/// One region of the allocator: disks take it from each other, and what is freed is soon reused.
inline constexpr uint64_t kTight = 16 << 20;
/// The disk that has what the others shall not have, if there is one.
inline constexpr const char* kBallast = "ballast";
/// Of a rude client, for each request of a polite one.
inline constexpr uint64_t kRudeRequests = 8;

struct Snapshot {
    Image image;
    std::shared_ptr<Moments> moments;  // of its cut, which other disks may share
};

struct Disk {
    explicit Disk(uint64_t size) : model(size) {}
    ModelDisk model;
    std::map<std::string, Snapshot> snapshots;
};

/// Memory whose alignment does not depend on the heap, so that a seed replays.
class Buffer {
  public:
    Buffer(size_t bytes, bool aligned)
        : memory_(cow::AllocateAligned(bytes + 8)), bytes_(bytes), shift_(aligned ? 0 : 8) {
        std::memset(span().data(), '?', bytes_);
    }
    std::span<std::byte> span() { return {memory_.get() + shift_, bytes_}; }
    std::string text() { return {reinterpret_cast<char*>(memory_.get()) + shift_, bytes_}; }
    void Fill(const std::string& text) { std::memcpy(span().data(), text.data(), bytes_); }

  private:
    cow::AlignedBuffer memory_;
    const size_t bytes_, shift_;
};

class Runner {
  public:
    explicit Runner(const SimulationOptions& options)
        : options_(options),
          scale_(ScaleOf(options)),
          dice_(Dice::Of(options.seed, 0)),
          scheduler_(options.seed + (options.order << 32)),
          tight_(dice_.Chance(0.5)),
          limited_(Dice::Of(options.seed, kMetadata).Chance(0.25)),
          rude_(Dice::Of(options.seed, kRude).Chance(0.25)),
          fragile_(!limited_ && !options.small && Dice::Of(options.seed, kHurt).Chance(0.25)),
          commanders_(Dice::Of(options.seed, kCrowd).Chance(0.25) ? 3 : 1),
          media_(scheduler_, tight_ ? kTight : kRoomy) {
        if (options_.probe) media_.probe = [this](Call call) { return Ask(call); };
    }

    SimulationResult Run();

  private:
    // Dice that are no step's.
    static constexpr uint64_t kReadsAtOnce = ~uint64_t{0}, kWorld = kReadsAtOnce - 1;
    static constexpr uint64_t kMetadata = kReadsAtOnce - 2, kRude = kReadsAtOnce - 3;
    static constexpr uint64_t kBreadth = kReadsAtOnce - 4, kHurt = kReadsAtOnce - 5;
    static constexpr uint64_t kCrowd = kReadsAtOnce - 6;

    static const Scale& ScaleOf(const SimulationOptions& options) {
        if (options.small) return kSmall;
        if (Dice::Of(options.seed, kBreadth).Chance(0.03)) return kWide;
        return Dice::Of(options.seed, kWorld).Chance(0.2) ? kMany : kLarge;
    }

    bool Fine() const { return result_.violation.empty(); }

    void Violation(const std::string& what) {
        if (Fine()) result_.violation = fmt::format("seed {}: {}", options_.seed, what);
    }

    /// The result of a command.
    void Do(const Status& s) {
        if (s.ok()) return;
        if (Refused(s)) return;
        if (Faulty()) failed_ = true;
        if (media_.power() && !failed_) Violation("refused: " + s.error().message);
    }

    /// The command was refused before anything was done, as it may be where metadata is scarce.
    bool Refused(const Status& s) const {
        return limited_ && !s.ok() && s.error().kind == ErrorKind::kNoSpace && media_.power() &&
               media_.broken.empty();
    }

    /// Errors are excused.
    bool Faulty() const { return faulty_; }

    // ---- mishaps

    Mishap Ask(Call call) {
        if (!exposed_ || mishap_ != Mishap::kNone) return Mishap::kNone;
        mishap_ = options_.probe(++asked_, call);
        if (mishap_ != Mishap::kNone) {
            static constexpr const char* kNames[] = {"nothing", "a power cut", "a kill",
                                                     "an error"};
            Note("{} at call {}, a {}", kNames[static_cast<size_t>(mishap_)], asked_, NameOf(call));
        }
        if (mishap_ == Mishap::kError) faulty_ = true;
        return mishap_;
    }
    /// While it lives, mishaps may happen: where they do, all code copes with them.
    class Exposed {
      public:
        explicit Exposed(Runner& runner) : runner_(runner), before_(runner.exposed_) {
            runner.exposed_ = true;
        }
        Exposed(const Exposed&) = delete;
        ~Exposed() { runner_.exposed_ = before_; }

      private:
        Runner& runner_;
        const bool before_;
    };
    bool Struck() const { return mishap_ != Mishap::kNone; }

    // ---- steps

    // Who begins one. Clients count on from kClients.
    enum Actor : uint64_t {
        kRound,
        kCommander,
        kQuiet,
        kRestart,
        kVerifier,
        kClients,
        kCommanders = 253,  // further ones
        kLeaver = 255
    };

    /// The next draws, until the first wait, are those of this step. False if it is left out.
    bool Begin(uint64_t actor, uint64_t index) {
        step_ = uint64_t{round_} << 16 | actor << 8 | index;
        dice_ = Dice::Of(options_.seed, step_);
        return !options_.skipped.contains(step_);
    }
    template <typename... Args>
    void Note(fmt::format_string<Args...> format, Args&&... args) {
        if (!options_.on_step) return;
        const std::string what = fmt::format(format, std::forward<Args>(args)...);
        options_.on_step(step_, fmt::format("round {}: {}", round_, what));
    }

    /// What was promised just now holds from now on: a good moment for the power to fail.
    void Answered() {
        if (cut_at_answer_ > 0 && --cut_at_answer_ == 0) media_.End();
    }

    void DrawCut(uint64_t operations, uint64_t answers) {
        const bool kill = dice_.Chance(0.4);
        const char* what = kill ? "the process is killed" : "the power fails";
        if (dice_.Chance(0.5)) {
            const uint64_t after = 1 + dice_.Draw(operations);
            Note("{} after {} operations", what, after);
            media_.CutAfter(after, kill);
        } else {
            cut_at_answer_ = 1 + dice_.Draw(answers);
            Note("{} after {} answers", what, cut_at_answer_);
            media_.EndBy(kill);
        }
    }

    void CancelCut() {
        media_.CutAfter(0);
        cut_at_answer_ = 0;
    }

    Time Now() { return ++time_; }

    std::string NewName(char letter) { return fmt::format("{}{}", letter, ++names_); }

    cow::Pool& pool() { return machine_->pool(); }

    // ---- life and death

    void Bound();
    bool Open();
    uint64_t RingBlocks();
    void FillUp(uint64_t free_blocks);
    void Reopen();
    void Restart();
    void Hurt();
    void Mend();

    /// After a restart each disk and snapshot must be something that was legal.
    void SettleAll(bool crashed);
    void SettleDisk(const std::string& name, Disk& disk, bool crashed);
    void VerifyAll();
    void VerifySnapshots(const std::string& name, Disk& disk);
    void Verify(const std::string& full, Snapshot& state, const std::string& data);
    static void Explain(const Image& image, const std::string& data, size_t sector);
    Task<void> WaitForReclaim(bool* done);

    // ---- damage
    /// Whatever is verified must be sound; a flipped bit must be an I/O error for all who see it.
    void VerifyChecksums();
    Task<void> WaitForChecksums(bool* done);
    void DamageOne();
    void ExpectDamage(const std::string& name, uint64_t offset);
    Errno Attempt(const std::string& name, uint64_t offset, uint64_t length, bool write);
    Task<void> Scrub();

    // ---- requests

    /// Nothing if it cannot be read and that is excused.
    std::optional<std::string> ReadAll(const std::string& name);
    void Close(uint64_t id);
    Task<void> CloseTask(uint64_t id, bool* done);
    std::string Fill(const std::string& disk, uint64_t length);

    struct Range {
        uint64_t offset, length;
    };
    Range DrawRange(uint64_t size);

    struct Change {
        std::vector<Edit> edits;
        std::vector<std::vector<Content>> results;
        uint64_t first = 0;
    };
    Change BeginChange(ModelDisk& model, Range range, const std::string* data);
    void EndChange(ModelDisk& model, const Change& change, Errno error);
    void Judge(Errno error, const char* what);
    Task<void> Client(uint64_t actor, std::string name, Disk* disk, cow::Volume* volume,
                      unsigned requests);
    Task<void> Request(const std::string& name, Disk* disk, cow::Volume* volume);
    Task<void> WriteOnce(const std::string& name, Disk* disk, cow::Volume* volume, Range range,
                         bool fua);
    Task<void> TrimOnce(Disk* disk, cow::Volume* volume, Range range);
    Task<void> FlushOnce(Disk* disk, cow::Volume* volume);
    Task<void> ReadOnce(std::string name, Disk* disk, cow::Volume* volume, Range range);

    // ---- clients that go away
    struct Abandoned;
    uint64_t StartRude(std::vector<uint64_t>* exports);
    Task<void> RudeClient(std::string name, Disk* disk, cow::Volume* volume);
    Task<void> GoAway(const std::string& name, Disk* disk, cow::Volume* volume);
    Range DrawLarge(uint64_t size);
    Task<void> Abandon(const std::string& name, Disk* disk, cow::Volume* volume, Range range,
                       Abandoned* abandoned);

    // ---- commands beside clients

    Task<void> Commands(uint64_t actor, unsigned count);
    Task<void> TakeSnapshots();

    /// Reads a snapshot that was taken a moment ago, beside clients.
    Task<void> LookAt(std::string full, Disk& disk, std::string snapshot);
    Task<void> DeleteSnapshot();
    Task<void> FlattenBeside();

    // ---- rounds

    void Round();
    void BusyRound();
    uint64_t StartClients(std::vector<uint64_t>* exports);
    void DrawFaults();
    void CreateDisk(uint64_t index);

    /// Commands that need their disks without clients.
    void QuietCommands();
    void QuietCommand(const std::string& name, Disk& disk);
    Snapshot* DrawSnapshot(Disk& disk, std::string* name);

    /// A snapshot's image, made certain by reading it.
    bool Know(const std::string& disk, const std::string& name, Snapshot& snapshot);
    void Restore(const std::string& name, Disk& disk);
    void Flatten(const std::string& name);
    void Clone(const std::string& name, Disk& disk);
    void Resize(const std::string& name, Disk& disk);
    void ResizeTo(const std::string& name, Disk& disk, uint64_t size);
    void DeleteDisk(const std::string& name);

    /// With nothing else under way, deleting frees exactly what `unique` says.
    void DeleteCounted(const std::string& name, Disk& disk);

    /// The pool is closed before the deletion has given anything back.
    void DeleteAndClose(const std::string& name, Disk& disk);
    bool Quiet();

    const SimulationOptions options_;
    const Scale& scale_;
    Dice dice_;  // of the step that was begun last
    Scheduler scheduler_;
    const bool tight_;    // in data
    const bool limited_;  // in metadata
    const bool rude_;     // clients write and trim a few blocks for long
    const bool fragile_;  // rows of the allocator become unreadable for a while
    const uint64_t commanders_;
    Media media_;
    cow::PoolOptions pool_options_;
    unsigned lanes_ = 1;
    DataTraits data_traits_;
    std::unique_ptr<Machine> machine_;
    std::vector<std::unique_ptr<Machine>> past_;  // taking them down is dear where a process ends
    std::map<std::string, Disk> disks_;
    SimulationResult result_;
    Time time_ = 0;
    uint64_t names_ = 0;
    uint64_t sequence_ = 0;
    uint64_t clients_ = 0;
    unsigned round_ = 0;
    uint64_t step_ = 0;
    bool exposed_ = false;
    uint64_t asked_ = 0;  // calls at which there might have been a mishap
    Mishap mishap_ = Mishap::kNone;
    bool faulty_ = false;         // there was an error since the start, or one may be drawn now
    bool failed_ = false;         // the pool refuses writes: only a restart helps
    bool reopen_ = false;         // at once
    bool any_cut_ = false;        // since the pool was open last, the power failed; else kills only
    uint64_t cut_at_answer_ = 0;  // the power fails when so many more were given; 0: no

    // What a command that the crash met may have done or not.
    std::set<std::string> uncertain_disks_;
    std::unique_ptr<Disk> uncertain_disk_;
    struct Uncertain {
        Snapshot snapshot;
        bool begun;  // else its deletion
    };
    std::map<std::pair<std::string, std::string>, Uncertain> uncertain_snapshots_;
    std::set<std::string> held_;  // DISK@SNAP that a command is at
    bool scrubbing_ = false;
    /// Of a cut that the crash met: whether disks have it.
    struct Fate {
        bool there = false, lost = false;
    };
    std::map<const Moments*, Fate> cuts_;
    std::optional<std::pair<std::string, std::string>> hurt_;  // a row, as it was
    std::string grow_;                                         // a disk whose shrinking a crash met
    std::string uncertain_name_;
    std::optional<Image> uncertain_image_;
};

}  // namespace varve::simulation
