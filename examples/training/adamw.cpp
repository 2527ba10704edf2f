#include "adamw.hpp"

#include <ATen/ATen.h>
#include <torch/nn/utils/clip_grad.h>

#include <cmath>
#include <limits>

#include "fastweights/core/error.hpp"

namespace training {
namespace {

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

bool AdamW::decays(const std::string& name, const at::Tensor& parameter) {
  return parameter.dim() == 2 && ends_with(name, ".weight") && name != "embedding.weight";
}

AdamW::AdamW(NamedTensors parameters, const AdamWOptions& options)
    : options_(options),
      groups_{{options.weight_decay, {}, {}, {}, {}, {}}, {0.0, {}, {}, {}, {}, {}}} {
  for (auto& [name, parameter] : parameters) {
    Group& group = groups_[decays(name, parameter) ? 0 : 1];
    group.names.push_back(name);
    group.first.push_back(at::zeros_like(parameter));
    group.second.push_back(at::zeros_like(parameter));
    group.steps.push_back(at::zeros({}, at::kFloat));
    group.parameters.push_back(std::move(parameter));
  }
}

std::vector<at::Tensor> AdamW::gradients(const Group& group) const {
  std::vector<at::Tensor> gradients;
  gradients.reserve(group.parameters.size());
  for (const at::Tensor& parameter : group.parameters) {
    // A part that took no part in this step (a switched-off branch) has no gradient.
    if (!parameter.grad().defined()) parameter.mutable_grad() = at::zeros_like(parameter);
    gradients.push_back(parameter.grad());
  }
  return gradients;
}

double AdamW::step(double learning_rate) {
  const at::NoGradGuard no_gradient;
  std::vector<std::vector<at::Tensor>> all;
  std::vector<at::Tensor> parameters;
  for (const Group& group : groups_) {
    all.push_back(gradients(group));
    parameters.insert(parameters.end(), group.parameters.begin(), group.parameters.end());
  }
  const double limit = options_.clip > 0 ? options_.clip : std::numeric_limits<double>::infinity();
  const double norm = torch::nn::utils::clip_grad_norm_(parameters, limit);
  if (!std::isfinite(norm)) return norm;
  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    if (group.parameters.empty()) continue;
    at::_foreach_add_(group.steps, 1);
    at::_fused_adamw_(group.parameters, all[i], group.first, group.second, {}, group.steps,
                      learning_rate, options_.beta1, options_.beta2, group.weight_decay,
                      options_.epsilon, /*amsgrad=*/false, /*maximize=*/false);
    at::_foreach_zero_(all[i]);
  }
  return norm;
}

std::map<std::string, at::Tensor> AdamW::save() const {
  std::map<std::string, at::Tensor> tensors;
  for (const Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      tensors["optimizer.first." + group.names[i]] = group.first[i];
      tensors["optimizer.second." + group.names[i]] = group.second[i];
      tensors["optimizer.steps." + group.names[i]] = group.steps[i];
    }
  }
  return tensors;
}

void AdamW::restore(const std::map<std::string, at::Tensor>& tensors) {
  const auto copy = [&tensors](const std::string& name, at::Tensor& into) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw fastweights::StateMismatch("checkpoint: no tensor " + name);
    if (found->second.sizes() != into.sizes() || found->second.dtype() != into.dtype()) {
      throw fastweights::StateMismatch("checkpoint: " + name + " has another shape or type");
    }
    into.copy_(found->second);
  };
  for (Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      copy("optimizer.first." + group.names[i], group.first[i]);
      copy("optimizer.second." + group.names[i], group.second[i]);
      copy("optimizer.steps." + group.names[i], group.steps[i]);
    }
  }
}

}  // namespace training
