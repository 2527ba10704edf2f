#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "fastweights/session/shared.hpp"

namespace fastweights::detail {

/// A sequence whose copies share what they have in common: items lie in blocks, blocks in groups,
/// and what is shared is copied when it is changed. A copy costs nothing until one of the two
/// changes, and then a block, a group and the list of groups. Each copy is used by one thread at a
/// time; copies may be on different threads.
template <class T>
class SharedSequence {
 public:
  std::size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }

  const T& operator[](std::size_t i) const {
    return (*(*(*groups_)[i / kGroupItems])[i % kGroupItems / kBlockItems])[i % kBlockItems];
  }
  const T& back() const { return (*this)[size_ - 1]; }

  void push_back(const T& item) {
    auto& groups = own(groups_);
    if (size_ % kGroupItems == 0) groups.push_back(std::make_shared<Group>());
    auto& group = own(groups.back());
    if (size_ % kBlockItems == 0) group.push_back(std::make_shared<Block>());
    own(group.back()).push_back(item);
    ++size_;
  }

  void append(std::span<const T> items) {
    for (const T& item : items) push_back(item);
  }

  /// Drops the items from `size` on, which must not be more than there are.
  void truncate(std::size_t size) {
    if (size == size_) return;
    auto& groups = own(groups_);
    groups.resize(divide_up(size, kGroupItems));
    size_ = size;
    if (size % kGroupItems == 0) return;
    auto& group = own(groups.back());
    group.resize(divide_up(size % kGroupItems, kBlockItems));
    if (size % kBlockItems != 0) own(group.back()).resize(size % kBlockItems);
  }

  void set_back(const T& item) {
    truncate(size_ - 1);
    push_back(item);
  }

  std::vector<T> items(std::size_t begin, std::size_t end) const {
    std::vector<T> out;
    out.reserve(end - begin);
    while (begin < end) {
      const Block& block = *(*(*groups_)[begin / kGroupItems])[begin % kGroupItems / kBlockItems];
      const std::size_t first = begin % kBlockItems;
      const std::size_t count = std::min(end - begin, kBlockItems - first);
      out.insert(out.end(), block.begin() + static_cast<std::ptrdiff_t>(first),
                 block.begin() + static_cast<std::ptrdiff_t>(first + count));
      begin += count;
    }
    return out;
  }

  /// Bytes of all items, whether others share them or not.
  std::size_t bytes() const { return size_ * sizeof(T); }

  bool operator==(const SharedSequence& other) const {
    if (size_ != other.size_) return false;
    for (std::size_t i = 0; i < size_; i += kBlockItems) {
      const std::size_t end = std::min(size_, i + kBlockItems);
      if (items(i, end) != other.items(i, end)) return false;
    }
    return true;
  }

 private:
  using Block = std::vector<T>;
  using Group = std::vector<std::shared_ptr<Block>>;
  static constexpr std::size_t kBlockItems = std::max<std::size_t>(1, 1024 / sizeof(T));
  static constexpr std::size_t kGroupItems = 64 * kBlockItems;

  static constexpr std::size_t divide_up(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

  std::size_t size_ = 0;
  std::shared_ptr<std::vector<std::shared_ptr<Group>>> groups_ =
      std::make_shared<std::vector<std::shared_ptr<Group>>>();
};

}  // namespace fastweights::detail
