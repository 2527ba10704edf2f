#include "fastweights/session/protection.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/session.hpp"
#include "protected_rule.hpp"
#include "small_session.hpp"

namespace fastweights::test {
namespace {

using Catch::Matchers::ContainsSubstring;

/// A model whose memories begin with matrices that are not zero.
Model model_with_matrices() {
  auto config = small_config();
  config.memory_initial_matrix = true;
  config.fast_head = true;
  torch::manual_seed(4);
  auto model = std::make_shared<nn::LanguageModelImpl>(config);
  model->eval();
  for (at::Tensor& parameter : model->parameters()) parameter.requires_grad_(false);
  for (auto& block : model->blocks) block->memory->initial_matrix.normal_();
  return model;
}

std::shared_ptr<const Protection> protection_of(const Model& model, std::int64_t most = 6) {
  return std::make_shared<Protection>(
      protect_keys(model, noise(300), {.share = 1.0, .most = most}));
}

SessionOptions with(std::shared_ptr<const Protection> protection) {
  SessionOptions options;
  options.piece = 13;
  options.protection = std::move(protection);
  return options;
}

at::Tensor matrix_of(const Session& session, int layer) {
  return tensor_of(session, "layers." + std::to_string(layer) + ".memory.state")[0];
}

/// How far the protected part of a session's matrices is from that of another.
double moved(const Session& a, const Session& b, const Protection& protection) {
  double most = 0;
  for (int layer = 0; layer < 2; ++layer) {
    const at::Tensor& projector = protection.projectors[static_cast<std::size_t>(layer)];
    most = std::max(most, distance(at::matmul(projector, matrix_of(a, layer)),
                                   at::matmul(projector, matrix_of(b, layer))));
  }
  return most;
}

}  // namespace

TEST_CASE("the protected part neither decays nor is written into", "[protection]") {
  const OneThread one_thread;
  const Model model = model_with_matrices();
  const auto protection = protection_of(model);
  const Session fresh(model);
  Session kept(model, with(protection));
  Session plain(model);
  for (Session* session : {&kept, &plain}) {
    session->read(noise(3000, 2));
    session->write({.max_tokens = 50});
  }
  CHECK(moved(kept, fresh, *protection) < 1e-5);
  CHECK(moved(plain, fresh, *protection) > 0.1);
  CHECK(distance(matrix_of(kept, 0), matrix_of(fresh, 0)) > 0.1);  // the rest learns
  CHECK_FALSE(kept.log() == fresh.log());
}

TEST_CASE("what is not protected follows the rule on the rest of its key", "[protection]") {
  torch::manual_seed(1);
  const auto wide = at::TensorOptions(at::kDouble);
  const at::Tensor basis = std::get<0>(at::linalg_qr(at::randn({2, 8, 3}, wide)));
  const at::Tensor projector = at::matmul(basis, basis.transpose(1, 2));
  const at::Tensor first = at::randn({2, 8, 5}, wide);
  const MemoryRuleCall call{at::randn({1, 40, 1, 8}, wide),   at::randn({1, 40, 1, 8}, wide),
                            at::randn({1, 40, 2, 5}, wide),   -0.1 * at::rand({1, 40, 2}, wide),
                            1.5 * at::rand({1, 40, 2}, wide), first.unsqueeze(0)};
  std::int64_t refused = 0;
  const double least = 0.3;
  const auto [o, state] = detail::protected_rule(detail::with_unit_keys(call),
                                                 {projector, at::matmul(projector, first), least},
                                                 detail::delta_rule_of_any_keys, refused);
  std::int64_t expected_refused = 0;
  for (std::int64_t head = 0; head < 2; ++head) {
    const at::Tensor fixed = at::matmul(projector[head], first[head]);
    at::Tensor rest = first[head] - fixed;
    for (std::int64_t t = 0; t < 40; ++t) {
      const auto unit = [](const at::Tensor& x) { return x * (x.square().sum() + 1e-6).rsqrt(); };
      const at::Tensor k = unit(call.k[0][t][0]);
      const at::Tensor free = k - at::matmul(projector[head], k);
      const bool refuses = free.square().sum().item<double>() < least;
      expected_refused += refuses ? 1 : 0;
      const at::Tensor beta = call.beta[0][t][head] * (refuses ? 0.0 : 1.0);
      rest = rest * call.g[0][t][head].exp();
      const at::Tensor error =
          call.v[0][t][head] - at::matmul(fixed.t(), k) - at::matmul(rest.t(), free);
      rest = rest + beta * at::outer(free, error);
      const at::Tensor read =
          at::matmul((fixed + rest).t(), unit(call.q[0][t][0])) / std::sqrt(8.0);
      CHECK(distance(o[0][t][head], read) < 1e-9);
    }
    CHECK(distance(state[0][head], fixed + rest) < 1e-9);
  }
  CHECK(refused == expected_refused);
  CHECK(refused > 0);
  CHECK(refused < 80);
}

TEST_CASE("a session with protected keys is a function of model, options and log", "[protection]") {
  const OneThread one_thread;
  const Model model = model_with_matrices();
  for (const double ridge : {0.0, 0.5}) {
    SessionOptions options = with(protection_of(model, 13));
    options.policy.ridge = ridge;
    options.store.emplace();
    options.end_to_end = EndToEndOptions{1.0, 8, 1.0};
    Session session(model, options);
    session.read(noise(50));
    CHECK(session.report().refused_writes > 0);
    check_is_function_of_log(model, options);
  }
}

TEST_CASE("a model in bf16 can have protected keys", "[protection]") {
  const OneThread one_thread;
  const auto half = std::static_pointer_cast<nn::LanguageModelImpl>(model_with_matrices()->clone());
  half->to(at::kBFloat16);
  REQUIRE(half->blocks[0]->memory->initial_matrix.requires_grad());
  for (const double ridge : {0.0, 0.5}) {
    const auto protection = protection_of(half);
    SessionOptions options = with(protection);
    options.policy.ridge = ridge;
    const Session fresh(half);
    Session session(half, options);
    session.read(noise(300, 2));
    session.write({.max_tokens = 20});
    CHECK(moved(session, fresh, *protection) < 1e-5);
    CHECK(same_bits(session, Session::from_log(half, session.log(), options)));
  }
}

TEST_CASE("a protection holds the share that was asked for", "[protection]") {
  const Model model = model_with_matrices();
  const at::Tensor few = protect_keys(model, noise(300), {.share = 0.3}).free_ranks();
  const at::Tensor many = protect_keys(model, noise(300), {.share = 1.0, .most = 15}).free_ranks();
  CHECK(few.sizes() == at::IntArrayRef({2, 2}));
  CHECK((few > many).all().item<bool>());
  CHECK(many.min().item<std::int64_t>() == 1);
  CHECK(protect_keys(model, noise(300), {.share = 1.0}).free_ranks().min().item<std::int64_t>() ==
        8);
}

TEST_CASE("a protection that does not fit is refused", "[protection]") {
  const Model model = model_with_matrices();
  const auto attempt = [&](auto change) {
    auto protection = std::make_shared<Protection>(*protection_of(model));
    for (at::Tensor& each : protection->projectors) each = each.clone();
    change(*protection);
    Session session(model, with(protection));
  };
  CHECK_NOTHROW(attempt([](Protection&) {}));
  const auto refused = [&](auto change, const char* why) {
    CHECK_THROWS_WITH(attempt(change), ContainsSubstring(why));
  };
  refused([](Protection& p) { p.projectors.pop_back(); }, "projectors of 2 layers, got 1");
  refused([](Protection& p) { p.projectors[0] = p.projectors[0].slice(0, 0, 1); }, "[HV, K, K]");
  refused([](Protection& p) { p.projectors[0] = p.projectors[0].to(at::kDouble); }, "fp32");
  refused([](Protection& p) { p.projectors[1].mul_(2.0); }, "equal to its square");
  refused([](Protection& p) { p.projectors[1][0][0][0] = std::nanf(""); }, "equal to its square");
  refused([](Protection& p) { p.projectors[1][0] = at::eye(16); }, "no free direction");
  refused([](Protection& p) { p.least_free = 1.0; }, "least_free must be in [0, 1)");

  const auto options = [&](ProtectKeysOptions each, const char* why) {
    CHECK_THROWS_WITH(protect_keys(model, noise(10), each), ContainsSubstring(why));
  };
  options({.share = 0.0}, "share must be in (0, 1]");
  options({.most = 16}, "most must be in [0, 16)");
  options({.least_free = -0.1}, "least_free");
  CHECK_THROWS_WITH(protect_keys(model, ""), ContainsSubstring("an empty text"));
  auto config = small_config();
  config.memory = false;
  const Model none = random_model(1, config);
  CHECK_THROWS_WITH(protect_keys(none, "text"), ContainsSubstring("no memories"));
  CHECK_THROWS_WITH(Session(none, with(protection_of(model))), ContainsSubstring("no memories"));
}

}  // namespace fastweights::test
