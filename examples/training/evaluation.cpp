#include "evaluation.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <atomic>
#include <numbers>
#include <string_view>

#include "autocast.hpp"
#include "workers.hpp"

namespace training {
namespace {

at::Tensor tokens(std::string_view bytes) {
  at::Tensor tensor = at::empty({1, static_cast<int64_t>(bytes.size())}, at::kLong);
  std::transform(bytes.begin(), bytes.end(), tensor.mutable_data_ptr<int64_t>(),
                 [](char byte) { return static_cast<unsigned char>(byte); });
  return tensor;
}

double bits_per_byte_of(const fastweights::nn::LanguageModelImpl& model, std::string_view bytes,
                        const EvaluationOptions& options, const std::function<bool()>& stop) {
  const at::NoGradGuard no_gradient;
  const Autocast autocast(options.bf16);
  auto state = model.initial_state(1);
  const auto last = static_cast<int64_t>(bytes.size()) - 1;
  const int64_t count = options.bytes > 0 ? std::min(options.bytes, last) : last;
  double nats = 0.0;
  for (int64_t t = 0; t < count && !stop(); t += options.piece) {
    const int64_t length = std::min(options.piece, count - t);
    const at::Tensor piece = tokens(bytes.substr(t, length + 1));
    auto result = model.forward(piece.narrow(1, 0, length), state, {.in_place = true});
    state = std::move(result.state);
    nats += at::cross_entropy_loss(result.logits.flatten(0, 1).to(at::kFloat),
                                   piece.narrow(1, 1, length).flatten(), {}, at::Reduction::Sum)
                .item<double>();
  }
  return nats / static_cast<double>(count) / std::numbers::ln2;
}

}  // namespace

std::vector<double> bits_per_byte(const fastweights::nn::LanguageModelImpl& model,
                                  const std::vector<Work>& works, const EvaluationOptions& options,
                                  const std::function<bool()>& stop) {
  std::vector<double> bits(works.size());
  std::atomic<size_t> next = 0;
  run_workers(options.threads, [&](int) {
    for (size_t i = next++; i < works.size(); i = next++) {
      bits[i] = bits_per_byte_of(model, works[i].bytes, options, stop);
    }
  });
  if (stop()) bits.clear();
  return bits;
}

}  // namespace training
