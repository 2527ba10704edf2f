#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "fastweights/core/rule.hpp"
#include "fastweights/ops/options.hpp"

// A rule as an operator, from a table that describes it: schemas, checks, the CPU, shape, autograd
// and autocast halves of `rule`, `rule_backward` and `rule_recurrent_`.

namespace fastweights::detail {

enum class Layout {
  kKeys,         // [B, T, H, K]
  kValues,       // [B, T, HV, V]
  kGates,        // [B, T, HV]
  kChannelGates  // [B, T, HV, K]
};

/// One tensor that a rule takes. Its name is that of the member of core::RuleParams which it fills,
/// and with `d_` before it that of core::RuleGradients.
struct RuleInput {
  const char* name;
  Layout layout;
  bool optional = false;
};

/// A rule; q, k and v come first.
struct RuleSpec {
  const char* name;
  std::vector<RuleInput> inputs;
  bool momentum;  // whether the state is a pair
  const core::RuleForms<float>& (*forms)();
  const core::RuleForms<double>& (*forms_double)();
};

/// Defines and implements the rule's three operators.
void register_rule(torch::Library& library, const RuleSpec& spec);

/// A tensor for each of the rule's states: one, or two of a rule with a momentum.
using States = std::vector<std::optional<at::Tensor>>;

/// What every rule takes beside its tensors; see RuleOptions.
struct RuleArguments {
  std::optional<double> scale;
  States initial_states;
  bool output_final_state = false;
  std::optional<at::Tensor> cu_seqlens;
  bool use_qk_l2norm = false;
};

/// The rule's entries in the dispatcher; callers keep them.
c10::OperatorHandle operator_of(const RuleSpec& spec);
c10::OperatorHandle recurrent_operator_of(const RuleSpec& spec);

/// Calls the rule's operator: o, then the final states (empty tensors unless asked for).
std::vector<at::Tensor> call_rule(const c10::OperatorHandle& op, const RuleSpec& spec,
                                  const std::vector<std::optional<at::Tensor>>& inputs,
                                  const RuleArguments& arguments);

/// The same for a rule with one state, by its public options.
RuleResult call_rule(const c10::OperatorHandle& op, const RuleSpec& spec,
                     const std::vector<std::optional<at::Tensor>>& inputs,
                     const RuleOptions& options);

/// Calls the rule's recurrent operator on the states in place; returns o.
at::Tensor call_rule_recurrent(const c10::OperatorHandle& op,
                               const std::vector<std::optional<at::Tensor>>& inputs,
                               const std::vector<at::Tensor>& states, std::optional<double> scale,
                               bool use_qk_l2norm);

}  // namespace fastweights::detail
