#include "fastweights/session/protection.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "fastweights/core/error.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/ops/delta_rule.hpp"
#include "fastweights/ops/gated_delta_rule.hpp"
#include "protected_rule.hpp"

namespace fastweights {
namespace {

/// Tokens that are read at once.
constexpr std::size_t kPiece = 1024;

void check_options(const ProtectKeysOptions& options, std::int64_t key_size) {
  const auto check = [](bool fits, const std::string& what) {
    if (!fits) throw Error("protect_keys: " + what);
  };
  check(options.share > 0.0 && options.share <= 1.0,
        "share must be in (0, 1], got " + std::to_string(options.share));
  check(
      options.most >= 0 && options.most < key_size,
      "most must be in [0, " + std::to_string(key_size) + "), got " + std::to_string(options.most));
  check(options.least_free >= 0.0 && options.least_free < 1.0,
        "least_free must be in [0, 1), got " + std::to_string(options.least_free));
}

/// Σ k̂ k̂ᵀ of the keys that each layer makes of a text: fp64 [HV, K, K].
std::vector<at::Tensor> key_moments(const nn::LanguageModelImpl& model, std::string_view text) {
  std::vector<at::Tensor> moments(model.blocks.size());
  auto state = model.initial_state(1);
  for (std::size_t begin = 0; begin < text.size(); begin += kPiece) {
    const auto ids = io::ByteTokenizer().encode(text.substr(begin, kPiece));
    const at::Tensor tokens = at::tensor(at::IntArrayRef(ids), at::kLong).unsqueeze(0);
    nn::ForwardOptions options;
    options.logits = false;
    options.memory_rule = [&](std::int64_t layer, const MemoryRuleCall& call) {
      const MemoryRuleCall unit = detail::with_unit_keys(call);
      const at::Tensor rows = unit.k.to(at::kDouble)[0].transpose(0, 1);  // [HV, T, K]
      at::Tensor& moment = moments[static_cast<std::size_t>(layer)];
      const at::Tensor added = at::matmul(rows.transpose(1, 2), rows);
      moment = moment.defined() ? moment + added : added;
      return detail::delta_rule_of_any_keys(unit);
    };
    state = model.forward(tokens.to(model.norm->weight.device()), state, options).state;
  }
  return moments;
}

/// The projector onto the fewest directions that hold the share of a moment, `most` at most.
at::Tensor projector_of(const at::Tensor& moment, double share, std::int64_t most) {
  const auto [values, vectors] = at::linalg_eigh(moment);  // ascending
  const at::Tensor held = values.flip(0).cumsum(0) / values.sum();
  const auto needed = (held < share).sum().item<std::int64_t>() + 1;
  const auto rank = std::min(needed, most);
  const at::Tensor basis = vectors.slice(1, vectors.size(1) - rank);
  return at::matmul(basis, basis.t()).to(at::kFloat);
}

}  // namespace

at::Tensor Protection::free_ranks() const {
  std::vector<at::Tensor> layers;
  for (const at::Tensor& projector : projectors) {
    const at::Tensor rank = projector.diagonal(0, -2, -1).sum(-1).round().to(at::kLong);
    layers.push_back(projector.size(-1) - rank);
  }
  return layers.empty() ? at::zeros({0, 0}, at::kLong) : at::stack(layers);
}

bool Protection::operator==(const Protection& other) const {
  return least_free == other.least_free &&
         std::ranges::equal(projectors, other.projectors,
                            [](const at::Tensor& a, const at::Tensor& b) { return a.equal(b); });
}

Protection protect_keys(const std::shared_ptr<const nn::LanguageModelImpl>& model,
                        std::string_view text, const ProtectKeysOptions& options) {
  if (!model || !model->config().memory) {
    throw Error("protect_keys: the model has no memories in its blocks");
  }
  const std::int64_t key_size = model->config().memory_key_size;
  check_options(options, key_size);
  if (text.empty()) throw Error("protect_keys: an empty text has no keys");
  const c10::InferenceMode guard;
  const std::int64_t most =
      options.most > 0 ? options.most : std::max<std::int64_t>(key_size / 2, 1);
  Protection protection{.projectors = {}, .least_free = options.least_free};
  for (const at::Tensor& moments : key_moments(*model, text)) {
    std::vector<at::Tensor> heads;
    for (const at::Tensor& moment : moments.unbind(0)) {
      heads.push_back(projector_of(moment, options.share, most));
    }
    protection.projectors.push_back(at::stack(heads));
  }
  return protection;
}

void check_protection(const Protection& protection, const nn::LanguageModelImpl& model) {
  const auto& config = model.config();
  const auto check = [](bool fits, const std::string& what) {
    if (!fits) throw Error("session: protection: " + what);
  };
  check(config.memory, "the model has no memories in its blocks");
  check(std::ssize(protection.projectors) == config.layers,
        "there must be projectors of " + std::to_string(config.layers) + " layers, got " +
            std::to_string(protection.projectors.size()));
  check(protection.least_free >= 0.0 && protection.least_free < 1.0,
        "least_free must be in [0, 1), got " + std::to_string(protection.least_free));
  for (const at::Tensor& each : protection.projectors) {
    const std::vector<std::int64_t> sizes = {config.memory_value_heads, config.memory_key_size,
                                             config.memory_key_size};
    check(each.defined() && each.scalar_type() == at::kFloat && each.sizes() == sizes,
          "a layer's projectors must be fp32 [HV, K, K]");
    const at::Tensor error = at::matmul(each, each) - each;
    check(error.abs().max().item<float>() < 1e-4F && each.allclose(each.transpose(1, 2), 0, 1e-4),
          "a projector must be symmetric and equal to its square");
  }
  check((protection.free_ranks() > 0).all().item<bool>(), "a head has no free direction");
}

namespace detail {

MemoryRuleCall with_unit_keys(const MemoryRuleCall& call) {
  const auto type = call.state.scalar_type();
  const auto unit_rows = [&](const at::Tensor& x) {
    const at::Tensor wide = x.to(type);
    const at::Tensor unit = wide * (wide.square().sum(-1, true) + 1e-6).rsqrt();
    return unit.repeat_interleave(call.v.size(2) / x.size(2), 2);
  };
  return {unit_rows(call.q), unit_rows(call.k), call.v.to(type), call.g, call.beta, call.state};
}

std::tuple<at::Tensor, at::Tensor> delta_rule_of_any_keys(const MemoryRuleCall& call) {
  RuleOptions options;
  options.initial_state = call.state;
  options.output_final_state = true;
  auto [o, state] = call.g.defined()
                        ? gated_delta_rule(call.q, call.k, call.v, call.g, call.beta, options)
                        : delta_rule(call.q, call.k, call.v, call.beta, options);
  return {o, *state};
}

std::tuple<at::Tensor, at::Tensor> protected_rule(const MemoryRuleCall& call,
                                                  const ProtectedPart& part, const MemoryRule& rule,
                                                  std::int64_t& refused) {
  // A head's matrix times its rows [B, T, HV, …].
  const auto times = [](const at::Tensor& rows, const at::Tensor& matrix) {
    return at::matmul(rows.transpose(1, 2), matrix).transpose(1, 2);
  };
  const auto without = [&](const at::Tensor& state) {
    return state - at::matmul(part.projector, state);
  };
  const at::Tensor k = call.k - times(call.k, part.projector);
  const at::Tensor little = (k.square().sum(-1) < part.least_free).logical_and(call.beta > 0);
  refused += little.sum().item<std::int64_t>();
  const at::Tensor v = call.v - times(call.k, part.kept);
  const at::Tensor beta = call.beta.masked_fill(little, 0);
  const auto [o, state] = rule({call.q, k, v, call.g, beta, without(call.state)});
  const double scale = 1.0 / std::sqrt(static_cast<double>(call.q.size(3)));
  // The rule leaves nothing in the protected part but what rounding would gather there.
  return {o + times(call.q, part.kept) * scale, without(state) + part.kept};
}

}  // namespace detail
}  // namespace fastweights
