#include "fastweights/nn/model_folder.hpp"

#include <ATen/ATen.h>

#include <map>
#include <sstream>
#include <string>
#include <system_error>

#include "fastweights/core/error.hpp"
#include "fastweights/io/atomic_file.hpp"
#include "fastweights/io/mapped_file.hpp"
#include "fastweights/nn/initial_values.hpp"
#include "fastweights/nn/tensor_file.hpp"

namespace fastweights {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConfigFile = "config.json";
constexpr const char* kWeightsFile = "model.safetensors";
constexpr std::size_t kNamesInMessage = 8;

nn::LanguageModelConfig read_config(const fs::path& folder) {
  const auto path = folder / kConfigFile;
  const io::MappedFile file(path);
  try {
    return nn::LanguageModelConfig::from_json(file.text());
  } catch (const Error& error) {
    throw Error(path.string() + ": " + error.what());
  }
}

/// Without the keys that mean nothing to trained weights: where training starts, how it drops, and
/// a head that has none.
nn::LanguageModelConfig of_weights(nn::LanguageModelConfig config) {
  const nn::LanguageModelConfig defaults;
  config.dropout = defaults.dropout;
  config.memory_dropout = defaults.memory_dropout;
  config.half_life_min = defaults.half_life_min;
  config.half_life_max = defaults.half_life_max;
  config.initializer_range = defaults.initializer_range;
  if (config.fast_head_initial_matrix) return config;
  config.fast_head = defaults.fast_head;
  config.fast_head_eta = defaults.fast_head_eta;
  config.fast_head_half_life = defaults.fast_head_half_life;
  return config;
}

// Collects what does not fit, so that one message names it all (up to a limit).
class Mismatches {
 public:
  void add(const std::string& text) {
    if (++count_ > kNamesInMessage) return;
    text_ += (text_.empty() ? "" : "; ") + text;
  }
  void throw_if_any(const fs::path& path) const {
    if (count_ == 0) return;
    const auto more = count_ > kNamesInMessage
                          ? "; and " + std::to_string(count_ - kNamesInMessage) + " more"
                          : std::string();
    throw StateMismatch(path.string() + " does not fit its configuration: " + text_ + more);
  }

 private:
  std::size_t count_ = 0;
  std::string text_;
};

std::string shape_mismatch(const std::string& name, const at::Tensor& expected,
                           const at::Tensor& given) {
  std::ostringstream out;
  out << name << " must be " << expected.sizes() << ", got " << given.sizes();
  return out.str();
}

// The tensors of a file, of which there is one of the right shape for each parameter.
std::map<std::string, at::Tensor> read_weights(const fs::path& path,
                                               const nn::LanguageModelImpl& model) {
  std::map<std::string, at::Tensor> stored;
  for (auto& [name, tensor] : nn::load_tensors(path)) stored.emplace(name, std::move(tensor));
  Mismatches mismatches;
  const auto parameters = model.named_parameters();
  for (const auto& item : parameters) {
    const auto found = stored.find(item.key());
    if (found == stored.end()) {
      mismatches.add(item.key() + " is missing");
    } else if (found->second.sizes() != item.value().sizes()) {
      mismatches.add(shape_mismatch(item.key(), item.value(), found->second));
    } else if (!found->second.is_floating_point()) {
      mismatches.add(item.key() + " must be of a floating-point type");
    }
  }
  for (const auto& [name, tensor] : stored) {
    if (!parameters.contains(name)) mismatches.add(name + " is not known");
  }
  mismatches.throw_if_any(path);
  return stored;
}

void make_folder(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error) throw FileError(folder.string() + ": cannot create the folder: " + error.message());
}

}  // namespace

std::shared_ptr<const nn::LanguageModelImpl> load_model(const fs::path& folder,
                                                        at::ScalarType dtype,
                                                        const ConfigChange& change) {
  auto config = read_config(folder);
  if (change) change(config);
  const nn::WithoutInitialValues fast;
  auto model = std::make_shared<nn::LanguageModelImpl>(config);
  const auto stored = read_weights(folder / kWeightsFile, *model);
  for (auto& item : model->named_parameters()) {
    item.value().set_data(stored.at(item.key()).to(dtype));
    item.value().requires_grad_(false);
  }
  model->eval();
  return model;
}

void load_weights(const fs::path& folder, nn::LanguageModelImpl& model) {
  if (of_weights(read_config(folder)) != of_weights(model.config())) {
    throw StateMismatch((folder / kConfigFile).string() +
                        " is not the configuration of the model that it is read into");
  }
  const auto stored = read_weights(folder / kWeightsFile, model);
  const at::NoGradGuard no_grad;
  for (auto& item : model.named_parameters()) item.value().copy_(stored.at(item.key()));
}

void save_model(const fs::path& folder, const nn::LanguageModelImpl& model,
                std::optional<at::ScalarType> dtype) {
  make_folder(folder);
  nn::NamedTensors tensors;
  for (const auto& item : model.named_parameters()) {
    const auto& value = item.value();
    tensors.emplace_back(item.key(), value.detach().to(dtype.value_or(value.scalar_type())));
  }
  nn::save_tensors(folder / kWeightsFile, tensors, {{"format", "pt"}});
  io::write_file_atomically(folder / kConfigFile, model.config().to_json());
}

}  // namespace fastweights
