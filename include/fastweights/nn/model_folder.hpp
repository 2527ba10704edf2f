#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>

#include <c10/core/ScalarType.h>

#include "fastweights/nn/language_model.hpp"

namespace fastweights {

/// Changes a configuration.
using ConfigChange = std::function<void(nn::LanguageModelConfig&)>;

/// Reads a model folder: `config.json` and `model.safetensors`. The model is in evaluation mode,
/// its parameters need no gradients.
/// @param dtype  type of the weights in memory; files in bf16 or fp16 are widened
/// @param change called with the folder's configuration before the model is made: for keys that no
///               weights depend on, so that a trained model gets a `fast_head`
/// @throws FileError for a missing or malformed file, Error for a configuration that is not valid,
///         StateMismatch naming the tensors that are missing, of another shape, or not known
std::shared_ptr<const nn::LanguageModelImpl> load_model(const std::filesystem::path& folder,
                                                        at::ScalarType dtype = at::kFloat,
                                                        const ConfigChange& change = {});

/// Reads the weights of a model folder into `model`, which may be one that is being trained.
/// @throws StateMismatch also if the folder's configuration is not the model's, but for keys that
///         mean nothing to trained weights: where training starts, how it drops, and a fast head
///         without an initial matrix
void load_weights(const std::filesystem::path& folder, nn::LanguageModelImpl& model);

/// Writes a model folder; creates it if needed. Each file is replaced atomically.
/// @param dtype type of the weights in the file; the model's own unless given
/// @throws FileError naming the path and the cause
void save_model(const std::filesystem::path& folder, const nn::LanguageModelImpl& model,
                std::optional<at::ScalarType> dtype = std::nullopt);

}  // namespace fastweights
