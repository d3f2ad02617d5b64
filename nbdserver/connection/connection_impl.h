// The insides of Connection and of what the connections of a reactor share, for connection*.cc.
// How they work: connection.cc. Everything here belongs to the reactor's thread.
#pragma once

#include <sys/socket.h>
#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/backoff.h"
#include "base/buffers.h"
#include "base/check.h"
#include "base/free_list.h"
#include "base/reactor.h"
#include "base/sync.h"
#include "base/task.h"
#include "base/trial.h"
#include "nbdserver/connection/connection.h"
#include "nbdserver/connection/memory_budget.h"
#include "nbdserver/connection/request.h"
#include "nbdserver/tls/records.h"
#include "nbdserver/wire/wire.h"

namespace varve::nbdserver {

constexpr size_t kSendPiecesMax = 1024;  // IOV_MAX
// What a request costs besides its payload, measured while many wait for the device: its state and
// the frames of its coroutines.
constexpr uint64_t kRequestBytes = 2560;
// A request with a payload of 16 KiB, or one of 4 KiB that takes a detour, whatever its reply looks
// like.
constexpr uint64_t kSmallRequestBytes = 24 << 10;
static_assert(kReplyPiecesMax <= kSendPiecesMax);

/// What a reactor's connections have received but not begun, or what their receives may bring. Told
/// to the pot, which has that of all reactors, in steps.
class ReceivedBytes {
  public:
    explicit ReceivedBytes(MemoryPot& pot) : pot_(pot), step_(pot.grain() / 4) {}

    /// A part of it, counted as long as it lasts.
    class Part {
      public:
        explicit Part(ReceivedBytes& all) : all_(all) {}
        ~Part() { Set(0); }
        Part(const Part&) = delete;

        /// In place of what it was.
        void Set(uint64_t bytes) { all_.Change(std::exchange(bytes_, bytes), bytes); }

      private:
        ReceivedBytes& all_;
        uint64_t bytes_ = 0;
    };

    uint64_t here() const { return bytes_; }
    uint64_t everywhere() const {
        return pot_.received_bytes.load(std::memory_order_relaxed) - told_ + bytes_;
    }

  private:
    void Change(uint64_t before, uint64_t after) {
        VARVE_CHECK(bytes_ >= before);
        bytes_ += after - before;
        if (bytes_ <= told_ && told_ <= bytes_ + 2 * step_) return;
        const uint64_t tell = bytes_ + step_;
        pot_.received_bytes.fetch_add(tell - std::exchange(told_, tell));
    }

    MemoryPot& pot_;
    const uint64_t step_;
    uint64_t bytes_ = 0;
    uint64_t told_ = 0;
};

/// What one send needs until it is complete.
struct SendBatch {
    SendBatch* next = nullptr;  // among the unused
    msghdr message{};
    Request* requests = nullptr;  // whose replies these are
    size_t first = 0;             // of the pieces that are not sent yet
    size_t end = 0;               // of all pieces
    uint64_t cut = 0;             // bytes that the last piece in `message` has besides
    std::array<iovec, kSendPiecesMax> pieces;
};

/// Some of a batch, as records: what is being sent under TLS.
struct SealedBatch {
    static constexpr size_t kRecordsMax = 256;
    // A key update may come before them.
    static constexpr size_t kAddedMax =
        kRecordsMax * (tls::kHeadBytesMax + tls::kTailBytesMax) + tls::Records::kKeyUpdateBytes;

    SealedBatch* next = nullptr;  // among the unused
    size_t first = 0, end = 0;    // pieces that are not sent yet
    size_t added_bytes = 0;
    std::array<iovec, kSendPiecesMax> pieces;
    std::array<std::byte, kAddedMax> added;  // what goes before and behind data
};

/// What the connections of a reactor share.
struct ConnectionHost::Shared {
    Shared(Reactor& r, ConnectionLimits l, std::shared_ptr<MemoryPot> p);
    ~Shared();

    void ReturnRequest(Request* request);

    /// When nobody is left.
    void CheckNothingHeld() const;

    /// From now on, while somebody waits for memory, closes who holds it and does nothing.
    void WatchStalled();
    void LookForStalled(int32_t timer_result);

    /// Something has changed in the pot. Any thread.
    void Poke();
    void OnPoke();

    void Hold(uint64_t more) {
        bytes += more;
        if (bytes > peak.load(std::memory_order_relaxed)) {
            peak.store(bytes, std::memory_order_relaxed);
        }
    }

    Reactor& reactor;
    const ConnectionLimits limits;
    BufferPool pool;
    const std::shared_ptr<MemoryPot> pot;
    MemoryBudget budget;             // of requests
    ReceivedBytes received;          // but not begun
    uint64_t bytes = 0;              // held by requests, and received but not begun
    std::atomic<uint64_t> peak = 0;  // of `bytes`, since somebody asked
    FreeList<Request, 4096> free_requests;
    FreeList<SendBatch, 256> free_batches;  // of 16 KiB each
    FreeList<SealedBatch, 64> free_sealed;  // of 24 KiB each
    std::vector<Connection*> all;
    uint64_t connections_started = 0;

    /// Connections of a volume whose clients were seen to have left, and who waits for their end.
    /// Each is known by the look that found them, or after which it came: so a connection's end
    /// costs the same however many there are.
    struct Leavers {
        bool AnyUpTo(uint64_t look) const { return !left.empty() && left.begin()->first <= look; }

        std::map<uint64_t, uint64_t> left;  // by look: how many have not ended
        std::multimap<uint64_t, LeaverWait*> waiters;
    };
    bool FindLeavers(cow::Volume& volume, uint64_t count, uint64_t* look);
    Task<void> LeaversEnded(cow::Volume& volume, uint64_t look, LeaverWait& wait);
    void DropLeavers(cow::Volume& volume, uint64_t look);
    void LeaverEnded(cow::Volume& volume, uint64_t look);
    struct LeaveDeadline;
    std::map<const cow::Volume*, Leavers> leavers;  // of those that have any
    uint64_t looks = 0;                             // for leavers, so far
    uint64_t peers_asked = 0;                       // in all of them

    struct Watch : TimerOp {
        Shared* shared = nullptr;
    };
    Watch watch;
    struct Poked : Runnable {
        Shared* shared = nullptr;
        std::atomic<bool> posted = false;
    };
    Poked poked;

    // Large reads and other requests that work on much wait for a turn of the loop.
    class SliceTurn;
    struct SliceTimer : TimerOp {
        Shared* shared = nullptr;
    };
    bool BeginSlice();
    void OnSliceTimer();
    SliceTimer slice_timer;
    SliceTurn* slices_ = nullptr;
    SliceTurn** slices_tail_ = &slices_;
    uint64_t slice_turn_ = 0;   // in which the last slice began
    bool watch_begins = false;  // its next look only notes how far everybody is
};

class Connection {
    friend struct ConnectionHost::Shared;

  public:
    Connection(ConnectionHost& host, int fd, TransmissionOptions options, cow::Volume& volume,
               std::function<void()> ended);
    ~Connection();

    void Drop();
    /// Whether its client will send no more, as far as the system knows; `revents` is what poll(2)
    /// tells of the socket. Ends it if nobody is there to be answered.
    bool Leaving(int revents);
    void Wake() { shared_.reactor.AtBatchEnd(hook_); }
    /// Looks whether it holds what others wait for while its client neither takes nor sends: true
    /// if that was so long enough. `first`: begins to count.
    bool Stalled(bool first);

  private:
    using Shared = ConnectionHost::Shared;
    enum class State : uint8_t { kOpen, kDraining, kDropped };

    // Receiving, in the order in which bytes pass.
    void Receive();
    uint64_t CountArrived();
    bool ShallRest(uint64_t came);
    void Rest();
    bool IsNextSoon() const;
    void OnReceived(int32_t result);
    void OnPayload(int32_t result);
    void OnStreamEnd(int32_t result);
    void Stash(std::span<const std::byte> bytes, size_t most);
    void Resume();
    std::span<const std::byte> Parse(std::span<const std::byte> bytes);
    size_t TakeHeader(std::span<const std::byte> bytes);
    size_t TakePayload(std::span<const std::byte> bytes);
    void CountPayload(size_t bytes);
    bool Accept(const std::byte* header);
    bool TakeMemory(Request& request);
    uint32_t MostToReceive() const;
    void AcceptPayload(Request* request);
    void RunFilled();

    // Under TLS.
    void StartTls(std::unique_ptr<tls::Records> records, std::string_view received);
    void TakeSealed(std::span<std::byte> bytes);
    std::span<std::byte> Gather(std::span<std::byte> bytes);
    void OpenRecord(std::span<std::byte> record, size_t behind);
    void ReleaseGathered();
    void BreakTls(tls::Alert alert);
    void EndIfClosed();
    void SendSealed();
    bool SkipSealed(uint64_t bytes);
    void SealBatch();
    void SealRecord();
    void EndTls();

    // Running.
    void Run(Request* request);
    bool BeginWork(Request* request);
    void EndWork(const Request& request);
    void RunWaiting();
    Task<void> Serve(Request* request);
    Task<Errno> Execute(Request* request);
    Task<Errno> ExecuteInTurn(Request* request);
    Task<Errno> Status(Request* request);
    Task<Errno> ReadInSlices(Request* request, std::vector<cow::Allocation>* map);

    // Replying.
    void Reply(Request* request);
    void SendReplies();
    void SendPieces();
    void OnSent(int32_t result);
    bool SkipSent(uint64_t bytes);
    uint64_t BytesTaken() const;
    void CountReply(const Request& request);
    void DropUnwanted();
    void Release(Request* request);

    void OnBatchEnd();
    void Lose();
    int Poll() const;
    void WatchPeer();
    void OnHangUp(int32_t result);
    bool Finished() const;
    void Finish();

    // The operations and the hook know their connection by their place in it.
    struct Hook : BatchHook {
        Connection* connection = nullptr;
    };
    struct Receiving : ReceiveOp {
        Connection* connection = nullptr;
    };
    struct Other : Op {
        Connection* connection = nullptr;
    };
    struct Resting : TimerOp {
        Connection* connection = nullptr;
    };
    struct Share : MemoryBudget::Share {
        Connection* connection = nullptr;
    };
    /// How far a client has taken its replies, or sent a payload.
    struct Progress {
        /// Something ended, which counts however short it was.
        void Ended();
        bool Stalled(bool due, uint64_t more_bytes, bool first);

        uint64_t bytes = 0;
        uint64_t seen_bytes = 0;
        unsigned looks = 0;  // since it grew
    };

    /// What a connection under TLS has besides.
    struct Tls {
        Tls(std::unique_ptr<tls::Records> r, ReceivedBytes& all)
            : records(std::move(r)), gathered_part(all) {}

        const std::unique_ptr<tls::Records> records;
        // A record that arrives in pieces: its header, then all of it.
        std::array<std::byte, tls::kHeaderBytes> header;
        size_t gathered_bytes = 0;
        Buffer gathered;
        ReceivedBytes::Part gathered_part;
        bool small_records = false;     // so the last receive brought
        SealedBatch* sealed = nullptr;  // being sent
    };

    // Fixed from the start.
    Shared& shared_;
    const int fd_;
    const bool local_;       // a unix socket
    const uint64_t number_;  // of the reactor's connections so far
    cow::Volume& volume_;
    const std::vector<std::shared_ptr<const cow::Base>> bases_;
    const std::function<Task<std::shared_ptr<const cow::Layers>>()> layers_;
    cow::Requester requester_;
    RequestRules rules_;
    std::shared_ptr<ConnectionCounters> counters_;
    std::function<void()> ended_;

    State state_ = State::kOpen;
    bool disconnecting_ = false;  // the client asked for it: what is outstanding is finished
    bool hung_up_ = false;        // seen while nothing was received
    bool paused_ = false;         // a limit was met, or there is a stash to begin with
    bool expect_large_ = false;   // the last payload was received directly
    bool rested_ = false;         // just now
    uint64_t seen_leaving_ = 0;   // by which look; 0: by none
    uint32_t requests_ = 0;       // in flight
    uint64_t bytes_ = 0;          // of payloads in flight
    uint64_t work_bytes_ = 0;     // of requests that run
    Request* waiting_ = nullptr;  // until there is less work
    Request** waiting_tail_ = &waiting_;
    Share share_;  // of the budget

    // When to rest, and when to expect more.
    uint64_t arrived_ = 0;        // requests
    uint64_t arrived_then_ = 0;   // before the last receive
    unsigned trickle_ = 0;        // receives in a row that brought few requests, up to a limit
    bool flushed_ = false;        // the latest request is a flush
    uint64_t replied_bytes_ = 0;  // by the last send
    uint64_t replied_ = 0;        // requests, likewise
    Backoff rest_checks_{64};     // looks at what the client has not read
    Trial rests_or_not_;

    std::array<std::byte, kHeaderBytesMax> header_;  // one that arrives in pieces
    size_t header_bytes_ = 0;
    uint64_t skip_ = 0;              // bytes of a refused payload that are still to come
    Request* filling_ = nullptr;     // whose payload is not complete
    uint32_t filled_ = 0;            // bytes of it
    ReceivedBytes::Part receiving_;  // what receive_op_ may bring
    Buffer stash_;                   // received before the pause
    std::span<const std::byte> stashed_;
    ReceivedBytes::Part kept_;  // the stash

    std::unique_ptr<Tls> tls_;  // null: there is none

    Request* replies_ = nullptr;
    Request** replies_tail_ = &replies_;
    SendBatch* batch_ = nullptr;  // being sent
    uint64_t sent_bytes_ = 0;     // taken by the system

    Progress taken_;  // of replies
    Progress given_;  // of payloads that are received in place

    Hook hook_;
    Receiving receive_op_;
    Resting rest_op_;
    Other payload_op_;
    Other send_op_;
    Other hang_up_op_;
};

}  // namespace varve::nbdserver
