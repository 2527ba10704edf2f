#include "journal.hpp"

#include <sys/mman.h>
#include <torch/torch.h>

#include <utility>

#include "recollection.hpp"

namespace fastweights::detail {
namespace {

std::int64_t bytes_of(const Place& place) {
  std::int64_t bytes = static_cast<std::int64_t>(place.logits.nbytes());
  for (const auto& [name, tensor] : place.state.tensors()) {
    bytes += static_cast<std::int64_t>(tensor.nbytes());
  }
  return bytes;
}

/// A copy in pages of its own. Checkpoints outlive the buffers between which the heap would place
/// them, and keep the heap from giving those back: several times the checkpoints' own bytes.
at::Tensor in_own_pages(const at::Tensor& tensor) {
  constexpr std::size_t kLeast = 65536;
  const std::size_t bytes = tensor.nbytes();
  if (!tensor.device().is_cpu() || bytes < kLeast) return tensor.clone();
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return tensor.clone();
  const auto give_back = [bytes](void* memory) { munmap(memory, bytes); };
  return at::from_blob(pages, tensor.sizes(), give_back, tensor.options()).copy_(tensor);
}

Place in_own_pages(const Place& place) {
  nn::NamedTensors tensors = place.state.tensors();
  for (auto& [name, tensor] : tensors) tensor = in_own_pages(tensor);
  return {nn::LanguageModelState::from_tensors(tensors), in_own_pages(place.logits),
          place.limited_writes, place.recollection};
}

}  // namespace

void Journal::add(std::int64_t position, const Place& place) {
  if (last() != nullptr && last()->position >= position) return;
  const std::int64_t bytes = bytes_of(place);
  if (bytes > budget_) return;
  checkpoints_.push_back(
      std::make_shared<const Checkpoint>(Checkpoint{position, in_own_pages(place), bytes}));
  each_bytes_.push_back(0);
  weigh(checkpoints_.size() - 1);
  if (checkpoints_.size() > 1) weigh(checkpoints_.size() - 2);
  while (bytes_ > budget_) {
    const std::size_t gone = least_needed();
    bytes_ -= each_bytes_[gone];
    checkpoints_.erase(checkpoints_.begin() + static_cast<std::ptrdiff_t>(gone));
    each_bytes_.erase(each_bytes_.begin() + static_cast<std::ptrdiff_t>(gone));
    if (gone > 0) weigh(gone - 1);
  }
}

void Journal::weigh_all() {
  bytes_ = 0;
  each_bytes_.assign(checkpoints_.size(), 0);
  for (std::size_t i = 0; i < checkpoints_.size(); ++i) weigh(i);
}

void Journal::weigh(std::size_t i) {
  const Checkpoint& each = *checkpoints_[i];
  std::int64_t bytes = each.tensor_bytes;
  if (each.place.recollection && i + 1 < checkpoints_.size()) {
    const ExactStore& next = checkpoints_[i + 1]->place.recollection->store();
    bytes += each.place.recollection->store().bytes_apart(next);
  }
  bytes_ += bytes - each_bytes_[i];
  each_bytes_[i] = bytes;
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
