#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
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

/// Defines and implements the rule's three operators. `spec` outlives them.
void register_rule(torch::Library& library, const RuleSpec& spec);

/// The rule's entries in the dispatcher; callers keep them.
c10::OperatorHandle operator_of(const RuleSpec& spec);
c10::OperatorHandle recurrent_operator_of(const RuleSpec& spec);

/// A tensor that a rule is called with, borrowed from the caller; it may be absent or undefined.
struct RuleArgument {
  RuleArgument(const at::Tensor& given) : tensor(given.defined() ? &given : nullptr) {}
  RuleArgument(const std::optional<at::Tensor>& given)
      : tensor(given && given->defined() ? &*given : nullptr) {}

  const at::Tensor* tensor;
};

using RuleTensors = std::initializer_list<RuleArgument>;

/// What every rule takes beside its tensors; see RuleOptions.
struct RuleSettings {
  std::optional<double> scale;
  bool output_final_state;
  RuleArgument cu_seqlens;
  bool use_qk_l2norm;
};

/// Calls the rule's operator: o, then the final states (empty tensors unless asked for).
/// `initial_states` has one for each of the rule's states.
std::vector<at::Tensor> call_rule(const c10::OperatorHandle& op, RuleTensors inputs,
                                  RuleTensors initial_states, const RuleSettings& settings);

/// The same for a rule with one state, by its public options.
RuleResult call_rule(const c10::OperatorHandle& op, RuleTensors inputs, const RuleOptions& options);

/// Calls the rule's recurrent operator on the states in place; returns o.
at::Tensor call_rule_recurrent(const c10::OperatorHandle& op, RuleTensors inputs,
                               RuleTensors states, std::optional<double> scale, bool use_qk_l2norm);

}  // namespace fastweights::detail
