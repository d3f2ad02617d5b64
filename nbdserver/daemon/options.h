// The settings of varved, from the command line and a configuration file.
// Not their effects: main.cc hands them to the parts that they are for.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/log.h"
#include "base/result.h"
#include "cow/pool/pool.h"
#include "nbdserver/connection/connection.h"
#include "nbdserver/daemon/listeners.h"
#include "nbdserver/negotiation/negotiation.h"
#include "nbdserver/tls/credentials.h"

namespace varve::nbdserver {

inline constexpr uint16_t kNbdPort = 10809;  // IANA

struct Options {
    std::string pool;
    std::string data;
    std::vector<TcpAddress> listen;  // as given
    std::vector<UnixAddress> listen_unix;
    tls::CredentialFiles tls;
    std::string access;    // file; empty: everybody may open everything
    std::string admin;     // empty: POOL/admin.sock
    unsigned threads = 0;  // 0: one per CPU
    uint64_t poll_us = 50;
    bool direct = true;
    bool force_epoch = false;  // see cow::PoolDirectoryOptions
    std::string config;        // file
    LogFormat log_format = LogFormat::kText;
    LogLevel log_level = LogLevel::kInfo;

    cow::PoolOptions pool_options;
    uint64_t metadata_cache_bytes = 32 << 20;
    NegotiationLimits negotiation;
    uint64_t negotiation_timeout_s = 10;
    uint64_t negotiating_max = 100;  // connections that still negotiate; more wait in the backlog
    uint64_t waiting_max = 100;      // that wait for one export, besides; more are refused
    uint64_t connections_max = 10'000;  // in all; more are closed at once
    ConnectionLimits connection;
    uint64_t bytes_in_flight_max = 1 << 30;  // payloads, all connections together
    uint64_t admin_connections_max = 128;
    uint64_t peer_timeout_s = 60;

    bool check_config = false;
    bool version = false;
    bool help = false;
};

/// `arguments` without the program's name. Reads the file named by --config first; what the command
/// line says goes before it. kInvalid, in one line, that names the option, or the file and line.
Result<Options> ParseOptions(const std::vector<std::string>& arguments);

/// The text of --help.
std::string HelpText();

}  // namespace varve::nbdserver
