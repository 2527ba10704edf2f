#pragma once

#include <atomic>
#include <memory>
#include <utility>

namespace fastweights {

namespace detail {

/// Whether nobody else refers to the value. What others read of it before they let go is done then.
template <class T>
bool is_alone(const std::shared_ptr<T>& value) {
  if (value.use_count() > 1) return false;
  std::atomic_thread_fence(std::memory_order_acquire);
  return true;
}

/// The value behind `pointer`, after making it one's own: a copy is made if others have it too.
template <class T>
T& own(std::shared_ptr<T>& pointer) {
  if (!is_alone(pointer)) pointer = std::make_shared<T>(*pointer);
  return *pointer;
}

}  // namespace detail

/// A value that copies share until one of them changes it. One copy is used by one thread at a
/// time; different copies may be used by different threads.
template <class T>
class Shared {
 public:
  Shared() : value_(std::make_shared<T>()) {}
  explicit Shared(T value) : value_(std::make_shared<T>(std::move(value))) {}

  const T& operator*() const { return *value_; }
  const T* operator->() const { return value_.get(); }

  /// The value to be changed: a copy of its own where others share it.
  T& edit() { return detail::own(value_); }

 private:
  std::shared_ptr<T> value_;
};

}  // namespace fastweights
