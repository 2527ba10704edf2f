#include "batch_stream.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string_view>
#include <tuple>
#include <utility>

#include "fastweights/core/error.hpp"

namespace training {
namespace {

constexpr int64_t kShortestRepeat = 64;
constexpr int64_t kLongestRepeat = 256;
constexpr int64_t kNearestRepeat = 256;
constexpr int64_t kFarthestRepeat = 16384;
constexpr int64_t kHistory = kFarthestRepeat + kLongestRepeat;
constexpr int64_t kLine = 80;  // how far to look for a line's end

/// The first place after a line's end at or behind `place`, or `place` where no line ends nearby.
int64_t line_start(std::string_view text, int64_t place) {
  const size_t end = text.substr(place, kLine).find('\n');
  return end == std::string_view::npos ? place : place + static_cast<int64_t>(end) + 1;
}

at::Tensor bytes_tensor(const std::string& bytes) {
  at::Tensor tensor = at::empty({static_cast<int64_t>(bytes.size())}, at::kByte);
  if (!bytes.empty()) std::memcpy(tensor.data_ptr(), bytes.data(), bytes.size());
  return tensor;
}

const at::Tensor& find(const std::map<std::string, at::Tensor>& tensors, const std::string& name,
                       at::ScalarType type) {
  const auto found = tensors.find(name);
  if (found == tensors.end()) throw fastweights::StateMismatch("checkpoint: no tensor " + name);
  if (found->second.scalar_type() != type) {
    throw fastweights::StateMismatch("checkpoint: " + name + " must be " + at::toString(type) +
                                     ", got " + at::toString(found->second.scalar_type()));
  }
  return found->second;
}

}  // namespace

BatchStream::BatchStream(const std::vector<Work>& works, const StreamOptions& options)
    : works_(works), options_(options), random_(options.seed), rows_(options.rows) {
  for (Row& row : rows_) {
    start_work(row);
    const auto size = static_cast<int64_t>(works_[row.work].bytes.size());
    row.offset = line_start(works_[row.work].bytes, random_.below(size - 1));
    if (row.offset > size - 2) row.offset = 0;
  }
}

int64_t BatchStream::deal() {
  if (deck_.empty()) {
    deck_.resize(works_.size());
    std::iota(deck_.begin(), deck_.end(), 0);
    for (size_t i = deck_.size(); i > 1; --i) {
      std::swap(deck_[i - 1], deck_[random_.below(static_cast<int64_t>(i))]);
    }
  }
  const int64_t work = deck_.back();
  deck_.pop_back();
  return work;
}

void BatchStream::start_work(Row& row) { row = Row{deal(), 0, {}}; }

std::optional<BatchStream::Repeat> BatchStream::plan_repeat(const Row& row,
                                                            std::string_view ahead) {
  if (random_.uniform() >= options_.repeat_probability) return std::nullopt;
  const auto length = static_cast<int64_t>(ahead.size());
  const int64_t wanted = kShortestRepeat + random_.below(kLongestRepeat - kShortestRepeat + 1);
  const int64_t size = std::min(wanted, length / 2);
  const double octaves = std::log2(static_cast<double>(kFarthestRepeat) / kNearestRepeat);
  const auto distance =
      static_cast<int64_t>(std::exp2(octaves * random_.uniform()) * kNearestRepeat);
  const int64_t place = std::min(line_start(ahead, random_.below(length - size)), length - size);
  std::string read = row.history;
  read.append(ahead.substr(0, place));
  const auto end = static_cast<int64_t>(read.size());
  if (distance > end) return std::nullopt;  // the row has not read that far yet
  const int64_t from = std::min(line_start(read, end - distance), end - size);
  return Repeat{place, read.substr(from, size)};
}

std::string BatchStream::read(Row& row) {
  const std::string& bytes = works_[row.work].bytes;
  const std::string_view ahead = std::string_view(bytes).substr(row.offset, options_.segment);
  std::optional<Repeat> repeat;
  if (static_cast<int64_t>(ahead.size()) == options_.segment) repeat = plan_repeat(row, ahead);
  if (!repeat) {
    row.offset += static_cast<int64_t>(ahead.size());
    return std::string(ahead);
  }
  // What the passage pushes out of the segment is read in the next one.
  const int64_t kept = options_.segment - static_cast<int64_t>(repeat->passage.size());
  row.offset += kept;
  std::string text(ahead.substr(0, kept));
  return text.insert(repeat->place, repeat->passage);
}

Segment BatchStream::next() {
  const int64_t rows = options_.rows;
  const int64_t length = options_.segment;
  Segment segment{at::zeros({rows, length}, at::kLong),
                  at::full({rows, length}, kIgnored, at::kLong), at::zeros({rows}, at::kBool)};
  auto* inputs = segment.inputs.mutable_data_ptr<int64_t>();
  auto* targets = segment.targets.mutable_data_ptr<int64_t>();
  auto* fresh = segment.fresh.mutable_data_ptr<bool>();
  for (int64_t b = 0; b < rows; ++b, inputs += length, targets += length) {
    Row& row = rows_[b];
    if (row.offset >= static_cast<int64_t>(works_[row.work].bytes.size())) start_work(row);
    fresh[b] = row.history.empty() || random_.uniform() < options_.reset_probability;
    if (row.history.empty()) row.history.push_back(works_[row.work].bytes[row.offset++]);
    // A passage from before a reset could not be remembered.
    if (fresh[b]) row.history.erase(0, row.history.size() - 1);

    unsigned char last = row.history.back();
    const std::string text = read(row);
    for (size_t t = 0; t < text.size(); ++t) {
      inputs[t] = last;
      last = text[t];
      targets[t] = last;
    }
    segment.bytes += static_cast<int64_t>(text.size());
    row.history.append(text);
    if (row.history.size() > kHistory) row.history.erase(0, row.history.size() - kHistory);
  }
  return segment;
}

std::map<std::string, at::Tensor> BatchStream::save() const {
  at::Tensor places = at::empty({options_.rows, 3}, at::kLong);
  auto* place = places.mutable_data_ptr<int64_t>();
  std::string history;
  for (const Row& row : rows_) {
    *place++ = row.work;
    *place++ = row.offset;
    *place++ = static_cast<int64_t>(row.history.size());
    history += row.history;
  }
  return {{"stream.random", at::scalar_tensor(std::bit_cast<int64_t>(random_.state()), at::kLong)},
          {"stream.deck", at::tensor(deck_, at::kLong)},
          {"stream.places", places},
          {"stream.history", bytes_tensor(history)}};
}

void BatchStream::restore(const std::map<std::string, at::Tensor>& tensors) {
  const at::Tensor places = find(tensors, "stream.places", at::kLong).contiguous();
  const at::Tensor deck = find(tensors, "stream.deck", at::kLong).contiguous();
  const at::Tensor history = find(tensors, "stream.history", at::kByte).contiguous();
  const auto works = static_cast<int64_t>(works_.size());
  if (!places.sizes().equals({options_.rows, 3})) {
    throw fastweights::StateMismatch("checkpoint: stream.places must be [rows, 3] = [" +
                                     std::to_string(options_.rows) + ", 3]");
  }
  const auto* place = places.const_data_ptr<int64_t>();
  const auto* bytes = reinterpret_cast<const char*>(history.const_data_ptr<uint8_t>());
  int64_t left = history.numel();
  for (Row& row : rows_) {
    const auto [work, offset, size] = std::tuple(place[0], place[1], place[2]);
    if (work < 0 || work >= works || offset < 0 || size < 0 || size > left) {
      throw fastweights::StateMismatch("checkpoint: stream.places does not fit the texts");
    }
    row = Row{work, offset, std::string(bytes, size)};
    place += 3;
    bytes += size;
    left -= size;
  }
  deck_.assign(deck.const_data_ptr<int64_t>(), deck.const_data_ptr<int64_t>() + deck.numel());
  if (std::any_of(deck_.begin(), deck_.end(), [&](int64_t w) { return w < 0 || w >= works; })) {
    throw fastweights::StateMismatch("checkpoint: stream.deck does not fit the texts");
  }
  const auto state = find(tensors, "stream.random", at::kLong).item<int64_t>();
  random_ = Random(std::bit_cast<uint64_t>(state));
}

}  // namespace training
