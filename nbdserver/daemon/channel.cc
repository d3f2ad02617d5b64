#include "nbdserver/daemon/channel.h"

#include <poll.h>

#include <utility>

namespace varve::nbdserver {
namespace {

bool Readable(int fd) {
    pollfd readable{fd, POLLIN, 0};
    return ::poll(&readable, 1, 0) > 0;
}

}  // namespace

bool Channel::IsLate() const {
    if (!waited_.running()) return false;
    return !reading_ || !Readable(fd());
}

Task<std::string> Channel::ReadRaw() {
    waited_.Go();
    reading_ = true;
    Task<size_t> reading = socket_.Read(buffer_);
    const size_t bytes = co_await reading;
    reading_ = false;
    waited_.Halt();
    co_return std::string(buffer_.data(), bytes);
}

Task<bool> Channel::WriteRaw(std::string_view bytes) {
    waited_.Go();
    Task<bool> writing = socket_.WriteAll(bytes);
    const bool written = co_await writing;
    waited_.Halt();
    co_return written;
}

Task<std::string> Channel::Read() {
    std::string data;
    while (data.empty()) {
        if (records_ && !OpenRecords(data)) break;
        if (!data.empty()) break;
        Task<std::string> reading = ReadRaw();
        std::string bytes = co_await reading;
        if (bytes.empty()) break;
        if (!records_) co_return bytes;
        sealed_ += bytes;
    }
    co_return data;
}

/// Appends the data of whole records that have arrived. False once no more will come.
bool Channel::OpenRecords(std::string& data) {
    records_->OpenCopy(sealed_, data);
    return !records_->closed() && !records_->broken();
}

Task<bool> Channel::WriteAll(std::string_view bytes) {
    if (!records_) {
        Task<bool> writing = WriteRaw(bytes);
        co_return co_await writing;
    }
    std::string sealed;
    records_->SealCopy(bytes, sealed);
    Task<bool> writing = WriteRaw(sealed);
    co_return co_await writing;
}

bool Channel::WriteNow(std::string_view bytes) {
    if (!records_) return socket_.WriteNow(bytes);
    std::string sealed;
    records_->SealCopy(bytes, sealed);
    return socket_.WriteNow(sealed);
}

void Channel::SayGoodbye() {
    if (!records_ || cancelled()) return;
    socket_.WriteNow(records_->SealAlert(records_->broken().value_or(tls::Alert::kCloseNotify)));
}

Task<std::string> Channel::StartTls(TlsService& service) {
    tls::Handshake handshake(service.credentials());
    using Step = tls::Handshake::Step;
    while (handshake.step() == Step::kInput) {
        Task<std::string> reading = ReadRaw();
        const std::string bytes = co_await reading;
        if (bytes.empty()) co_return "the client left";
        co_await Hop(service.worker());
        handshake.Feed(bytes);
        co_await Hop(control_);
        const std::string output = handshake.TakeOutput();
        Task<bool> writing = WriteRaw(output);
        const bool written = co_await writing;
        // Why it failed matters more than that it did not wait to be told.
        if (!written && handshake.step() != Step::kFailed) co_return "the client left";
    }
    if (handshake.step() == Step::kFailed) co_return handshake.failure();
    records_ = std::make_unique<tls::Records>(handshake.agreement());
    identity_ = handshake.identity();
    sealed_ = handshake.TakeLeftover();
    co_return std::string();
}

Channel::Remains Channel::Release() {
    Remains remains;
    if (records_) OpenRecords(remains.plain);  // an end is seen by who reads next
    remains.sealed = std::move(sealed_);
    remains.records = std::move(records_);
    remains.fd = socket_.Release();
    return remains;
}

}  // namespace varve::nbdserver
