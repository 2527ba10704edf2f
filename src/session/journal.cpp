#include "journal.hpp"

#include <sys/mman.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>

#include "place.hpp"
#include "recollection.hpp"

namespace fastweights::detail {
namespace {

/// Memory in pages of its own, which go back to the system with the last owner; null if there is
/// none to be had.
std::shared_ptr<std::byte> own_pages(std::size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) return nullptr;
  return {static_cast<std::byte*>(pages), [bytes](std::byte* memory) { munmap(memory, bytes); }};
}

/// Checkpoints of a session at most. So many are as good as any number, since their spacing grows
/// with the distance; where they are small, more would cost time and scatter the heap.
constexpr std::size_t kMost = 512;

constexpr std::size_t kAlignment = 64;

std::size_t aligned(std::size_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// Copies of tensors in pages of their own. Checkpoints outlive the buffers between which the heap
/// would place them, and keep the heap from giving those back: many times the checkpoints' own
/// bytes.
void move_to_own_pages(nn::NamedTensors& tensors) {
  std::size_t bytes = 0;
  for (const auto& [name, tensor] : tensors) bytes += aligned(tensor.nbytes());
  const bool on_cpu =
      std::ranges::all_of(tensors, [](const auto& each) { return each.second.is_cpu(); });
  std::shared_ptr<std::byte> pages = on_cpu && bytes > 0 ? own_pages(bytes) : nullptr;
  std::byte* next = pages.get();
  for (auto& [name, tensor] : tensors) {
    if (!pages) {
      tensor = tensor.clone();
      continue;
    }
    tensor = at::from_blob(next, tensor.sizes(), [pages](void*) {}, tensor.options()).copy_(tensor);
    next += aligned(tensor.nbytes());
  }
}

Place in_own_pages(const Place& place) {
  nn::NamedTensors tensors = tensors_of(place);
  move_to_own_pages(tensors);
  return with_tensors(place, tensors);
}

}  // namespace

void Journal::add(std::int64_t position, const Place& place) {
  if (last() != nullptr && last()->position >= position) return;
  const std::int64_t bytes = tensor_bytes(place);
  if (bytes > budget_) return;
  checkpoints_.push_back(
      std::make_shared<const Checkpoint>(Checkpoint{position, in_own_pages(place), bytes}));
  each_bytes_.push_back(0);
  weigh(checkpoints_.size() - 1);
  if (checkpoints_.size() > 1) weigh(checkpoints_.size() - 2);
  while (bytes_ > budget_ || checkpoints_.size() > kMost) {
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
