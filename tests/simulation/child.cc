#include "tests/simulation/child.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "base/check.h"
#include "base/log.h"

namespace varve::simulation {
namespace {

// The beginnings of the lines in which a child tells what happened.
constexpr char kVerdict[] = "violation: ";
constexpr char kStep[] = "step ";

[[noreturn]] void Run(const Child::Work& work) {
    const std::string found = work();
    if (!found.empty()) fmt::print(stderr, "{}{}\n", kVerdict, found);
    std::fflush(nullptr);
    ::_exit(found.empty() ? 0 : 1);
}

/// What was said last.
std::string LastLine(const std::string& text) {
    const size_t end = text.find_last_not_of('\n');
    if (end == std::string::npos) return {};
    const size_t before = text.find_last_of('\n', end);
    return text.substr(before + 1, end - before);
}

}  // namespace

Child::Child(const Work& work) {
    int ends[2];
    VARVE_CHECK(::pipe2(ends, O_CLOEXEC) == 0);
    std::fflush(nullptr);
    pid_ = ::fork();
    VARVE_CHECK(pid_ >= 0);
    if (pid_ == 0) {
        ::dup2(ends[1], STDERR_FILENO);
        SetLog(LogLevel::kNothing, LogFormat::kText);
        Run(work);
    }
    ::close(ends[1]);
    output_ = ends[0];
}

bool Child::Listen() {
    char buffer[4096];
    const ssize_t length = ::read(output_, buffer, sizeof buffer);
    if (length > 0) text_.append(buffer, static_cast<size_t>(length));
    return length > 0;
}

std::string Child::Verdict(int status) const {
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
    const std::string last = LastLine(text_);
    if (last.starts_with(kVerdict)) return last.substr(sizeof kVerdict - 1);
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) return last;
    if (WIFSIGNALED(status)) return ::strsignal(WTERMSIG(status));
    return fmt::format("exit status {}: {}", WEXITSTATUS(status), last);
}

std::string Child::Reap() {
    int status = 0;
    ::close(output_);
    VARVE_CHECK(::waitpid(pid_, &status, 0) == pid_);
    return Verdict(status);
}

std::string Child::End() {
    while (Listen()) {
    }
    return Reap();
}

std::vector<Step> Child::Steps() const {
    std::vector<Step> steps;
    for (size_t at = 0; at < text_.size();) {
        const size_t end = std::min(text_.find('\n', at), text_.size());
        const std::string line = text_.substr(at, end - at);
        at = end + 1;
        if (!line.starts_with(kStep)) continue;
        const size_t number = sizeof kStep - 1;
        const size_t space = line.find(' ', number);
        if (space == std::string::npos) continue;
        steps.push_back({std::stoull(line.substr(number)), line.substr(space + 1)});
    }
    return steps;
}

void TellStep(uint64_t step, const std::string& text) {
    fmt::print(stderr, "{}{} {}\n", kStep, step, text);
}

Outcome RunInChild(SimulationOptions options) {
    options.on_step = TellStep;
    Child child([&] { return Simulate(options).violation; });
    const std::string found = child.End();
    return {found, child.Steps()};
}

}  // namespace varve::simulation
