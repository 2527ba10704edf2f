#include "fastweights/session/nearest_neighbours.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "exact_store_kernels.hpp"
#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/session/generator.hpp"
#include "option_checks.hpp"

namespace fastweights {
namespace {

using detail::kKeyGroup;
using detail::kKeyPage;
using detail::kKeySize;
using detail::kQueryBlock;

static_assert(NearestNeighbours::kPage == kKeyPage);

/// Queries that one thread takes through all pages together.
constexpr std::int64_t kTile = 64;

void check(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  detail::check_option("nearest_neighbours", name, value, least, most);
}

/// Random signs (Achlioptas 2003), divided by √size.
std::vector<float> random_signs(std::int64_t size, std::uint64_t seed) {
  Generator generator{.seed = seed};
  const auto magnitude = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  std::vector<float> matrix(static_cast<std::size_t>(size * kKeySize));
  for (float& value : matrix) value = generator.uniform() < 0.5 ? -magnitude : magnitude;
  return matrix;
}

/// The nearest entries that a search has seen so far. Nearer is the greater product, then the
/// greater number: an order without ties, that of integers with the product in the upper half.
class Nearest {
 public:
  explicit Nearest(std::int64_t count) : count_(static_cast<std::size_t>(count)) {
    found_.reserve(kSlack * count_);
  }

  /// Entries whose product is not above it are not among the nearest.
  std::int32_t limit() const { return limit_; }

  void offer(std::int32_t product, std::int64_t entry) {
    found_.push_back(std::int64_t{product} * kUnit + entry);
    if (found_.size() == kSlack * count_) shrink();
  }

  void merge(const Nearest& other) {
    for (const std::int64_t packed : other.found_) {
      found_.push_back(packed);
      if (found_.size() == kSlack * count_) shrink();
    }
  }

  std::vector<Neighbour> sorted(std::int64_t base) && {
    const auto end = found_.begin() + static_cast<std::ptrdiff_t>(std::min(count_, found_.size()));
    std::nth_element(found_.begin(), end, found_.end(), std::greater<>());
    std::sort(found_.begin(), end, std::greater<>());
    std::vector<Neighbour> out;
    out.reserve(count_);
    for (auto packed = found_.begin(); packed != end; ++packed) {
      out.push_back({base + (*packed & (kUnit - 1)), product_of(*packed)});
    }
    return out;
  }

  /// Entries of a search are counted from its first: fewer than this.
  static constexpr std::int64_t kUnit = std::int64_t{1} << 32;

 private:
  static constexpr std::size_t kSlack = 4;

  static std::int32_t product_of(std::int64_t packed) {
    return static_cast<std::int32_t>(packed >> 32);
  }

  void shrink() {
    const auto last = found_.begin() + static_cast<std::ptrdiff_t>(count_) - 1;
    std::nth_element(found_.begin(), last, found_.end(), std::greater<>());
    limit_ = product_of(*last) - 1;  // of equal ones, those to come may be more recent
    found_.resize(count_);
  }

  std::size_t count_;
  std::int32_t limit_ = std::numeric_limits<std::int32_t>::min();
  std::vector<std::int64_t> found_;
};

/// Entries [begin, end) of a query.
struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

/// A tile of queries on its way through the pages.
class Tile {
 public:
  Tile(const std::int8_t* queries, std::span<const Range> ranges, std::int64_t base,
       std::int64_t count)
      : queries_(queries), ranges_(ranges), base_(base) {
    for (std::size_t i = 0; i < ranges.size(); ++i) nearest_.emplace_back(count);
  }

  void scan(const std::int8_t* page, std::int64_t first) {
    const auto total = std::ssize(ranges_);
    for (std::int64_t q = 0; q < total; q += kQueryBlock) {
      const auto count = std::min(kQueryBlock, total - q);
      const auto end = ranges_[static_cast<std::size_t>(q + count - 1)].end;  // none ends later
      const auto entries = std::clamp<std::int64_t>(end - first, 0, kKeyPage);
      const auto groups = (entries + kKeyGroup - 1) / kKeyGroup;
      detail::multiply_keys(page, groups, queries_ + q * kKeySize, count, products_.data());
      for (std::int64_t i = 0; i < count; ++i) take(q + i, i, first);
    }
  }

  std::vector<Nearest>& nearest() { return nearest_; }

 private:
  void take(std::int64_t query, std::int64_t row, std::int64_t first) {
    const Range range = ranges_[static_cast<std::size_t>(query)];
    Nearest& nearest = nearest_[static_cast<std::size_t>(query)];
    const std::int32_t* products = products_.data() + row * kKeyPage;
    const auto end = std::clamp<std::int64_t>(range.end - first, 0, kKeyPage);
    auto i = std::clamp<std::int64_t>(range.begin - first, 0, end);
    while ((i = detail::find_above(products, i, end, nearest.limit())) < end) {
      nearest.offer(products[i], first - base_ + i);
      ++i;
    }
  }

  const std::int8_t* queries_;
  std::span<const Range> ranges_;
  std::int64_t base_;
  std::vector<Nearest> nearest_;
  core::AlignedBuffer<std::int32_t> products_{kQueryBlock * kKeyPage};
};

std::int64_t divide_up(std::int64_t value, std::int64_t by) { return (value + by - 1) / by; }

}  // namespace

NearestNeighbours::NearestNeighbours(std::int64_t hidden_size, std::int64_t vocabulary_size,
                                     const NearestNeighboursOptions& options)
    : hidden_size_(hidden_size),
      options_(options),
      pages_(0),
      keys_(kPage * kKeySize),
      tokens_(std::max<std::int64_t>(vocabulary_size, 1), kPage) {
  check("hidden_size", hidden_size, 1, std::int64_t{1} << 24);
  check("vocabulary_size", vocabulary_size, 1, std::int64_t{1} << 31);
  check("count", options.count, 1, 1024);
  check("bytes", options.bytes, 0, std::numeric_limits<std::int64_t>::max());
  pages_ = std::clamp<std::int64_t>(options.bytes / (kPage * (kKeySize + tokens_.token_bytes())), 1,
                                    Nearest::kUnit / kPage / 2);
  projection_ = Shared(random_signs(hidden_size, options.seed));
}

NeighbourKeys NearestNeighbours::make_keys(std::span<const float> hidden,
                                           const core::Executor& executor) const {
  const auto count = std::ssize(hidden) / hidden_size_;
  NeighbourKeys keys;
  keys.numbers.resize(static_cast<std::size_t>(count * kKeySize));
  keys.usable.resize(static_cast<std::size_t>(count));
  executor.run(divide_up(count, kTile), [&](std::int64_t tile) {
    for (auto t = tile * kTile; t < std::min(count, (tile + 1) * kTile); ++t) {
      keys.usable[static_cast<std::size_t>(t)] =
          detail::make_key(hidden.data() + t * hidden_size_, projection_->data(), hidden_size_,
                           keys.numbers.data() + t * kKeySize);
    }
  });
  return keys;
}

void NearestNeighbours::append(std::span<const std::int8_t> key, std::int64_t token) {
  const std::int64_t entry = size();
  tokens_.push_back(token);
  keys_.resize(divide_up(entry + 1, kPage) * kPage * kKeySize);
  std::int8_t* page = keys_.edit_page(entry / kPage);
  for (std::int64_t i = 0; i < kKeySize; ++i) {
    page[detail::key_offset(entry % kPage, i)] = key[static_cast<std::size_t>(i)];
  }
}

/// The first entry that the budget leaves of `size`: the last `pages_` pages stay.
std::int64_t NearestNeighbours::begin_at(std::int64_t size) const {
  return std::max<std::int64_t>(0, divide_up(size, kPage) - pages_) * kPage;
}

void NearestNeighbours::drop_old() {
  const std::int64_t page = begin_at(size()) / kPage;
  keys_.drop_before(page);
  tokens_.drop_before(page);
}

std::vector<std::vector<Neighbour>> NearestNeighbours::find(std::span<const std::int8_t> keys,
                                                            std::span<const std::int64_t> ends,
                                                            const core::Executor& executor) const {
  const auto count = std::ssize(ends);
  std::vector<Range> ranges;
  for (const std::int64_t end : ends) ranges.push_back({std::max(begin_at(end), begin()), end});
  const std::int64_t tiles = divide_up(count, kTile);
  // Few queries: the threads share the pages.
  const std::int64_t parts = tiles < executor.threads ? executor.threads : 1;
  std::vector<std::vector<Nearest>> partial(static_cast<std::size_t>(tiles * parts));
  executor.run(tiles * parts, [&](std::int64_t task) {
    const auto first = task / parts * kTile;
    const auto part = task % parts;
    const auto queries = std::min(kTile, count - first);
    const auto mine = std::span(ranges).subspan(static_cast<std::size_t>(first),
                                                static_cast<std::size_t>(queries));
    Tile tile(keys.data() + first * kKeySize, mine, begin(), options_.count);
    const std::int64_t low = mine.front().begin / kPage;
    const std::int64_t pages = divide_up(mine.back().end, kPage) - low;
    // The nearest are mostly recent: from the last page on, few are taken in vain.
    for (auto page = low + pages * (part + 1) / parts; page-- > low + pages * part / parts;) {
      tile.scan(keys_.page(page), page * kPage);
    }
    partial[static_cast<std::size_t>(task)] = std::move(tile.nearest());
  });
  std::vector<std::vector<Neighbour>> found(static_cast<std::size_t>(count));
  executor.run(tiles, [&](std::int64_t tile) {
    for (auto t = tile * kTile; t < std::min(count, (tile + 1) * kTile); ++t) {
      const auto of_part = [&](std::int64_t part) -> Nearest& {
        return partial[static_cast<std::size_t>(tile * parts + part)]
                      [static_cast<std::size_t>(t % kTile)];
      };
      Nearest& nearest = of_part(0);
      for (std::int64_t part = 1; part < parts; ++part) nearest.merge(of_part(part));
      found[static_cast<std::size_t>(t)] = std::move(nearest).sorted(begin());
    }
  });
  return found;
}

std::vector<std::int8_t> NearestNeighbours::key(std::int64_t entry) const {
  std::vector<std::int8_t> key(kKeySize);
  const std::int8_t* page = keys_.page(entry / kPage);
  for (std::int64_t i = 0; i < kKeySize; ++i) {
    key[static_cast<std::size_t>(i)] = page[detail::key_offset(entry % kPage, i)];
  }
  return key;
}

void NearestNeighbours::truncate(std::int64_t size) {
  if (size < 0 || size > this->size()) {
    throw Error("nearest_neighbours: can go back to [0, " + std::to_string(this->size()) +
                "] entries, not to " + std::to_string(size));
  }
  if (begin_at(size) < begin()) {
    throw Error("nearest_neighbours: the entries from " + std::to_string(begin_at(size)) + " to " +
                std::to_string(begin()) + ", which there were at " + std::to_string(size) +
                ", have been dropped since");
  }
  tokens_.resize(size);
  keys_.resize(divide_up(size, kPage) * kPage * kKeySize);
  drop_old();
}

bool NearestNeighbours::extend_back(const NearestNeighbours& earlier) {
  // Keys fill their last page, so that its tokens tell whether it is whole.
  return tokens_.extend_back(earlier.tokens_) && keys_.extend_back(earlier.keys_);
}

void NearestNeighbours::start_at(std::int64_t begin) {
  if (size() != 0 || begin < 0 || begin % kPage != 0 || begin > (std::int64_t{1} << 48)) {
    throw Error("nearest_neighbours: the entries cannot begin at " + std::to_string(begin));
  }
  keys_.start_at(begin / kPage);
  tokens_.start_at(begin / kPage);
}

}  // namespace fastweights
