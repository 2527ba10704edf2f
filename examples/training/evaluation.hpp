#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "corpus.hpp"
#include "fastweights/nn/language_model.hpp"

namespace training {

struct EvaluationOptions {
  int64_t bytes = 0;    ///< of each work, from its start; 0: all
  int64_t piece = 512;  ///< bytes per call; the result does not depend on it but for rounding
  bool bf16 = false;
  int threads = 1;  ///< workers; each takes whole works
};

/// Bits per byte of each work, read from its start with the state carried to its end (the first
/// byte has nothing before it and is not counted). `stop` is asked between pieces, by every worker;
/// where it says yes the result is empty. The model must be in evaluation mode.
std::vector<double> bits_per_byte(const fastweights::nn::LanguageModelImpl& model,
                                  const std::vector<Work>& works, const EvaluationOptions& options,
                                  const std::function<bool()>& stop);

}  // namespace training
