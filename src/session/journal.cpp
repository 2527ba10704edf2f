#include "journal.hpp"

#include <torch/torch.h>

#include <utility>

namespace fastweights::detail {
namespace {

std::int64_t bytes_of(const Place& place) {
  std::int64_t bytes = static_cast<std::int64_t>(place.logits.storage().nbytes());
  for (const auto& [name, tensor] : place.state.tensors()) {
    bytes += static_cast<std::int64_t>(tensor.storage().nbytes());
  }
  return bytes;
}

}  // namespace

void Journal::add(std::int64_t position, const Place& place) {
  if (last() != nullptr && last()->position >= position) return;
  const std::int64_t bytes = bytes_of(place);
  if (bytes > budget_) return;
  checkpoints_.push_back(std::make_shared<const Checkpoint>(Checkpoint{position, place, bytes}));
  bytes_ += bytes;
  while (bytes_ > budget_) {
    const auto gone = checkpoints_.begin() + static_cast<std::ptrdiff_t>(least_needed());
    bytes_ -= (*gone)->bytes;
    checkpoints_.erase(gone);
  }
}

std::size_t Journal::least_needed() const {
  const auto position = [&](std::size_t i) { return checkpoints_[i]->position; };
  const std::int64_t present = position(checkpoints_.size() - 1);
  std::size_t best = 0;
  double smallest = 2.0;
  for (std::size_t i = 0; i + 1 < checkpoints_.size(); ++i) {
    const std::int64_t before = i == 0 ? 0 : position(i - 1);
    const double gap =
        static_cast<double>(position(i + 1) - before) / static_cast<double>(present - before);
    if (gap < smallest) {
      smallest = gap;
      best = i;
    }
  }
  return best;
}

}  // namespace fastweights::detail
