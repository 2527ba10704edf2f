/// \file
/// Reading and writing safetensors files (github.com/huggingface/safetensors): an 8-byte
/// little-endian length, a JSON header of that length, and the tensors' bytes without gaps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "fastweights/io/atomic_file.hpp"
#include "fastweights/io/mapped_file.hpp"

namespace fastweights::io {

/// The element types that a file may hold, by their names in it.
enum class ScalarType { F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL };

/// Bytes of one element.
std::size_t element_size(ScalarType type);
/// The name in the file: "F32".
std::string_view scalar_type_name(ScalarType type);

/// Bytes of a tensor. Throws ShapeError if a dimension is negative, if there are more than 64, or
/// if the size with every 0 taken as 1 does not fit into int64 (then its strides would not either).
std::size_t byte_count(ScalarType type, std::span<const std::int64_t> shape);

/// The header's `__metadata__`.
using Metadata = std::map<std::string, std::string>;

/// A tensor of a file. `begin` and `end` count bytes from the end of the header, as in the file.
struct TensorInfo {
  std::string name;
  ScalarType type = ScalarType::F32;
  std::vector<std::int64_t> shape;
  std::size_t begin = 0;
  std::size_t end = 0;

  bool operator==(const TensorInfo&) const = default;
};

/// The content of a safetensors file, read where it lies: nothing but the header is copied, and the
/// span that was parsed must outlive the view.
class SafetensorsView {
 public:
  /// Checks all of the header, so that every tensor of the view lies within `file` and has the size
  /// that its shape says. Throws FileError, naming `source` and what is wrong, for: a length beyond
  /// the file or 100 MB; a header that is no JSON object of tensors; fields that are missing,
  /// unknown, of a wrong type or there twice; unknown dtypes; sizes that overflow or do not match
  /// the offsets; tensors beyond the file, overlapping, with gaps between or bytes behind them.
  /// The tensors' values are not looked at.
  static SafetensorsView parse(std::span<const std::byte> file,
                               std::string_view source = "safetensors data");

  /// In the order in which they lie in the file.
  [[nodiscard]] std::span<const TensorInfo> tensors() const noexcept { return tensors_; }
  [[nodiscard]] const Metadata& metadata() const noexcept { return metadata_; }
  /// Null if there is none of that name.
  [[nodiscard]] const TensorInfo* find(std::string_view name) const noexcept;
  /// The bytes of a tensor of this view, little-endian, row-major. The format does not promise that
  /// they are aligned for their type (files written here are, relative to the file's start).
  [[nodiscard]] std::span<const std::byte> bytes(const TensorInfo& tensor) const;

 private:
  std::vector<TensorInfo> tensors_;
  std::vector<std::size_t> by_name_;  // indices into tensors_, sorted by name
  Metadata metadata_;
  std::span<const std::byte> data_;
};

/// A mapped file and the view of it.
class SafetensorsFile {
 public:
  /// Throws FileError if the file cannot be mapped or is malformed.
  explicit SafetensorsFile(const std::filesystem::path& path);

  [[nodiscard]] const SafetensorsView& view() const noexcept { return view_; }

 private:
  MappedFile file_;
  SafetensorsView view_;
};

/// A tensor to write: `bytes` are little-endian, row-major, and belong to the caller.
struct TensorData {
  std::string name;
  ScalarType type = ScalarType::F32;
  std::vector<std::int64_t> shape;
  std::span<const std::byte> bytes;
};

/// Writes a file through an AtomicFile. The bytes of the file depend on the set of tensors and the
/// metadata alone, not on their order: larger elements first, then by name, so that every tensor is
/// aligned for its type. Throws ShapeError if a tensor's bytes do not match its shape, Error for a
/// name that is there twice, reserved (`__metadata__`) or no UTF-8, or for a header above 100 MB;
/// FileError if it cannot be written, and then an older file of that name is whole.
void write_safetensors(const std::filesystem::path& path, std::span<const TensorData> tensors,
                       const Metadata& metadata = {}, mode_t mode = kPublicMode);

/// Hands the content of that file to `write`, piece by piece: the header, then the tensors' own
/// bytes, which are not copied.
void write_safetensors(std::span<const TensorData> tensors, const Metadata& metadata,
                       const std::function<void(std::span<const std::byte>)>& write);

/// The content of that file, in memory.
std::vector<std::byte> serialize_safetensors(std::span<const TensorData> tensors,
                                             const Metadata& metadata = {});

}  // namespace fastweights::io
