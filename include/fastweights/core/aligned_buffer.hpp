#pragma once

#include <array>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <span>
#include <utility>

namespace fastweights::core {

namespace detail {

/// Blocks that a thread has given back and may need again soon. Kernels allocate the same few
/// hundred kilobytes at every call, and the system would clear their pages each time anew.
class BlockCache {
 public:
  BlockCache() = default;
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;
  ~BlockCache() {
    for (const Block& block : blocks_) std::free(block.data);
  }

  /// A kept block of just this size, or null.
  void* take(std::size_t bytes) {
    for (Block& block : blocks_) {
      if (block.data != nullptr && block.bytes == bytes) return std::exchange(block.data, nullptr);
    }
    return nullptr;
  }

  /// Keeps the block in the place of the one that has been kept for longest.
  void give(void* data, std::size_t bytes) {
    Block& place = blocks_[next_++ % blocks_.size()];
    std::free(place.data);
    place = {data, bytes};
  }

 private:
  struct Block {
    void* data = nullptr;
    std::size_t bytes = 0;
  };
  std::array<Block, 16> blocks_;
  std::size_t next_ = 0;
};

inline BlockCache& block_cache() {
  static thread_local BlockCache cache;
  return cache;
}

}  // namespace detail

/// Uninitialised, cache-line aligned storage of a fixed size.
template <class T>
class AlignedBuffer {
 public:
  static constexpr std::size_t kAlignment = 64;
  /// Larger blocks go back to the system at once.
  static constexpr std::size_t kKeptBytes = std::size_t{1} << 20;

  explicit AlignedBuffer(std::size_t size) : size_(size), data_(allocate(size)) {}

  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  std::span<T> span() { return {data_.get(), size_}; }
  T& operator[](std::size_t index) { return data_.get()[index]; }
  const T& operator[](std::size_t index) const { return data_.get()[index]; }

 private:
  struct Free {
    std::size_t bytes = 0;
    void operator()(T* pointer) const {
      if (bytes <= kKeptBytes) {
        detail::block_cache().give(pointer, bytes);
      } else {
        std::free(pointer);
      }
    }
  };

  static std::unique_ptr<T, Free> allocate(std::size_t size) {
    if (size > (static_cast<std::size_t>(-1) - kAlignment) / sizeof(T)) throw std::bad_alloc();
    const std::size_t lines = (size * sizeof(T) + kAlignment - 1) / kAlignment;
    const std::size_t bytes = kAlignment * (lines == 0 ? 1 : lines);
    void* pointer = bytes <= kKeptBytes ? detail::block_cache().take(bytes) : nullptr;
    if (pointer == nullptr) pointer = std::aligned_alloc(kAlignment, bytes);
    if (pointer == nullptr) throw std::bad_alloc();
    return {static_cast<T*>(pointer), Free{bytes}};
  }

  std::size_t size_;
  std::unique_ptr<T, Free> data_;
};

}  // namespace fastweights::core
