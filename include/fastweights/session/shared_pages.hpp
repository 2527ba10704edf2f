#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/session/shared.hpp"

namespace fastweights {

/// A sequence that grows at its end and is dropped from its front, in pages that copies share: a
/// copy costs a pointer, and a write into a page that is shared copies that page. No LibTorch.
template <class T>
class SharedPages {
 public:
  /// An empty sequence in pages of `page_size` ≥ 1 elements.
  explicit SharedPages(std::int64_t page_size) : page_size_(page_size) {}

  std::int64_t page_size() const { return page_size_; }
  std::int64_t size() const { return size_; }
  /// The number of the first page that is still there; those before it were dropped.
  std::int64_t first_page() const { return first_page_; }
  /// The number behind the last page.
  std::int64_t end_page() const { return first_page_ + static_cast<std::int64_t>(pages_->size()); }
  /// Bytes of the pages, shared ones included.
  std::int64_t bytes() const {
    return (end_page() - first_page_) * page_size_ * static_cast<std::int64_t>(sizeof(T));
  }

  /// The elements of page `page`, aligned to a cache line.
  const T* page(std::int64_t page) const {
    return (*pages_)[static_cast<std::size_t>(page - first_page_)]->data();
  }
  const T& operator[](std::int64_t index) const {
    return page(index / page_size_)[index % page_size_];
  }

  /// The elements of a page to be changed.
  T* edit_page(std::int64_t page) {
    auto& place = pages_.edit()[static_cast<std::size_t>(page - first_page_)];
    if (!detail::is_alone(place)) {
      auto copy = new_page();
      std::copy_n(place->data(), page_size_, copy->data());
      place = std::move(copy);
    }
    return place->data();
  }
  T& edit(std::int64_t index) { return edit_page(index / page_size_)[index % page_size_]; }

  /// Makes the sequence longer by zeros, or shorter; what was dropped stays dropped.
  void resize(std::int64_t size) {
    const std::int64_t pages = (size + page_size_ - 1) / page_size_;
    if (pages != end_page()) {
      auto& list = pages_.edit();
      if (pages < end_page()) list.resize(static_cast<std::size_t>(pages - first_page_));
      while (end_page() < pages) list.push_back(new_page());
    }
    size_ = size;
  }

  void push_back(T value) {
    resize(size_ + 1);
    edit(size_ - 1) = value;
  }

  /// Drops the pages before page `page`, which must not lie behind the end.
  void drop_before(std::int64_t page) {
    if (page <= first_page_) return;
    auto& list = pages_.edit();
    list.erase(list.begin(), list.begin() + static_cast<std::ptrdiff_t>(page - first_page_));
    first_page_ = page;
  }

  /// Bytes of the pages that `other` does not share.
  std::int64_t bytes_apart(const SharedPages& other) const {
    std::int64_t apart = 0;
    for (std::int64_t page = first_page_; page < end_page(); ++page) {
      if (!other.has(page) || other.place(page) != place(page)) ++apart;
    }
    return apart * page_size_ * static_cast<std::int64_t>(sizeof(T));
  }

  /// Takes back the pages that this sequence has dropped and `earlier`, which it went on from,
  /// still has. False, and nothing is changed, if pages between the two are lost.
  bool extend_back(const SharedPages& earlier) {
    if (earlier.first_page_ >= first_page_) return true;
    if (earlier.size_ < first_page_ * page_size_) return false;
    auto& list = pages_.edit();
    const auto begin = earlier.pages_->begin();
    list.insert(list.begin(), begin, begin + (first_page_ - earlier.first_page_));
    first_page_ = earlier.first_page_;
    return true;
  }

  /// Makes an empty sequence one whose first pages were dropped: it begins at page `page`.
  void start_at(std::int64_t page) {
    first_page_ = page;
    size_ = page * page_size_;
  }

 private:
  using Page = core::AlignedBuffer<T>;

  bool has(std::int64_t page) const { return page >= first_page_ && page < end_page(); }
  const std::shared_ptr<Page>& place(std::int64_t page) const {
    return (*pages_)[static_cast<std::size_t>(page - first_page_)];
  }

  std::shared_ptr<Page> new_page() const {
    auto page = std::make_shared<Page>(static_cast<std::size_t>(page_size_));
    std::fill_n(page->data(), page_size_, T{});
    return page;
  }

  std::int64_t page_size_;
  std::int64_t size_ = 0;
  std::int64_t first_page_ = 0;
  Shared<std::vector<std::shared_ptr<Page>>> pages_;
};

}  // namespace fastweights
