#include <ATen/Parallel.h>
#include <torch/torch.h>

#include <atomic>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <chrono>
#include <string>
#include <thread>

#include "../../src/ops/layer_op.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/ops/delta_rule.hpp"
#include "fastweights/ops/gated_delta_rule.hpp"
#include "fastweights/ops/kda.hpp"

// What the operators add to the kernels, which tests/core compares with the oracle: layouts, types,
// autograd, the in-place form, threads, messages. The sweeps over PyTorch's machinery are in
// Python.

namespace fastweights {
namespace {

using at::Tensor;

struct Inputs {
  explicit Inputs(at::ScalarType type, int64_t tokens = 70)
      : q(at::randn({2, tokens, 2, 24}, type)),
        k(at::randn({2, tokens, 2, 24}, type)),
        v(at::randn({2, tokens, 4, 40}, type)),
        g(at::randn({2, tokens, 4}, type).abs().neg() * 0.1),
        beta(at::rand({2, tokens, 4}, type)),
        state(at::randn({2, 4, 24, 40}, type == at::kDouble ? at::kDouble : at::kFloat)) {}

  RuleOptions options() const {
    RuleOptions options;
    options.initial_state = state;
    options.output_final_state = true;
    options.use_qk_l2norm = true;
    return options;
  }

  RuleResult run() const { return gated_delta_rule(q, k, v, g, beta, options()); }

  Tensor q, k, v, g, beta, state;
};

double error_ratio(const Tensor& value, const Tensor& exact) {
  const Tensor difference = value.to(at::kDouble) - exact.to(at::kDouble);
  const double size = exact.to(at::kDouble).square().mean().item<double>();
  return std::sqrt(difference.square().mean().item<double>() / size);
}

/// The rule as it is written, with ATen, differentiable.
RuleResult naive(const Inputs& x) {
  const auto normalise = [](const Tensor& t) {
    return t * (t.square().sum(-1, true) + 1e-6).rsqrt();
  };
  const Tensor q = normalise(x.q).repeat_interleave(2, 2) / std::sqrt(24.0);
  const Tensor k = normalise(x.k).repeat_interleave(2, 2);
  Tensor state = x.state;
  std::vector<Tensor> outputs;
  for (int64_t t = 0; t < x.q.size(1); ++t) {
    const Tensor key = k.select(1, t);
    state = state * x.g.select(1, t).exp().unsqueeze(-1).unsqueeze(-1);
    const Tensor error = x.v.select(1, t) - at::matmul(key.unsqueeze(-2), state).squeeze(-2);
    const Tensor write = x.beta.select(1, t).unsqueeze(-1) * error;
    state = state + key.unsqueeze(-1) * write.unsqueeze(-2);
    outputs.push_back(at::matmul(q.select(1, t).unsqueeze(-2), state).squeeze(-2));
  }
  return {at::stack(outputs, 1), state};
}

TEST_CASE("the operator and its gradients agree with autograd through the rule", "[ops]") {
  torch::manual_seed(1);
  Inputs x(at::kDouble);
  std::vector<Tensor> leaves{x.q, x.k, x.v, x.g, x.beta, x.state};
  for (auto& leaf : leaves) leaf.requires_grad_();
  const auto [o, state] = x.run();
  const auto [expected_o, expected_state] = naive(x);
  CHECK(error_ratio(o, expected_o) < 1e-12);
  CHECK(error_ratio(*state, *expected_state) < 1e-12);

  const Tensor d_o = at::randn_like(o);
  const Tensor d_state = at::randn_like(*state);
  const auto gradients = torch::autograd::grad({o, *state}, leaves, {d_o, d_state});
  const auto expected =
      torch::autograd::grad({expected_o, *expected_state}, leaves, {d_o, d_state});
  for (size_t i = 0; i < leaves.size(); ++i) CHECK(error_ratio(gradients[i], expected[i]) < 1e-11);
}

TEST_CASE("a state that nobody asked for is not returned", "[ops]") {
  const Inputs x(at::kFloat);
  CHECK_FALSE(gated_delta_rule(x.q, x.k, x.v, x.g, x.beta).final_state.has_value());
  CHECK_FALSE(delta_rule(x.q, x.k, x.v, x.beta).final_state.has_value());
}

TEST_CASE("views of any stride give the same bits as copies", "[ops]") {
  torch::manual_seed(2);
  Inputs x(at::kFloat);
  const auto [o, state] = x.run();
  const auto strided = [](const Tensor& t) {
    return t.transpose(1, 2).contiguous().transpose(1, 2);
  };
  Inputs views = x;
  views.q = strided(x.q);
  views.k = x.k.transpose(-1, -2).contiguous().transpose(-1, -2);  // rows not adjacent: copied
  views.v = strided(x.v);
  views.g = x.g.transpose(0, 2).contiguous().transpose(0, 2);
  views.beta = strided(x.beta);
  REQUIRE_FALSE(views.k.is_contiguous());
  const auto [view_o, view_state] = views.run();
  CHECK(at::equal(o, view_o));
  CHECK(at::equal(*state, *view_state));
}

TEST_CASE("the recurrent form works on the caller's state", "[ops]") {
  torch::manual_seed(3);
  const Inputs x(at::kFloat);
  const auto [o, state] = x.run();
  Tensor working = x.state.clone();
  const Tensor stepped =
      gated_delta_rule_recurrent_(x.q, x.k, x.v, x.g, x.beta, working, std::nullopt, true);
  CHECK(error_ratio(stepped, o) < 1e-5);
  CHECK(error_ratio(working, *state) < 1e-5);

  Tensor plain = x.state.clone();
  RuleOptions options = x.options();
  const auto ungated = delta_rule(x.q, x.k, x.v, x.beta, options);
  const Tensor ungated_step =
      delta_rule_recurrent_(x.q, x.k, x.v, x.beta, plain, std::nullopt, true);
  CHECK(error_ratio(ungated_step, ungated.o) < 1e-5);
  CHECK(error_ratio(plain, *ungated.final_state) < 1e-5);
}

TEST_CASE("a state that is not contiguous is updated all the same", "[ops]") {
  torch::manual_seed(4);
  const Inputs x(at::kFloat);
  Tensor expected = x.state.clone();
  Tensor transposed = x.state.transpose(-1, -2).contiguous().transpose(-1, -2);
  REQUIRE_FALSE(transposed.is_contiguous());
  delta_rule_recurrent_(x.q, x.k, x.v, x.beta, expected, std::nullopt, true);
  delta_rule_recurrent_(x.q, x.k, x.v, x.beta, transposed, std::nullopt, true);
  CHECK(at::equal(expected, transposed));
}

TEST_CASE("autograd knows that the recurrent form writes into its state", "[ops]") {
  using Catch::Matchers::MessageMatches, Catch::Matchers::ContainsSubstring;
  const Inputs x(at::kFloat);
  const auto step = [&](Tensor& state) {
    return delta_rule_recurrent_(x.q, x.k, x.v, x.beta, state);
  };
  SECTION("a value that was saved for a backward pass") {
    const Tensor weight = at::ones({40}).requires_grad_();
    Tensor state = x.state.clone();
    const Tensor product = state * weight;  // saves the state
    step(state);
    CHECK_THROWS_MATCHES(product.sum().backward(), c10::Error,
                         MessageMatches(ContainsSubstring("modified by an inplace operation")));
  }
  SECTION("a state with a history loses it: its gradient would be wrong") {
    const Tensor leaf = x.state.clone().requires_grad_();
    Tensor state = leaf * 2;
    const Tensor o = step(state);
    for (const auto& result : {o, state}) {
      CHECK_THROWS_MATCHES(
          result.sum().backward({}, /*retain_graph=*/true), c10::Error,
          MessageMatches(ContainsSubstring("delta_rule_recurrent_ is not implemented")));
    }
  }
  SECTION("a leaf is refused, but not without gradients") {
    Tensor state = x.state.clone().requires_grad_();
    CHECK_THROWS_MATCHES(step(state), c10::Error, MessageMatches(ContainsSubstring("leaf")));
    const at::NoGradGuard guard;
    CHECK_FALSE(step(state).requires_grad());
    CHECK(state._version() == 1);
  }
  SECTION("a state without a history gets none from inputs that need a gradient") {
    Tensor state = x.state.clone();
    const Tensor q = x.q.clone().requires_grad_();
    CHECK(delta_rule_recurrent_(q, x.k, x.v, x.beta, state).requires_grad());
    CHECK_FALSE(state.requires_grad());
  }
  SECTION("a state made in inference mode has no version to count") {
    Tensor state = [&] {
      const c10::InferenceMode guard;
      return x.state.clone();
    }();
    Tensor twin = x.state.clone();
    CHECK(at::equal(step(state), step(twin)));
    CHECK(at::equal(state, twin));
  }
}

TEST_CASE("a tensor that is missing is refused", "[ops]") {
  using Catch::Matchers::Message;
  const Inputs x(at::kFloat, 6);
  const Tensor nothing;
  const Tensor g = at::zeros({2, 6, 4, 24});
  CHECK_THROWS_MATCHES(kda(x.q, nothing, x.v, g, x.beta), ShapeError,
                       Message("kda: k must be [B, T, H, K] = [2, 6, 2, 24], got [0]"));
  Tensor state;
  CHECK_THROWS_MATCHES(
      delta_rule_recurrent_(x.q, x.k, x.v, x.beta, state), ShapeError,
      Message("delta_rule: state must be [B, HV, K, V] = [2, 4, 24, 40], got [0]"));
}

TEST_CASE("no tokens: the state is copied", "[ops]") {
  const Inputs x(at::kFloat, 0);
  const auto [o, state] = x.run();
  CHECK(o.sizes() == at::IntArrayRef({2, 0, 4, 40}));
  CHECK(at::equal(*state, x.state));
  CHECK(state->data_ptr() != x.state.data_ptr());
}

TEST_CASE("sixteen-bit inputs keep their type, the state is fp32", "[ops]") {
  const auto type = GENERATE(at::kBFloat16, at::kHalf);
  torch::manual_seed(5);
  const Inputs x(type);
  const auto [o, state] = x.run();
  CHECK(o.scalar_type() == type);
  CHECK(state->scalar_type() == at::kFloat);
  Inputs wide = x;
  for (auto* t : {&wide.q, &wide.k, &wide.v, &wide.g, &wide.beta}) *t = t->to(at::kDouble);
  wide.state = x.state.to(at::kDouble);
  CHECK(error_ratio(o, wide.run().o) < 5e-3);
}

TEST_CASE("the library's kernels run on two threads at once", "[ops]") {
  // at::parallel_for is silently serial in a unit compiled without OpenMP. Two tasks that wait for
  // each other can only end if they run at the same time.
  at::set_num_threads(2);
  std::atomic<int> arrived{0};
  std::atomic<bool> met{false};
  detail::parallel_executor().run(2, [&](int64_t) {
    ++arrived;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
    while (arrived < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    if (arrived == 2) met = true;
    if (std::chrono::steady_clock::now() >= deadline) met = false;
  });
  CHECK(met);
}

TEST_CASE("results do not depend on the number of threads", "[ops]") {
  torch::manual_seed(6);
  const Inputs x(at::kFloat, 200);
  at::set_num_threads(1);
  const auto [o, state] = x.run();
  at::set_num_threads(2);
  const auto [o2, state2] = x.run();
  CHECK(at::equal(o, o2));
  CHECK(at::equal(*state, *state2));
}

TEST_CASE("misuse is refused with the tensor, what was expected and what came", "[ops]") {
  using Catch::Matchers::Message;
  const Inputs x(at::kFloat, 6);
  const auto call = [&](const Inputs& in) { return [in] { in.run(); }; };
  const auto refuses = [&](const Inputs& in, const std::string& message) {
    CHECK_THROWS_MATCHES(call(in)(), ShapeError, Message(message));
  };
  Inputs bad = x;
  bad.beta = at::ones({2, 6, 8});
  refuses(bad, "gated_delta_rule: beta must be [B, T, HV] = [2, 6, 4], got [2, 6, 8]");
  bad = x;
  bad.k = at::ones({2, 6, 2, 25});
  refuses(bad, "gated_delta_rule: k must be [B, T, H, K] = [2, 6, 2, 24], got [2, 6, 2, 25]");
  bad = x;
  bad.q = at::ones({6, 2, 24});
  refuses(bad, "gated_delta_rule: q must be [B, T, H, K], got [6, 2, 24]");
  bad = x;
  bad.v = x.v.narrow(2, 0, 3);
  refuses(bad, "gated_delta_rule: v must have a positive multiple of q's heads, H = 2, got HV = 3");
  bad = x;
  bad.v = x.v.to(at::kHalf);
  refuses(bad, "gated_delta_rule: v must be Float, got Half");
  bad = x;
  bad.g = x.g.to(at::kDouble);
  refuses(bad, "gated_delta_rule: g must be Float, got Double");
  bad = x;
  bad.state = x.state.to(at::kDouble);
  refuses(bad, "gated_delta_rule: initial_state must be Float or BFloat16, got Double");
  bad = x;
  bad.q = bad.k = at::ones({2, 6, 2, 300});
  refuses(bad, "gated_delta_rule: K must be from 1 to 256, got 300");

  RuleOptions packed;
  packed.cu_seqlens = at::tensor({0, 6}, at::kLong);
  CHECK_THROWS_MATCHES(
      delta_rule(x.q, x.k, x.v, x.beta, packed), ShapeError,
      Message("delta_rule: cu_seqlens needs packed input with B = 1, got q [2, 6, 2, 24]"));
  const auto first = [](const Tensor& t) { return t.narrow(0, 0, 1); };
  packed.cu_seqlens = at::tensor({0, 7}, at::kLong);
  CHECK_THROWS_AS(delta_rule(first(x.q), first(x.k), first(x.v), first(x.beta), packed),
                  ShapeError);
  packed.cu_seqlens = at::tensor({0, 6}, at::kInt);
  CHECK_THROWS_AS(delta_rule(first(x.q), first(x.k), first(x.v), first(x.beta), packed),
                  ShapeError);
}

}  // namespace
}  // namespace fastweights
