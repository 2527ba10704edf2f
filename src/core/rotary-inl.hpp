// Rotary position embedding. Per-target include guard.
#if defined(FASTWEIGHTS_CORE_ROTARY_INL_HPP_) == defined(HWY_TARGET_TOGGLE)
#ifdef FASTWEIGHTS_CORE_ROTARY_INL_HPP_
#undef FASTWEIGHTS_CORE_ROTARY_INL_HPP_
#else
#define FASTWEIGHTS_CORE_ROTARY_INL_HPP_
#endif

#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "fastweights/core/executor.hpp"

HWY_BEFORE_NAMESPACE();
namespace fastweights::core::HWY_NAMESPACE {

/// Cosines and sines of one token, [pairs] each.
template <class Real>
struct Angles {
  const Real* cosine;
  const Real* sine;
};

/// The angles of every token of every row. Rows that stand at the same position share theirs. The
/// angles are sums, exact to fp64, of that of a block's first token and that within the block.
template <class Real>
class RotaryTable {
 public:
  RotaryTable(const std::int64_t* position, std::int64_t batch, std::int64_t tokens,
              std::int64_t size, double base, const Executor& executor)
      : tokens_(tokens), pairs_(size / 4), table_of_row_(static_cast<std::size_t>(batch)) {
    for (std::int64_t i = 0; i < pairs_; ++i) {
      frequency_.push_back(std::pow(base, -static_cast<double>(i) / static_cast<double>(pairs_)));
    }
    share_rows(position, batch);
    fill_within();
    data_.resize(positions_.size() * static_cast<std::size_t>(tokens * pairs_ * 2));
    const auto blocks = (tokens + kBlock - 1) / kBlock;
    executor.run(static_cast<std::int64_t>(positions_.size()) * blocks,
                 [&](std::int64_t task) { fill_block(task / blocks, task % blocks); });
  }

  Angles<Real> at(std::int64_t row, std::int64_t token) const {
    const auto table = table_of_row_[static_cast<std::size_t>(row)];
    const Real* cosine = data_.data() + (table * tokens_ + token) * pairs_ * 2;
    return {cosine, cosine + pairs_};
  }
  std::int64_t pairs() const { return pairs_; }

 private:
  static constexpr std::int64_t kBlock = 64;

  void share_rows(const std::int64_t* position, std::int64_t batch) {
    for (std::int64_t row = 0; row < batch; ++row) {
      const auto found = std::find(positions_.begin(), positions_.end(), position[row]);
      table_of_row_[static_cast<std::size_t>(row)] = found - positions_.begin();
      if (found == positions_.end()) positions_.push_back(position[row]);
    }
  }

  void fill_within() {
    for (std::int64_t token = 0; token < std::min(tokens_, kBlock); ++token) {
      for (const double frequency : frequency_) {
        within_.push_back(std::cos(static_cast<double>(token) * frequency));
        within_.push_back(std::sin(static_cast<double>(token) * frequency));
      }
    }
  }

  void fill_block(std::int64_t table, std::int64_t block) {
    const auto begin = block * kBlock;
    const auto end = std::min(tokens_, begin + kBlock);
    const auto first = static_cast<double>(positions_[static_cast<std::size_t>(table)] + begin);
    for (std::int64_t i = 0; i < pairs_; ++i) {
      const double angle = first * frequency_[static_cast<std::size_t>(i)];
      const double c = std::cos(angle);
      const double s = std::sin(angle);
      for (std::int64_t token = begin; token < end; ++token) {
        const double* within = within_.data() + ((token - begin) * pairs_ + i) * 2;
        Real* out = data_.data() + (table * tokens_ + token) * pairs_ * 2 + i;
        out[0] = static_cast<Real>(c * within[0] - s * within[1]);
        out[pairs_] = static_cast<Real>(s * within[0] + c * within[1]);
      }
    }
  }

  std::int64_t tokens_, pairs_;
  std::vector<std::int64_t> table_of_row_;
  std::vector<std::int64_t> positions_;  // one per table
  std::vector<double> frequency_;
  std::vector<double> within_;  // [block, pairs, 2]
  std::vector<Real> data_;      // [tables, tokens, 2, pairs]
};

/// Turns the pairs (row[i], row[i + pairs]) by their angles.
template <class Real>
void rotate(Real* HWY_RESTRICT row, const Angles<Real>& angles, std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    const Real a = row[i];
    const Real b = row[i + pairs];
    row[i] = a * angles.cosine[i] - b * angles.sine[i];
    row[i + pairs] = b * angles.cosine[i] + a * angles.sine[i];
  }
}

template <class Real>
void rotate_back(Real* HWY_RESTRICT row, const Angles<Real>& angles, std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    const Real a = row[i];
    const Real b = row[i + pairs];
    row[i] = a * angles.cosine[i] + b * angles.sine[i];
    row[i + pairs] = b * angles.cosine[i] - a * angles.sine[i];
  }
}

}  // namespace fastweights::core::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // per-target guard
