#include "safetensors_header.hpp"

#include <array>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include <nlohmann/json.hpp>

#include "fastweights/core/error.hpp"
#include "fastweights/io/quote.hpp"
#include "safetensors_format.hpp"

namespace fastweights::io::detail {
namespace {

enum class Kind { kNull, kBoolean, kNegative, kUnsigned, kFraction, kString, kObject, kArray };

constexpr std::array<std::string_view, 8> kKindNames = {
    "null",
    "a boolean",
    "a negative number",
    "a non-negative integer",
    "a fraction or huge number",
    "a string",
    "an object",
    "an array",
};

/// A place in the header where one value stands.
enum class Slot {
  kHeader,
  kMetadata,
  kMetadataValue,
  kTensor,
  kDtype,
  kShape,
  kDimension,
  kOffsets,
  kOffset,
};

enum class Subject { kHeader, kMetadata, kTensor };

struct SlotRow {
  Kind kind;  // the only one that may stand there
  Subject subject;
  std::string_view demand;
};

/// In the order of the enumeration.
constexpr std::array<SlotRow, 9> kSlots = {{
    {Kind::kObject, Subject::kHeader, "must be an object"},
    {Kind::kObject, Subject::kMetadata, "must be an object"},
    {Kind::kString, Subject::kMetadata, "must hold strings only"},
    {Kind::kObject, Subject::kTensor, "must be an object"},
    {Kind::kString, Subject::kTensor, "dtype must be a string"},
    {Kind::kArray, Subject::kTensor, "shape must be an array"},
    {Kind::kUnsigned, Subject::kTensor, "shape must hold non-negative integers"},
    {Kind::kArray, Subject::kTensor, "data_offsets must be an array"},
    {Kind::kUnsigned, Subject::kTensor, "data_offsets must hold non-negative integers"},
}};

struct FieldRow {
  std::string_view key;
  Slot slot;
};

constexpr std::array<FieldRow, 3> kFields = {{
    {"dtype", Slot::kDtype},
    {"shape", Slot::kShape},
    {"data_offsets", Slot::kOffsets},
}};

/// Takes the events of nlohmann's parser, which calls its functions by these names and stops at the
/// first one that returns false. Whatever the input, nesting is refused at the fourth level, so
/// neither the parser nor this class can be driven deep.
class HeaderReader {
 public:
  using Json = nlohmann::json;

  bool null() { return expect(Kind::kNull); }
  bool boolean(bool) { return expect(Kind::kBoolean); }
  bool number_integer(Json::number_integer_t) { return expect(Kind::kNegative); }
  bool number_unsigned(Json::number_unsigned_t value) {
    return expect(Kind::kUnsigned) &&
           (slot_ == Slot::kDimension ? add_dimension(value) : add_offset(value));
  }
  bool number_float(Json::number_float_t, const std::string&) { return expect(Kind::kFraction); }
  bool string(std::string& value) {
    return expect(Kind::kString) &&
           (slot_ == Slot::kDtype ? set_dtype(value) : add_metadata(value));
  }
  bool binary(Json::binary_t&) { return false; }  // JSON text has none

  bool start_object(std::size_t);
  bool key(std::string& name);
  bool end_object();
  bool start_array(std::size_t);
  bool end_array();
  bool parse_error(std::size_t position, const std::string&, const Json::exception& error);

  [[nodiscard]] const std::string& failure() const { return failure_; }
  SafetensorsHeader take() { return std::move(header_); }

 private:
  TensorInfo& tensor() { return header_.tensors.back(); }
  bool expect(Kind kind);
  bool fail(Subject subject, const std::string& what);
  bool start_member(std::string& name);
  bool start_metadata_value(std::string& name);
  bool start_field(const std::string& name);
  bool add_dimension(std::uint64_t value);
  bool add_offset(std::uint64_t value);
  bool set_dtype(const std::string& name);
  bool add_metadata(std::string& value);
  bool check_fields();

  SafetensorsHeader header_;
  Slot slot_ = Slot::kHeader;          // where the next value stands
  Subject object_ = Subject::kHeader;  // the object whose keys come next
  std::string metadata_key_;
  std::array<bool, kFields.size()> seen_{};  // of the tensor's fields
  std::size_t offsets_ = 0;                  // of the tensor's data_offsets
  bool metadata_seen_ = false;
  std::string failure_;
};

bool HeaderReader::expect(Kind kind) {
  const SlotRow& row = kSlots[static_cast<std::size_t>(slot_)];
  if (kind == row.kind) return true;
  return fail(row.subject, std::string(row.demand) + ", got " +
                               std::string(kKindNames[static_cast<std::size_t>(kind)]));
}

bool HeaderReader::fail(Subject subject, const std::string& what) {
  switch (subject) {
    case Subject::kHeader: failure_ = "the header " + what; break;
    case Subject::kMetadata: failure_ = "__metadata__ " + what; break;
    case Subject::kTensor: failure_ = "tensor " + quote(tensor().name) + ": " + what; break;
  }
  return false;
}

bool HeaderReader::start_object(std::size_t) {
  if (!expect(Kind::kObject)) return false;
  object_ = kSlots[static_cast<std::size_t>(slot_)].subject;
  return true;
}

bool HeaderReader::key(std::string& name) {
  switch (object_) {
    case Subject::kHeader: return start_member(name);
    case Subject::kMetadata: return start_metadata_value(name);
    case Subject::kTensor: return start_field(name);
  }
  return false;
}

bool HeaderReader::start_member(std::string& name) {
  if (name == kMetadataKey) {
    if (std::exchange(metadata_seen_, true)) return fail(Subject::kMetadata, "is there twice");
    slot_ = Slot::kMetadata;
    return true;
  }
  header_.tensors.push_back({.name = std::move(name), .shape = {}});
  seen_ = {};
  offsets_ = 0;
  slot_ = Slot::kTensor;
  return true;
}

bool HeaderReader::start_metadata_value(std::string& name) {
  if (header_.metadata.contains(name)) {
    return fail(Subject::kMetadata, "has the key " + quote(name) + " twice");
  }
  metadata_key_ = std::move(name);
  slot_ = Slot::kMetadataValue;
  return true;
}

bool HeaderReader::start_field(const std::string& name) {
  for (std::size_t i = 0; i < kFields.size(); ++i) {
    if (name != kFields[i].key) continue;
    if (std::exchange(seen_[i], true)) return fail(Subject::kTensor, name + " is there twice");
    slot_ = kFields[i].slot;
    return true;
  }
  return fail(Subject::kTensor, "has an unknown field " + quote(name));
}

bool HeaderReader::end_object() {
  if (object_ == Subject::kTensor && !check_fields()) return false;
  object_ = Subject::kHeader;
  return true;
}

bool HeaderReader::check_fields() {
  for (std::size_t i = 0; i < kFields.size(); ++i) {
    if (!seen_[i]) return fail(Subject::kTensor, "has no " + std::string(kFields[i].key));
  }
  return true;
}

bool HeaderReader::start_array(std::size_t) {
  if (!expect(Kind::kArray)) return false;
  slot_ = slot_ == Slot::kShape ? Slot::kDimension : Slot::kOffset;
  return true;
}

bool HeaderReader::end_array() {
  if (slot_ == Slot::kDimension || offsets_ == 2) return true;
  return fail(Subject::kTensor,
              "data_offsets must hold 2 numbers, got " + std::to_string(offsets_));
}

bool HeaderReader::add_dimension(std::uint64_t value) {
  if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
    return fail(Subject::kTensor, "the dimension " + std::to_string(value) + " is too large");
  }
  if (tensor().shape.size() == kHighestRank) {
    return fail(Subject::kTensor, "shape has more than 64 dimensions");
  }
  tensor().shape.push_back(static_cast<std::int64_t>(value));
  return true;
}

bool HeaderReader::add_offset(std::uint64_t value) {
  if (value > std::numeric_limits<std::size_t>::max()) {
    return fail(Subject::kTensor, "the offset " + std::to_string(value) + " is too large");
  }
  if (offsets_ == 2) return fail(Subject::kTensor, "data_offsets must hold 2 numbers, got more");
  (offsets_++ == 0 ? tensor().begin : tensor().end) = static_cast<std::size_t>(value);
  return true;
}

bool HeaderReader::set_dtype(const std::string& name) {
  for (const ScalarTypeRow& row : kScalarTypes) {
    if (name != row.name) continue;
    tensor().type = row.type;
    return true;
  }
  std::string known;
  for (const ScalarTypeRow& row : kScalarTypes) known += " " + std::string(row.name);
  return fail(Subject::kTensor, "unknown dtype " + quote(name) + "; known are" + known);
}

bool HeaderReader::add_metadata(std::string& value) {
  header_.metadata.emplace(std::move(metadata_key_), std::move(value));
  return true;
}

bool HeaderReader::parse_error(std::size_t position, const std::string&, const Json::exception&) {
  return fail(Subject::kHeader, "is not valid JSON at byte " + std::to_string(position));
}

}  // namespace

void refuse(std::string_view source, std::string_view what) {
  throw FileError(std::string(source) + ": " + std::string(what));
}

SafetensorsHeader parse_safetensors_header(std::string_view json, std::string_view source) {
  if (!json.starts_with('{')) refuse(source, "the header must begin with '{'");
  // The parser would take a NUL for the end of the text and ignore what follows it.
  if (const std::size_t nul = json.find('\0'); nul != std::string_view::npos) {
    refuse(source, "the header is not valid JSON at byte " + std::to_string(nul + 1));
  }
  HeaderReader reader;
  if (!nlohmann::json::sax_parse(json.begin(), json.end(), &reader)) {
    refuse(source, reader.failure());
  }
  return reader.take();
}

}  // namespace fastweights::io::detail
