#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "fastweights/session/session.hpp"

namespace fastweights::detail {

/// A session as it stood at one position of its log.
struct Checkpoint {
  std::int64_t position = 0;
  Place place;
  std::int64_t tensor_bytes = 0;
};

/// Checkpoints within a budget of bytes, 512 at most, in order of their positions. Copies share
/// them.
///
/// When there are more, one goes: that whose absence leaves the smallest gap, measured
/// against how far back the gap begins. So spacing grows in proportion to the distance from the
/// present. Of an exact store each checkpoint counts what the next one does not share: what it
/// keeps from being dropped.
class Journal {
 public:
  explicit Journal(std::int64_t budget) : budget_(budget) {}

  /// Adds a copy of a place as a checkpoint behind all others; one at the same position is kept as
  /// it is.
  void add(std::int64_t position, const Place& place);
  /// Drops those at which `keep(position)` is false.
  template <class Keep>
  void keep_if(Keep keep) {
    std::erase_if(checkpoints_, [&](const auto& each) { return !keep(each->position); });
    weigh_all();
  }
  /// The last one; null if there is none.
  const Checkpoint* last() const {
    return checkpoints_.empty() ? nullptr : checkpoints_.back().get();
  }

  std::int64_t budget() const { return budget_; }
  /// Bytes of all checkpoints; what copies of a session share is counted in each.
  std::int64_t bytes() const { return bytes_; }
  const std::vector<std::shared_ptr<const Checkpoint>>& checkpoints() const { return checkpoints_; }

 private:
  std::size_t least_needed() const;
  void weigh_all();
  void weigh(std::size_t i);

  std::int64_t budget_;
  std::int64_t bytes_ = 0;
  std::vector<std::int64_t> each_bytes_;
  std::vector<std::shared_ptr<const Checkpoint>> checkpoints_;
};

}  // namespace fastweights::detail
