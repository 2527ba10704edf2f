#include <algorithm>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "../core/executors.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/session/exact_store.hpp"
#include "fastweights/session/generator.hpp"

using fastweights::Error;
using fastweights::ExactStore;
using fastweights::ExactStoreOptions;
using fastweights::FileError;
using fastweights::Generator;
using fastweights::Recall;
using fastweights::ShapeError;
using fastweights::StateMismatch;
using fastweights::StoredTensor;
using fastweights::core::Executor;
using fastweights::core::serial_executor;
using fastweights::test::two_threads;
namespace io = fastweights::io;

namespace {

constexpr std::int64_t kHidden = 16;
constexpr std::int64_t kVocabulary = 11;

/// A text that repeats itself, and a model whose hidden states tell what comes next, a little.
struct Stream {
  explicit Stream(std::int64_t size, std::uint64_t seed = 1) {
    Generator generator{.seed = seed};
    const auto below = [&](std::int64_t limit) {
      return static_cast<std::int64_t>(generator.uniform() * static_cast<double>(limit));
    };
    while (std::ssize(tokens) < size) {
      const auto from = std::ssize(tokens) > 80 ? below(std::ssize(tokens) - 50) : 0;
      for (std::int64_t i = 0; i < 40; ++i) {
        const bool again = std::ssize(tokens) > 80 && from % 2 == 0;
        tokens.push_back(again ? tokens[static_cast<std::size_t>(from + i)] : below(kVocabulary));
      }
    }
    tokens.resize(static_cast<std::size_t>(size));
    for (std::int64_t t = 0; t < size; ++t) {
      for (std::int64_t i = 0; i < kHidden; ++i) {
        const bool meant = i == tokens[static_cast<std::size_t>(t)];
        hidden.push_back(static_cast<float>(generator.uniform() - 0.5 + (meant ? 0.7 : 0.0)));
      }
      for (std::int64_t v = 0; v < kVocabulary; ++v) {
        logits.push_back(static_cast<float>(2.0 * generator.uniform()));
      }
      strengths.push_back(t % 50 < 45 ? 1.0f : 0.0f);
    }
    std::fill_n(hidden.begin(), std::min<std::int64_t>(size, 1) * kHidden, 0.0f);
  }

  std::int64_t size() const { return std::ssize(tokens); }

  ExactStore::Batch batch(std::int64_t begin, std::int64_t end) const {
    const auto rows = [&](const auto& from, std::int64_t width) {
      return std::span(from).subspan(static_cast<std::size_t>(begin * width),
                                     static_cast<std::size_t>((end - begin) * width));
    };
    return {rows(tokens, 1), rows(hidden, kHidden), rows(logits, kVocabulary), rows(strengths, 1)};
  }

  std::vector<std::int64_t> tokens;
  std::vector<float> hidden;
  std::vector<float> logits;
  std::vector<float> strengths;
};

ExactStoreOptions small_options() {
  ExactStoreOptions options;
  options.match.shortest = 4;
  options.neighbours.count = 8;
  return options;
}

/// Budgets that the streams of these tests exceed.
ExactStoreOptions tight_options() {
  ExactStoreOptions options = small_options();
  options.match.bytes = 2 * 8 * 1024;
  options.neighbours.bytes = 3 * 256 * 65;
  return options;
}

/// Reads [begin, end) in batches of `step` tokens; returns log p of all tokens at each place.
std::vector<float> read(ExactStore& store, const Stream& stream, std::int64_t begin,
                        std::int64_t end, std::int64_t step,
                        const Executor& executor = serial_executor()) {
  std::vector<float> out;
  for (std::int64_t t = begin; t < end; t += step) {
    const auto stop = std::min(end, t + step);
    std::vector<float> part(static_cast<std::size_t>((stop - t) * kVocabulary));
    store.read(stream.batch(t, stop), part, executor);
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

/// The same token by token, with recall, mix and append.
std::vector<float> step(ExactStore& store, const Stream& stream, std::int64_t begin,
                        std::int64_t end, const Executor& executor = serial_executor()) {
  std::vector<float> out;
  for (std::int64_t t = begin; t < end; ++t) {
    const auto batch = stream.batch(t, t + 1);
    std::vector<float> row(kVocabulary);
    const Recall recall = store.recall(batch.hidden, executor);
    store.mix(recall, batch.logits, row);
    out.insert(out.end(), row.begin(), row.end());
    store.append(batch.tokens[0], recall, batch.logits, batch.strengths[0]);
  }
  return out;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool same(const ExactStore& a, const ExactStore& b) {
  const auto left = a.tensors();
  const auto right = b.tensors();
  return std::equal(left.begin(), left.end(), right.begin(), right.end(),
                    [](const StoredTensor& x, const StoredTensor& y) {
                      return x.name == y.name && x.type == y.type && x.shape == y.shape &&
                             x.bytes == y.bytes;
                    });
}

std::vector<io::TensorData> views(const std::vector<StoredTensor>& tensors) {
  std::vector<io::TensorData> views;
  for (const StoredTensor& tensor : tensors) views.push_back(tensor.view());
  return views;
}

ExactStore loaded(const std::vector<StoredTensor>& tensors) {
  return ExactStore::from_tensors(kHidden, kVocabulary, views(tensors));
}

}  // namespace

TEST_CASE("a store is the same in batches of any size, token by token, on any threads",
          "[exact_store]") {
  const Stream stream(5000);
  for (const auto& options : {small_options(), tight_options()}) {
    ExactStore stepped(kHidden, kVocabulary, options);
    const auto expected = step(stepped, stream, 0, stream.size());
    for (const std::int64_t size : {1, 7, 256, 1024, 1500, 5000}) {
      CAPTURE(size);
      ExactStore one(kHidden, kVocabulary, options);
      ExactStore two(kHidden, kVocabulary, options);
      CHECK(same_bits(read(one, stream, 0, stream.size(), size), expected));
      CHECK(same_bits(read(two, stream, 0, stream.size(), size, two_threads()), expected));
      CHECK(same(one, stepped));
      CHECK(same(two, stepped));
    }
    ExactStore threaded(kHidden, kVocabulary, options);
    CHECK(same_bits(step(threaded, stream, 0, 1500, two_threads()),
                    {expected.begin(), expected.begin() + 1500 * kVocabulary}));
  }
}

TEST_CASE("what a store predicts are probabilities, and better ones than the model's",
          "[exact_store]") {
  const Stream stream(6000);
  const auto bits = [&](const ExactStoreOptions& options) {
    ExactStore store(kHidden, kVocabulary, options);
    const auto out = read(store, stream, 0, stream.size(), 1024);
    double total = 0.0;
    for (std::int64_t t = 0; t < stream.size(); ++t) {
      double sum = 0.0;
      for (std::int64_t v = 0; v < kVocabulary; ++v) {
        sum += std::exp(static_cast<double>(out[static_cast<std::size_t>(t * kVocabulary + v)]));
      }
      REQUIRE(std::abs(sum - 1.0) < 1e-5);
      const auto token = stream.tokens[static_cast<std::size_t>(t)];
      total -= static_cast<double>(out[static_cast<std::size_t>(t * kVocabulary + token)]);
    }
    return total / std::log(2.0) / static_cast<double>(stream.size());
  };
  ExactStoreOptions none = small_options();
  none.match.bytes = 0;
  none.neighbours.bytes = 0;
  ExactStoreOptions match = small_options();
  match.neighbours.bytes = 0;
  ExactStoreOptions neighbours = small_options();
  neighbours.match.bytes = 0;
  const double model = bits(none);
  CHECK(bits(match) < model - 0.5);
  CHECK(bits(neighbours) < model - 0.2);
  CHECK(bits(small_options()) < bits(match) - 0.05);
}

TEST_CASE("an empty store says what the model says", "[exact_store]") {
  const ExactStore store(kHidden, kVocabulary);
  const Stream stream(3);
  const auto batch = stream.batch(2, 3);
  std::vector<float> out(kVocabulary);
  store.mix(store.recall(batch.hidden, serial_executor()), batch.logits, out);
  double sum = 0.0;
  for (const float logit : batch.logits) sum += std::exp(static_cast<double>(logit));
  for (std::size_t v = 0; v < out.size(); ++v) {
    CHECK(std::abs(static_cast<double>(out[v]) -
                   (static_cast<double>(batch.logits[v]) - std::log(sum))) < 1e-6);
  }
}

TEST_CASE("a passage is recalled at any distance", "[exact_store]") {
  Stream stream(9000, 3);
  for (auto& token : stream.tokens) token %= 5;
  Generator generator{.seed = 4};
  for (std::size_t i = 0; i < 60; ++i) {
    stream.tokens[100 + i] = 5 + static_cast<std::int64_t>(generator.uniform() * 6.0);
    stream.tokens[8900 + i] = stream.tokens[100 + i];
  }
  std::ranges::fill(stream.strengths, 1.0f);
  ExactStoreOptions options = small_options();
  options.neighbours.bytes = 0;
  ExactStore store(kHidden, kVocabulary, options);
  const auto out = read(store, stream, 0, stream.size(), 1024);
  for (std::size_t i = 20; i < 60; ++i) {
    const auto token = static_cast<std::size_t>(stream.tokens[8900 + i]);
    CHECK(out[(8900 + i) * kVocabulary + token] > std::log(0.8f));
  }
}

TEST_CASE("going back is never having gone on, bit for bit", "[exact_store]") {
  const Stream stream(4000);
  for (const std::int64_t place : {0, 1, 255, 1024, 1500, 3999}) {
    CAPTURE(place);
    ExactStore store(kHidden, kVocabulary, small_options());
    read(store, stream, 0, place, 300);
    const auto checkpoint = store.checkpoint();
    const ExactStore straight = store;
    read(store, stream, place, stream.size(), 300);
    CHECK(!same(store, straight));
    store.rollback(checkpoint);
    CHECK(same(store, straight));
    ExactStore other = straight;
    const Stream next(1500, 9);
    CHECK(same_bits(read(store, next, 0, 1500, 100), read(other, next, 0, 1500, 100)));
    CHECK(same(store, other));
  }
}

TEST_CASE("what was dropped since cannot be gone back to, but a copy can", "[exact_store]") {
  const Stream stream(6000);
  ExactStore store(kHidden, kVocabulary, tight_options());
  read(store, stream, 0, 3000, 500);
  const auto checkpoint = store.checkpoint();
  ExactStore copy = store;
  read(store, stream, 3000, 6000, 500);
  const auto before = store.tensors();
  CHECK_THROWS_AS(store.rollback(checkpoint), Error);
  CHECK(same(store, loaded(before)));
  const auto expected = read(copy, stream, 3000, 6000, 500);
  CHECK(same(copy, store));
  CHECK(store.bytes() < 40'000 + tight_options().match.bytes + tight_options().neighbours.bytes);
}

TEST_CASE("copies are independent", "[exact_store]") {
  const Stream stream(3000);
  ExactStore store(kHidden, kVocabulary, small_options());
  read(store, stream, 0, 2000, 500);
  const auto before = store.tensors();
  ExactStore left = store;
  ExactStore right = store;
  read(left, stream, 2000, 3000, 100);
  read(right, Stream(900, 5), 0, 900, 100);
  CHECK(same(store, loaded(before)));
  ExactStore again = store;
  read(again, stream, 2000, 3000, 1000);
  CHECK(same(again, left));
}

TEST_CASE("with a strength of 0 a token passes without a trace but its context", "[exact_store]") {
  Stream stream(2000);
  std::ranges::fill(stream.strengths, 0.0f);
  ExactStore store(kHidden, kVocabulary, small_options());
  read(store, stream, 0, stream.size(), 300);
  CHECK(store.size() == 2000);
  CHECK(store.neighbours().size() == 0);
  CHECK(store.match().matches().empty());
  const ExactStore fresh(kHidden, kVocabulary, small_options());
  CHECK(std::ranges::equal(store.mixture().buckets(), fresh.mixture().buckets()));
  CHECK(store.match().size() == 2000);
}

TEST_CASE("a store comes back from its tensors and goes on alike", "[exact_store]") {
  const Stream stream(5000);
  for (const auto& options : {small_options(), tight_options(), ExactStoreOptions{}}) {
    for (const std::int64_t size : {0, 1, 3300}) {
      ExactStore store(kHidden, kVocabulary, options);
      read(store, stream, 0, size, 1000);
      ExactStore again = loaded(store.tensors());
      CHECK(same(store, again));
      CHECK(same_bits(read(store, stream, size, 5000, 700), read(again, stream, size, 5000, 700)));
      CHECK(same(store, again));
    }
  }
}

TEST_CASE("tensors that are none of a store's are refused", "[exact_store]") {
  ExactStore store(kHidden, kVocabulary, small_options());
  read(store, Stream(1500), 0, 1500, 500);
  const auto good = store.tensors();
  CHECK_THROWS_AS(ExactStore::from_tensors(kHidden + 1, kVocabulary, views(good)), StateMismatch);
  CHECK_THROWS_AS(ExactStore::from_tensors(kHidden, kVocabulary + 1, views(good)), StateMismatch);

  const auto refused = [&](std::size_t index, auto change) {
    auto bad = good;
    change(bad[index]);
    CAPTURE(bad[index].name);
    CHECK_THROWS_AS(loaded(bad), Error);
  };
  for (std::size_t i = 0; i < good.size(); ++i) {
    refused(i, [](StoredTensor& tensor) { tensor.name += "x"; });
    refused(i, [](StoredTensor& tensor) { tensor.type = io::ScalarType::F16; });
    refused(i, [](StoredTensor& tensor) { tensor.shape.push_back(1); });
    refused(i, [](StoredTensor& tensor) { tensor.shape[0] += 1; });
    refused(i, [](StoredTensor& tensor) { tensor.shape[0] = -1; });
    refused(i, [](StoredTensor& tensor) { tensor.shape = {std::int64_t{1} << 62, 1 << 30}; });
    refused(i, [](StoredTensor& tensor) { tensor.bytes.push_back(std::byte{0}); });
    // Fewer rows of one part than of its neighbours.
    if (good[i].name == "store.skipped" || good[i].shape[0] == 0) continue;
    if (good[i].name == "store.matches") continue;  // fewer matches are a state, too
    refused(i, [](StoredTensor& tensor) {
      tensor.bytes.resize(tensor.bytes.size() / static_cast<std::size_t>(tensor.shape[0]) *
                          static_cast<std::size_t>(tensor.shape[0] - 1));
      --tensor.shape[0];
    });
  }
}

TEST_CASE("numbers of a stored store that mean nothing are refused", "[exact_store]") {
  ExactStore store(kHidden, kVocabulary, small_options());
  read(store, Stream(1500), 0, 1500, 500);
  const auto good = store.tensors();
  const auto refused = [&](const std::string& name, std::size_t index, auto value) {
    auto bad = good;
    const auto at = std::ranges::find(bad, name, &StoredTensor::name);
    std::memcpy(at->bytes.data() + index * sizeof(value), &value, sizeof(value));
    CAPTURE(name, index);
    CHECK_THROWS_AS(loaded(bad), Error);
  };
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  for (const std::int64_t absurd : {std::int64_t{-1}, kMost, -kMost}) {
    for (const std::size_t field : {0, 1, 2, 4}) refused("store.options", field, absurd);
    for (const std::size_t field : {2, 3, 4}) refused("store.sizes", field, absurd);
    refused("store.skipped", 0, absurd);
    refused("store.skipped", 1, absurd);
  }
  refused("store.options", 3, std::int64_t{-1});
  refused("store.options", 6, std::int64_t{-1});
  refused("store.sizes", 3, std::int64_t{1024});
  refused("store.sizes", 3, std::int64_t{7});
  refused("store.sizes", 4, std::int64_t{3});
  refused("store.temperature", 0, 0.0);
  refused("store.temperature", 0, std::numeric_limits<double>::quiet_NaN());
  refused("store.temperature", 1, 2.0);
  refused("store.temperature", 2, -1.0);
  refused("store.text", 5, static_cast<std::uint8_t>(kVocabulary));
  refused("store.values", 5, static_cast<std::uint8_t>(255));
  refused("store.keys", 100, std::int8_t{-128});
  refused("store.mixture", 8, -1.0f);
  refused("store.mixture", 11, std::numeric_limits<float>::infinity());
}

TEST_CASE("bytes that were altered at random are refused or harmless", "[exact_store]") {
  ExactStore store(kHidden, kVocabulary, small_options());
  read(store, Stream(1300), 0, 1300, 500);
  const auto good = store.tensors();
  const Stream next(60, 7);
  Generator generator{.seed = 11};
  int refused = 0;
  for (int i = 0; i < 300; ++i) {
    auto bad = good;
    auto& tensor = bad[static_cast<std::size_t>(generator.uniform() * 9.0)];
    if (tensor.bytes.empty()) continue;
    const auto at =
        static_cast<std::size_t>(generator.uniform() * static_cast<double>(tensor.bytes.size()));
    tensor.bytes[at] = static_cast<std::byte>(generator.uniform() * 256.0);
    try {
      ExactStore altered = loaded(bad);
      read(altered, next, 0, 60, 60);
    } catch (const Error&) {
      ++refused;
    }
  }
  CHECK(refused > 20);
}

TEST_CASE("a batch whose sizes do not agree is refused, and nothing is appended", "[exact_store]") {
  const Stream stream(50);
  ExactStore store(kHidden, kVocabulary, small_options());
  const auto batch = stream.batch(0, 50);
  const auto cut = [](auto span) { return span.first(span.size() - 1); };
  std::vector<float> out(50 * kVocabulary);
  const auto refuse = [&](const ExactStore::Batch& bad, std::span<float> to) {
    CHECK_THROWS_AS(store.read(bad, to, serial_executor()), Error);
    CHECK(store.size() == 0);
  };
  refuse({batch.tokens, cut(batch.hidden), batch.logits, batch.strengths}, out);
  refuse({batch.tokens, batch.hidden, cut(batch.logits), batch.strengths}, out);
  refuse({batch.tokens, batch.hidden, batch.logits, cut(batch.strengths)}, out);
  refuse(batch, cut(std::span(out)));
  auto tokens = stream.tokens;
  tokens.back() = kVocabulary;
  refuse({tokens, batch.hidden, batch.logits, {}}, out);
  auto strengths = stream.strengths;
  strengths[3] = std::numeric_limits<float>::quiet_NaN();
  refuse({batch.tokens, batch.hidden, batch.logits, strengths}, out);
  store.read(batch, {}, serial_executor());
  CHECK(store.size() == 50);
  CHECK_THROWS_AS(store.recall(cut(batch.hidden), serial_executor()), ShapeError);
  CHECK_THROWS_AS(store.mix({}, cut(batch.logits), out), ShapeError);
}

TEST_CASE("of equal neighbours the recent ones count more", "[exact_store]") {
  for (const double recency : {0.0, 0.5, 1.0}) {
    ExactStoreOptions options = small_options();
    options.recency = recency;
    ExactStore store(kHidden, kVocabulary, options);
    const std::vector<float> logits(kVocabulary, 0.0f);
    const auto meaning = [](std::size_t what) {
      std::vector<float> hidden(kHidden, 0.0f);
      hidden[what] = 1.0f;
      return hidden;
    };
    const auto append = [&](std::int64_t token, std::size_t what) {
      store.append(token, store.recall(meaning(what), serial_executor()), logits, 1.0f);
    };
    append(1, 0);
    for (int i = 0; i < 98; ++i) append(2, 1);
    append(3, 0);
    double old = 0.0;
    double recent = 0.0;
    for (const auto& vote : store.recall(meaning(0), serial_executor()).neighbours) {
      if (vote.token == 1) old = vote.probability;
      if (vote.token == 3) recent = vote.probability;
    }
    CHECK(std::abs(recent / old - std::pow(100.0, recency)) < 1e-9 * recent / old);
  }
}

TEST_CASE("a store from before recency counts all ages alike", "[exact_store]") {
  const Stream stream(600);
  ExactStoreOptions options = small_options();
  options.recency = 0.0;
  ExactStore store(kHidden, kVocabulary, options);
  read(store, stream, 0, 500, 100);
  auto tensors = store.tensors();
  const auto numbers = std::ranges::find(tensors, "store.temperature", &StoredTensor::name);
  REQUIRE(numbers->shape == std::vector<std::int64_t>{1, 3});
  numbers->shape[1] = 2;
  numbers->bytes.resize(16);
  ExactStore before = ExactStore::from_tensors(kHidden, kVocabulary, views(tensors));
  CHECK(before.options().recency == 0.0);
  CHECK(same(before, store));
  CHECK(same_bits(read(before, stream, 500, 600, 7), read(store, stream, 500, 600, 7)));
}

TEST_CASE("options of a store out of range are refused", "[exact_store]") {
  const auto refused = [](auto change) {
    ExactStoreOptions options;
    change(options);
    CHECK_THROWS_AS(ExactStore(kHidden, kVocabulary, options), Error);
  };
  refused([](ExactStoreOptions& o) { o.temperature = 0.0; });
  refused([](ExactStoreOptions& o) { o.temperature = INFINITY; });
  refused([](ExactStoreOptions& o) { o.recency = -0.1; });
  refused([](ExactStoreOptions& o) { o.recency = INFINITY; });
  refused([](ExactStoreOptions& o) { o.rate = 0.0; });
  refused([](ExactStoreOptions& o) { o.rate = 1.5; });
  refused([](ExactStoreOptions& o) { o.match.shortest = 0; });
  refused([](ExactStoreOptions& o) { o.neighbours.count = 0; });
}
