#include "least_squares.hpp"

#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/session.hpp"
#include "small_session.hpp"

namespace fastweights::test {
namespace {

using Catch::Matchers::ContainsSubstring;

MemoryRuleCall random_call(std::int64_t tokens) {
  torch::manual_seed(2);
  const auto wide = at::TensorOptions(at::kDouble);
  at::Tensor beta = at::rand({1, tokens, 4}, wide) * 2.0;
  beta.slice(1, 3, 5).zero_();
  return {at::randn({1, tokens, 4, 8}, wide),
          at::randn({1, tokens, 4, 8}, wide),
          at::randn({1, tokens, 4, 5}, wide),
          {},
          beta,
          at::randn({1, 4, 8, 5}, wide)};
}

at::Tensor first_covariance(double ridge) {
  return (at::eye(8, at::kDouble) / ridge).repeat({1, 4, 1, 1});
}

/// By the normal equations, for each token of a head anew: o [T, V] and the last matrix.
std::pair<at::Tensor, at::Tensor> direct(const MemoryRuleCall& call, std::int64_t head,
                                         double ridge) {
  const at::Tensor first = call.state[0][head];
  at::Tensor gram = ridge * at::eye(8, at::kDouble);
  at::Tensor cross = ridge * first;
  at::Tensor state = first;
  std::vector<at::Tensor> out;
  for (std::int64_t t = 0; t < call.v.size(1); ++t) {
    const at::Tensor k = call.k[0][t][head];
    const at::Tensor q = call.q[0][t][head];
    gram = gram + call.beta[0][t][head] * at::outer(k, k);
    cross = cross + call.beta[0][t][head] * at::outer(k, call.v[0][t][head]);
    state = at::linalg_solve(gram, cross);
    out.push_back(at::matmul(state.t(), q) / std::sqrt(8.0));
  }
  return {at::stack(out), state};
}

SessionOptions with_ridge(double ridge) {
  SessionOptions options;
  options.piece = 13;
  options.policy.ridge = ridge;
  return options;
}

}  // namespace

TEST_CASE("least squares are the ridge solution after every token", "[least_squares]") {
  for (const double ridge : {0.01, 1.0, 30.0}) {
    const MemoryRuleCall call = random_call(150);
    at::Tensor covariance = first_covariance(ridge);
    const auto [o, state] = detail::least_squares(call, covariance);
    for (std::int64_t head = 0; head < 4; ++head) {
      INFO("ridge " << ridge << ", head " << head);
      const auto [expected, last] = direct(call, head, ridge);
      CHECK(distance(o[0].select(1, head), expected) < 1e-9);
      CHECK(distance(state[0][head], last) < 1e-9);
    }
  }
}

TEST_CASE("least squares do not depend on where calls end", "[least_squares]") {
  const MemoryRuleCall call = random_call(100);
  at::Tensor covariance = first_covariance(0.5);
  const auto [o, state] = detail::least_squares(call, covariance);
  at::Tensor own = first_covariance(0.5);
  at::Tensor now = call.state;
  std::vector<at::Tensor> out;
  for (std::int64_t begin = 0, size = 1; begin < 100; begin += size, size = 1 + begin % 40) {
    const auto rows = [&](const at::Tensor& x) {
      return x.slice(1, begin, std::min<std::int64_t>(begin + size, 100));
    };
    const auto [part, next] = detail::least_squares(
        {rows(call.q), rows(call.k), rows(call.v), {}, rows(call.beta), now}, own);
    out.push_back(part);
    now = next;
  }
  CHECK(distance(at::cat(out, 1), o) < 1e-10);
  CHECK(distance(now, state) < 1e-10);
  CHECK(distance(own, covariance) < 1e-10);
  const auto [none, same] = detail::least_squares({call.q.slice(1, 0, 0),
                                                   call.k.slice(1, 0, 0),
                                                   call.v.slice(1, 0, 0),
                                                   {},
                                                   call.beta.slice(1, 0, 0),
                                                   state},
                                                  own);
  CHECK(none.size(1) == 0);
  CHECK(at::equal(same, state));
}

TEST_CASE("a session by least squares is a function of model, options and log", "[least_squares]") {
  const OneThread one_thread;
  auto config = small_config();
  config.fast_head = true;
  SessionOptions options = with_ridge(0.5);
  options.store.emplace();
  options.end_to_end = EndToEndOptions{1.0, 8, 1.0};
  check_is_function_of_log(random_model(4, config), options);
}

TEST_CASE("what a session wrote by least squares is what it read", "[least_squares]") {
  const OneThread one_thread;
  const Model model = random_model();
  Session writes(model, with_ridge(0.5));
  writes.read("Once");
  const std::string text = writes.write({.max_tokens = 40, .seed = 1});
  Session reads(model, with_ridge(0.5));
  reads.read("Once");
  reads.read(text);
  CHECK(distance(writes.logits(), reads.logits()) < 1e-3);
  Session own(model);
  own.read("Once" + text);
  CHECK(distance(own.logits(), reads.logits()) > 1e-2);
  const std::string name = "layers.1.memory.covariance";
  CHECK(tensor_of(reads, name).sizes() == at::IntArrayRef({1, 2, 16, 16}));
  CHECK_FALSE(tensor_of(own, name).defined());
}

TEST_CASE("with strength 0 nothing is solved for", "[least_squares]") {
  const OneThread one_thread;
  const Model model = random_model();
  SessionOptions options = with_ridge(0.5);
  options.policy.strength = 0.0F;
  Session session(model, options);
  const at::Tensor before = tensor_of(session, "layers.0.memory.covariance");
  session.read(noise(40));
  CHECK(at::equal(tensor_of(session, "layers.0.memory.covariance"), before));
  CHECK(tensor_of(session, "layers.0.memory.state").abs().max().item<double>() == 0.0);
}

TEST_CASE("a ridge that makes no sense is refused", "[least_squares]") {
  const Model model = random_model();
  for (const double bad :
       {-1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    CHECK_THROWS_WITH(Session(model, with_ridge(bad)),
                      ContainsSubstring("ridge must be at least 0"));
  }
  SessionOptions capped = with_ridge(1.0);
  capped.policy.memory_norm_cap = 3.0;
  CHECK_THROWS_WITH(Session(model, capped), ContainsSubstring("no place beside a ridge"));
}

}  // namespace fastweights::test
