#include "fastweights/io/safetensors.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include <nlohmann/json.hpp>

#include "fastweights/core/error.hpp"
#include "fastweights/io/quote.hpp"
#include "safetensors_format.hpp"
#include "safetensors_header.hpp"

namespace fastweights::io {
namespace {

using detail::kLengthBytes;
using detail::kLongestHeader;
using detail::refuse;

static_assert(std::endian::native == std::endian::little,
              "tensors are little-endian in the file and are read where they lie");

const detail::ScalarTypeRow& row_of(ScalarType type) {
  return detail::kScalarTypes.at(static_cast<std::size_t>(type));
}

/// "[2, 3]", as in JSON.
std::string list(std::span<const std::int64_t> numbers) {
  std::string text;
  for (const std::int64_t number : numbers) {
    text += (text.empty() ? "" : ", ") + std::to_string(number);
  }
  return "[" + text + "]";
}

std::string list(std::size_t begin, std::size_t end) {
  return "[" + std::to_string(begin) + ", " + std::to_string(end) + "]";
}

/// "tensor 'weight', F32 [2, 3],"
template <typename Tensor>
std::string describe(const Tensor& tensor) {
  return "tensor " + quote(tensor.name) + ", " + std::string(scalar_type_name(tensor.type)) + " " +
         list(tensor.shape) + ",";
}

/// See byte_count; none where that throws.
std::optional<std::size_t> checked_byte_count(ScalarType type,
                                              std::span<const std::int64_t> shape) {
  if (shape.size() > detail::kHighestRank) return {};
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  auto bytes = static_cast<std::int64_t>(element_size(type));
  bool is_empty = false;
  for (const std::int64_t dimension : shape) {
    if (dimension < 0 || (dimension > 0 && bytes > kMost / dimension)) return {};
    bytes *= std::max<std::int64_t>(dimension, 1);
    is_empty |= dimension == 0;
  }
  return is_empty ? 0 : static_cast<std::size_t>(bytes);
}

struct FileParts {
  std::string_view header;
  std::span<const std::byte> data;
};

FileParts split(std::span<const std::byte> file, std::string_view source) {
  if (file.size() < kLengthBytes) {
    refuse(source, "the file must begin with the header's length in 8 bytes, but it has " +
                       std::to_string(file.size()) + " bytes");
  }
  std::uint64_t length = 0;
  std::memcpy(&length, file.data(), kLengthBytes);
  const std::span<const std::byte> rest = file.subspan(kLengthBytes);
  if (length > kLongestHeader) {
    refuse(source, "the header's length is " + std::to_string(length) + ", above the limit of " +
                       std::to_string(kLongestHeader));
  }
  if (length > rest.size()) {
    refuse(source, "the file is cut off: the header's length is " + std::to_string(length) +
                       ", but only " + std::to_string(rest.size()) + " bytes follow");
  }
  return {{reinterpret_cast<const char*>(rest.data()), static_cast<std::size_t>(length)},
          rest.subspan(static_cast<std::size_t>(length))};
}

void check_extent(const TensorInfo& tensor, std::size_t data_size, std::string_view source) {
  const auto& [name, type, shape, begin, end] = tensor;
  if (begin > end) {
    refuse(source, describe(tensor) + " has data_offsets that run backwards: " + list(begin, end));
  }
  const std::optional<std::size_t> size = checked_byte_count(type, shape);
  if (!size) refuse(source, describe(tensor) + " is larger than any memory");
  if (*size != end - begin) {
    refuse(source, describe(tensor) + " needs " + std::to_string(*size) +
                       " bytes, but its data_offsets are " + list(begin, end));
  }
  if (end > data_size) {
    refuse(source, "the file is cut off: " + describe(tensor) + " ends at byte " +
                       std::to_string(end) + " of the data, but only " + std::to_string(data_size) +
                       " bytes follow the header");
  }
}

/// The tensors, sorted by their place, must cover the data without gaps or overlaps.
void check_coverage(std::span<const TensorInfo> tensors, std::size_t data_size,
                    std::string_view source) {
  std::size_t covered = 0;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.begin != covered) {
      refuse(source, describe(tensor) + " begins at byte " + std::to_string(tensor.begin) +
                         " of the data, " +
                         (tensor.begin < covered ? "inside" : "with a gap behind") +
                         " the tensor before, which ends at byte " + std::to_string(covered));
    }
    covered = tensor.end;
  }
  if (covered != data_size) {
    refuse(source, "the tensors end at byte " + std::to_string(covered) + " of the data, but " +
                       std::to_string(data_size - covered) + " more bytes follow");
  }
}

std::vector<std::size_t> sorted_by_name(std::span<const TensorInfo> tensors,
                                        std::string_view source) {
  std::vector<std::size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto name = [&](std::size_t i) -> const std::string& { return tensors[i].name; };
  std::ranges::sort(order, {}, name);
  const auto twice = std::ranges::adjacent_find(order, {}, name);
  if (twice != order.end()) refuse(source, "tensor " + quote(name(*twice)) + " is there twice");
  return order;
}

[[noreturn]] void refuse_to_write(const std::string& what) { throw Error("safetensors: " + what); }

void check_tensor(const TensorData& tensor) {
  if (tensor.name == detail::kMetadataKey) {
    refuse_to_write("no tensor may have the name '__metadata__'");
  }
  const std::optional<std::size_t> size = checked_byte_count(tensor.type, tensor.shape);
  if (size == tensor.bytes.size()) return;
  throw ShapeError("safetensors: " + describe(tensor) + " must have " +
                   (size ? std::to_string(*size) + " bytes" : "a shape that fits into memory") +
                   ", got " + std::to_string(tensor.bytes.size()) + " bytes");
}

void check_names(std::span<const TensorData> tensors) {
  std::set<std::string_view> names;
  for (const TensorData& tensor : tensors) {
    if (!names.insert(tensor.name).second) {
      refuse_to_write("tensor " + quote(tensor.name) + " is there twice");
    }
  }
}

std::string json_string(const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    refuse_to_write("names and metadata must be UTF-8, got " + quote(text));
  }
}

std::string json_metadata(const Metadata& metadata) {
  std::string text;
  for (const auto& [key, value] : metadata) {
    text += (text.empty() ? "" : ",") + json_string(key) + ":" + json_string(value);
  }
  return json_string(std::string(detail::kMetadataKey)) + ":{" + text + "}";
}

std::string json_tensor(const TensorData& tensor, std::size_t begin) {
  return json_string(tensor.name) + R"(:{"dtype":")" + std::string(scalar_type_name(tensor.type)) +
         R"(","shape":)" + list(tensor.shape) + R"(,"data_offsets":)" +
         list(begin, begin + tensor.bytes.size()) + "}";
}

/// What precedes the tensors, which lie in this order: the header's length and the header, padded.
std::string file_head(std::span<const TensorData* const> tensors, const Metadata& metadata) {
  std::string header = metadata.empty() ? "" : json_metadata(metadata);
  std::size_t offset = 0;
  for (const TensorData* tensor : tensors) {
    header += (header.empty() ? "" : ",") + json_tensor(*tensor, offset);
    offset += tensor->bytes.size();
  }
  header = "{" + header + "}";
  header.resize((header.size() + detail::kHeaderAlignment - 1) / detail::kHeaderAlignment *
                    detail::kHeaderAlignment,
                ' ');
  if (header.size() > kLongestHeader) {
    refuse_to_write("the header would be " + std::to_string(header.size()) +
                    " bytes long, above the limit of " + std::to_string(kLongestHeader));
  }
  const std::uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), kLengthBytes) + header;
}

}  // namespace

void write_safetensors(std::span<const TensorData> tensors, const Metadata& metadata,
                       const std::function<void(std::span<const std::byte>)>& write) {
  std::ranges::for_each(tensors, check_tensor);
  check_names(tensors);
  std::vector<const TensorData*> order;
  for (const TensorData& tensor : tensors) order.push_back(&tensor);
  std::ranges::sort(order, std::less<>(), [](const TensorData* tensor) {
    return std::tuple(-static_cast<std::int64_t>(element_size(tensor->type)),
                      std::string_view(tensor->name));
  });
  const std::string head = file_head(order, metadata);
  write(std::as_bytes(std::span(head)));
  for (const TensorData* tensor : order) write(tensor->bytes);
}

std::size_t element_size(ScalarType type) { return row_of(type).size; }

std::string_view scalar_type_name(ScalarType type) { return row_of(type).name; }

std::size_t byte_count(ScalarType type, std::span<const std::int64_t> shape) {
  if (const std::optional<std::size_t> size = checked_byte_count(type, shape)) return *size;
  throw ShapeError(
      "byte_count: a shape must have at most 64 dimensions, none of them negative, and "
      "fit into memory, got " +
      list(shape));
}

SafetensorsView SafetensorsView::parse(std::span<const std::byte> file, std::string_view source) {
  const FileParts parts = split(file, source);
  detail::SafetensorsHeader header = detail::parse_safetensors_header(parts.header, source);
  SafetensorsView view;
  view.data_ = parts.data;
  view.metadata_ = std::move(header.metadata);
  view.tensors_ = std::move(header.tensors);
  std::ranges::sort(view.tensors_, {}, [](const TensorInfo& tensor) {
    return std::tuple(tensor.begin, tensor.end, std::string_view(tensor.name));
  });
  view.by_name_ = sorted_by_name(view.tensors_, source);
  for (const TensorInfo& tensor : view.tensors_) check_extent(tensor, parts.data.size(), source);
  check_coverage(view.tensors_, parts.data.size(), source);
  return view;
}

const TensorInfo* SafetensorsView::find(std::string_view name) const noexcept {
  const auto name_of = [this](std::size_t i) { return std::string_view(tensors_[i].name); };
  const auto found = std::ranges::lower_bound(by_name_, name, {}, name_of);
  return found != by_name_.end() && name_of(*found) == name ? &tensors_[*found] : nullptr;
}

std::span<const std::byte> SafetensorsView::bytes(const TensorInfo& tensor) const {
  if (tensor.begin > tensor.end || tensor.end > data_.size()) {
    throw Error("SafetensorsView: " + describe(tensor) + " is no tensor of this file");
  }
  return data_.subspan(tensor.begin, tensor.end - tensor.begin);
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path)
    : file_(path), view_(SafetensorsView::parse(file_.bytes(), quote(path.native()))) {}

void write_safetensors(const std::filesystem::path& path, std::span<const TensorData> tensors,
                       const Metadata& metadata, mode_t mode) {
  AtomicFile file(path, mode);
  write_safetensors(tensors, metadata,
                    [&](std::span<const std::byte> bytes) { file.write(bytes); });
  file.commit();
}

std::vector<std::byte> serialize_safetensors(std::span<const TensorData> tensors,
                                             const Metadata& metadata) {
  std::vector<std::byte> result;
  write_safetensors(tensors, metadata, [&](std::span<const std::byte> bytes) {
    result.insert(result.end(), bytes.begin(), bytes.end());
  });
  return result;
}

}  // namespace fastweights::io
