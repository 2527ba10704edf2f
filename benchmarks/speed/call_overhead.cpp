// Times a call of the gated delta rule's operators beside the kernel that they end in, on one
// thread: the difference is what a call costs. benchmarks/speed/call_overhead.py runs it.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "fastweights/core/cpu.hpp"
#include "fastweights/ops/gated_delta_rule.hpp"

namespace fastweights {
namespace {

struct Inputs {
  Inputs(std::int64_t tokens, std::int64_t heads, std::int64_t size)
      : q(at::randn({1, tokens, heads, size})),
        k(at::randn({1, tokens, heads, size})),
        v(at::randn({1, tokens, heads, size})),
        g(at::rand({1, tokens, heads}).neg()),
        beta(at::rand({1, tokens, heads})),
        state(at::randn({1, heads, size, size})),
        o(at::empty_like(v)) {}

  at::Tensor q, k, v, g, beta, state, o;
};

core::ConstView view_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), core::DType::kFloat32, tensor.stride(0), tensor.stride(1),
          tensor.stride(2)};
}

/// Both forms may work on the state in place.
core::RuleParams<float> params_of(const Inputs& x) {
  core::RuleParams<float> params;
  params.shape = {1, x.q.size(1), x.q.size(2), x.v.size(2), x.q.size(3), x.v.size(3)};
  params.scale = 1.0 / std::sqrt(static_cast<double>(params.shape.K));
  params.use_qk_l2norm = true;
  params.q = view_of(x.q);
  params.k = view_of(x.k);
  params.v = view_of(x.v);
  params.g = view_of(x.g);
  params.beta = view_of(x.beta);
  params.initial_state = params.final_state = x.state.mutable_data_ptr<float>();
  params.o = {x.o.mutable_data_ptr(), core::DType::kFloat32, x.o.stride(0), x.o.stride(1),
              x.o.stride(2)};
  return params;
}

Inputs inputs_of(const benchmark::State& state) {
  return {state.range(0), state.range(1), state.range(2)};
}

void kernel_recurrent(benchmark::State& state) {
  const Inputs x = inputs_of(state);
  const auto params = params_of(x);
  const auto& forms = cpu::gated_delta_rule_forms<float>();
  const auto executor = core::serial_executor();
  for (auto _ : state) forms.recurrent(params, executor);
}

void operator_recurrent(benchmark::State& state) {
  Inputs x = inputs_of(state);
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        gated_delta_rule_recurrent_(x.q, x.k, x.v, x.g, x.beta, x.state, std::nullopt, true));
  }
}

void kernel_chunkwise(benchmark::State& state) {
  const Inputs x = inputs_of(state);
  const auto params = params_of(x);
  const auto& forms = cpu::gated_delta_rule_forms<float>();
  const auto executor = core::serial_executor();
  for (auto _ : state) forms.forward(params, executor);
}

void operator_chunkwise(benchmark::State& state) {
  const Inputs x = inputs_of(state);
  RuleOptions options;
  options.initial_state = x.state;
  options.output_final_state = true;
  options.use_qk_l2norm = true;
  for (auto _ : state) {
    benchmark::DoNotOptimize(gated_delta_rule(x.q, x.k, x.v, x.g, x.beta, options));
  }
}

/// Tokens, heads, K = V.
void shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"T", "H", "K"})->Args({1, 1, 16})->Args({1, 16, 128})->Args({16, 1, 16});
}

BENCHMARK(kernel_recurrent)->Apply(shapes);
BENCHMARK(operator_recurrent)->Apply(shapes);
BENCHMARK(kernel_chunkwise)->Apply(shapes);
BENCHMARK(operator_chunkwise)->Apply(shapes);

}  // namespace
}  // namespace fastweights

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  at::set_num_threads(1);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
