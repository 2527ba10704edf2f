#include <fastweights/core/delta_rule.hpp>
#include <fastweights/io/tokenizer.hpp>
#include <fastweights/version.hpp>

#include <array>
#include <cstdio>

int main() {
  // One write and one read: S = β k vᵀ, so with q = k = e₀, β = 1 and scale 1 the output is v.
  const std::array<float, 4> key = {1, 0, 0, 0};
  const std::array<float, 3> value = {2, -3, 5};
  const float beta = 1;
  std::array<float, 3> output = {};
  fastweights::core::RuleParams<float> params;
  params.shape = {.B = 1, .T = 1, .H = 1, .HV = 1, .K = 4, .V = 3};
  params.q.data = key.data();
  params.k.data = key.data();
  params.v.data = value.data();
  params.beta.data = &beta;
  params.o.data = output.data();
  fastweights::core::delta_rule(params);  // compiled here, for this program's own flags

  const fastweights::io::ByteTokenizer tokenizer;
  const bool right = output == value && tokenizer.decode(tokenizer.encode("abc")) == "abc";
  std::printf("fastweights %s: %s\n", fastweights::kVersion, right ? "right" : "wrong");
  return right ? 0 : 1;
}
