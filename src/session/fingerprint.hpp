#pragma once

#include <string>

namespace fastweights {

namespace nn {
class LanguageModelImpl;
}

namespace detail {

/// What tells one model from another: XXH3-128 over its configuration, which branches are switched
/// on, and the name, dtype, shape and bytes of each parameter and buffer, as 32 hexadecimal digits.
std::string model_fingerprint(const nn::LanguageModelImpl& model);

}  // namespace detail
}  // namespace fastweights
