#include "nbdserver/negotiation/negotiation.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "cow/volume/changes.h"
#include "nbdserver/connection/connection.h"
#include "nbdserver/wire/wire.h"

namespace varve::nbdserver {
namespace {

constexpr uint32_t kMinimumBlock = 1;  // any byte range is served
constexpr uint32_t kPreferredBlock = 4096;

template <typename T>
std::string_view Bytes(const T& structure) {
    return {reinterpret_cast<const char*>(&structure), sizeof structure};
}

/// Takes the fields of an option's data from the front.
class Fields {
  public:
    explicit Fields(std::string_view data) : data_(data) {}

    template <typename T>
    std::optional<T> Number() {
        if (data_.size() < sizeof(T)) return std::nullopt;
        const T number = LoadBig<T>(data_.data());
        data_.remove_prefix(sizeof(T));
        return number;
    }
    /// A 32-bit length and as many bytes.
    std::optional<std::string_view> String() {
        const std::optional<uint32_t> length = Number<uint32_t>();
        if (!length || *length > data_.size()) return std::nullopt;
        const std::string_view text = data_.substr(0, *length);
        data_.remove_prefix(*length);
        return text;
    }
    bool empty() const { return data_.empty(); }

  private:
    std::string_view data_;
};

bool IsName(std::string_view name) {
    return name.find('\0') == std::string_view::npos;
}

}  // namespace

Negotiator::Negotiator(NegotiationLimits limits, TlsMode tls) : limits_(limits), tls_(tls) {
    wire::Greeting greeting;
    greeting.flags = wire::kHandshakeFixedNewstyle | wire::kHandshakeNoZeroes;
    output_ = Bytes(greeting);
}

std::string Negotiator::TakeOutput() {
    return std::exchange(output_, {});
}

bool Negotiator::opens() const {
    return option_ == wire::kOptGo || option_ == wire::kOptExportName;
}

Negotiator::Step Negotiator::Feed(std::string_view bytes) {
    VARVE_CHECK(step_ == Step::kInput);
    input_ += bytes;
    return Continue();
}

Negotiator::Step Negotiator::Continue() {
    while (step_ == Step::kInput && Advance()) {
    }
    return step_;
}

bool Negotiator::Advance() {
    switch (phase_) {
        case Phase::kClientFlags:
            return TakeClientFlags();
        case Phase::kOptionHeader:
            return TakeOptionHeader();
        case Phase::kSkipData:
            return TakeSkippedData();
        case Phase::kOptionData:
            break;
    }
    if (input_.size() < length_) return false;
    const std::string data = input_.substr(0, length_);
    input_.erase(0, length_);
    phase_ = Phase::kOptionHeader;
    HandleOption(data);
    return true;
}

bool Negotiator::TakeClientFlags() {
    if (input_.size() < sizeof(uint32_t)) return false;
    const auto flags = LoadBig<uint32_t>(input_.data());
    input_.erase(0, sizeof(uint32_t));
    fixed_newstyle_ = flags & wire::kClientFixedNewstyle;
    no_zeroes_ = flags & wire::kClientNoZeroes;
    phase_ = Phase::kOptionHeader;
    // proto.md, "Client flags": a server must drop the connection on flags it does not know.
    if (flags & ~(wire::kClientFixedNewstyle | wire::kClientNoZeroes)) HangUp();
    return true;
}

bool Negotiator::TakeOptionHeader() {
    wire::OptionHeader header;
    if (input_.size() < sizeof header) return false;
    std::memcpy(static_cast<void*>(&header), input_.data(), sizeof header);
    input_.erase(0, sizeof header);
    option_ = header.option;
    length_ = header.length;
    const uint64_t options_max = limits_.options_max + listed_ * limits_.options_per_listed;
    lists_ += option_ == wire::kOptList;
    const bool hopeless = header.magic != wire::kOptionMagic || ++options_ > options_max ||
                          lists_ > limits_.options_max || length_ > limits_.option_skip_max;
    // Without the fixed newstyle, a client cannot understand an error reply.
    const bool mute = !fixed_newstyle_ && option_ != wire::kOptExportName;
    const bool too_long = length_ > limits_.option_bytes_max;
    if (hopeless || mute || (too_long && option_ == wire::kOptExportName)) {
        HangUp();
    } else {
        phase_ = too_long ? Phase::kSkipData : Phase::kOptionData;
    }
    return true;
}

bool Negotiator::TakeSkippedData() {
    const size_t here = std::min<size_t>(length_, input_.size());
    input_.erase(0, here);
    length_ -= static_cast<uint32_t>(here);
    if (length_ > 0) return false;
    phase_ = Phase::kOptionHeader;
    if (NeedsTls()) {
        RequireTls();
    } else {
        ReplyError(wire::kRepErrTooBig, "the data of this option is too long");
    }
    return true;
}

void Negotiator::HandleOption(std::string_view data) {
    if (shutting_down_ && option_ != wire::kOptAbort) {
        if (option_ == wire::kOptExportName) return HangUp();
        return ReplyError(wire::kRepErrShutdown, "the server is shutting down");
    }
    if (NeedsTls()) return RequireTls();
    switch (option_) {
        case wire::kOptExportName:
            // This option has no error reply: all that is left is to hang up.
            if (data.size() > wire::kStringMax || !IsName(data) || extended_) return HangUp();
            return AskLookup(data);
        case wire::kOptAbort:
            Reply(wire::kRepAck);
            return HangUp();
        case wire::kOptList:
            if (!data.empty()) return ReplyError(wire::kRepErrInvalid, "LIST takes no data");
            step_ = Step::kList;
            return;
        case wire::kOptStartTls:
            return HandleStartTls(data);
        case wire::kOptInfo:
        case wire::kOptGo:
            return HandleInfoOrGo(data);
        case wire::kOptStructuredReply:
            return HandleStructuredReply(data);
        case wire::kOptExtendedHeaders:
            return HandleExtendedHeaders(data);
        case wire::kOptListMetaContext:
        case wire::kOptSetMetaContext:
            return HandleMetaContext(data);
        default:
            return ReplyError(wire::kRepErrUnsupported, "this option is not supported");
    }
}

bool Negotiator::NeedsTls() const {
    const bool free = option_ == wire::kOptStartTls || option_ == wire::kOptAbort;
    return tls_ == TlsMode::kRequire && !encrypted_ && !free;
}

void Negotiator::RequireTls() {
    if (option_ == wire::kOptExportName) return HangUp();
    ReplyError(wire::kRepErrTlsRequired, "this server requires TLS, begin with STARTTLS");
}

void Negotiator::HandleStartTls(std::string_view data) {
    if (!data.empty()) return ReplyError(wire::kRepErrInvalid, "STARTTLS takes no data");
    if (encrypted_) return ReplyError(wire::kRepErrInvalid, "there is TLS already");
    if (tls_ == TlsMode::kOff) {
        return ReplyError(wire::kRepErrUnsupported, "this server does not offer TLS here");
    }
    // What came behind it in the clear may be somebody else's: it must not be taken for encrypted.
    if (!input_.empty()) return HangUp();
    Reply(wire::kRepAck);
    step_ = Step::kStartTls;
}

Negotiator::Step Negotiator::TlsStarted() {
    VARVE_CHECK(step_ == Step::kStartTls && output_.empty());
    encrypted_ = true;
    structured_replies_ = extended_ = false;
    contexts_.clear();
    step_ = Step::kInput;
    return Continue();
}

/// They bring structured replies with them.
void Negotiator::HandleExtendedHeaders(std::string_view data) {
    if (!data.empty() || extended_) {
        return ReplyError(wire::kRepErrInvalid, "EXTENDED_HEADERS takes no data, and once");
    }
    extended_ = structured_replies_ = true;
    Reply(wire::kRepAck);
}

void Negotiator::HandleStructuredReply(std::string_view data) {
    if (data.empty() && extended_) {
        return ReplyError(wire::kRepErrExtendedHeadersRequired,
                          "extended headers were negotiated, replies are structured");
    }
    if (!data.empty() || structured_replies_) {
        return ReplyError(wire::kRepErrInvalid, "STRUCTURED_REPLY takes no data, and once");
    }
    structured_replies_ = true;
    Reply(wire::kRepAck);
}

void Negotiator::HandleInfoOrGo(std::string_view data) {
    Fields fields(data);
    const std::optional<std::string_view> name = fields.String();
    const std::optional<uint16_t> count = name ? fields.Number<uint16_t>() : std::nullopt;
    if (!count) return ReplyError(wire::kRepErrInvalid, "the lengths in this option do not fit");
    infos_.clear();
    for (uint32_t i = 0; i < *count; ++i) {
        const std::optional<uint16_t> info = fields.Number<uint16_t>();
        if (!info) return ReplyError(wire::kRepErrInvalid, "there are fewer requests than counted");
        infos_.push_back(*info);
    }
    if (!fields.empty()) {
        return ReplyError(wire::kRepErrInvalid, "there are more requests than counted");
    }
    if (name->size() > wire::kStringMax) {
        return ReplyError(wire::kRepErrTooBig, "names have at most 4096 bytes");
    }
    if (!IsName(*name)) return ReplyError(wire::kRepErrInvalid, "a name has no NUL byte");
    AskLookup(*name);
}

void Negotiator::HandleMetaContext(std::string_view data) {
    const bool set = option_ == wire::kOptSetMetaContext;
    if (set) contexts_.clear();  // whatever becomes of this one
    if (!structured_replies_) {
        return ReplyError(wire::kRepErrInvalid, "negotiate structured replies first");
    }
    Fields fields(data);
    const std::optional<std::string_view> name = fields.String();
    const std::optional<uint32_t> count = name ? fields.Number<uint32_t>() : std::nullopt;
    if (!count) return ReplyError(wire::kRepErrInvalid, "the lengths in this option do not fit");
    if (*count > limits_.context_queries_max) {
        return ReplyError(wire::kRepErrTooBig, "there are too many queries");
    }
    queries_.clear();
    for (uint32_t i = 0; i < *count; ++i) {
        const std::optional<std::string_view> query = fields.String();
        if (!query) return ReplyError(wire::kRepErrInvalid, "there are fewer queries than counted");
        queries_.emplace_back(*query);
    }
    if (!fields.empty()) {
        return ReplyError(wire::kRepErrInvalid, "there are more queries than counted");
    }
    if (name->size() > wire::kStringMax) {
        return ReplyError(wire::kRepErrTooBig, "names have at most 4096 bytes");
    }
    if (!IsName(*name)) return ReplyError(wire::kRepErrInvalid, "a name has no NUL byte");
    AskLookup(*name);
}

void Negotiator::AskLookup(std::string_view name) {
    lookup_name_ = name;
    step_ = Step::kLookup;
}

Negotiator::Step Negotiator::AnswerLookup(const ExportDescription& description) {
    VARVE_CHECK(step_ == Step::kLookup);
    step_ = Step::kInput;
    switch (option_) {
        case wire::kOptExportName:
            AnswerExportName(description);
            break;
        case wire::kOptListMetaContext:
        case wire::kOptSetMetaContext:
            AnswerMetaContext(description);
            break;
        default:
            DescribeExport(description);
    }
    if (opens()) {
        step_ = Step::kDone;
        return step_;
    }
    return Continue();
}

Negotiator::Step Negotiator::AnswerLookup(LookupError error) {
    VARVE_CHECK(step_ == Step::kLookup);
    step_ = Step::kInput;
    if (option_ == wire::kOptExportName) {
        HangUp();
        return step_;
    }
    switch (error) {
        case LookupError::kUnknown:
            ReplyError(wire::kRepErrUnknown, "no such export");
            break;
        case LookupError::kBusy:
            ReplyError(wire::kRepErrPolicy,
                       "this export is offline or being changed, try again later");
            break;
        case LookupError::kCrowded:
            ReplyError(wire::kRepErrPolicy,
                       "this export waits for the device, and too many clients for it already, "
                       "try again later");
            break;
        case LookupError::kFailed:
            ReplyError(wire::kRepErrPlatform, "the server cannot open this export");
            break;
        case LookupError::kShutdown:
            ReplyError(wire::kRepErrShutdown, "the server is shutting down");
            break;
    }
    return Continue();
}

void Negotiator::AnswerExportName(const ExportDescription& description) {
    wire::ExportNameReply reply;
    reply.size = description.size;
    reply.flags = TransmissionFlags(description.read_only, structured_replies_, extended_);
    output_ += Bytes(reply);
    if (!no_zeroes_) output_.append(wire::kExportNameZeroes, '\0');
}

void Negotiator::DescribeExport(const ExportDescription& description) {
    wire::InfoExport about;
    about.size = description.size;
    about.flags = TransmissionFlags(description.read_only, structured_replies_, extended_);
    Reply(wire::kRepInfo, Bytes(about));
    const auto asked = [this](uint16_t info) {
        return std::find(infos_.begin(), infos_.end(), info) != infos_.end();
    };
    if (asked(wire::kInfoName)) {
        std::string name;
        AppendBig<uint16_t>(name, wire::kInfoName);
        name += description.name;
        Reply(wire::kRepInfo, name);
    }
    if (asked(wire::kInfoBlockSize)) {
        wire::InfoBlockSize sizes;
        sizes.minimum = kMinimumBlock;
        sizes.preferred = kPreferredBlock;
        sizes.maximum = wire::kPayloadMax;
        Reply(wire::kRepInfo, Bytes(sizes));
    }
    Reply(wire::kRepAck);
}

std::vector<ContextName> Negotiator::ContextsOf(const std::string& name) const {
    return context_export_ == name ? contexts_ : std::vector<ContextName>();
}

std::vector<std::string> Negotiator::lookup_bases() const {
    std::vector<std::string> bases;
    if (opens()) {
        for (const ContextName& context : ContextsOf(lookup_name_)) {
            if (context.kind == ContextKind::kBitmap) bases.push_back(context.base);
        }
        return bases;
    }
    const bool asks = option_ == wire::kOptListMetaContext || option_ == wire::kOptSetMetaContext;
    for (const std::string& query : asks ? queries_ : std::vector<std::string>()) {
        if (std::optional<std::string> base = BitmapBase(query)) bases.push_back(*base);
    }
    return bases;
}

void Negotiator::AnswerMetaContext(const ExportDescription& description) {
    const bool set = option_ == wire::kOptSetMetaContext;
    const std::vector<ContextName> found =
        set ? SelectedContexts(description, queries_) : ListedContexts(description, queries_);
    const auto bitmaps = std::count_if(found.begin(), found.end(), [](const ContextName& context) {
        return context.kind == ContextKind::kBitmap;
    });
    if (set && static_cast<size_t>(bitmaps) > cow::kBasesMax) {
        return ReplyError(wire::kRepErrTooBig, "these are too many bitmaps for one connection");
    }
    for (size_t i = 0; i < found.size(); ++i) {
        std::string context;
        AppendBig<uint32_t>(context, set ? static_cast<uint32_t>(i + 1) : 0);
        context += found[i].text();
        Reply(wire::kRepMetaContext, context);
    }
    Reply(wire::kRepAck);
    if (!set) return;
    context_export_ = lookup_name_;
    contexts_ = found;
}

Negotiator::Step Negotiator::AnswerList(const ListReply& list) {
    VARVE_CHECK(step_ == Step::kList && output_.empty());
    step_ = Step::kInput;
    listed_ = std::max(listed_, list.exports);
    return Continue();
}

void Negotiator::Reply(uint32_t type, std::string_view data) {
    AppendReply(output_, option_, type, data.size());
    output_ += data;
}

void Negotiator::ReplyError(uint32_t type, std::string_view message) {
    AppendErrorReply(output_, option_, type, message);
}

uint64_t Negotiator::options_for_list() const {
    return options_ - std::min(options_, limits_.options_max);
}

NegotiationResult Negotiator::TakeResult() {
    VARVE_CHECK(step_ == Step::kDone);
    NegotiationResult result;
    result.export_name = lookup_name_;
    result.structured_replies = structured_replies_;
    result.extended_headers = extended_;
    result.contexts = ContextsOf(lookup_name_);
    result.leftover = std::exchange(input_, {});
    return result;
}

}  // namespace varve::nbdserver
