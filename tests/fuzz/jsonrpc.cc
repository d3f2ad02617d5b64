// Fuzz target: any bytes on the admin socket, through lines, JSON-RPC and commands, to a pool of
// names. Lines do not depend on how the bytes were cut; each call that wants an answer gets one
// line of JSON with its id; a command's parameters mean the same when they are written out.
// Input: size of the pieces, then the client's bytes.
#include "admin/jsonrpc.h"

#include <boost/json/parse.hpp>
#include <boost/json/serialize.hpp>
#include <deque>

#include "admin/command.h"
#include "tests/fake_pool.h"
#include "tests/fuzz/fuzz.h"

namespace varve::admin {
namespace {

namespace json = boost::json;
constexpr size_t kLineMax = 512;
constexpr size_t kBatchMax = 4;

/// Runs what is posted when it is told to.
class Queue : public Executor {
  public:
    void Post(Runnable* runnable) override { posted_.push_back(runnable); }
    void RunAll() {
        while (!posted_.empty()) {
            Runnable* next = posted_.front();
            posted_.pop_front();
            next->run(next);
        }
    }

  private:
    std::deque<Runnable*> posted_;
};

class NoClients : public ClientDirectory {
  public:
    Task<std::vector<ClientInfo>> List() override { co_return std::vector<ClientInfo>(); }
    Task<uint64_t> Disconnect(std::vector<uint64_t> ids) override { co_return ids.size(); }
};

struct Backend {
    Queue queue;
    varve::testing::FakePool pool{queue};
    NoClients clients;
};

/// Lines, with a mark for each that was too long.
std::vector<std::string> Split(std::string_view bytes, size_t piece) {
    LineSplitter splitter(kLineMax);
    std::vector<std::string> lines;
    const auto take = [&] {
        while (const std::optional<LineSplitter::Line> line = splitter.Next()) {
            VARVE_CHECK(line->text.size() <= kLineMax);
            lines.push_back(line->too_long ? "\n" : std::string(line->text));
        }
        VARVE_CHECK(splitter.buffered() <= kLineMax);
    };
    while (!bytes.empty()) {
        splitter.Append(bytes.substr(0, piece));
        bytes.remove_prefix(std::min(bytes.size(), piece));
        take();
    }
    splitter.End();
    take();
    return lines;
}

Task<void> Run(CommandTarget target, Command command, std::optional<Result<Reply>>* result) {
    result->emplace(co_await RunCommand(target, std::move(command)));
}

void VerifyAnswer(const std::string& text, const json::value& id) {
    VARVE_CHECK(text.find('\n') == std::string::npos);
    boost::system::error_code failure;
    const json::value answer = json::parse(text, failure);
    VARVE_CHECK(!failure && answer.is_object());
    const json::object& object = answer.get_object();
    VARVE_CHECK(object.at("jsonrpc") == json::value("2.0"));
    VARVE_CHECK(object.contains("result") != object.contains("error"));
    // The JSON library's reading of fractions is not exact.
    if (!id.is_double()) VARVE_CHECK(object.at("id") == id);
    if (object.contains("error")) {
        const json::object& error = object.at("error").as_object();
        VARVE_CHECK(error.at("code").is_int64() && error.at("message").is_string());
        VARVE_CHECK(error.at("data").as_object().at("kind").is_string());
    }
}

void VerifyParameters(const Command& command, const std::string& method) {
    Request request;
    request.method = method;
    request.params = EncodeParameters(command);
    const auto again = DecodeCommand(request);
    VARVE_CHECK(std::holds_alternative<Command>(again));
    VARVE_CHECK(EncodeParameters(std::get<Command>(again)) == request.params);
    VARVE_CHECK(Describe(command) == Describe(std::get<Command>(again)));
}

void Serve(Backend& backend, const Request& request) {
    const json::value id = request.id.value_or(nullptr);
    if (request.error) return VerifyAnswer(EncodeError(id, *request.error), id);
    const auto decoded = DecodeCommand(request);
    if (const auto* error = std::get_if<RpcError>(&decoded)) {
        return VerifyAnswer(EncodeError(id, *error), id);
    }
    const auto& command = std::get<Command>(decoded);
    VerifyParameters(command, request.method);
    std::optional<Result<Reply>> result;
    Spawn(Run({&backend.pool, &backend.clients}, command, &result));
    backend.queue.RunAll();
    VARVE_CHECK(result);
    if (result->ok()) {
        VerifyAnswer(EncodeResult(id, EncodeReply(command, result->value(), {"/pool", 1})), id);
    } else {
        VerifyAnswer(EncodeError(id, {RpcCode::kServerError, result->error()}), id);
    }
}

}  // namespace
}  // namespace varve::admin

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace varve::admin;  // NOLINT: a function of C's
    varve::fuzz::Input input(data, size);
    const size_t piece = 1 + input.Byte();
    const std::vector<std::string> lines = Split(input.rest(), size + 1);
    VARVE_CHECK(lines == Split(input.rest(), piece));
    Backend backend;
    for (const std::string& line : lines) {
        const Message message =
            line == "\n" ? LineTooLong(kLineMax) : ParseMessage(line, kBatchMax);
        VARVE_CHECK(!message.requests.empty() && message.requests.size() <= kBatchMax);
        for (const Request& request : message.requests) Serve(backend, request);
    }
    return 0;
}
