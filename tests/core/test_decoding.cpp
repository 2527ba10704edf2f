#include <algorithm>
#include <bit>
#include <catch2/catch_test_macros.hpp>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "executors.hpp"
#include "fastweights/core/aligned_buffer.hpp"
#include "fastweights/core/decoding.hpp"

// Tokens of many sessions at once, and several of one, against each alone: the same bits.

using fastweights::core::AlignedBuffer;
using fastweights::core::DType;
using fastweights::core::Executor;
using fastweights::core::serial_executor;
using fastweights::cpu::decode_token;
using fastweights::cpu::decode_tokens;
using fastweights::cpu::decoding_scratch;
using fastweights::cpu::decoding_trace;
using fastweights::cpu::DecodingHeadState;
using fastweights::cpu::DecodingModel;
using fastweights::cpu::DecodingSizes;
using fastweights::cpu::DecodingState;
using fastweights::cpu::DecodingToken;
using fastweights::cpu::keep_tokens;
using fastweights::cpu::Weights;

namespace {

using Bytes = std::vector<unsigned char>;

/// Numbers that are equal if their bits are.
struct Floats : std::vector<float> {
  using std::vector<float>::vector;
  bool operator==(const Floats& other) const {
    return size() == other.size() && std::memcmp(data(), other.data(), size() * sizeof(float)) == 0;
  }
};

struct Kind {
  std::string name;
  DType dtype = DType::kFloat32;
  bool gated = true;
  bool head = false;
  bool odd = false;  // sizes that fill no vector and divide no tile
};

std::vector<Kind> kinds() {
  std::vector<Kind> all;
  for (const auto dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const bool gated : {false, true}) {
      for (const bool head : {false, true}) {
        for (const bool odd : {false, true}) {
          const std::string name = std::string(dtype == DType::kFloat32 ? "fp32" : "bf16") +
                                   (gated ? ", gated" : "") + (head ? ", with head" : "") +
                                   (odd ? ", odd sizes" : "");
          all.push_back({name, dtype, gated, head, odd});
        }
      }
    }
  }
  return all;
}

constexpr std::int64_t kVocabulary = 139;

/// A model of random weights, with what its pointers show.
class RandomModel {
 public:
  explicit RandomModel(const Kind& kind) : kind_(kind) {
    model.dtype = kind.dtype;
    DecodingSizes& s = model.sizes;
    s.width = kind.odd ? 60 : 64;
    s.feed_forward_width = kind.odd ? 137 : 160;
    s.attention_heads = kind.odd ? 3 : 2;
    s.attention_window = 5;
    s.attention_sinks = kind.odd ? 3 : 1;
    s.memory_heads = kind.odd ? 3 : 2;
    s.memory_value_heads = 2 * s.memory_heads;
    s.memory_key_size = kind.odd ? 13 : 16;
    s.memory_value_size = kind.odd ? 7 : 32;
    s.convolution_size = 3;
    s.beta_max = 2.0;
    for (int i = 0; i < 2; ++i) model.layers.push_back(layer());
    model.embedding = matrix(kVocabulary, s.width);
    model.norm = vector(s.width);
    model.output = matrix(kVocabulary, s.width);
    model.fast_head = kind.head;
    model.head_eta = 0.7;
    model.head_decay = -0.02;
  }
  RandomModel(const RandomModel&) = delete;
  RandomModel& operator=(const RandomModel&) = delete;

  std::int64_t element_bytes() const { return kind_.dtype == DType::kFloat32 ? 4 : 2; }

  DecodingModel model;

 private:
  float random(float scale) { return scale * std::normal_distribution<float>()(generator_); }

  const float* vector(std::int64_t size) {
    auto& values = vectors_.emplace_back(static_cast<std::size_t>(size));
    for (float& value : values) value = random(0.5F);
    return values.data();
  }

  Weights matrix(std::int64_t rows, std::int64_t columns) {
    const float scale = 1.5F / std::sqrt(static_cast<float>(columns));
    Bytes& bytes = matrices_.emplace_back(static_cast<std::size_t>(rows * columns) *
                                          static_cast<std::size_t>(element_bytes()));
    for (std::size_t i = 0; i < bytes.size(); i += static_cast<std::size_t>(element_bytes())) {
      const auto bits = std::bit_cast<std::uint32_t>(random(scale));
      const std::uint32_t stored = element_bytes() == 4 ? bits : bits >> 16;
      std::memcpy(bytes.data() + i, &stored, static_cast<std::size_t>(element_bytes()));
    }
    return {bytes.data(), rows, columns};
  }

  fastweights::cpu::DecodingLayer layer() {
    const DecodingSizes& s = model.sizes;
    const auto width = s.width;
    const auto heads = s.memory_value_heads;
    const auto channels = 2 * s.keys() + s.values();
    fastweights::cpu::DecodingLayer out;
    out.mixer_norm = vector(width);
    out.feed_forward_norm = vector(width);
    out.attention = {matrix(width, width),
                     matrix(width, width),
                     matrix(width, width),
                     matrix(width, width),
                     vector(s.attention_sinks * width / 2),
                     vector(s.attention_sinks * width),
                     vector(width)};
    auto& memory = out.memory;
    memory.query = matrix(s.keys(), width);
    memory.key = matrix(s.keys(), width);
    memory.value = matrix(s.values(), width);
    memory.beta = matrix(heads, width);
    memory.gate = matrix(s.values(), width);
    memory.output = matrix(width, s.values());
    memory.convolution = vector(s.convolution_size * channels);
    memory.norm = vector(s.memory_value_size);
    memory.mix = vector(width);
    if (kind_.gated) {
      memory.decay = matrix(heads, width);
      memory.a_log = vector(heads);
      memory.dt_bias = vector(heads);
    }
    out.gate = matrix(s.feed_forward_width, width);
    out.up = matrix(s.feed_forward_width, width);
    out.down = matrix(width, s.feed_forward_width);
    return out;
  }

  Kind kind_;
  std::mt19937 generator_{7};
  std::deque<std::vector<float>> vectors_;
  std::deque<Bytes> matrices_;
};

/// What a session carries; copies are independent.
struct SessionState {
  explicit SessionState(const RandomModel& random)
      : layers(random.model.layers.size()),
        head_state(static_cast<std::size_t>(random.model.sizes.width * kVocabulary)),
        head_hidden(static_cast<std::size_t>(random.model.sizes.width * random.element_bytes())),
        head_logits(kVocabulary) {
    const DecodingSizes& s = random.model.sizes;
    const auto bytes = [&](std::int64_t elements) {
      return Bytes(static_cast<std::size_t>(elements * random.element_bytes()));
    };
    for (auto& each : layers) {
      each.memory.resize(static_cast<std::size_t>(s.values() * s.memory_key_size));
      each.convolution = bytes((s.convolution_size - 1) * (2 * s.keys() + s.values()));
      each.key = bytes(s.attention_window * s.width);
      each.value = bytes(s.attention_window * s.width);
    }
  }

  std::vector<DecodingState> views() {
    std::vector<DecodingState> out;
    for (auto& each : layers) {
      out.push_back(
          {each.memory.data(), each.convolution.data(), each.key.data(), each.value.data()});
    }
    return out;
  }

  DecodingHeadState head() { return {head_state.data(), head_hidden.data(), head_logits.data()}; }

  bool operator==(const SessionState&) const = default;

  struct Layer {
    Floats memory;
    Bytes convolution, key, value;
    bool operator==(const Layer&) const = default;
  };
  std::vector<Layer> layers;
  Floats head_state;
  Bytes head_hidden;
  Floats head_logits;
  std::int64_t position = 0;
};

/// Which token session `session` reads at its step `step`, and how strongly.
std::int64_t token_of(std::int64_t session, std::int64_t step) {
  return (session * 31 + step * 17 + session * step) % kVocabulary;
}
float strength_of(std::int64_t session) { return session % 4 == 3 ? 0.5F : 1.0F; }

void read_alone(const RandomModel& random, SessionState& state, std::int64_t session,
                std::int64_t step, Floats& logits) {
  AlignedBuffer<float> scratch(static_cast<std::size_t>(decoding_scratch(random.model)));
  std::ranges::fill(scratch.span(), std::nanf(""));
  logits.assign(kVocabulary, std::nanf(""));
  decode_token(random.model, token_of(session, step), state.position, strength_of(session),
               state.views(), scratch.data(), logits.data(), serial_executor(), state.head());
  ++state.position;
}

/// The next token of all sessions; returns their logits [sessions, vocabulary].
Floats read_together(const RandomModel& random, std::vector<SessionState>& states,
                     std::int64_t step, const Executor& executor) {
  std::vector<std::vector<DecodingState>> views;
  for (SessionState& state : states) views.push_back(state.views());
  std::vector<DecodingToken> tokens;
  for (std::size_t i = 0; i < states.size(); ++i) {
    const auto session = static_cast<std::int64_t>(i);
    tokens.push_back({token_of(session, step), states[i].position++, strength_of(session),
                      views[i].data(), states[i].head()});
  }
  const auto count = static_cast<std::int64_t>(states.size());
  AlignedBuffer<float> scratch(static_cast<std::size_t>(decoding_scratch(random.model, count)));
  std::ranges::fill(scratch.span(), std::nanf(""));
  Floats logits(states.size() * kVocabulary, std::nanf(""));
  decode_tokens(random.model, tokens, scratch.data(), logits.data(), executor);
  return logits;
}

/// Sessions that have read different numbers of tokens, each alone.
std::vector<SessionState> started(const RandomModel& random, std::int64_t sessions) {
  std::vector<SessionState> states(static_cast<std::size_t>(sessions), SessionState(random));
  Floats logits;
  for (std::int64_t i = 0; i < sessions; ++i) {
    auto& state = states[static_cast<std::size_t>(i)];
    for (std::int64_t step = 0; step < i % 8; ++step) read_alone(random, state, i, step, logits);
  }
  return states;
}

}  // namespace

TEST_CASE("a session gets the same bits alone and in any company", "[decoding]") {
  for (const Kind& kind : kinds()) {
    const RandomModel random(kind);
    for (std::int64_t sessions = 1; sessions <= 17; ++sessions) {
      INFO(kind.name << ", " << sessions << " sessions");
      std::vector<SessionState> together = started(random, sessions);
      std::vector<SessionState> alone = together;
      for (std::int64_t step = 0; step < 3; ++step) {
        const Executor executor = step == 1 ? fastweights::test::two_threads() : serial_executor();
        const Floats logits = read_together(random, together, step, executor);
        Floats expected;
        for (std::int64_t i = 0; i < sessions; ++i) {
          Floats own;
          read_alone(random, alone[static_cast<std::size_t>(i)], i, step, own);
          expected.insert(expected.end(), own.begin(), own.end());
        }
        CHECK(logits == expected);
      }
      CHECK(together == alone);
    }
  }
}

namespace {

/// What a pass over successive tokens of each of some sessions has left.
struct Passed {
  Floats logits;               // [sessions · count, vocabulary]
  std::vector<Floats> traces;  // of each token
};

/// Tokens `step`, … of all sessions in one pass.
Passed read_ahead(const RandomModel& random, std::vector<SessionState>& states, std::int64_t step,
                  std::int64_t count, const Executor& executor) {
  Passed passed;
  std::vector<std::vector<DecodingState>> views;
  std::vector<DecodingToken> tokens;
  passed.traces.assign(
      states.size() * static_cast<std::size_t>(count),
      Floats(static_cast<std::size_t>(decoding_trace(random.model)), std::nanf("")));
  for (SessionState& state : states) views.push_back(state.views());
  for (std::size_t i = 0; i < states.size(); ++i) {
    const auto session = static_cast<std::int64_t>(i);
    for (std::int64_t j = 0; j < count; ++j) {
      tokens.push_back({token_of(session, step + j), states[i].position++, strength_of(session),
                        views[i].data(), states[i].head(), nullptr,
                        passed.traces[tokens.size()].data()});
    }
  }
  const auto all = static_cast<std::int64_t>(tokens.size());
  AlignedBuffer<float> scratch(static_cast<std::size_t>(decoding_scratch(random.model, all)));
  std::ranges::fill(scratch.span(), std::nanf(""));
  passed.logits.assign(tokens.size() * kVocabulary, std::nanf(""));
  decode_tokens(random.model, tokens, scratch.data(), passed.logits.data(), executor);
  return passed;
}

/// Keeps the first `count` tokens of a pass over `of` tokens of each session.
void keep(const RandomModel& random, std::vector<SessionState>& states, Passed& passed,
          std::int64_t step, std::int64_t of, std::int64_t count, const Executor& executor) {
  for (std::size_t i = 0; i < states.size(); ++i) {
    const auto session = static_cast<std::int64_t>(i);
    const auto views = states[i].views();
    std::vector<DecodingToken> tokens;
    for (std::int64_t j = 0; j < count; ++j) {
      const auto index = i * static_cast<std::size_t>(of) + static_cast<std::size_t>(j);
      tokens.push_back({token_of(session, step + j), states[i].position++, strength_of(session),
                        views.data(), states[i].head(), nullptr, passed.traces[index].data()});
    }
    keep_tokens(random.model, tokens, executor);
  }
}

}  // namespace

TEST_CASE("successive tokens of a session get the same bits in one pass", "[decoding]") {
  constexpr std::int64_t kAhead = 7;  // more than the window and the convolution hold
  for (const Kind& kind : kinds()) {
    const RandomModel random(kind);
    for (const std::int64_t sessions : {1, 3}) {
      INFO(kind.name << ", " << sessions << " sessions");
      const std::vector<SessionState> before = started(random, sessions);
      const Executor executor =
          sessions == 3 ? fastweights::test::two_threads() : serial_executor();
      std::vector<SessionState> together = before;
      Passed passed = read_ahead(random, together, 0, kAhead, executor);
      std::vector<SessionState> alone = before;
      std::vector<std::vector<SessionState>> at_step = {before};
      Floats expected(passed.logits.size());
      for (std::int64_t j = 0; j < kAhead; ++j) {
        for (std::int64_t i = 0; i < sessions; ++i) {
          Floats own;
          read_alone(random, alone[static_cast<std::size_t>(i)], i, j, own);
          std::ranges::copy(own, expected.begin() + (i * kAhead + j) * kVocabulary);
        }
        at_step.push_back(alone);
      }
      CHECK(passed.logits == expected);
      CHECK(together == alone);
      for (std::int64_t count = 0; count <= kAhead; ++count) {
        INFO(count << " kept");
        std::vector<SessionState> kept = before;
        keep(random, kept, passed, 0, kAhead, count, executor);
        CHECK(kept == at_step[static_cast<std::size_t>(count)]);
      }
    }
  }
}

TEST_CASE("a session's own change of the last feed-forward is as one of the weights",
          "[decoding]") {
  for (const bool odd : {false, true}) {
    const RandomModel random({"", DType::kFloat32, true, true, odd});
    const DecodingSizes& s = random.model.sizes;
    const auto width = static_cast<std::size_t>(s.width);
    const auto elements = static_cast<std::size_t>(s.feed_forward_width) * width;
    std::mt19937 generator(3);
    std::vector<float> delta(2 * elements);
    for (float& each : delta) each = 0.1F * std::normal_distribution<float>()(generator);

    DecodingModel changed = random.model;
    auto& last = changed.layers.back();
    std::vector<float> gate(elements), up(elements);
    for (std::size_t i = 0; i < elements; ++i) {
      gate[i] = static_cast<const float*>(last.gate.data)[i] + delta[i];
      up[i] = static_cast<const float*>(last.up.data)[i] + delta[elements + i];
    }
    last.gate.data = gate.data();
    last.up.data = up.data();

    // Three sessions, of which the second has the change.
    std::vector<SessionState> states(3, SessionState(random));
    std::vector<std::vector<DecodingState>> views;
    for (SessionState& state : states) views.push_back(state.views());
    std::vector<Floats> mixed(3, Floats(width, std::nanf("")));
    std::vector<DecodingToken> tokens;
    for (std::size_t i = 0; i < 3; ++i) {
      tokens.push_back({.token = 5,
                        .position = 0,
                        .states = views[i].data(),
                        .head = states[i].head(),
                        .feed_forward_delta = i == 1 ? delta.data() : nullptr,
                        .mixed = mixed[i].data()});
    }
    const auto run = [](const DecodingModel& model, std::span<const DecodingToken> some) {
      const auto count = static_cast<std::int64_t>(some.size());
      AlignedBuffer<float> scratch(static_cast<std::size_t>(decoding_scratch(model, count)));
      Floats logits(some.size() * kVocabulary, std::nanf(""));
      decode_tokens(model, some, scratch.data(), logits.data(), serial_executor());
      return logits;
    };
    const Floats logits = run(random.model, tokens);
    const auto of = [&](std::size_t i) {
      Floats own(kVocabulary);
      std::copy_n(logits.begin() + static_cast<std::ptrdiff_t>(i * kVocabulary), kVocabulary,
                  own.begin());
      return own;
    };
    CHECK(of(0) == of(2));
    CHECK(mixed[0] == mixed[1]);  // the change comes behind it
    const auto alone = [&](const DecodingModel& model, const float* change) {
      SessionState state(random);
      const auto view = state.views();
      const DecodingToken token{.token = 5,
                                .position = 0,
                                .states = view.data(),
                                .head = state.head(),
                                .feed_forward_delta = change};
      return run(model, {&token, 1});
    };
    CHECK(of(0) == alone(random.model, nullptr));
    CHECK(of(1) == alone(random.model, delta.data()));
    const Floats expected = alone(changed, nullptr);
    const Floats without = of(0);
    double error = 0, difference = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      error = std::max(error, static_cast<double>(std::abs(expected[i] - of(1)[i])));
      difference = std::max(difference, static_cast<double>(std::abs(expected[i] - without[i])));
    }
    CHECK(error < 1e-4);
    CHECK(difference > 0.05);
  }
}

TEST_CASE("what a session gets depends on its own token, state and strength", "[decoding]") {
  const RandomModel random({"", DType::kFloat32, true, true, false});
  std::vector<SessionState> states(4, SessionState(random));
  for (std::int64_t step = 0; step < 3; ++step) {
    read_together(random, states, step, serial_executor());
  }
  for (std::size_t i = 0; i < states.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) CHECK_FALSE(states[i] == states[j]);
  }
}

TEST_CASE("no sessions are nothing to do", "[decoding]") {
  const RandomModel random({"", DType::kFloat32, true, true, false});
  std::vector<SessionState> none;
  CHECK(read_together(random, none, 0, serial_executor()).empty());
}
