#include "admin/service.h"

#include <fmt/format.h>

#include <array>
#include <boost/asio/io_context.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <list>
#include <optional>
#include <variant>

#include "admin/command.h"
#include "admin/jsonrpc.h"
#include "admin/slots.h"
#include "admin/unix_socket.h"
#include "base/check.h"

namespace varve::admin {
namespace {

namespace asio = boost::asio;
namespace json = boost::json;
using Socket = asio::local::stream_protocol::socket;
using Failure = boost::system::error_code;

/// A command on its way to the home executor and back. Deletes itself.
struct Job : Runnable {
    Executor* home = nullptr;
    asio::io_context* io = nullptr;
    CommandTarget target;
    Command command;
    std::function<void(Result<Reply>)> done;  // on io's thread

    /// Takes over `job`.
    static void Start(std::unique_ptr<Job> job) {
        job->run = [](Runnable* self) { Spawn(Perform(static_cast<Job*>(self))); };
        Executor* home = job->home;
        home->Post(job.release());
    }

  private:
    static Task<void> Perform(Job* raw) {
        std::unique_ptr<Job> job(raw);
        Result<Reply> result = co_await RunCommand(job->target, std::move(job->command));
        asio::post(*job->io, [done = std::move(job->done), result = std::move(result)]() mutable {
            done(std::move(result));
        });
    }
};

/// Answers of a server that stops are written together: each write takes room of the socket's that
/// has nothing to do with its length.
constexpr size_t kWriteTogether = 64 << 10;

bool IsBlank(std::string_view line) {
    return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

}  // namespace

class Service::Impl : public std::enable_shared_from_this<Service::Impl> {
  public:
    Impl(asio::io_context& io, Backend backend, ServiceOptions options)
        : io_(io),
          backend_(backend),
          options_(std::move(options)),
          acceptor_(io),
          pause_(io),
          slots_(options_.connections_max) {}
    ~Impl() { VARVE_CHECK(running_ == 0); }

    Status Start();
    void Stop(std::function<void()> stopped);
    void LeaveBehind();

  private:
    class Session;
    using Sessions = std::list<std::shared_ptr<Session>>;

    void Accept();
    void OnAccept(Failure failure, Socket socket);
    void RefuseBacklog();
    bool MakeRoom();
    void OnEnd();
    ServerFacts Facts() const;

    asio::io_context& io_;
    const Backend backend_;
    const ServiceOptions options_;
    const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
    ListeningSocket listening_;
    asio::local::stream_protocol::acceptor acceptor_;
    asio::steady_timer pause_;       // after a failed accept
    Sessions sessions_;              // the one that has been silent longest comes first
    std::optional<Socket> next_;     // accepted, but all run commands
    Slots slots_;                    // for commands
    size_t running_ = 0;             // commands
    size_t output_bytes_ = 0;        // answers made and not yet taken, of all sessions
    std::function<void()> stopped_;  // set once stopping
};

/// A connection. One step at a time: read until there is a line; run its requests, one after the
/// other; write the answers; again.
class Service::Impl::Session : public std::enable_shared_from_this<Service::Impl::Session> {
  public:
    Session(std::shared_ptr<Impl> service, Socket socket)
        : service_(std::move(service)),
          socket_(std::move(socket)),
          peer_(DescribePeer(socket_.native_handle())),
          lines_(service_->options_.line_bytes_max) {}

    void Open();
    /// Of a server that stops: refuses what was received, and closes.
    void Refuse();
    void Close();
    bool busy() const { return running_ || waiting_; }
    /// Lets the running command finish, refuses those after it and one that waits in line, and
    /// waits for the client no more: closes when all that was received is answered.
    void FinishAndClose();
    /// Answers the running command before it has ended. REQUIRES: FinishAndClose() was called.
    void LeaveBehind();

  private:
    void Advance();
    bool TakeLine();
    void Read();
    void OnRead(Failure failure, size_t bytes);
    bool ReadTheLast();
    bool StartRequest(Request& request);
    void WatchHangUp();
    void Begin(Command command);
    void OnResult(const Command& command, Result<Reply> result);
    void AnswerResult(const Request& request, json::value result);
    void AnswerError(const Request& request, const RpcError& error);
    void Answer(std::string_view text);
    void FinishMessage();
    void Write();
    void OnWrite(Failure failure, size_t bytes);
    void WriteWhatFits();
    void ForgetOutput();
    void Touch();

    const std::shared_ptr<Impl> service_;
    Socket socket_;
    const std::string peer_;  // for the log
    Sessions::iterator place_;
    LineSplitter lines_;
    std::array<char, 16384> input_;
    Message message_;
    size_t next_ = 0;     // request of message_ to be run next
    std::string output_;  // the answers to message_, and to those before if finishing_
    size_t begun_ = 0;    // bytes of output_ before the answers to message_
    size_t written_ = 0;  // bytes of output_
    bool running_ = false;
    bool waiting_ = false;  // in line, at ticket_
    Slots::Ticket ticket_;
    bool finishing_ = false;
    size_t read_last_ = 0;  // bytes, while finishing_
    bool ended_ = false;    // the client will send no more
    bool closed_ = false;
};

// ---- a connection

void Service::Impl::Session::Open() {
    place_ = service_->sessions_.insert(service_->sessions_.end(), shared_from_this());
    Read();
}

void Service::Impl::Session::Refuse() {
    place_ = service_->sessions_.insert(service_->sessions_.end(), shared_from_this());
    finishing_ = true;
    Advance();
}

void Service::Impl::Session::Close() {
    if (closed_) return;
    closed_ = true;
    Failure ignored;
    socket_.close(ignored);
    ForgetOutput();
    service_->sessions_.erase(place_);  // perhaps the last reference but the caller's
}

void Service::Impl::Session::Touch() {
    Sessions& sessions = service_->sessions_;
    sessions.splice(sessions.end(), sessions, place_);
}

void Service::Impl::Session::Advance() {
    while (!closed_) {
        if (next_ < message_.requests.size()) {
            if (StartRequest(message_.requests[next_])) return;
            ++next_;
        } else if (!message_.requests.empty()) {
            FinishMessage();
            if (output_.empty()) continue;
            if (!finishing_) return Write();
            if (output_.size() >= kWriteTogether) WriteWhatFits();
        } else if (TakeLine()) {
            continue;
        } else if (finishing_) {
            if (ReadTheLast()) continue;
            WriteWhatFits();
            Close();
        } else {
            return ended_ ? Close() : Read();
        }
    }
}

/// Makes message_ of the next line. False if there is none.
bool Service::Impl::Session::TakeLine() {
    const std::optional<LineSplitter::Line> line = lines_.Next();
    if (!line) return false;
    if (line->too_long) {
        message_ = LineTooLong(service_->options_.line_bytes_max);
    } else if (!IsBlank(line->text)) {
        message_ = ParseMessage(line->text, service_->options_.batch_max);
    }
    next_ = 0;
    begun_ = output_.size();
    return true;
}

void Service::Impl::Session::Read() {
    socket_.async_read_some(asio::buffer(input_),
                            [self = shared_from_this()](Failure failure, size_t bytes) {
                                self->OnRead(failure, bytes);
                            });
}

void Service::Impl::Session::OnRead(Failure failure, size_t bytes) {
    if (closed_) return;
    if (failure == asio::error::eof) {
        ended_ = true;
        lines_.End();
    } else if (failure && !finishing_) {
        return Close();
    }
    Touch();
    lines_.Append(std::string_view(input_.data(), bytes));
    Advance();
}

/// More of what had been sent when the server began to stop, up to a line's limit in all. False if
/// there is none.
bool Service::Impl::Session::ReadTheLast() {
    const size_t most = service_->options_.line_bytes_max - read_last_;
    if (ended_ || most == 0) return false;
    Failure failure;
    socket_.non_blocking(true, failure);
    const size_t bytes = socket_.read_some(asio::buffer(input_, most), failure);
    ended_ = failure == asio::error::eof;
    if (ended_) lines_.End();
    lines_.Append(std::string_view(input_.data(), bytes));
    read_last_ += bytes;
    return ended_ || bytes > 0;
}

/// True if a command is on its way, or waits in line; false if the request needs none.
bool Service::Impl::Session::StartRequest(Request& request) {
    if (request.error || finishing_) {
        const RpcError stopping{
            RpcCode::kServerError,
            MakeError(ErrorKind::kBusy, "the server is stopping; send it again to the next one")};
        const RpcError& error = request.error ? *request.error : stopping;
        AnswerError(request, error);
        return false;
    }
    std::variant<Command, RpcError> decoded = DecodeCommand(request);
    if (const RpcError* error = std::get_if<RpcError>(&decoded)) {
        AnswerError(request, *error);
        return false;
    }
    Command& command = std::get<Command>(decoded);
    const auto turn = [self = shared_from_this(), command] {
        self->waiting_ = false;
        Failure ignored;
        self->socket_.cancel(ignored);
        self->Begin(command);
    };
    switch (service_->slots_.Enter(PaceOf(command), turn, &ticket_)) {
        case Slots::Entry::kBegins:
            Begin(std::move(command));
            return true;
        case Slots::Entry::kWaits:
            waiting_ = true;
            WatchHangUp();
            return true;
        case Slots::Entry::kRefused:
            break;
    }
    const Error error =
        MakeError(ErrorKind::kLimit,
                  "many commands are under way; see 'varve status' for what is waited for, "
                  "and try again when one of them has finished");
    AnswerError(request, RpcError{RpcCode::kServerError, error});
    return false;
}

/// A command whose client has gone, answers and all, is not begun: who retries would pile them up.
void Service::Impl::Session::WatchHangUp() {
    socket_.async_wait(Socket::wait_error, [self = shared_from_this()](Failure failure) {
        if (failure || !self->waiting_) return;
        self->service_->slots_.LeaveLine(self->ticket_);
        self->waiting_ = false;
        self->Close();
        self->service_->OnEnd();
    });
}

void Service::Impl::Session::Begin(Command command) {
    auto job = std::make_unique<Job>();
    job->home = service_->backend_.home;
    job->io = &service_->io_;
    job->target = CommandTarget{service_->backend_.pool, service_->backend_.clients};
    job->command = command;
    job->done = [self = shared_from_this(), command](Result<Reply> result) {
        self->OnResult(command, std::move(result));
    };
    running_ = true;
    ++service_->running_;
    Job::Start(std::move(job));
}

void Service::Impl::Session::FinishAndClose() {
    finishing_ = true;
    if (running_) return;
    Failure ignored;
    socket_.cancel(ignored);  // the read or write under way ends, and goes on from there
    if (!waiting_) return;
    service_->slots_.LeaveLine(ticket_);
    waiting_ = false;
    Advance();
}

void Service::Impl::Session::LeaveBehind() {
    if (closed_ || !running_) return;
    const Request& request = message_.requests[next_];
    const Error error = MakeError(ErrorKind::kIo,
                                  "the server is stopping and waits no longer; whether the command "
                                  "was carried out shows once it runs again");
    AnswerError(request, RpcError{RpcCode::kServerError, error});
    ++next_;
    Advance();
}

void Service::Impl::Session::OnResult(const Command& command, Result<Reply> result) {
    running_ = false;
    service_->slots_.Leave(PaceOf(command));
    if (result.ok() && IsChange(command) && service_->options_.log) {
        service_->options_.log(Describe(command) + " by " + peer_);
    }
    if (!closed_) {
        const Request& request = message_.requests[next_];
        if (result.ok()) {
            AnswerResult(request, EncodeReply(command, result.value(), service_->Facts()));
        } else {
            AnswerError(request, RpcError{RpcCode::kServerError, result.error()});
        }
        ++next_;
        Touch();
        Advance();
    }
    service_->OnEnd();
    // Last: whoever waits for this may end the pool, or this service.
    if (--service_->running_ == 0 && service_->stopped_) service_->stopped_();
}

void Service::Impl::Session::AnswerResult(const Request& request, json::value result) {
    if (!request.id) return;
    const std::string text = EncodeResult(*request.id, std::move(result));
    if (service_->output_bytes_ + text.size() <= service_->options_.output_bytes_max) {
        return Answer(text);
    }
    const Error error = MakeError(ErrorKind::kLimit,
                                  "the command was carried out, but too many answers wait for "
                                  "clients that do not read them; ask again later");
    AnswerError(request, RpcError{RpcCode::kServerError, error});
}

/// Whatever else waits: it is short, and says what nothing else does.
void Service::Impl::Session::AnswerError(const Request& request, const RpcError& error) {
    if (request.id) Answer(EncodeError(*request.id, error));
}

void Service::Impl::Session::Answer(std::string_view text) {
    const size_t before = output_.size();
    if (message_.batch) output_ += output_.size() == begun_ ? '[' : ',';
    output_ += text;
    service_->output_bytes_ += output_.size() - before;
}

void Service::Impl::Session::FinishMessage() {
    if (output_.size() > begun_) {
        const std::string_view end = message_.batch ? "]\n" : "\n";
        output_ += end;
        service_->output_bytes_ += end.size();
    }
    message_ = Message();
    next_ = 0;
}

void Service::Impl::Session::ForgetOutput() {
    service_->output_bytes_ -= output_.size();
    output_ = std::string();  // with its memory: an answer may have been large
    begun_ = 0;
    written_ = 0;
}

void Service::Impl::Session::Write() {
    socket_.async_write_some(asio::buffer(output_) + written_,
                             [self = shared_from_this()](Failure failure, size_t bytes) {
                                 self->OnWrite(failure, bytes);
                             });
}

void Service::Impl::Session::OnWrite(Failure failure, size_t bytes) {
    if (closed_) return;
    if (failure && !finishing_) return Close();
    Touch();
    written_ += bytes;
    if (finishing_) {
        WriteWhatFits();
    } else if (written_ < output_.size()) {
        return Write();
    } else {
        ForgetOutput();
    }
    Advance();
}

/// Answers of a server that stops. Closes if the socket does not take it at once.
void Service::Impl::Session::WriteWhatFits() {
    Failure failure;
    socket_.non_blocking(true, failure);
    while (!failure && written_ < output_.size()) {
        written_ += socket_.write_some(asio::buffer(output_) + written_, failure);
    }
    if (failure) return Close();
    ForgetOutput();
}

// ---- the service

Status Service::Impl::Start() {
    Result<ListeningSocket> listening = ListenUnix(options_.path, 0660);
    if (!listening.ok()) return listening.error();
    listening_ = std::move(listening.value());
    Failure failure;
    acceptor_.assign(asio::local::stream_protocol(), listening_.fd.get(), failure);
    if (failure) return SystemError(failure.value(), "cannot listen on the admin socket");
    listening_.fd.Release();
    Accept();
    return Status();
}

void Service::Impl::Accept() {
    acceptor_.async_accept([self = shared_from_this()](Failure failure, Socket socket) {
        self->OnAccept(failure, std::move(socket));
    });
}

void Service::Impl::OnAccept(Failure failure, Socket socket) {
    if (failure == asio::error::operation_aborted) return;
    if (stopped_) {  // it had been accepted by then
        if (!failure) std::make_shared<Session>(shared_from_this(), std::move(socket))->Refuse();
        return;
    }
    if (failure) {
        // Out of descriptors, mostly. Trying again at once would spin.
        pause_.expires_after(std::chrono::milliseconds(100));
        pause_.async_wait([self = shared_from_this()](Failure aborted) {
            if (!aborted) self->Accept();
        });
        return;
    }
    if (!MakeRoom()) {  // those that hang leave places for some that do not: one of them ends soon
        next_.emplace(std::move(socket));
        return;
    }
    std::make_shared<Session>(shared_from_this(), std::move(socket))->Open();
    Accept();
}

/// A command is over: who came when all connections ran one may have room now.
void Service::Impl::OnEnd() {
    if (!next_ || !MakeRoom()) return;
    Socket socket = std::move(*next_);
    next_.reset();
    std::make_shared<Session>(shared_from_this(), std::move(socket))->Open();
    Accept();
}

/// Closes the connection that has been silent longest, if all are taken. False if they all run
/// commands.
bool Service::Impl::MakeRoom() {
    if (stopped_) return false;
    if (sessions_.size() < options_.connections_max) return true;
    for (const std::shared_ptr<Session>& session : sessions_) {
        if (session->busy()) continue;
        const std::shared_ptr<Session> silent = session;  // the list's reference goes
        silent->Close();
        return true;
    }
    return false;
}

/// Those that have connected, and wait to be accepted.
void Service::Impl::RefuseBacklog() {
    Failure failure;
    acceptor_.non_blocking(true, failure);
    while (!failure) {
        Socket socket(io_);
        acceptor_.accept(socket, failure);
        if (failure) return;
        std::make_shared<Session>(shared_from_this(), std::move(socket))->Refuse();
    }
}

void Service::Impl::Stop(std::function<void()> stopped) {
    VARVE_CHECK(!stopped_);
    stopped_ = std::move(stopped);
    listening_.RemoveFile();
    pause_.cancel();
    const Sessions sessions = sessions_;
    for (const std::shared_ptr<Session>& session : sessions) session->FinishAndClose();
    if (next_) std::make_shared<Session>(shared_from_this(), std::move(*next_))->Refuse();
    next_.reset();
    RefuseBacklog();
    Failure ignored;
    acceptor_.close(ignored);
    if (running_ == 0) asio::post(io_, [self = shared_from_this()] { self->stopped_(); });
}

void Service::Impl::LeaveBehind() {
    VARVE_CHECK(stopped_);
    const Sessions sessions = sessions_;
    for (const std::shared_ptr<Session>& session : sessions) session->LeaveBehind();
}

ServerFacts Service::Impl::Facts() const {
    const auto uptime = std::chrono::steady_clock::now() - started_;
    return {options_.pool_directory,
            std::chrono::duration_cast<std::chrono::seconds>(uptime).count()};
}

Service::Service(asio::io_context& io, Backend backend, ServiceOptions options)
    : impl_(std::make_shared<Impl>(io, backend, std::move(options))) {}

Service::~Service() = default;

Status Service::Start() {
    return impl_->Start();
}

void Service::Stop(std::function<void()> stopped) {
    impl_->Stop(std::move(stopped));
}

void Service::LeaveBehind() {
    impl_->LeaveBehind();
}

}  // namespace varve::admin
