/// \file
/// Everything. Where LibTorch is not on the include path: everything that needs none.
#pragma once

#include "fastweights/core/cpu.hpp"
#include "fastweights/core/delta_rule.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/core/gated_delta_rule.hpp"
#include "fastweights/core/reference.hpp"
#include "fastweights/io/atomic_file.hpp"
#include "fastweights/io/mapped_file.hpp"
#include "fastweights/io/safetensors.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/session/generator.hpp"
#include "fastweights/session/log.hpp"
#include "fastweights/session/sampling.hpp"
#include "fastweights/session/state_file.hpp"
#include "fastweights/version.hpp"

#if __has_include(<torch/nn/module.h>)
#include "fastweights/nn/config.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/nn/layers.hpp"
#include "fastweights/nn/model_folder.hpp"
#include "fastweights/nn/state.hpp"
#include "fastweights/nn/tensor_file.hpp"
#include "fastweights/ops/delta_rule.hpp"
#include "fastweights/ops/fast_weight_memory.hpp"
#include "fastweights/ops/gated_delta_rule.hpp"
#include "fastweights/ops/normalization.hpp"
#include "fastweights/ops/options.hpp"
#include "fastweights/ops/short_convolution.hpp"
#include "fastweights/ops/sliding_window_attention.hpp"
#include "fastweights/session/session.hpp"
#endif
