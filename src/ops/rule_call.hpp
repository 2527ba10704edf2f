#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

// What the delta rules' operators share: the arguments of a call, their checks, and the CPU, shape,
// autograd and autocast halves that a rule registers under its own name.

namespace fastweights::detail {

/// The arguments of one call of a rule; g is absent where the rule has none.
struct RuleCall {
  const char* rule = "";
  at::Tensor q;
  at::Tensor k;
  at::Tensor v;
  std::optional<at::Tensor> g;
  at::Tensor beta;
  std::optional<double> scale;
  std::optional<at::Tensor> initial_state;
  bool output_final_state = false;
  std::optional<at::Tensor> cu_seqlens;
  bool use_qk_l2norm = false;
};

using RuleOutputs = std::tuple<at::Tensor, at::Tensor>;  // o, final state (empty unless asked for)

/// Gradients of q, k, v, g, beta and the initial state; empty tensors where there is none.
struct RuleGradients {
  at::Tensor q, k, v, g, beta, initial_state;
};

/// The dispatcher entries of a rule, as the shared halves call them.
struct RuleEntries {
  RuleOutputs (*forward)(const RuleCall& call);
  RuleGradients (*backward)(const RuleCall& call, const std::optional<at::Tensor>& d_o,
                            const std::optional<at::Tensor>& d_final_state);
};

/// Throws ShapeError unless shapes, types and devices fit; works on symbolic shapes.
void check_call(const RuleCall& call);

RuleOutputs rule_cpu(const RuleCall& call);
RuleOutputs rule_meta(const RuleCall& call);
RuleOutputs rule_autograd(const RuleCall& call, const RuleEntries& entries);
RuleOutputs rule_autocast(RuleCall call, const RuleEntries& entries);
at::Tensor rule_recurrent_cpu(const RuleCall& call, at::Tensor& state);

RuleGradients rule_backward_cpu(const RuleCall& call, const std::optional<at::Tensor>& d_o,
                                const std::optional<at::Tensor>& d_final_state);
RuleGradients rule_backward_meta(const RuleCall& call);

}  // namespace fastweights::detail
