// Negotiator: NBD's fixed newstyle negotiation as a state machine. Bytes in, bytes out.
// Not a connection: it knows no sockets, no threads and no pool. Whoever drives it looks exports
// up. Source: doc/proto.md of github.com/NetworkBlockDevice/nbd.
//
//   output(Greeting()); loop: Feed(bytes)... and do as step() says until kDone or kHangUp
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nbdserver/negotiation/contexts.h"
#include "nbdserver/negotiation/list_reply.h"

namespace varve::nbdserver {

struct NegotiationLimits {
    uint32_t options_max = 32;            // then the connection is closed
    uint32_t options_per_listed = 8;      // more but LIST, for each export that a LIST has named
    uint32_t option_bytes_max = 8 << 10;  // data of one option; more: an error, not stored
    uint32_t option_skip_max = 1 << 20;   // data of one option; more: the connection is closed
    uint32_t list_bytes_max = 4 << 20;    // (server) the answer to LIST; more: an error instead
    uint32_t context_queries_max = 64;    // in one option
};

enum class TlsMode {
    kOff,      // STARTTLS is refused
    kAllow,    // the client may
    kRequire,  // without it nothing is told
};

/// What the state machine must know of an export.
struct ExportDescription {
    std::string name;   // its own: "disk0", also if it was asked for as ""
    uint64_t size = 0;  // bytes
    bool read_only = false;
    bool diff = false;               // "disk0@new~old"
    std::string base;                // whose bitmap is shown; empty: none is
    std::vector<std::string> bases;  // of lookup_bases(), those whose bitmaps there are
};

/// Why a looked-up export is not served.
enum class LookupError {
    kUnknown,   // there is no such export
    kBusy,      // not now: it is offline, or being restored, deleted or resized
    kCrowded,   // not now: requests of clients that left it are under way, and many wait for that
    kFailed,    // the server cannot
    kShutdown,  // the server is stopping
};

/// What was agreed on, valid at Step::kDone.
struct NegotiationResult {
    std::string export_name;  // as the client named it
    bool structured_replies = false;
    bool extended_headers = false;      // then structured_replies as well
    std::vector<ContextName> contexts;  // selected for this export; their ids are 1, 2, ...
    std::string leftover;               // bytes that arrived behind the last option
};

class Negotiator {
  public:
    enum class Step {
        kInput,     // Feed() more
        kList,      // call AnswerList()
        kLookup,    // look lookup_name() up, call AnswerLookup()
        kStartTls,  // send the output, make a handshake, call TlsStarted()
        kDone,      // send the output; transmission begins. Only after a lookup with opens()
        kHangUp,    // send the output, then close
    };

    explicit Negotiator(NegotiationLimits limits = {}, TlsMode tls = TlsMode::kOff);

    Step step() const { return step_; }

    /// Takes the next bytes of the client. REQUIRES: step() is kInput. Looks at them until it needs
    /// an answer; what is behind stays inside. Keeps at most one option and what `bytes` held.
    Step Feed(std::string_view bytes);

    /// REQUIRES: step() is kLookup.
    const std::string& lookup_name() const { return lookup_name_; }
    /// Snapshots whose bitmaps are asked about; if the export is to be opened, that were selected.
    std::vector<std::string> lookup_bases() const;
    /// Whether the export is to be opened (GO, EXPORT_NAME), not only described.
    bool opens() const;
    Step AnswerLookup(const ExportDescription& description);
    Step AnswerLookup(LookupError error);

    /// The caller sends `list`, and what TakeOutput() gives from now on behind it.
    /// REQUIRES: step() is kList; TakeOutput() was called since.
    Step AnswerList(const ListReply& list);

    /// What Feed() gets from now on was encrypted, and what TakeOutput() gives has to be. Nothing
    /// is left of what was agreed on before. REQUIRES: step() is kStartTls; TakeOutput() was called
    /// since.
    Step TlsStarted();

    /// From now on every option but ABORT is answered with ERR_SHUTDOWN.
    void Shutdown() { shutting_down_ = true; }

    /// Bytes to send, in one write. The greeting is the first.
    std::string TakeOutput();

    /// Options that only the answer to a LIST gave room for: whoever asks about each export needs
    /// time for it, too.
    uint64_t options_for_list() const;

    /// REQUIRES: step() is kDone.
    NegotiationResult TakeResult();

  private:
    enum class Phase { kClientFlags, kOptionHeader, kOptionData, kSkipData };

    bool Advance();  // one message; false: more bytes or an answer are needed
    bool TakeClientFlags();
    bool TakeOptionHeader();
    bool TakeSkippedData();
    void HandleOption(std::string_view data);
    void HandleInfoOrGo(std::string_view data);
    void HandleMetaContext(std::string_view data);
    void HandleStructuredReply(std::string_view data);
    void HandleExtendedHeaders(std::string_view data);
    void HandleStartTls(std::string_view data);
    bool NeedsTls() const;
    void RequireTls();

    void DescribeExport(const ExportDescription& description);
    void AnswerExportName(const ExportDescription& description);
    void AnswerMetaContext(const ExportDescription& description);
    std::vector<ContextName> ContextsOf(const std::string& name) const;
    void Reply(uint32_t type, std::string_view data = {});
    void ReplyError(uint32_t type, std::string_view message);
    void AskLookup(std::string_view name);
    void HangUp() { step_ = Step::kHangUp; }
    Step Continue();

    const NegotiationLimits limits_;
    const TlsMode tls_;
    Step step_ = Step::kInput;
    Phase phase_ = Phase::kClientFlags;
    std::string input_;
    std::string output_;
    bool shutting_down_ = false;

    // What the client said so far. STARTTLS forgets all but the flags and the limits' counts.
    bool encrypted_ = false;
    bool fixed_newstyle_ = false;
    bool no_zeroes_ = false;
    bool structured_replies_ = false;
    bool extended_ = false;       // headers
    std::string context_export_;  // for which contexts were selected:
    std::vector<ContextName> contexts_;
    uint32_t options_ = 0;
    uint32_t lists_ = 0;   // of them LIST
    uint64_t listed_ = 0;  // exports in the longest answer to a LIST

    // The option at hand.
    uint32_t option_ = 0;
    uint32_t length_ = 0;  // of its data; while skipping: what is left of it
    std::string lookup_name_;
    std::vector<uint16_t> infos_;       // that it asks for
    std::vector<std::string> queries_;  // for contexts
};

}  // namespace varve::nbdserver
