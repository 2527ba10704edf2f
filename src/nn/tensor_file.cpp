#include "fastweights/nn/tensor_file.hpp"

#include <ATen/ATen.h>

#include <cstring>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/io/safetensors.hpp"

namespace fastweights::nn {
namespace {

constexpr std::pair<at::ScalarType, io::ScalarType> kTypes[] = {
    {at::kDouble, io::ScalarType::F64}, {at::kFloat, io::ScalarType::F32},
    {at::kHalf, io::ScalarType::F16},   {at::kBFloat16, io::ScalarType::BF16},
    {at::kLong, io::ScalarType::I64},   {at::kInt, io::ScalarType::I32},
    {at::kShort, io::ScalarType::I16},  {at::kChar, io::ScalarType::I8},
    {at::kByte, io::ScalarType::U8},    {at::kBool, io::ScalarType::BOOL},
};

io::ScalarType file_type(const std::string& name, const at::Tensor& tensor) {
  for (const auto& [memory, file] : kTypes) {
    if (memory == tensor.scalar_type()) return file;
  }
  throw Error("save_tensors: \"" + name + "\" has type " + at::toString(tensor.scalar_type()) +
              ", which safetensors files of this library cannot hold");
}

at::ScalarType memory_type(io::ScalarType type) {
  for (const auto& [memory, file] : kTypes) {
    if (file == type) return memory;
  }
  throw Error("load_tensors: unknown element type");
}

at::Tensor to_tensor(const io::TensorInfo& info, std::span<const std::byte> bytes) {
  auto tensor = at::empty(info.shape, memory_type(info.type));
  if (!bytes.empty()) std::memcpy(tensor.mutable_data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

}  // namespace

void save_tensors(const std::filesystem::path& path, const NamedTensors& tensors,
                  const std::map<std::string, std::string>& metadata) {
  std::vector<at::Tensor> kept;  // owns what `data` points to
  std::vector<io::TensorData> data;
  for (const auto& [name, tensor] : tensors) {
    kept.push_back(tensor.detach().cpu().contiguous());
    const auto& stored = kept.back();
    data.push_back({name,
                    file_type(name, stored),
                    stored.sizes().vec(),
                    {static_cast<const std::byte*>(stored.const_data_ptr()), stored.nbytes()}});
  }
  io::write_safetensors(path, data, metadata);
}

NamedTensors load_tensors(const std::filesystem::path& path) {
  const io::SafetensorsFile file(path);
  NamedTensors tensors;
  for (const auto& info : file.view().tensors()) {
    tensors.emplace_back(info.name, to_tensor(info, file.view().bytes(info)));
  }
  return tensors;
}

}  // namespace fastweights::nn
