#include "fastweights/session/exact_store.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "exact_store_kernels.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/session/packed_tokens.hpp"

namespace fastweights {
namespace {

// ---- buckets -----------------------------------------------------------------------------------

/// The least match lengths of the buckets; bucket 0 has no match.
constexpr std::array<std::int64_t, 10> kLengths = {1, 8, 10, 12, 16, 20, 24, 32, 48, 64};
/// The same, coarsely.
constexpr std::array<std::int64_t, 3> kCoarseLengths = {1, 16, 32};
/// What a match of these lengths weighs at first, where the model weighs 1.
constexpr std::array<double, 11> kFirstMatchWeight = {.5, .3, .4, .6, 1, 2, 4, 8, 16, 32, 64};
constexpr std::array<double, 4> kFirstCoarseMatchWeight = {.5, .4, 2, 32};
constexpr double kFirstNeighbourWeight = 0.3;
/// The least probabilities that the model gives to an expert's best token; bucket 0 has none.
constexpr std::array<double, 4> kAgreements = {0.0, 0.03, 0.2, 0.6};
/// The least probabilities that the neighbours give to their best token; bucket 0 has none.
constexpr std::array<double, 6> kCertainties = {0.0, 0.3, 0.5, 0.7, 0.9, 0.97};
/// The least cosines; bucket 0 has no neighbours or none so near.
constexpr std::array<double, 7> kSimilarities = {0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98};

/// Classes of a list of limits.
template <class T, std::size_t kCount>
constexpr std::size_t classes(const std::array<T, kCount>&) {
  return kCount + 1;
}

// Two tables: what the match is, and what the neighbours are.
constexpr std::size_t kPerLength = classes(kAgreements) * classes(kCertainties);
constexpr std::size_t kMatchBuckets = classes(kLengths) * kPerLength;
constexpr std::size_t kPerCoarseLength =
    classes(kCertainties) * classes(kAgreements) * classes(kSimilarities);
constexpr std::size_t kNeighbourBuckets = classes(kCoarseLengths) * kPerCoarseLength;

/// How many of the limits are at most `value`.
template <class T, std::size_t kCount>
std::size_t rank(const std::array<T, kCount>& limits, T value) {
  return static_cast<std::size_t>(std::upper_bound(limits.begin(), limits.end(), value) -
                                  limits.begin());
}

Mixture::Bucket first_bucket(double match) {
  const double sum = 1.0 + kFirstNeighbourWeight + match;
  return {{static_cast<float>(1.0 / sum), static_cast<float>(kFirstNeighbourWeight / sum),
           static_cast<float>(match / sum)},
          0.0f};
}

std::vector<Mixture::Bucket> first_buckets() {
  std::vector<Mixture::Bucket> buckets;
  for (std::size_t i = 0; i < kMatchBuckets; ++i) {
    buckets.push_back(first_bucket(kFirstMatchWeight[i / kPerLength]));
  }
  for (std::size_t i = 0; i < kNeighbourBuckets; ++i) {
    buckets.push_back(first_bucket(kFirstCoarseMatchWeight[i / kPerCoarseLength]));
  }
  return buckets;
}

// ---- votes -------------------------------------------------------------------------------------

/// Where the token's vote stands among votes in the order of their tokens, or would.
template <class Votes>
auto place_of(Votes& votes, std::int64_t token) {
  return std::lower_bound(votes.begin(), votes.end(), token,
                          [](const Vote& vote, std::int64_t t) { return vote.token < t; });
}

/// Of each token once, in the order of the tokens, with the sum 1.
std::vector<Vote> gathered(std::span<const Vote> votes) {
  std::vector<Vote> out;
  double sum = 0.0;
  for (const Vote& vote : votes) {
    sum += vote.probability;
    const auto place = place_of(out, vote.token);
    if (place != out.end() && place->token == vote.token) {
      place->probability += vote.probability;
    } else {
      out.insert(place, vote);
    }
  }
  for (Vote& vote : out) vote.probability /= sum;
  return out;
}

double probability_of(std::span<const Vote> votes, std::int64_t token) {
  const auto found = place_of(votes, token);
  return found != votes.end() && found->token == token ? found->probability : 0.0;
}

double model_probability(std::span<const float> logits, float log_sum, std::int64_t token) {
  return std::exp(static_cast<double>(logits[static_cast<std::size_t>(token)]) -
                  static_cast<double>(log_sum));
}

const Vote& best_of(std::span<const Vote> votes) {
  return *std::max_element(votes.begin(), votes.end(), [](const Vote& a, const Vote& b) {
    return a.probability < b.probability;
  });
}

std::array<bool, Mixture::kExperts> present(const Recall& recall) {
  return {true, !recall.neighbours.empty(), !recall.match.empty()};
}

// ---- the stored form ---------------------------------------------------------------------------

constexpr std::size_t kOptionFields = 7;

template <class T>
StoredTensor stored(const char* name, io::ScalarType type, std::vector<std::int64_t> shape,
                    std::span<const T> values) {
  StoredTensor tensor{name, type, std::move(shape), std::vector<std::byte>(values.size_bytes())};
  if (!values.empty()) std::memcpy(tensor.bytes.data(), values.data(), values.size_bytes());
  return tensor;
}

/// The shape of so many numbers in rows of `columns`.
std::vector<std::int64_t> rows(std::size_t size, std::int64_t columns) {
  return {static_cast<std::int64_t>(size) / columns, columns};
}

StoredTensor stored_matches(std::span<const TextMatch> matches) {
  std::vector<std::int64_t> numbers;
  for (const TextMatch& match : matches) {
    numbers.insert(numbers.end(), {match.position, match.length});
  }
  return stored<std::int64_t>("store.matches", io::ScalarType::I64, rows(numbers.size(), 2),
                              numbers);
}

StoredTensor stored_mixture(const Mixture& mixture) {
  std::vector<float> numbers;
  for (const Mixture::Bucket& bucket : mixture.buckets()) {
    numbers.insert(numbers.end(), bucket.weights.begin(), bucket.weights.end());
    numbers.push_back(bucket.seen);
  }
  return stored<float>("store.mixture", io::ScalarType::F32, rows(numbers.size(), 4), numbers);
}

[[noreturn]] void refuse(const std::string& what) { throw FileError("exact store: " + what); }

/// A tensor of that name, type and number of columns, as a list of its elements.
template <class T>
std::vector<T> taken(std::span<const io::TensorData> tensors, const std::string& name,
                     io::ScalarType type, std::int64_t columns) {
  const auto found = std::ranges::find(tensors, name, &io::TensorData::name);
  const bool fits = found != tensors.end() && found->type == type && found->shape.size() == 2 &&
                    found->shape[0] >= 0 && found->shape[1] == columns &&
                    found->bytes.size() == io::byte_count(type, found->shape);
  if (!fits) {
    refuse("tensor " + name + " must be there as " + std::string(io::scalar_type_name(type)) +
           " [N, " + std::to_string(columns) + "] with the bytes of its shape");
  }
  std::vector<T> values(found->bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), found->bytes.data(), found->bytes.size());
  return values;
}

/// The same with so many rows.
template <class T>
std::vector<T> taken_rows(std::span<const io::TensorData> tensors, const std::string& name,
                          io::ScalarType type, std::size_t rows, std::int64_t columns) {
  std::vector<T> values = taken<T>(tensors, name, type, columns);
  const std::size_t size = rows * static_cast<std::size_t>(columns);
  if (values.size() != size) {
    refuse("tensor " + name + " must have " + std::to_string(rows) + " rows, got " +
           std::to_string(values.size() / static_cast<std::size_t>(columns)));
  }
  return values;
}

std::vector<std::int64_t> unpacked(std::span<const std::uint8_t> packed, std::int64_t width) {
  std::vector<std::int64_t> tokens(packed.size() / static_cast<std::size_t>(width));
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = detail::load_token(packed.data() + i * static_cast<std::size_t>(width), width);
  }
  return tokens;
}

void pack(std::int64_t token, std::int64_t width, std::vector<std::uint8_t>& out) {
  out.resize(out.size() + static_cast<std::size_t>(width));
  detail::store_token(token, width, out.data() + out.size() - static_cast<std::size_t>(width));
}

}  // namespace

ExactStore::ExactStore(std::int64_t hidden_size, std::int64_t vocabulary_size,
                       const ExactStoreOptions& options)
    : options_(options),
      vocabulary_size_(vocabulary_size),
      match_(vocabulary_size, options.match),
      neighbours_(hidden_size, vocabulary_size, options.neighbours),
      mixture_(first_buckets(), {.rate = options.rate}) {
  if (!(options.temperature > 0.0) || !std::isfinite(options.temperature)) {
    throw Error("exact_store: temperature must be positive and finite, got " +
                std::to_string(options.temperature));
  }
  if (!(options.recency >= 0.0) || !std::isfinite(options.recency)) {
    throw Error("exact_store: recency must be at least 0 and finite, got " +
                std::to_string(options.recency));
  }
  if (!(options.rate > 0.0 && options.rate <= 1.0)) {
    throw Error("exact_store: rate must be in (0, 1], got " + std::to_string(options.rate));
  }
}

// ---- recalling ---------------------------------------------------------------------------------

/// A match counts e^½ times more for each token, up to 32.
void ExactStore::add_matches(Recall& recall) const {
  std::vector<Vote> votes;
  for (const TextMatch& match : match_.matches()) {
    const auto length = static_cast<double>(std::min<std::int64_t>(match.length, 32));
    votes.push_back({match_.token(match.position), std::exp(0.5 * (length - 32.0))});
    recall.match_length = std::max(recall.match_length, match.length);
  }
  recall.match = gathered(votes);
}

/// Neighbours among the first `end` entries.
void ExactStore::add_neighbours(Recall& recall, std::span<const Neighbour> found,
                                std::int64_t end) const {
  if (found.empty()) return;
  const auto cosine = [](const Neighbour& neighbour) {
    return static_cast<double>(neighbour.product) / NearestNeighbours::kScale;
  };
  recall.similarity = cosine(found.front());
  std::vector<Vote> votes;
  for (const Neighbour& neighbour : found) {
    const double distance = cosine(neighbour) - recall.similarity;
    const double log_age = std::log(static_cast<double>(end - neighbour.entry));
    votes.push_back({neighbours_.token(neighbour.entry),
                     std::exp(distance / options_.temperature - options_.recency * log_age)});
  }
  recall.neighbours = gathered(votes);
}

Recall ExactStore::recall(std::span<const float> hidden, const core::Executor& executor) const {
  if (std::ssize(hidden) != hidden_size()) {
    throw ShapeError("exact_store: hidden must have " + std::to_string(hidden_size()) +
                     " numbers, got " + std::to_string(hidden.size()));
  }
  Recall recall;
  add_matches(recall);
  if (options_.neighbours.bytes == 0) return recall;
  NeighbourKeys keys = neighbours_.make_keys(hidden, executor);
  if (keys.usable[0] == 0) return recall;
  const std::array<std::int64_t, 1> ends = {neighbours_.size()};
  add_neighbours(recall, neighbours_.find(keys.numbers, ends, executor)[0], ends[0]);
  recall.key = std::move(keys.numbers);
  return recall;
}

// ---- mixing ------------------------------------------------------------------------------------

ExactStore::Buckets ExactStore::buckets(const Recall& recall, std::span<const float> logits,
                                        float log_sum) const {
  const auto agreement = [&](std::span<const Vote> votes) {
    if (votes.empty()) return std::size_t{0};
    return rank(kAgreements, model_probability(logits, log_sum, best_of(votes).token));
  };
  const auto& near = recall.neighbours;
  const std::size_t certainty = near.empty() ? 0 : rank(kCertainties, best_of(near).probability);
  const std::size_t match =
      (rank(kLengths, recall.match_length) * classes(kAgreements) + agreement(recall.match)) *
          classes(kCertainties) +
      certainty;
  const std::size_t neighbours =
      ((rank(kCoarseLengths, recall.match_length) * classes(kCertainties) + certainty) *
           classes(kAgreements) +
       agreement(near)) *
          classes(kSimilarities) +
      rank(kSimilarities, recall.similarity);
  return {match, kMatchBuckets + neighbours};
}

void ExactStore::mix(const Recall& recall, std::span<const float> logits, float log_sum,
                     std::span<float> out) const {
  Mixture::Weights weights{};
  for (const std::size_t bucket : buckets(recall, logits, log_sum)) {
    const auto part = mixture_.weights(bucket, present(recall));
    for (std::size_t i = 0; i < weights.size(); ++i) weights[i] += 0.5 * part[i];
  }
  const auto shift = static_cast<float>(std::log(weights[0])) - log_sum;
  detail::add_to_all(logits.data(), shift, vocabulary_size_, out.data());
  const auto speak = [&](const Vote& vote) {
    const double p = weights[0] * model_probability(logits, log_sum, vote.token) +
                     weights[1] * probability_of(recall.neighbours, vote.token) +
                     weights[2] * probability_of(recall.match, vote.token);
    out[static_cast<std::size_t>(vote.token)] = static_cast<float>(std::log(p));
  };
  std::for_each(recall.neighbours.begin(), recall.neighbours.end(), speak);
  std::for_each(recall.match.begin(), recall.match.end(), speak);
}

void ExactStore::mix(const Recall& recall, std::span<const float> logits,
                     std::span<float> out) const {
  if (std::ssize(logits) != vocabulary_size_ || std::ssize(out) != vocabulary_size_) {
    throw ShapeError("exact_store: logits and out must have " + std::to_string(vocabulary_size_) +
                     " numbers, got " + std::to_string(logits.size()) + " and " +
                     std::to_string(out.size()));
  }
  mix(recall, logits, detail::log_sum_exp(logits.data(), vocabulary_size_), out);
}

void ExactStore::learn(std::int64_t token, const Recall& recall, std::span<const float> logits,
                       float log_sum) {
  if (recall.match.empty() && recall.neighbours.empty()) return;
  const std::array<double, Mixture::kExperts> probabilities = {
      model_probability(logits, log_sum, token), probability_of(recall.neighbours, token),
      probability_of(recall.match, token)};
  for (const std::size_t bucket : buckets(recall, logits, log_sum)) {
    mixture_.learn(bucket, present(recall), probabilities);
  }
}

// ---- appending ---------------------------------------------------------------------------------

void ExactStore::check_token(std::int64_t token, float strength) const {
  if (token < 0 || token >= vocabulary_size_) {
    throw Error("exact_store: a token must be in [0, " + std::to_string(vocabulary_size_) +
                "), got " + std::to_string(token));
  }
  if (!(strength >= 0.0f)) {
    throw Error("exact_store: a strength must be at least 0, got " + std::to_string(strength));
  }
}

void ExactStore::append(std::int64_t token, const Recall& recall, std::span<const float> logits,
                        float strength) {
  check_token(token, strength);
  if (std::ssize(logits) != vocabulary_size_) {
    throw ShapeError("exact_store: logits must have " + std::to_string(vocabulary_size_) +
                     " numbers, got " + std::to_string(logits.size()));
  }
  const bool kept = strength > 0.0f;
  if (kept) learn(token, recall, logits, detail::log_sum_exp(logits.data(), vocabulary_size_));
  if (options_.match.bytes > 0) match_.append(token, kept);
  if (kept && !recall.key.empty()) {
    neighbours_.append(recall.key, token);
    neighbours_.drop_old();
  }
  ++size_;
}

void ExactStore::check_batch(const Batch& batch, std::span<const float> out) const {
  const std::size_t tokens = batch.tokens.size();
  const auto check = [&](const char* name, std::size_t got, std::size_t expected, bool optional) {
    if (got == expected || (optional && got == 0)) return;
    throw ShapeError("exact_store: " + std::string(name) + " must have " +
                     std::to_string(expected) + " numbers for " + std::to_string(tokens) +
                     " tokens, got " + std::to_string(got));
  };
  const auto vocabulary = static_cast<std::size_t>(vocabulary_size_);
  check("hidden", batch.hidden.size(), tokens * static_cast<std::size_t>(hidden_size()), false);
  check("logits", batch.logits.size(), tokens * vocabulary, false);
  check("strengths", batch.strengths.size(), tokens, true);
  check("out", out.size(), tokens * vocabulary, true);
  for (std::size_t t = 0; t < tokens; ++t) {
    check_token(batch.tokens[t], batch.strengths.empty() ? 1.0f : batch.strengths[t]);
  }
}

void ExactStore::read(const Batch& batch, std::span<float> out, const core::Executor& executor) {
  constexpr std::size_t kPart = 1024;
  check_batch(batch, out);
  const auto hidden = static_cast<std::size_t>(hidden_size());
  const auto vocabulary = static_cast<std::size_t>(vocabulary_size_);
  for (std::size_t t = 0; t < batch.tokens.size(); t += kPart) {
    const std::size_t count = std::min(kPart, batch.tokens.size() - t);
    const auto rows = [&](auto span, std::size_t size) {
      return span.empty() ? span : span.subspan(t * size, count * size);
    };
    read_part({rows(batch.tokens, 1), rows(batch.hidden, hidden), rows(batch.logits, vocabulary),
               rows(batch.strengths, 1)},
              rows(out, vocabulary), executor);
  }
}

/// What a token needs of the others is found first, for all at once; what is left goes in order.
void ExactStore::read_part(const Batch& batch, std::span<float> out,
                           const core::Executor& executor) {
  const std::size_t count = batch.tokens.size();
  const auto vocabulary = static_cast<std::size_t>(vocabulary_size_);
  const auto kept = [&](std::size_t t) {
    return batch.strengths.empty() || batch.strengths[t] > 0.0f;
  };
  NeighbourKeys keys;
  std::vector<std::vector<Neighbour>> found(count);
  std::vector<std::int64_t> ends(count);
  if (options_.neighbours.bytes > 0) {
    keys = neighbours_.make_keys(batch.hidden, executor);
    for (std::size_t t = 0; t < count; ++t) {
      ends[t] = neighbours_.size();
      if (keys.usable[t] != 0 && kept(t)) {
        neighbours_.append(keys.key(static_cast<std::int64_t>(t)), batch.tokens[t]);
      }
    }
    found = neighbours_.find(keys.numbers, ends, executor);
  }
  std::vector<float> log_sums(count);
  constexpr std::size_t kRows = 64;
  executor.run(static_cast<std::int64_t>((count + kRows - 1) / kRows), [&](std::int64_t task) {
    const auto first = static_cast<std::size_t>(task) * kRows;
    for (std::size_t t = first; t < std::min(count, first + kRows); ++t) {
      log_sums[t] = detail::log_sum_exp(batch.logits.data() + t * vocabulary, vocabulary_size_);
    }
  });
  for (std::size_t t = 0; t < count; ++t) {
    const auto logits = batch.logits.subspan(t * vocabulary, vocabulary);
    Recall recall;
    add_matches(recall);
    if (!keys.usable.empty() && keys.usable[t] != 0) add_neighbours(recall, found[t], ends[t]);
    if (!out.empty()) mix(recall, logits, log_sums[t], out.subspan(t * vocabulary, vocabulary));
    if (kept(t)) learn(batch.tokens[t], recall, logits, log_sums[t]);
    if (options_.match.bytes > 0) match_.append(batch.tokens[t], kept(t));
  }
  neighbours_.drop_old();
  size_ += static_cast<std::int64_t>(count);
}

// ---- going back --------------------------------------------------------------------------------

ExactStore::Checkpoint ExactStore::checkpoint() const {
  const auto matches = match_.matches();
  return {
      size_,   match_.size(), match_.begin(), {matches.begin(), matches.end()}, neighbours_.size(),
      mixture_};
}

void ExactStore::rollback(const Checkpoint& checkpoint) {
  LongestMatch match = match_;
  match.truncate(checkpoint.text, checkpoint.text_begin, checkpoint.matches);
  neighbours_.truncate(checkpoint.entries);
  match_ = std::move(match);
  mixture_ = checkpoint.mixture;
  size_ = checkpoint.size;
}

bool ExactStore::extend_back(const ExactStore& earlier) {
  ExactStore wider = *this;
  if (!wider.match_.extend_back(earlier.match_)) return false;
  if (!wider.neighbours_.extend_back(earlier.neighbours_)) return false;
  *this = std::move(wider);
  return true;
}

// ---- the stored form ---------------------------------------------------------------------------

std::vector<StoredTensor> ExactStore::tensors() const {
  static_assert(std::endian::native == std::endian::little);
  const std::int64_t width = detail::token_bytes(vocabulary_size_);
  const std::array<std::int64_t, kOptionFields> options = {
      options_.match.shortest,   options_.match.longest,
      options_.match.candidates, options_.match.bytes,
      options_.neighbours.count, static_cast<std::int64_t>(options_.neighbours.seed),
      options_.neighbours.bytes};
  const std::array<double, 3> numbers = {options_.temperature, options_.rate, options_.recency};
  const std::array<std::int64_t, 5> sizes = {hidden_size(), vocabulary_size_, size_, match_.begin(),
                                             neighbours_.begin()};
  std::vector<std::uint8_t> text;
  for (std::int64_t t = match_.begin(); t < match_.size(); ++t) pack(match_.token(t), width, text);
  std::vector<std::int64_t> skipped;
  for (const auto& [begin, end] : match_.skipped()) skipped.insert(skipped.end(), {begin, end});
  std::vector<std::int8_t> keys;
  std::vector<std::uint8_t> values;
  for (std::int64_t entry = neighbours_.begin(); entry < neighbours_.size(); ++entry) {
    const std::vector<std::int8_t> key = neighbours_.key(entry);
    keys.insert(keys.end(), key.begin(), key.end());
    pack(neighbours_.token(entry), width, values);
  }
  using io::ScalarType;
  return {
      stored<std::int64_t>("store.options", ScalarType::I64, {1, kOptionFields}, options),
      stored<double>("store.temperature", ScalarType::F64, {1, 3}, numbers),
      stored<std::int64_t>("store.sizes", ScalarType::I64, {1, 5}, sizes),
      stored<std::uint8_t>("store.text", ScalarType::U8, rows(text.size(), width), text),
      stored<std::int64_t>("store.skipped", ScalarType::I64, rows(skipped.size(), 2), skipped),
      stored_matches(match_.matches()),
      stored<std::int8_t>("store.keys", ScalarType::I8, rows(keys.size(), detail::kKeySize), keys),
      stored<std::uint8_t>("store.values", ScalarType::U8, rows(values.size(), width), values),
      stored_mixture(mixture_),
  };
}

namespace {

using Tensors = std::span<const io::TensorData>;

/// Temperature, rate and recency. Stores of before the last of them have two numbers: all ages
/// counted alike.
std::vector<double> taken_numbers(Tensors tensors) {
  constexpr const char* kName = "store.temperature";
  const auto found = std::ranges::find(tensors, kName, &io::TensorData::name);
  const bool old = found != tensors.end() && found->shape == std::vector<std::int64_t>{1, 2};
  auto numbers = taken_rows<double>(tensors, kName, io::ScalarType::F64, 1, old ? 2 : 3);
  numbers.resize(3, 0.0);
  return numbers;
}

ExactStoreOptions taken_options(Tensors tensors) {
  const auto fields =
      taken_rows<std::int64_t>(tensors, "store.options", io::ScalarType::I64, 1, kOptionFields);
  const std::vector<double> numbers = taken_numbers(tensors);
  ExactStoreOptions options;
  options.match = {fields[0], fields[1], fields[2], fields[3]};
  options.neighbours = {fields[4], static_cast<std::uint64_t>(fields[5]), fields[6]};
  options.temperature = numbers[0];
  options.rate = numbers[1];
  options.recency = numbers[2];
  return options;
}

std::vector<TextMatch> taken_matches(Tensors tensors) {
  const auto places = taken<std::int64_t>(tensors, "store.matches", io::ScalarType::I64, 2);
  std::vector<TextMatch> matches;
  for (std::size_t i = 0; i < places.size(); i += 2) matches.push_back({places[i], places[i + 1]});
  return matches;
}

void take_match(Tensors tensors, std::int64_t begin, std::int64_t width, LongestMatch& match) {
  const auto text = taken<std::uint8_t>(tensors, "store.text", io::ScalarType::U8, width);
  const auto spans = taken<std::int64_t>(tensors, "store.skipped", io::ScalarType::I64, 2);
  std::vector<std::pair<std::int64_t, std::int64_t>> skipped;
  for (std::size_t i = 0; i < spans.size(); i += 2) skipped.emplace_back(spans[i], spans[i + 1]);
  match.restore(begin, unpacked(text, width), std::move(skipped), taken_matches(tensors));
}

void take_neighbours(Tensors tensors, std::int64_t begin, std::int64_t width,
                     std::int64_t vocabulary_size, NearestNeighbours& neighbours) {
  const auto values =
      unpacked(taken<std::uint8_t>(tensors, "store.values", io::ScalarType::U8, width), width);
  const auto keys = taken_rows<std::int8_t>(tensors, "store.keys", io::ScalarType::I8,
                                            values.size(), detail::kKeySize);
  if (std::ranges::find(keys, std::numeric_limits<std::int8_t>::min()) != keys.end()) {
    refuse("a number of a key must be at least -127");
  }
  neighbours.start_at(begin);
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (values[i] >= vocabulary_size) refuse("a value is no token of the vocabulary");
    neighbours.append(std::span(keys).subspan(i * detail::kKeySize, detail::kKeySize), values[i]);
  }
}

std::vector<Mixture::Bucket> taken_mixture(Tensors tensors) {
  const auto numbers = taken<float>(tensors, "store.mixture", io::ScalarType::F32, 4);
  std::vector<Mixture::Bucket> buckets;
  for (std::size_t i = 0; i < numbers.size(); i += 4) {
    buckets.push_back({{numbers[i], numbers[i + 1], numbers[i + 2]}, numbers[i + 3]});
  }
  return buckets;
}

/// Runs `work`; what it finds wrong is wrong with the tensors.
template <class Work>
auto or_refuse(Work work) {
  try {
    return work();
  } catch (const FileError&) {
    throw;
  } catch (const Error& error) {
    refuse(error.what());
  }
}

}  // namespace

ExactStore ExactStore::from_tensors(std::int64_t hidden_size, std::int64_t vocabulary_size,
                                    std::span<const io::TensorData> tensors) {
  const auto sizes = taken_rows<std::int64_t>(tensors, "store.sizes", io::ScalarType::I64, 1, 5);
  if (sizes[0] != hidden_size || sizes[1] != vocabulary_size) {
    throw StateMismatch("exact store: its hidden states and vocabulary have the sizes " +
                        std::to_string(sizes[0]) + " and " + std::to_string(sizes[1]) +
                        ", the model's " + std::to_string(hidden_size) + " and " +
                        std::to_string(vocabulary_size));
  }
  return or_refuse([&] {
    ExactStore store(hidden_size, vocabulary_size, taken_options(tensors));
    const std::int64_t width = detail::token_bytes(vocabulary_size);
    take_match(tensors, sizes[3], width, store.match_);
    take_neighbours(tensors, sizes[4], width, vocabulary_size, store.neighbours_);
    store.mixture_.restore(taken_mixture(tensors));
    store.size_ = sizes[2];
    store.check_sizes(store.checkpoint());
    return store;
  });
}

void ExactStore::check_sizes(const Checkpoint& checkpoint) const {
  const bool whole = checkpoint.text == (options_.match.bytes == 0 ? 0 : checkpoint.size);
  if (!whole || checkpoint.size < 0 || checkpoint.entries > checkpoint.size) {
    refuse("its parts do not belong to " + std::to_string(checkpoint.size) + " tokens");
  }
}

std::vector<StoredTensor> ExactStore::tensors(const Checkpoint& checkpoint) {
  const std::array<std::int64_t, 4> place = {checkpoint.size, checkpoint.text,
                                             checkpoint.text_begin, checkpoint.entries};
  return {stored<std::int64_t>("store.place", io::ScalarType::I64, {1, 4}, place),
          stored_matches(checkpoint.matches), stored_mixture(checkpoint.mixture)};
}

ExactStore::Checkpoint ExactStore::checkpoint_from_tensors(
    std::span<const io::TensorData> tensors) const {
  return or_refuse([&] {
    const auto place = taken_rows<std::int64_t>(tensors, "store.place", io::ScalarType::I64, 1, 4);
    Checkpoint checkpoint{place[0], place[1], place[2], taken_matches(tensors), place[3], mixture_};
    checkpoint.mixture.restore(taken_mixture(tensors));
    check_sizes(checkpoint);
    ExactStore then = *this;
    then.rollback(checkpoint);
    return checkpoint;
  });
}

}  // namespace fastweights
