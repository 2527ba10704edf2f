#include "workers.hpp"

#include <torch/torch.h>

#include <exception>
#include <thread>

namespace training {

void run_workers(int count, const std::function<void(int)>& work) {
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::thread> threads;
  threads.reserve(count);
  for (int i = 0; i < count; ++i) {
    threads.emplace_back([&work, &error = errors[i], i] {
      try {
        at::set_num_threads(1);  // of the calling thread's OpenMP teams
        work(i);
      } catch (...) {
        error = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

std::pair<int64_t, int64_t> part(int64_t size, int64_t count, int64_t index) {
  return {size * index / count, size * (index + 1) / count};
}

Replicas::Replicas(fastweights::nn::LanguageModel model, int count) {
  models_.push_back(std::move(model));
  const auto weights = models_[0]->named_parameters();
  for (int i = 1; i < count; ++i) {
    fastweights::nn::LanguageModel replica(models_[0]->config());
    for (auto& item : replica->named_parameters()) item.value().set_data(weights[item.key()]);
    models_.push_back(std::move(replica));
  }
}

void Replicas::sum_gradients() {
  const at::NoGradGuard no_gradient;
  const auto into = models_[0]->parameters();
  for (size_t i = 1; i < models_.size(); ++i) {
    const auto from = models_[i]->parameters();
    for (size_t p = 0; p < into.size(); ++p) {
      const at::Tensor gradient = from[p].grad();
      if (!gradient.defined()) continue;
      if (into[p].grad().defined()) {
        into[p].mutable_grad().add_(gradient);
      } else {
        into[p].mutable_grad() = gradient;
      }
      from[p].mutable_grad().reset();
    }
  }
}

}  // namespace training
