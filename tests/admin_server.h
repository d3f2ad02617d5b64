// AdminServer: a real admin service on a real socket in a temporary directory, over a FakePool.
// Not varved: serves no disks.
#pragma once

#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/json/parse.hpp>
#include <boost/json/value.hpp>
#include <cstring>
#include <filesystem>
#include <functional>
#include <future>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "admin/service.h"
#include "admin/unix_socket.h"
#include "base/check.h"
#include "base/worker.h"
#include "tests/fake_pool.h"
#include "tests/run_on.h"

namespace varve::testing {

/// A directory that goes away with its content.
class TemporaryDirectory {
  public:
    TemporaryDirectory() {
        const char* base = std::getenv("TMPDIR");
        path_ = std::string(base && *base ? base : "/tmp") + "/varve-test-XXXXXX";
        VARVE_CHECK(::mkdtemp(path_.data()) != nullptr);
    }
    ~TemporaryDirectory() {
        std::error_code ignored;
        std::filesystem::remove_all(path_, ignored);
    }
    const std::string& path() const { return path_; }

  private:
    std::string path_;
};

/// Clients that are only rows of a list.
class FakeClients : public admin::ClientDirectory {
  public:
    Task<std::vector<admin::ClientInfo>> List() override { co_return clients; }
    Task<uint64_t> Disconnect(std::vector<uint64_t> ids) override {
        const size_t before = clients.size();
        std::erase_if(clients, [&](const admin::ClientInfo& client) {
            return std::find(ids.begin(), ids.end(), client.id) != ids.end();
        });
        co_return before - clients.size();
    }

    std::vector<admin::ClientInfo> clients;  // on home
};

class AdminServer {
  public:
    explicit AdminServer(admin::ServiceOptions options = {}) : pool_(home_) {
        if (options.path.empty()) options.path = directory_.path() + "/admin.sock";
        path_ = options.path;
        options.pool_directory = "/var/lib/varve";
        service_ = std::make_unique<admin::Service>(io_, admin::Backend{&home_, &pool_, &clients_},
                                                    std::move(options));
        status_ = service_->Start();
        thread_ = std::thread([this] { io_.run(); });
    }
    ~AdminServer() {
        if (!stopped_) Stop();
        thread_.join();
    }

    /// Stops the service and waits until it has reported.
    void Stop() { BeginStop().wait(); }
    /// `before` runs on the service's thread just before.
    std::future<void> BeginStop(std::function<void()> before = [] {}) {
        stopped_ = true;
        auto done = std::make_shared<std::promise<void>>();
        std::future<void> future = done->get_future();
        boost::asio::post(io_, [this, done, before = std::move(before)] {
            before();
            service_->Stop([this, done] {
                service_.reset();
                guard_.reset();
                done->set_value();
            });
        });
        return future;
    }
    /// REQUIRES: BeginStop() was called, and a command is still running.
    void LeaveBehind() {
        boost::asio::post(io_, [this] { service_->LeaveBehind(); });
    }

    /// Runs `function` on the pool's thread.
    void OnPool(const std::function<void(FakePool&)>& function) {
        RunOn(home_, [&] { function(pool_); });
    }
    void OnClients(const std::function<void(FakeClients&)>& function) {
        RunOn(home_, [&] { function(clients_); });
    }
    /// Waits until `count` commands wait for a held pool.
    void AwaitWaiting(uint64_t count) {
        for (uint64_t waiting = 0; waiting != count;) {
            OnPool([&](FakePool& pool) { waiting = pool.waiting(); });
            std::this_thread::yield();
        }
    }

    const std::string& path() const { return path_; }
    const std::string& directory() const { return directory_.path(); }
    const Status& status() const { return status_; }
    Executor& home() { return home_; }

  private:
    TemporaryDirectory directory_;
    std::string path_;
    boost::asio::io_context io_;  // outlives home, which posts to it
    boost::asio::executor_work_guard<boost::asio::io_context::executor_type> guard_{
        io_.get_executor()};
    Worker home_{"home", 1};
    FakePool pool_;
    FakeClients clients_;
    std::unique_ptr<admin::Service> service_;
    Status status_;
    bool stopped_ = false;
    std::thread thread_;
};

/// A raw client of the admin socket. Waits at most a minute, so that a test fails, not hangs.
class RawClient {
  public:
    explicit RawClient(const std::string& path) {
        Result<admin::OwnedFd> fd = admin::ConnectUnix(path);
        VARVE_CHECK(fd.ok());
        fd_ = std::move(fd.value());
        const timeval patience{60, 0};
        VARVE_CHECK(::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) ==
                    0);
        VARVE_CHECK(::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) ==
                    0);
    }

    /// False if the server has closed the connection.
    bool Send(std::string_view text) {
        while (!text.empty()) {
            const ssize_t sent = ::send(fd_.get(), text.data(), text.size(), MSG_NOSIGNAL);
            if (sent < 0) return false;
            text.remove_prefix(static_cast<size_t>(sent));
        }
        return true;
    }
    void EndInput() { ::shutdown(fd_.get(), SHUT_WR); }

    /// The next line without its newline; "" at the end of the stream.
    std::string Line() {
        for (;;) {
            const size_t newline = received_.find('\n');
            if (newline != std::string::npos) {
                std::string line = received_.substr(0, newline);
                received_.erase(0, newline + 1);
                return line;
            }
            if (!Receive()) return "";
        }
    }
    boost::json::value Json() {
        boost::system::error_code failure;
        boost::json::value value = boost::json::parse(Line(), failure);
        return failure ? boost::json::value("no JSON") : value;
    }
    boost::json::value Ask(const std::string& line) {
        Send(line + "\n");
        return Json();
    }
    /// Whether the stream ends here, with nothing more sent.
    bool AtEnd() { return received_.empty() && !Receive() && ended_; }
    int fd() const { return fd_.get(); }

  private:
    bool Receive() {
        char chunk[65536];
        const ssize_t count = ::recv(fd_.get(), chunk, sizeof chunk, 0);
        if (count > 0) received_.append(chunk, static_cast<size_t>(count));
        ended_ = count == 0 || (count < 0 && errno == ECONNRESET);
        return count > 0;
    }

    admin::OwnedFd fd_;
    std::string received_;
    bool ended_ = false;  // by the server, not by running out of patience
};

}  // namespace varve::testing
