/// \file
/// Keys whose associations a session's writes leave alone (docs/write_policies.md).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

namespace fastweights {

namespace nn {
class LanguageModelImpl;
}

/// Protected directions of the keys of each memory in the blocks. A session that has them splits
/// each head's matrix: the part Π S₀ of the matrix that it began with neither decays nor is written
/// into, and every write goes by the rest of its key, k̂ − Π k̂. So what a protected key reads stays
/// what it was, and other keys learn as before.
struct Protection {
  /// Of each layer the projectors Π onto the protected directions: fp32 [HV, K, K].
  std::vector<at::Tensor> projectors;
  /// A write is refused, and counted, where less than this of its key's squared length is free.
  double least_free = 0.05;

  /// Directions that are free: int64 [layers, HV].
  at::Tensor free_ranks() const;
  bool operator==(const Protection& other) const;
};

/// What protect_keys() protects.
struct ProtectKeysOptions {
  double share = 0.9;     ///< of the squared length of the text's keys, in (0, 1]
  std::int64_t most = 0;  ///< directions of a head at most, below K; 0: half of K
  double least_free = 0.05;
};

/// The protection of the keys that a model makes of a text: of each head the fewest directions that
/// hold the `share`. Throws Error if the text is empty, the model has no memories, or an option is
/// out of range.
Protection protect_keys(const std::shared_ptr<const nn::LanguageModelImpl>& model,
                        std::string_view text, const ProtectKeysOptions& options = {});

/// Throws Error unless the protection is one for this model: symmetric projectors of the right
/// sizes, with a free direction in each head.
void check_protection(const Protection& protection, const nn::LanguageModelImpl& model);

}  // namespace fastweights
