/// \file
/// Any bytes are either refused with a FileError or are a file whose tensors cover its data, and
/// which is the same after it was written and read again.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/io/safetensors.hpp"
#include "fuzz_target.hpp"

namespace fastweights::fuzz {
namespace {

using Bytes = std::span<const std::byte>;

std::optional<io::SafetensorsView> parse(Bytes file) {
  try {
    return io::SafetensorsView::parse(file);
  } catch (const FileError&) {
    return {};
  }
}

void check_coverage(const io::SafetensorsView& view, Bytes file) {
  const std::byte* position = file.data() + file.size();
  for (std::size_t i = view.tensors().size(); i-- > 0;) {
    const Bytes bytes = view.bytes(view.tensors()[i]);
    require(bytes.data() + bytes.size() == position, "tensors lie one behind the other");
    require(view.find(view.tensors()[i].name) == &view.tensors()[i], "a tensor has its name");
    position = bytes.data();
  }
  require(position >= file.data() + sizeof(std::uint64_t), "tensors lie behind the header");
}

void check_round_trip(const io::SafetensorsView& view) {
  std::vector<io::TensorData> tensors;
  for (const io::TensorInfo& tensor : view.tensors()) {
    tensors.push_back({tensor.name, tensor.type, tensor.shape, view.bytes(tensor)});
  }
  const std::vector<std::byte> file = io::serialize_safetensors(tensors, view.metadata());
  const auto again = io::SafetensorsView::parse(file);
  require(again.metadata() == view.metadata(), "metadata survive writing");
  require(again.tensors().size() == tensors.size(), "tensors survive writing");
  for (const io::TensorData& tensor : tensors) {
    const io::TensorInfo* const found = again.find(tensor.name);
    require(found != nullptr, "names survive writing");
    require(found->type == tensor.type && found->shape == tensor.shape, "shapes survive writing");
    const Bytes bytes = again.bytes(*found);
    require(std::vector(bytes.begin(), bytes.end()) ==
                std::vector(tensor.bytes.begin(), tensor.bytes.end()),
            "bytes survive writing");
  }
}

void check(Bytes file) {
  if (const auto view = parse(file)) {
    check_coverage(*view, file);
    check_round_trip(*view);
  }
}

}  // namespace
}  // namespace fastweights::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto input = std::as_bytes(std::span(data, size));
  fastweights::fuzz::check(input);
  fastweights::fuzz::check(fastweights::fuzz::with_header_length(input));
  return 0;
}
