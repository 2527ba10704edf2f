#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "fastweights/nn/language_model.hpp"

namespace training {

/// Calls `work(i)` for i in [0, count), each on a thread of its own whose tensor operations use
/// that thread only, and waits for all. The first exception (by i) is thrown on.
///
/// A small model on few cores is trained faster this way than with threads inside each operation:
/// there is one meeting per step instead of thousands, which matters most where other programs want
/// the cores too.
void run_workers(int count, const std::function<void(int)>& work);

/// [begin, end) of part `index` of `size` items in `count` parts that differ by one at most.
std::pair<int64_t, int64_t> part(int64_t size, int64_t count, int64_t index);

/// Models that share the weights of the first one but have gradients of their own.
class Replicas {
 public:
  Replicas(fastweights::nn::LanguageModel model, int count);

  fastweights::nn::LanguageModelImpl& operator[](int index) { return *models_[index]; }
  int count() const { return static_cast<int>(models_.size()); }

  /// Adds the gradients of all to those of the first, in order, and clears the others'.
  void sum_gradients();

 private:
  std::vector<fastweights::nn::LanguageModel> models_;
};

}  // namespace training
