#include "fastweights/session/state_file.hpp"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <limits>
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

constexpr const char* kLogTokens = "log.tokens";
constexpr const char* kLogCalls = "log.calls";
constexpr std::size_t kCallFields = 4;

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

Digest digest(Bytes bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data(), bytes.size()));
  Digest out;
  std::memcpy(out.data(), canonical.digest, out.size());
  return out;
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

/// The bytes of one of the log's two tensors.
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

std::vector<std::byte> pack(std::span<const LogCall> calls) {
  std::vector<std::byte> out(calls.size() * kCallFields * sizeof(std::uint64_t));
  for (std::size_t i = 0; i < calls.size(); ++i) {
    const std::array<std::uint64_t, kCallFields> fields = {
        static_cast<std::uint64_t>(calls[i].kind), static_cast<std::uint64_t>(calls[i].tokens),
        calls[i].seed ? 1U : 0U, calls[i].seed.value_or(0)};
    for (std::size_t j = 0; j < kCallFields; ++j) {
      store(std::span(out), (i * kCallFields + j) * sizeof(std::uint64_t), fields[j]);
    }
  }
  return out;
}

LogCall unpack_call(Bytes record) {
  const auto field = [&](std::size_t i) { return load<std::uint64_t>(record, i * 8); };
  if (field(0) > 1 || field(1) > std::numeric_limits<std::int64_t>::max() || field(2) > 1) {
    refuse("malformed: a call of the log has impossible values");
  }
  LogCall call{static_cast<CallKind>(field(0)), static_cast<std::int64_t>(field(1)), {}};
  if (field(2) == 1) call.seed = field(3);
  return call;
}

std::vector<LogCall> unpack(Bytes records) {
  constexpr std::size_t kRecord = kCallFields * sizeof(std::uint64_t);
  std::vector<LogCall> calls;
  calls.reserve(records.size() / kRecord);
  for (std::size_t at = 0; at < records.size(); at += kRecord) {
    calls.push_back(unpack_call(records.subspan(at, kRecord)));
  }
  return calls;
}

SessionLog parse_log(const io::SafetensorsView& view) {
  const auto vocabulary = number<std::int64_t>(view, "vocabulary_size", 1, std::int64_t{1} << 32);
  const std::size_t width = SessionLog(vocabulary).bytes_per_token();
  const Bytes tokens = log_tensor(view, kLogTokens, io::ScalarType::U8, width);
  const Bytes calls = log_tensor(view, kLogCalls, io::ScalarType::I64, kCallFields);
  std::vector<LogCall> unpacked = unpack(calls);
  try {
    return SessionLog::from_packed(vocabulary, tokens, std::move(unpacked));
  } catch (const Error& error) {
    refuse("malformed: " + std::string(error.what()));
  }
}

/// All tensors but the log's.
std::vector<io::TensorData> session_tensors(const io::SafetensorsView& view) {
  std::vector<io::TensorData> tensors;
  for (const io::TensorInfo& info : view.tensors()) {
    if (info.name == kLogTokens || info.name == kLogCalls) continue;
    tensors.push_back({info.name, info.type, info.shape, view.bytes(info)});
  }
  return tensors;
}

}  // namespace

namespace detail {

std::vector<std::byte> seal_state_file(std::span<const std::byte> content, std::uint32_t version) {
  std::vector<std::byte> bytes(kSmallest + content.size());
  std::memcpy(bytes.data(), kMagic.data(), kMagic.size());
  store(std::span(bytes), kVersionAt, version);
  store(std::span(bytes), kLengthAt, static_cast<std::uint64_t>(bytes.size()));
  std::copy(content.begin(), content.end(), bytes.begin() + kContentAt);
  const Digest sum = digest(Bytes(bytes).first(bytes.size() - sizeof(Digest)));
  std::copy(sum.begin(), sum.end(), bytes.end() - sizeof(Digest));
  return bytes;
}

}  // namespace detail

std::vector<std::byte> serialize_state_file(const StateFile& file) {
  const auto width = static_cast<std::int64_t>(file.log.bytes_per_token());
  const std::vector<std::byte> calls = pack(file.log.calls());
  std::vector<io::TensorData> tensors = file.tensors;
  tensors.push_back({kLogTokens, io::ScalarType::U8, {file.log.size(), width}, file.log.packed()});
  tensors.push_back({kLogCalls,
                     io::ScalarType::I64,
                     {std::ssize(file.log.calls()), std::int64_t{kCallFields}},
                     calls});
  const io::Metadata metadata = {
      {"model", file.model},
      {"vocabulary_size", std::to_string(file.log.vocabulary_size())},
      {"piece", std::to_string(file.piece)},
      {"seed", std::to_string(file.seed)},
  };
  return detail::seal_state_file(io::serialize_safetensors(tensors, metadata));
}

StateFile parse_state_file(std::span<const std::byte> bytes) {
  const Bytes content = unseal(bytes);
  const auto view = io::SafetensorsView::parse(content, "state file: malformed");
  return {.model = std::string(fingerprint(view)),
          .piece = number<std::int64_t>(view, "piece", 1, std::numeric_limits<std::int64_t>::max()),
          .seed = number<std::uint64_t>(view, "seed", 0, std::numeric_limits<std::uint64_t>::max()),
          .log = parse_log(view),
          .tensors = session_tensors(view)};
}

void write_state_file(const std::filesystem::path& path, const StateFile& file) {
  const std::vector<std::byte> bytes = serialize_state_file(file);
  const Bytes chunk = bytes;
  io::write_file_atomically(path, std::span(&chunk, 1), io::kPrivateMode);
}

}  // namespace fastweights
