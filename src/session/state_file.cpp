#include "fastweights/session/state_file.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>

#include "fastweights/core/error.hpp"
#include "fastweights/io/atomic_file.hpp"
#include "fastweights/io/quote.hpp"

namespace fastweights {
namespace {

using Bytes = std::span<const std::byte>;
using Digest = std::array<std::byte, 16>;

constexpr std::array<unsigned char, 8> kMagic = {0x89, 'F', 'W', 'S', '\r', '\n', 0x1A, '\n'};
constexpr std::size_t kVersionAt = 8;
constexpr std::size_t kLengthAt = 16;
constexpr std::size_t kContentAt = 24;
constexpr std::size_t kSmallest = kContentAt + sizeof(Digest);

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kJournalOfVersion1 = std::int64_t{64} << 20;

constexpr const char* kLogTokens = "log.tokens";

/// A table of integers among the tensors: its name, and how many a row has.
struct Table {
  const char* name;
  std::size_t fields;
};
constexpr Table kCalls{"log.calls", 4};
constexpr Table kStrengths{"log.strengths", 3};
constexpr Table kMarks{"log.marks", 3};
constexpr Table kCheckpoints{"log.checkpoints", 2};
constexpr Table kPolicy{"session.policy", 4};        // only where it is not the default
constexpr Table kEndToEnd{"session.end_to_end", 3};  // only where there are such options
constexpr std::array<Table, 6> kTables = {kCalls,       kStrengths, kMarks,
                                          kCheckpoints, kPolicy,    kEndToEnd};

[[noreturn]] void refuse(const std::string& why) { throw FileError("state file: " + why); }

// ---- the envelope ------------------------------------------------------------------------------

template <class T>
T load(Bytes bytes, std::size_t at) {
  T value = 0;
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    value |= std::to_integer<T>(bytes[at + i]) << (8 * i);
  }
  return value;
}

template <class T>
void store(std::span<std::byte> bytes, std::size_t at, T value) {
  for (std::size_t i = 0; i < sizeof(T); ++i) {
    bytes[at + i] = static_cast<std::byte>((value >> (8 * i)) & 0xFF);
  }
}

/// The digest of bytes that come in pieces.
class DigestOfPieces {
 public:
  DigestOfPieces() : state_(XXH3_createState()) { XXH3_128bits_reset(state_.get()); }

  void add(Bytes piece) { XXH3_128bits_update(state_.get(), piece.data(), piece.size()); }

  Digest value() const {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_.get()));
    Digest out;
    std::memcpy(out.data(), canonical.digest, out.size());
    return out;
  }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

Digest digest(Bytes bytes) {
  DigestOfPieces sum;
  sum.add(bytes);
  return sum.value();
}

void check_magic(Bytes bytes) {
  if (bytes.empty()) refuse("the file is empty");
  const std::size_t known = std::min(bytes.size(), kMagic.size());
  if (std::memcmp(bytes.data(), kMagic.data(), known) != 0) {
    refuse("this is no fastweights state file (it begins with other bytes)");
  }
}

void check_length(Bytes bytes) {
  if (bytes.size() < kSmallest) {
    refuse("cut short: " + std::to_string(bytes.size()) + " bytes, fewer than any state file has");
  }
  const auto length = load<std::uint64_t>(bytes, kLengthAt);
  const std::string sizes =
      std::to_string(length) + " bytes when written, " + std::to_string(bytes.size()) + " now";
  if (bytes.size() < length) refuse("cut short: " + sizes);
  if (bytes.size() > length) refuse("altered: " + sizes);
}

void check_digest(Bytes bytes) {
  const Digest expected = digest(bytes.first(bytes.size() - sizeof(Digest)));
  if (!std::equal(expected.begin(), expected.end(), bytes.end() - sizeof(Digest))) {
    refuse("altered: its checksum does not match its content");
  }
}

void check_version(Bytes bytes) {
  const auto version = load<std::uint32_t>(bytes, kVersionAt);
  if (version > kStateFileVersion) {
    refuse("written by a newer version: format " + std::to_string(version) +
           ", this library reads up to format " + std::to_string(kStateFileVersion));
  }
  if (version == 0) refuse("malformed: there is no format 0");
}

bool is_version_1(Bytes bytes) { return load<std::uint32_t>(bytes, kVersionAt) == 1; }

/// What the envelope holds, once everything about the envelope is right.
Bytes unseal(Bytes bytes) {
  check_magic(bytes);
  check_length(bytes);
  check_digest(bytes);
  check_version(bytes);
  return bytes.subspan(kContentAt, bytes.size() - kSmallest);
}

// ---- the content -------------------------------------------------------------------------------

std::string_view metadata(const io::SafetensorsView& view, const std::string& key) {
  const auto found = view.metadata().find(key);
  if (found == view.metadata().end()) refuse("malformed: `" + key + "` is missing");
  return found->second;
}

template <class T>
T number(const io::SafetensorsView& view, const std::string& key, T least, T most) {
  const std::string_view text = metadata(view, key);
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < least || value > most) {
    refuse("malformed: `" + key + "` must be an integer in [" + std::to_string(least) + ", " +
           std::to_string(most) + "], got " + io::quote(text));
  }
  return value;
}

std::string_view fingerprint(const io::SafetensorsView& view) {
  const std::string_view text = metadata(view, "model");
  const bool hexadecimal = std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
  });
  if (text.size() != 32 || !hexadecimal) {
    refuse("malformed: `model` must be 32 hexadecimal digits, got " + io::quote(text));
  }
  return text;
}

/// The bytes of one of the log's tensors.
Bytes log_tensor(const io::SafetensorsView& view, const char* name, io::ScalarType type,
                 std::size_t columns) {
  const io::TensorInfo* info = view.find(name);
  if (info == nullptr || info->type != type || info->shape.size() != 2 ||
      info->shape[1] != static_cast<std::int64_t>(columns)) {
    refuse("malformed: `" + std::string(name) + "` must be " +
           std::string(io::scalar_type_name(type)) + " [N, " + std::to_string(columns) + "]");
  }
  return view.bytes(*info);
}

// ---- tables ------------------------------------------------------------------------------------

using Row = std::array<std::uint64_t, 4>;  // the first fields are used

Row row_of(const LogCall& call) {
  return {static_cast<std::uint64_t>(call.kind), static_cast<std::uint64_t>(call.tokens),
          call.seed ? 1U : 0U, call.seed.value_or(0)};
}

Row row_of(const StrengthSpan& span) {
  return {static_cast<std::uint64_t>(span.begin), static_cast<std::uint64_t>(span.end),
          std::bit_cast<std::uint32_t>(span.strength)};
}

Row row_of(const MarkEntry& entry) {
  return {entry.mark.id, static_cast<std::uint64_t>(entry.position),
          static_cast<std::uint64_t>(entry.status)};
}

Row row_of(const StoredCheckpoint& checkpoint) {
  return {static_cast<std::uint64_t>(checkpoint.position),
          static_cast<std::uint64_t>(checkpoint.limited_writes)};
}

/// A row of a table of fp64.
using RealRow = std::array<double, 4>;

Row row_of(const RealRow& fields) {
  Row row{};
  std::ranges::transform(fields, row.begin(),
                         [](double value) { return std::bit_cast<std::uint64_t>(value); });
  return row;
}

RealRow real_row_of(const Row& row) {
  RealRow fields{};
  std::ranges::transform(row, fields.begin(),
                         [](std::uint64_t bits) { return std::bit_cast<double>(bits); });
  return fields;
}

std::vector<RealRow> rows_of(const WritePolicy& policy) {
  if (policy == WritePolicy()) return {};
  const SurpriseGate gate = policy.surprise.value_or(SurpriseGate());
  std::vector<RealRow> rows = {
      {policy.strength, policy.memory_norm_cap, policy.head_norm_cap, policy.surprise ? 1.0 : 0.0},
      {gate.low, gate.high, gate.least, gate.most}};
  if (policy.ridge > 0.0) rows.push_back({policy.ridge, 0.0, 0.0, 0.0});
  return rows;
}

std::vector<RealRow> rows_of(const std::optional<EndToEndOptions>& options) {
  if (!options) return {};
  return {{options->learning_rate, static_cast<double>(options->every), options->clip, 0.0}};
}

WritePolicy policy_of(const std::vector<RealRow>& rows) {
  const auto& [strength, memory_norm_cap, head_norm_cap, gated] = rows[0];
  WritePolicy policy{.strength = static_cast<float>(strength),
                     .memory_norm_cap = memory_norm_cap,
                     .head_norm_cap = head_norm_cap};
  const auto& [low, high, least, most] = rows[1];
  if (gated != 0.0) {
    policy.surprise = {low, high, static_cast<float>(least), static_cast<float>(most)};
  }
  if (rows.size() == 3) policy.ridge = rows[2][0];
  return policy;
}

bool is_count(std::uint64_t field) { return field <= static_cast<std::uint64_t>(kMost); }

LogCall call_of(const Row& row) {
  if (row[0] > 1 || !is_count(row[1]) || row[2] > 1) {
    refuse("malformed: a call of the log has impossible values");
  }
  LogCall call{static_cast<CallKind>(row[0]), static_cast<std::int64_t>(row[1]), {}};
  if (row[2] == 1) call.seed = row[3];
  return call;
}

StrengthSpan strength_of(const Row& row) {
  if (!is_count(row[0]) || !is_count(row[1]) ||
      row[2] > std::numeric_limits<std::uint32_t>::max()) {
    refuse("malformed: a strength of the log has impossible values");
  }
  return {static_cast<std::int64_t>(row[0]), static_cast<std::int64_t>(row[1]),
          std::bit_cast<float>(static_cast<std::uint32_t>(row[2]))};
}

MarkEntry mark_of(const Row& row) {
  if (!is_count(row[1]) || row[2] > 2) refuse("malformed: a mark has impossible values");
  return {{row[0]}, static_cast<std::int64_t>(row[1]), static_cast<MarkStatus>(row[2])};
}

StoredCheckpoint checkpoint_of(const Row& row) {
  if (!is_count(row[0]) || !is_count(row[1])) {
    refuse("malformed: a checkpoint has impossible values");
  }
  return {static_cast<std::int64_t>(row[0]), static_cast<std::int64_t>(row[1])};
}

template <class Items>
std::vector<std::byte> pack(const Table& table, const Items& items) {
  std::vector<std::byte> out(std::size(items) * table.fields * sizeof(std::uint64_t));
  std::size_t at = 0;
  for (const auto& item : items) {
    const Row row = row_of(item);
    for (std::size_t field = 0; field < table.fields; ++field, at += sizeof(std::uint64_t)) {
      store(std::span(out), at, row[field]);
    }
  }
  return out;
}

template <class Item>
std::vector<Item> unpack(const io::SafetensorsView& view, const Table& table,
                         Item (*item_of)(const Row&)) {
  const Bytes records = log_tensor(view, table.name, io::ScalarType::I64, table.fields);
  const std::size_t size = table.fields * sizeof(std::uint64_t);
  std::vector<Item> items;
  items.reserve(records.size() / size);
  for (std::size_t at = 0; at < records.size(); at += size) {
    Row row{};
    for (std::size_t field = 0; field < table.fields; ++field) {
      row[field] = load<std::uint64_t>(records, at + field * sizeof(std::uint64_t));
    }
    items.push_back(item_of(row));
  }
  return items;
}

// ---- the parts ---------------------------------------------------------------------------------

/// Runs `work`; what it finds wrong is wrong with the file.
template <class Work>
auto or_malformed(Work work) {
  try {
    return work();
  } catch (const FileError&) {
    throw;
  } catch (const Error& error) {
    refuse("malformed: " + std::string(error.what()));
  }
}

LogBase parse_base(const io::SafetensorsView& view, bool version_1) {
  LogBase base;
  base.generator.seed =
      number<std::uint64_t>(view, "seed", 0, std::numeric_limits<std::uint64_t>::max());
  if (version_1) return base;
  base.read = number<std::int64_t>(view, "base_read", 0, kMost);
  base.written = number<std::int64_t>(view, "base_written", 0, kMost - base.read);
  base.position = base.read + base.written;
  base.generator.draws =
      static_cast<std::uint64_t>(number<std::int64_t>(view, "base_draws", 0, base.written));
  return base;
}

SessionLog parse_log(const io::SafetensorsView& view, bool version_1) {
  const auto vocabulary = number<std::int64_t>(view, "vocabulary_size", 1, std::int64_t{1} << 32);
  const std::size_t width = SessionLog(vocabulary).bytes_per_token();
  const Bytes tokens = log_tensor(view, kLogTokens, io::ScalarType::U8, width);
  const std::vector<LogCall> calls = unpack(view, kCalls, call_of);
  std::vector<StrengthSpan> strengths;
  if (!version_1) strengths = unpack(view, kStrengths, strength_of);
  const LogBase base = parse_base(view, version_1);
  return or_malformed([&] {
    return SessionLog::from_packed(vocabulary, tokens, calls, std::move(strengths), base);
  });
}

WritePolicy parse_policy(const io::SafetensorsView& view) {
  if (view.find(kPolicy.name) == nullptr) return {};
  const std::vector<RealRow> rows = unpack(view, kPolicy, real_row_of);
  if (rows.size() != 2 && rows.size() != 3) refuse("malformed: a write policy has 2 or 3 rows");
  WritePolicy policy = policy_of(rows);
  or_malformed([&] {
    check_write_policy(policy);
    return true;
  });
  return policy;
}

std::optional<EndToEndOptions> parse_end_to_end(const io::SafetensorsView& view) {
  if (view.find(kEndToEnd.name) == nullptr) return std::nullopt;
  const std::vector<RealRow> rows = unpack(view, kEndToEnd, real_row_of);
  if (rows.size() != 1) refuse("malformed: the options of learning end to end have one row");
  const auto& [learning_rate, every, clip, unused] = rows[0];
  if (!(every >= 1 && every <= 4096) || every != std::floor(every)) {
    refuse("malformed: end_to_end.every is no number of tokens");
  }
  const EndToEndOptions options{learning_rate, static_cast<std::int64_t>(every), clip};
  or_malformed([&] {
    check_end_to_end_options(options);
    return true;
  });
  return options;
}

std::vector<MarkEntry> parse_marks(const io::SafetensorsView& view, const SessionLog& log) {
  std::vector<MarkEntry> marks = unpack(view, kMarks, mark_of);
  or_malformed([&] { return MarkTable::from_entries(marks, log.start(), log.end()); });
  return marks;
}

std::vector<StoredCheckpoint> parse_checkpoints(const io::SafetensorsView& view,
                                                const SessionLog& log, std::int64_t piece) {
  std::vector<StoredCheckpoint> checkpoints = unpack(view, kCheckpoints, checkpoint_of);
  std::int64_t before = -1;
  for (const auto& [position, limited_writes] : checkpoints) {
    if (position <= before || !log.is_boundary(position, piece)) {
      refuse(
          "malformed: checkpoints must stand in order at boundaries of the log's steps, got one "
          "at " +
          std::to_string(position));
    }
    before = position;
  }
  return checkpoints;
}

/// All tensors but the log's.
std::vector<io::TensorData> session_tensors(const io::SafetensorsView& view) {
  std::vector<io::TensorData> tensors;
  for (const io::TensorInfo& info : view.tensors()) {
    const bool of_log =
        info.name == kLogTokens ||
        std::ranges::any_of(kTables, [&](const Table& t) { return info.name == t.name; });
    if (of_log) continue;
    tensors.push_back({info.name, info.type, info.shape, view.bytes(info)});
  }
  return tensors;
}

}  // namespace

namespace {

using Sink = std::function<void(Bytes)>;

/// Hands an envelope around a content to `out`, piece by piece; `content` does so with its own
/// pieces, twice the same.
void seal(const std::function<void(const Sink&)>& content, std::uint32_t version, const Sink& out) {
  std::size_t size = kSmallest;
  content([&](Bytes piece) { size += piece.size(); });
  std::array<std::byte, kContentAt> head{};
  std::memcpy(head.data(), kMagic.data(), kMagic.size());
  store(std::span<std::byte>(head), kVersionAt, version);
  store(std::span<std::byte>(head), kLengthAt, static_cast<std::uint64_t>(size));
  DigestOfPieces sum;
  const auto write = [&](Bytes piece) {
    sum.add(piece);
    out(piece);
  };
  write(head);
  content(write);
  const Digest last = sum.value();
  out(last);
}

std::vector<std::byte> joined(const std::function<void(const Sink&)>& pieces) {
  std::vector<std::byte> bytes;
  pieces([&](Bytes piece) { bytes.insert(bytes.end(), piece.begin(), piece.end()); });
  return bytes;
}

/// The pieces of a state file.
void write_pieces(const StateFile& file, const Sink& out) {
  const SessionLog& log = file.log;
  const std::vector<std::byte> tokens = log.packed();
  const std::array<std::vector<std::byte>, 6> tables = {pack(kCalls, log.calls()),
                                                        pack(kStrengths, log.strengths()),
                                                        pack(kMarks, file.marks),
                                                        pack(kCheckpoints, file.checkpoints),
                                                        pack(kPolicy, rows_of(file.policy)),
                                                        pack(kEndToEnd, rows_of(file.end_to_end))};
  std::vector<io::TensorData> tensors = file.tensors;
  tensors.push_back({kLogTokens,
                     io::ScalarType::U8,
                     {log.size(), static_cast<std::int64_t>(log.bytes_per_token())},
                     tokens});
  for (std::size_t i = 0; i < kTables.size(); ++i) {
    const bool optional = kTables[i].name == kPolicy.name || kTables[i].name == kEndToEnd.name;
    if (optional && tables[i].empty()) continue;
    const auto fields = static_cast<std::int64_t>(kTables[i].fields);
    const std::int64_t rows = std::ssize(tables[i]) / (fields * 8);
    tensors.push_back({kTables[i].name, io::ScalarType::I64, {rows, fields}, tables[i]});
  }
  const io::Metadata metadata = {
      {"model", file.model},
      {"vocabulary_size", std::to_string(log.vocabulary_size())},
      {"piece", std::to_string(file.piece)},
      {"journal_bytes", std::to_string(file.journal_bytes)},
      {"limited_writes", std::to_string(file.limited_writes)},
      {"seed", std::to_string(log.base().generator.seed)},
      {"base_read", std::to_string(log.base().read)},
      {"base_written", std::to_string(log.base().written)},
      {"base_draws", std::to_string(log.base().generator.draws)},
      {"base_limited_writes", std::to_string(file.base_limited_writes)},
  };
  const auto content = [&](const Sink& sink) { io::write_safetensors(tensors, metadata, sink); };
  seal(content, kStateFileVersion, out);
}

}  // namespace

namespace detail {

std::vector<std::byte> seal_state_file(std::span<const std::byte> content, std::uint32_t version) {
  return joined(
      [&](const Sink& out) { seal([&](const Sink& sink) { sink(content); }, version, out); });
}

}  // namespace detail

std::vector<std::byte> serialize_state_file(const StateFile& file) {
  return joined([&](const Sink& out) { write_pieces(file, out); });
}

StateFile parse_state_file(std::span<const std::byte> bytes) {
  const Bytes content = unseal(bytes);
  const bool version_1 = is_version_1(bytes);
  const auto view = io::SafetensorsView::parse(content, "state file: malformed");
  const auto count = [&](const char* key, std::int64_t of_version_1) {
    return version_1 ? of_version_1 : number<std::int64_t>(view, key, 0, kMost);
  };
  StateFile file{.model = std::string(fingerprint(view)),
                 .piece = number<std::int64_t>(view, "piece", 1, kMost),
                 .journal_bytes = count("journal_bytes", kJournalOfVersion1),
                 .limited_writes = count("limited_writes", 0),
                 .base_limited_writes = count("base_limited_writes", 0),
                 .policy = parse_policy(view),
                 .end_to_end = parse_end_to_end(view),
                 .log = parse_log(view, version_1),
                 .marks = {},
                 .checkpoints = {},
                 .tensors = session_tensors(view)};
  if (version_1) return file;
  file.marks = parse_marks(view, file.log);
  file.checkpoints = parse_checkpoints(view, file.log, file.piece);
  return file;
}

void write_state_file(const std::filesystem::path& path, const StateFile& file) {
  io::AtomicFile out(path, io::kPrivateMode);
  write_pieces(file, [&](Bytes piece) { out.write(piece); });
  out.commit();
}

}  // namespace fastweights
