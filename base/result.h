// Errors as values: Status and Result<T> for the control plane, Errno for the data path.
// Not an exception hierarchy: nothing here throws.
#pragma once

#include <cerrno>
#include <optional>
#include <string>
#include <utility>

#include "base/check.h"

namespace varve {

/// What went wrong in the data path: 0 for success, else a positive errno value.
using Errno = int;

/// The kinds of failure a user can meet; the command line's exit codes follow from them.
enum class ErrorKind {
    kFailed,    // exit 1: anything without a kind of its own
    kInvalid,   // exit 2: the request cannot be understood or makes no sense
    kNotFound,  // exit 3
    kExists,    // exit 4
    kBusy,      // exit 5
    kNoSpace,   // exit 6
    kLimit,     // exit 6: over a configured limit
    kIo,        // exit 1: a device or file failed
    kDamaged,   // exit 8: stored data breaks a rule of the format
};

/// The name of `kind` on the admin socket: "not_found", "busy", ...
const char* KindName(ErrorKind kind);

/// A failure with a message of one line that says what to do.
struct Error {
    ErrorKind kind = ErrorKind::kFailed;
    std::string message;
};

Error MakeError(ErrorKind kind, std::string message);

/// An Error of kind kIo or kNoSpace that names the operation and the system's reason.
Error SystemError(Errno error, std::string what);

/// Success, or an Error.
class [[nodiscard]] Status {
  public:
    Status() = default;
    Status(Error error) : error_(std::move(error)) {}  // NOLINT: conversion intended

    bool ok() const { return !error_.has_value(); }
    const Error& error() const {
        VARVE_CHECK(error_.has_value());
        return *error_;
    }

  private:
    std::optional<Error> error_;
};

/// A value, or an Error. value() on an error is a programmer's error.
template <typename T>
class [[nodiscard]] Result {
  public:
    Result(T value) : value_(std::move(value)) {}      // NOLINT: conversion intended
    Result(Error error) : error_(std::move(error)) {}  // NOLINT: conversion intended

    bool ok() const { return value_.has_value(); }
    T& value() {
        VARVE_CHECK(value_.has_value());
        return *value_;
    }
    const T& value() const {
        VARVE_CHECK(value_.has_value());
        return *value_;
    }
    const Error& error() const { return error_; }
    Status status() const { return ok() ? Status() : Status(error_); }

  private:
    std::optional<T> value_;
    Error error_;
};

}  // namespace varve
