#include "nbdserver/daemon/server.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "base/log.h"
#include "nbdserver/daemon/channel.h"

namespace varve::nbdserver {
namespace {

constexpr uint64_t kShortagePauseMs = 100;
// Who has kept the server waiting longer than this may go when others wait to begin: who stalls
// must not keep everybody out for the whole time that a slow but honest client is given. Five round
// trips of 100 ms, or a packet that was lost, are within it.
constexpr uint64_t kPatienceMs = 500;
// An option that asks about a listed export may take as long as a slow network, on top of the rest.
constexpr uint64_t kListedOptionMs = 250;
constexpr uint64_t kLookAgainMs = 20;
constexpr int kAcceptsPerTurn = 16;

LookupError ToLookupError(const Error& error) {
    switch (error.kind) {
        case ErrorKind::kNotFound:
        case ErrorKind::kInvalid:
            return LookupError::kUnknown;
        case ErrorKind::kBusy:
            return LookupError::kBusy;
        default:
            return LookupError::kFailed;
    }
}

}  // namespace

/// A listener; its loop holds it until it has ended.
struct Server::Acceptor {
    Acceptor(Control& control, Listener l)
        : listener(std::move(l)), socket(control, listener.socket.fd.Release()), pause(control) {}

    Listener listener;
    ControlSocket socket;
    Timer pause;  // while the system is short of descriptors
};

/// A client that negotiates.
struct Server::Handshake {
    Handshake(Control& control, int fd, const NegotiationLimits& limits, const Listener& listener)
        : peer(PeerOf(fd)),
          channel(control, fd),
          deadline(control),
          negotiator(limits, listener.tls),
          read_only(listener.read_only) {}

    /// As of now: TLS tells more of it.
    Visitor visitor() const {
        Visitor v;
        v.name = peer.name;
        v.tls = channel.encrypted();
        v.who = {peer.address, peer.uid, channel.identity()};
        v.read_only = read_only;
        return v;
    }

    const Peer peer;
    Channel channel;
    Timer deadline;
    Negotiator negotiator;
    const bool read_only;
    bool leaving = false;                   // it waited too long
    std::shared_ptr<const ListReply> list;  // to be sent
    std::shared_ptr<Client> client;         // once its export is open
    std::shared_ptr<Client> asking;         // while that is waited for
    WaitingRoom::Guest guest;               // likewise
    bool crowded = false;                   // too many waited for it
};

Server::Server(Control& control, Executor& home, cow::Pool& pool, Clients& clients, TlsService* tls,
               ServerLimits limits)
    : control_(control),
      home_(home),
      pool_(pool),
      clients_(clients),
      tls_(tls),
      limits_(limits),
      lists_(control, home, pool, limits.negotiation.list_bytes_max),
      room_(control),
      gate_(control),
      waiting_(control, gate_, limits.waiting_max,
               std::max<uint64_t>(limits.connections_max / 2, 1), [this] { room_.WakeAll(); }) {}

Server::~Server() = default;

void Server::Start(std::vector<Listener> listeners) {
    for (Listener& listener : listeners) {
        acceptors_.push_back(std::make_shared<Acceptor>(control_, std::move(listener)));
        gate_.Enter();
        Spawn(Accept(acceptors_.back()));
    }
}

void Server::Close() {
    closing_ = true;
    for (const std::shared_ptr<Acceptor>& acceptor : acceptors_) {
        acceptor->listener.socket.RemoveFile();
        acceptor->socket.Cancel();
        acceptor->pause.Cancel();
    }
    acceptors_.clear();
    for (const std::shared_ptr<Handshake>& handshake : handshakes_) {
        handshake->negotiator.Shutdown();
        handshake->channel.Cancel();
    }
    room_.WakeAll();
}

Task<void> Server::Closed() {
    Task<void> drained = gate_.Drained();
    co_await drained;
}

Task<void> Server::Accept(std::shared_ptr<Acceptor> acceptor) {
    while (!closing_) {
        Task<bool> waiting = acceptor->socket.WaitReadable();
        const bool readable = co_await waiting;
        if (!readable) break;
        while (!closing_ && Full()) {
            MakeRoom();
            co_await room_.Wait();
        }
        Errno shortage = 0;
        for (int n = 0; n < kAcceptsPerTurn && !closing_ && !Full(); ++n) {
            if (!AcceptOne(*acceptor, &shortage)) break;
        }
        if (shortage == 0) continue;
        const std::string what = fmt::format("cannot accept on {}", acceptor->listener.uri);
        Log(LogLevel::kWarning,
            SystemError(shortage, what).message + "; raise LimitNOFILE or lower --connections-max");
        Task<bool> pausing = acceptor->pause.Wait(kShortagePauseMs);
        co_await pausing;
    }
    gate_.Leave();
}

/// False if there is nobody to accept, or if the system cannot (`*shortage`).
bool Server::AcceptOne(const Acceptor& acceptor, Errno* shortage) {
    const int fd = ::accept4(acceptor.socket.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        const Errno error = errno;
        const bool out = error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
        if (out) *shortage = error;
        return error == ECONNABORTED || error == EINTR;
    }
    if (connections_ >= limits_.connections_max) {
        ::close(fd);
        if (!std::exchange(full_, true)) {
            Log(LogLevel::kWarning, fmt::format("there are {} connections: more are refused; see "
                                                "--connections-max",
                                                connections_));
        }
        return true;
    }
    PrepareConnection(fd, limits_.peer_timeout_s);
    auto handshake =
        std::make_shared<Handshake>(control_, fd, limits_.negotiation, acceptor.listener);
    handshakes_.insert(handshake);
    ++connections_;
    gate_.Enter();
    Spawn(WatchDeadline(handshake));
    gate_.Enter();
    Spawn(Negotiate(std::move(handshake)));
    return true;
}

/// Ends the negotiation that has kept the server waiting longest, if that is too long now that
/// others wait, and unless a place is about to come free.
void Server::MakeRoom() {
    if (leaving_ > 0) return;
    Handshake* slowest = nullptr;
    Stopwatch::Clock::duration longest = std::chrono::milliseconds(kPatienceMs);
    for (const std::shared_ptr<Handshake>& handshake : handshakes_) {
        const Stopwatch::Clock::duration waited = handshake->channel.waited().passed();
        if (waited < longest || !handshake->channel.IsLate()) continue;
        longest = waited;
        slowest = handshake.get();
    }
    if (slowest) EndLate(*slowest);
}

void Server::EndLate(Handshake& handshake) {
    if (std::exchange(handshake.leaving, true)) return;
    Log(LogLevel::kDebug, fmt::format("{} took too long to negotiate", handshake.peer.name));
    ++leaving_;
    handshake.channel.Cancel();
}

uint64_t Server::AllowedMs(const Handshake& handshake) const {
    return limits_.negotiation_ms_max + handshake.negotiator.options_for_list() * kListedOptionMs;
}

/// Ends it once it has taken all the time there is. From kPatienceMs on it may go for others: then
/// whoever waits for a place looks again.
Task<void> Server::WatchDeadline(std::shared_ptr<Handshake> handshake) {
    for (;;) {
        const uint64_t waited_ms = handshake->channel.waited().ms();
        const uint64_t allowed_ms = AllowedMs(*handshake);
        if (waited_ms >= allowed_ms && handshake->channel.IsLate()) break;
        if (waited_ms >= kPatienceMs) room_.WakeAll();
        const uint64_t next_ms =
            waited_ms < kPatienceMs ? kPatienceMs : std::max(allowed_ms, waited_ms);
        Task<bool> wait =
            handshake->deadline.Wait(std::clamp(next_ms - waited_ms, kLookAgainMs, kPatienceMs));
        const bool expired = co_await wait;
        if (!expired) break;
    }
    if (!handshake->deadline.cancelled()) EndLate(*handshake);
    gate_.Leave();
}

void Server::NegotiationEnded(const std::shared_ptr<Handshake>& handshake) {
    handshake->deadline.Cancel();
    handshakes_.erase(handshake);
    leaving_ -= handshake->leaving;
    room_.WakeAll();
}

void Server::ConnectionEnded() {
    --connections_;
    full_ = false;
    gate_.Leave();
}

Task<void> Server::Negotiate(std::shared_ptr<Handshake> handshake) {
    std::shared_ptr<Handshake> shared = handshake;
    Task<void> conversing = Converse(std::move(shared));
    co_await conversing;
    std::shared_ptr<Client> client = std::move(handshake->client);
    if (!client) {
        handshake->channel.SayGoodbye();
        NegotiationEnded(handshake);
        ConnectionEnded();
        co_return;
    }
    // Never wait for the peer while its export is open: whoever fences the disk would wait too.
    // What it was told before has left already, so a few hundred bytes fit, or it does not read.
    Negotiator& negotiator = handshake->negotiator;
    const bool told = !handshake->channel.cancelled() &&
                      negotiator.step() == Negotiator::Step::kDone &&
                      handshake->channel.WriteNow(negotiator.TakeOutput());
    if (!told) {
        NegotiationEnded(handshake);
        co_await Hop(home_);
        Task<void> releasing = clients_.Release(std::move(client));
        co_await releasing;
        co_await Hop(control_);
        ConnectionEnded();
        co_return;
    }
    NegotiationResult result = negotiator.TakeResult();
    TransmissionOptions options;
    options.structured_replies = result.structured_replies;
    options.extended_headers = result.extended_headers;
    for (const ContextName& context : result.contexts) {
        const auto id = static_cast<uint32_t>(options.contexts.size() + 1);
        options.contexts.push_back({id, context.kind, 0});
    }
    Channel::Remains remains = handshake->channel.Release();
    const std::string received = result.leftover + remains.plain;
    const auto* bytes = reinterpret_cast<const std::byte*>(received.data());
    options.received.assign(bytes, bytes + received.size());
    options.tls = std::move(remains.records);
    options.tls_received = std::move(remains.sealed);
    NegotiationEnded(handshake);
    Spawn(Attend(std::move(client), remains.fd, std::move(options)));
}

Task<void> Server::Attend(std::shared_ptr<Client> client, int fd, TransmissionOptions options) {
    co_await Hop(home_);
    Task<void> serving = clients_.Serve(std::move(client), fd, std::move(options));
    co_await serving;
    co_await Hop(control_);
    ConnectionEnded();
}

/// Until the negotiation is done (`client` is set then), refused, or broken off.
Task<void> Server::Converse(std::shared_ptr<Handshake> handshake) {
    Negotiator& negotiator = handshake->negotiator;
    using Step = Negotiator::Step;
    while (negotiator.step() != Step::kDone) {
        std::shared_ptr<Handshake> teller = handshake;
        Task<bool> telling = Tell(std::move(teller));
        const bool written = co_await telling;
        if (!written || negotiator.step() == Step::kHangUp) break;
        if (negotiator.step() == Step::kInput) {
            Task<std::string> reading = handshake->channel.Read();
            const std::string bytes = co_await reading;
            if (bytes.empty()) break;
            negotiator.Feed(bytes);
            continue;
        }
        std::shared_ptr<Handshake> shared = handshake;
        if (negotiator.step() == Step::kStartTls) {
            Task<bool> starting = StartTls(std::move(shared));
            const bool started = co_await starting;
            if (!started) break;
        } else if (negotiator.step() == Step::kList) {
            Task<void> answering = AnswerList(std::move(shared));
            co_await answering;
        } else {
            Task<void> answering = AnswerLookup(std::move(shared));
            co_await answering;
        }
    }
}

Task<void> Server::AnswerList(std::shared_ptr<Handshake> handshake) {
    const Visitor visitor = handshake->visitor();
    co_await Hop(home_);
    access::Grants grants = clients_.GrantsOf(visitor);
    co_await Hop(control_);
    Task<std::shared_ptr<const ListReply>> getting = lists_.Get(std::move(grants));
    handshake->list = co_await getting;
    handshake->negotiator.AnswerList(*handshake->list);
}

/// Sends what the client is to be told: a list, if it has asked for one, and then the rest. False
/// if it does not take it.
Task<bool> Server::Tell(std::shared_ptr<Handshake> handshake) {
    const std::string output = handshake->negotiator.TakeOutput();
    const std::shared_ptr<const ListReply> list = std::move(handshake->list);
    for (size_t i = 0; list && i < list->pieces.size(); ++i) {
        Task<bool> writing = handshake->channel.WriteAll(list->pieces[i]);
        const bool written = co_await writing;
        if (!written) co_return false;
        co_await Hop(control_);  // a list may be long: others have their turns
    }
    Task<bool> writing = handshake->channel.WriteAll(output);
    co_return co_await writing;
}

Task<bool> Server::StartTls(std::shared_ptr<Handshake> handshake) {
    VARVE_CHECK(tls_);
    Task<std::string> starting = handshake->channel.StartTls(*tls_);
    const std::string failure = co_await starting;
    if (failure.empty()) {
        handshake->negotiator.TlsStarted();
        co_return true;
    }
    failures_.Tell(fmt::format("{}: the TLS handshake failed: {}", handshake->peer.name, failure));
    co_return false;
}

Task<void> Server::AnswerLookup(std::shared_ptr<Handshake> handshake) {
    Negotiator& negotiator = handshake->negotiator;
    if (negotiator.opens()) {
        Task<void> opening = OpenExport(std::move(handshake));
        co_await opening;
        co_return;
    }
    std::string name = negotiator.lookup_name();
    const std::vector<std::string> bases = negotiator.lookup_bases();
    const Visitor visitor = handshake->visitor();
    co_await Hop(home_);
    const Result<ExportDescription> described = clients_.Describe(std::move(name), bases, visitor);
    co_await Hop(control_);
    if (described.ok()) {
        negotiator.AnswerLookup(described.value());
    } else {
        Refuse(negotiator, described.error());
    }
}

/// Meanwhile nobody waits for the client, but it for others, perhaps for long.
Task<void> Server::OpenExport(std::shared_ptr<Handshake> handshake) {
    Negotiator& negotiator = handshake->negotiator;
    std::string name = negotiator.lookup_name();
    handshake->crowded = false;
    handshake->asking = Clients::Make(handshake->visitor());
    handshake->guest.fd = handshake->channel.fd();
    handshake->guest.name = name;
    handshake->guest.end = [this, raw = handshake.get()](WaitingRoom::Reason reason) {
        EndWait(*raw, reason);
    };
    waiting_.Enter(handshake->guest);
    std::shared_ptr<Client> client = handshake->asking;
    std::vector<std::string> bases = negotiator.lookup_bases();
    co_await Hop(home_);
    Task<Status> attaching = clients_.Attach(std::move(client), std::move(name), std::move(bases));
    const Status status = co_await attaching;
    co_await Hop(control_);
    waiting_.Leave(handshake->guest);
    client = std::move(handshake->asking);
    if (status.ok()) {
        negotiator.AnswerLookup(DescriptionOf(*client));
        handshake->client = std::move(client);
    } else if (handshake->crowded && status.error().kind == ErrorKind::kBusy) {
        negotiator.AnswerLookup(LookupError::kCrowded);
    } else {
        Refuse(negotiator, status.error());
    }
}

/// Of a handshake in OpenExport().
void Server::EndWait(Handshake& handshake, WaitingRoom::Reason reason) {
    if (reason == WaitingRoom::Reason::kPeerGone) {
        handshake.channel.Cancel();
    } else {
        handshake.crowded = true;
    }
    std::shared_ptr<Client> client = handshake.asking;
    Spawn(GiveUp(std::move(client)));
}

Task<void> Server::GiveUp(std::shared_ptr<Client> client) {
    gate_.Enter();
    co_await Hop(home_);
    clients_.GiveUp(std::move(client));
    co_await Hop(control_);
    gate_.Leave();
}

void Server::Refuse(Negotiator& negotiator, const Error& error) {
    const LookupError reason = closing_ ? LookupError::kShutdown : ToLookupError(error);
    if (reason == LookupError::kFailed) Log(LogLevel::kWarning, error.message);
    negotiator.AnswerLookup(reason);
}

}  // namespace varve::nbdserver
