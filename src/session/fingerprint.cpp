#include "fingerprint.hpp"

#include <torch/torch.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "fastweights/nn/language_model.hpp"

namespace fastweights::detail {
namespace {

/// XXH3-128 of what is fed to it, each part with its length, so that no two sequences look alike.
class Hasher {
 public:
  Hasher() { XXH3_128bits_reset(&state_); }

  void add(std::string_view bytes) {
    const auto length = static_cast<std::uint64_t>(bytes.size());
    XXH3_128bits_update(&state_, &length, sizeof(length));
    XXH3_128bits_update(&state_, bytes.data(), bytes.size());
  }

  void add(const std::string& name, const at::Tensor& tensor) {
    const at::Tensor plain = tensor.detach().cpu().contiguous();
    add(name);
    add(c10::toString(plain.scalar_type()));
    add({reinterpret_cast<const char*>(plain.sizes().data()),
         plain.sizes().size() * sizeof(int64_t)});
    add({static_cast<const char*>(plain.const_data_ptr()), plain.nbytes()});
  }

  std::string hexadecimal() const {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state_));
    constexpr std::string_view kDigits = "0123456789abcdef";
    std::string out;
    for (const unsigned char byte : canonical.digest) {
      out += kDigits[byte >> 4];
      out += kDigits[byte & 15];
    }
    return out;
  }

 private:
  XXH3_state_t state_;
};

/// The keys of a configuration that are not what they are by default: a key that a later version
/// adds changes no fingerprint. Dropout means nothing to a session.
std::string changed_keys(const nn::LanguageModelConfig& config) {
  auto changed = nlohmann::json::parse(config.to_json());
  const auto defaults = nlohmann::json::parse(nn::LanguageModelConfig{}.to_json());
  for (const auto& [key, value] : defaults.items()) {
    if (changed.at(key) == value) changed.erase(key);
  }
  changed.erase("dropout");
  return changed.dump();
}

}  // namespace

std::string model_fingerprint(const nn::LanguageModelImpl& model) {
  Hasher hasher;
  hasher.add(changed_keys(model.config()));
  for (const nn::Block& block : model.blocks) {
    hasher.add(block->attention_enabled ? "attention" : "");
    hasher.add(block->memory_enabled ? "memory" : "");
  }
  for (const auto& entry : model.named_parameters()) hasher.add(entry.key(), entry.value());
  for (const auto& entry : model.named_buffers()) hasher.add(entry.key(), entry.value());
  return hasher.hexadecimal();
}

}  // namespace fastweights::detail
