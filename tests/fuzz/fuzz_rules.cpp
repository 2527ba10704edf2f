/// \file
/// Any call that core::RuleParams can describe touches its own memory alone, and its forms agree.
/// The input's bytes are read as a call: sizes, how rows lie (gaps, axes in any order, broadcast,
/// reversed, overlapping), element types, tensors that share memory, sequences, what is absent.
/// Every buffer lies on the heap and is exactly as large as its rows need, so that AddressSanitizer
/// sees whatever is read or written outside. Then
///   - the chunkwise form gives what the recurrent one gives, alone and on two threads the same
///   bits,
///   - ⟨do, o⟩ + ⟨dS', S'⟩ = ⟨dv, v⟩ + ⟨dS, S⟩, as the rules are linear in v and S, and
///     ⟨do, o⟩ = ⟨dq, q⟩, as they are in q,
///   - gradients are finite, and what lies between the rows of an output is as it was,
///   - a call of wrong sizes is a ShapeError.
/// FASTWEIGHTS_FUZZ_TARGET=AVX2 (SSE4, …) runs the kernels of that instruction set.
#include <hwy/targets.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "fastweights/core/cpu.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/core/rule.hpp"
#include "fuzz_target.hpp"

namespace fastweights::fuzz {
namespace {

using core::DType;
using core::RuleGradients;
using core::RuleParams;
using core::Shape;

// ---- the input ---------------------------------------------------------------------------------

/// The input's bytes as choices; zeros when they are used up.
class Choices {
 public:
  explicit Choices(std::span<const std::uint8_t> bytes) : bytes_(bytes) {}

  /// One of 0 … count − 1.
  std::int64_t below(std::int64_t count) {
    if (bytes_.empty()) return 0;
    std::int64_t value = bytes_.front();
    bytes_ = bytes_.subspan(1);
    if (count > 256 && !bytes_.empty()) {
      value += 256 * bytes_.front();
      bytes_ = bytes_.subspan(1);
    }
    return value % count;
  }
  bool flag() { return below(2) == 1; }
  bool rarely() { return below(8) == 7; }
  template <class T, std::size_t N>
  T any_of(const std::array<T, N>& values) {
    return values[static_cast<std::size_t>(below(N))];
  }

 private:
  std::span<const std::uint8_t> bytes_;
};

/// Numbers for the elements of tensors.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  /// Uniform in [0, 1).
  double uniform() {
    state_ += 0x9e3779b97f4a7c15u;
    std::uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((x ^ (x >> 31)) >> 11) * 0x1p-53;
  }
  double either_sign() { return 2 * uniform() - 1; }

 private:
  std::uint64_t state_;
};

// ---- tensors -----------------------------------------------------------------------------------

double read(const void* element, DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return *static_cast<const double*>(element);
    case DType::kFloat32: return *static_cast<const float*>(element);
    case DType::kBFloat16: {
      const auto bits = *static_cast<const std::uint16_t*>(element);
      return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
    }
    case DType::kFloat16: break;
  }
  const auto bits = *static_cast<const std::uint16_t*>(element);
  const int exponent = bits >> 10 & 31;
  const double fraction = bits & 1023;
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 31) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN()
                         : sign * std::numeric_limits<double>::infinity();
  }
  return sign *
         (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

/// Cuts off what the type does not hold; which number comes out does not matter here.
void write(void* element, DType dtype, double value) {
  if (dtype == DType::kFloat64) {
    *static_cast<double*>(element) = value;
  } else if (dtype == DType::kFloat32) {
    *static_cast<float*>(element) = static_cast<float>(value);
  } else if (dtype == DType::kBFloat16) {
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(value));
    *static_cast<std::uint16_t*>(element) = static_cast<std::uint16_t>(bits >> 16);
  } else {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double size = std::abs(value);
    std::uint16_t bits = 0x7e00;  // NaN
    if (size == 0) {
      bits = 0;
    } else if (size >= 65504) {
      bits = 0x7c00;
    } else if (size > 0) {
      int exponent = std::max(std::ilogb(size), -14);
      const int fraction = static_cast<int>(std::ldexp(size, 10 - exponent));
      bits = static_cast<std::uint16_t>(fraction < 1024 ? fraction
                                                        : (exponent + 14) * 1024 + fraction);
    }
    *static_cast<std::uint16_t*>(element) = bits | sign;
  }
}

/// Rows [B, T, heads] of `size` elements, somewhere in a buffer that ends where they end.
class Rows {
 public:
  using Axes = std::array<std::int64_t, 3>;

  Rows(Axes counts, std::int64_t size, DType dtype, bool written, Choices& choices)
      : counts_(counts), size_(size), dtype_(dtype) {
    lay_out(written, choices);
    bytes_ = std::make_unique<std::byte[]>(length_ * core::size_of(dtype));
    for (std::size_t i = 0; i < length_; ++i) {
      write(at(i), dtype_, std::numeric_limits<double>::quiet_NaN());
    }
  }

  template <class Draw>
  void fill(const Draw& draw) {
    each([&](std::size_t i) { write(at(i), dtype_, draw()); });
  }

  template <class Body>
  void each(const Body& body) const {
    for (std::int64_t b = 0; b < counts_[0]; ++b) {
      for (std::int64_t t = 0; t < counts_[1]; ++t) {
        for (std::int64_t h = 0; h < counts_[2]; ++h) {
          const std::int64_t row = origin_ + b * strides_[0] + t * strides_[1] + h * strides_[2];
          for (std::int64_t j = 0; j < size_; ++j) body(static_cast<std::size_t>(row + j));
        }
      }
    }
  }

  /// Its elements in the order of batch, time, head.
  std::vector<double> values() const {
    std::vector<double> result;
    each([&](std::size_t i) { result.push_back(read(at(i), dtype_)); });
    return result;
  }

  bool gaps_are_nan() const {
    std::vector<bool> in_row(length_);
    each([&](std::size_t i) { in_row[i] = true; });
    for (std::size_t i = 0; i < length_; ++i) {
      if (!in_row[i] && !std::isnan(read(at(i), dtype_))) return false;
    }
    return true;
  }

  core::ConstView view() const { return {data(), dtype_, strides_[0], strides_[1], strides_[2]}; }
  core::View view() { return {data(), dtype_, strides_[0], strides_[1], strides_[2]}; }
  DType dtype() const { return dtype_; }
  bool same_shape(const Rows& other) const {
    return counts_ == other.counts_ && size_ == other.size_;
  }

 private:
  static constexpr std::array<Axes, 6> kOrders = {
      {{2, 1, 0}, {1, 2, 0}, {2, 0, 1}, {0, 2, 1}, {1, 0, 2}, {0, 1, 2}}};

  void lay_out(bool written, Choices& choices) {
    const Axes order = choices.any_of(kOrders);  // from the innermost axis outwards
    const bool overlap = !written && choices.rarely();
    std::int64_t step = overlap ? 1 : size_ + (choices.flag() ? choices.below(4) : 0);
    std::int64_t first = 0;
    std::int64_t last = 0;
    for (const auto axis : order) {
      const auto i = static_cast<std::size_t>(axis);
      strides_[i] = step;
      if (!written && choices.rarely()) strides_[i] = 0;
      if (choices.rarely()) strides_[i] = -strides_[i];
      const std::int64_t reach = std::max<std::int64_t>(counts_[i] - 1, 0) * strides_[i];
      (reach < 0 ? first : last) += reach;
      if (strides_[i] != 0) step *= std::max<std::int64_t>(counts_[i], 1);
      if (choices.rarely()) step += 1;
    }
    origin_ = -first;
    const bool empty = counts_[0] * counts_[1] * counts_[2] == 0;
    length_ = empty ? 0 : static_cast<std::size_t>(last - first + size_);
    if (empty) origin_ = 0;
  }

  std::byte* at(std::size_t i) const { return bytes_.get() + i * core::size_of(dtype_); }
  std::byte* data() const { return at(static_cast<std::size_t>(origin_)); }

  Axes counts_;
  Axes strides_{};
  std::int64_t size_;
  DType dtype_;
  std::int64_t origin_ = 0;
  std::size_t length_ = 0;
  std::unique_ptr<std::byte[]> bytes_;
};

/// States [N, HV, K, V]: always dense, exactly as large as they are.
template <class Real>
struct States {
  States(std::int64_t count, double value)
      : size(static_cast<std::size_t>(count)), data(std::make_unique<Real[]>(size)) {
    std::fill_n(data.get(), size, static_cast<Real>(value));
  }
  States(const States& other) : States(static_cast<std::int64_t>(other.size), 0) {
    std::copy_n(other.data.get(), size, data.get());
  }
  States& operator=(const States&) = delete;
  std::vector<double> values() const { return {data.get(), data.get() + size}; }

  std::size_t size;
  std::unique_ptr<Real[]> data;
};

// ---- the rules ---------------------------------------------------------------------------------

/// What a tensor's rows are: of keys, of values, or one number.
enum class Kind { kKey, kValue, kGate, kChannelGate };

/// How a tensor's elements are drawn. Tensors of one range may be one and the same.
enum class Range { kFeature, kReading, kWriting, kValue, kDecay, kStrength };

template <class Real>
struct Input {
  std::string_view name;
  core::ConstView RuleParams<Real>::* view;
  core::View RuleGradients<Real>::* gradient;
  Kind kind = Kind::kKey;
  Range range = Range::kFeature;
};

template <class Real>
struct Rule {
  const char* name;
  const core::RuleForms<Real>& forms;
  std::string_view inputs;  // one letter each, in the order of kAll
  std::string_view optional = "";
  bool channel_gate = false;
  bool momentum = false;
};

template <class Real>
std::vector<Input<Real>> all_inputs(bool channel_gate) {
  using P = RuleParams<Real>;
  using G = RuleGradients<Real>;
  const Kind decay = channel_gate ? Kind::kChannelGate : Kind::kGate;
  return {{"q", &P::q, &G::d_q},
          {"k", &P::k, &G::d_k},
          {"p", &P::p, &G::d_p},
          {"v", &P::v, &G::d_v, Kind::kValue, Range::kValue},
          {"a", &P::a, &G::d_a, Kind::kKey, Range::kReading},
          {"b", &P::b, &G::d_b, Kind::kKey, Range::kWriting},
          {"g", &P::g, &G::d_g, decay, Range::kDecay},
          {"s", &P::beta, &G::d_beta, Kind::kGate, Range::kStrength},
          {"m", &P::mu, &G::d_mu, Kind::kGate, Range::kStrength},
          {"e", &P::eta, &G::d_eta, Kind::kGate, Range::kStrength}};
}

template <class Real>
Rule<Real> rule_at(std::int64_t index) {
  switch (index) {
    case 0: return {"delta_rule", cpu::delta_rule_forms<Real>(), "qkvs"};
    case 1: return {"gated_delta_rule", cpu::gated_delta_rule_forms<Real>(), "qkvgs", "g"};
    case 2: return {"linear_attention", cpu::linear_attention_forms<Real>(), "qkvg", "g"};
    case 3: return {"kda", cpu::kda_forms<Real>(), "qkvgs", "", true};
    case 4: {
      const auto& forms = cpu::generalized_delta_rule_forms<Real>();
      return {"generalized_delta_rule", forms, "qkvabg", "", true};
    }
    default: break;
  }
  const auto& forms = cpu::momentum_delta_rule_forms<Real>();
  return {"momentum_delta_rule", forms, "qkpvgsme", "p", false, true};
}
constexpr std::int64_t kRules = 6;

/// What is being tried, for the line that repeats it. (After a crash, replay_rules has printed the
/// input's path, and libFuzzer prints where it wrote it.)
std::span<const std::uint8_t> current_input;

// ---- one call ----------------------------------------------------------------------------------

constexpr std::array<std::int64_t, 12> kHeadSizes = {1,  16, 31, 32,  33,  60,
                                                     64, 65, 96, 100, 128, 256};
constexpr std::array<std::int64_t, 8> kLongLengths = {127, 128, 129, 255, 1023, 1025, 4096, 4101};
constexpr std::array kTypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
constexpr std::int64_t kMaxWork = 1 << 16;  // elements of the state times tokens

Shape draw_shape(Choices& choices) {
  Shape shape;
  const auto head_size = [&] {
    return choices.flag() ? choices.any_of(kHeadSizes) : 1 + choices.below(20);
  };
  shape.B = choices.rarely() ? 0 : 1 + choices.below(3);
  shape.H = 1 + choices.below(3);
  shape.HV = shape.H * (1 + choices.below(3));
  shape.K = head_size();
  shape.V = head_size();
  shape.T = choices.rarely() ? choices.any_of(kLongLengths) : choices.below(72);
  const std::int64_t per_token = std::max<std::int64_t>(shape.B, 1) * shape.HV * shape.K * shape.V;
  shape.T = std::min(shape.T, kMaxWork / per_token);
  return shape;
}

/// Borders of sequences, some of them empty; of none at all if there are no tokens.
std::vector<std::int64_t> draw_packing(std::int64_t tokens, Choices& choices) {
  const std::int64_t sequences = tokens == 0 ? choices.below(3) : 1 + choices.below(5);
  std::vector<std::int64_t> cuts(static_cast<std::size_t>(sequences) + 1, 0);
  for (auto& cut : cuts) cut = choices.below(tokens + 1);
  std::sort(cuts.begin(), cuts.end());
  cuts.front() = 0;
  cuts.back() = tokens;
  return cuts;
}

enum class Gates { kMild, kNone, kForgetting, kStrong, kMixed };
enum class Values { kOrdinary, kZero, kDenormal };

double draw_element(Range range, double key_scale, Gates gates, double value_scale,
                    double strength_limit, Random& random) {
  const double x = random.uniform();
  switch (range) {
    case Range::kFeature: return key_scale * (2 * x - 1);
    // Of opposite signs, so that b aᵀ takes away from the state and nothing grows without bound.
    case Range::kReading: return 0.3 * key_scale * x;
    case Range::kWriting: return -0.3 * key_scale * x;
    case Range::kValue: return value_scale * (2 * x - 1);
    case Range::kStrength: return strength_limit * x;
    case Range::kDecay: break;
  }
  const auto kind = gates == Gates::kMixed ? static_cast<Gates>(4 * random.uniform()) : gates;
  switch (kind) {
    case Gates::kNone: return 0;
    case Gates::kForgetting: return x < 0.3 ? -std::numeric_limits<double>::infinity() : -x;
    case Gates::kStrong: return -50;
    default: return -x * x;
  }
}

/// Runs tasks in the order given, in the other, or every second on another thread.
core::Executor draw_executor(Choices& choices) {
  const std::int64_t kind = choices.below(3);
  if (kind == 0) return core::serial_executor();
  using Body = std::function<void(std::int64_t)>;
  if (kind == 1) {
    return {[](std::int64_t tasks, const Body& body) {
              for (std::int64_t task = tasks - 1; task >= 0; --task) body(task);
            },
            3};
  }
  return {[](std::int64_t tasks, const Body& body) {
            std::thread other([&] {
              for (std::int64_t task = 1; task < tasks; task += 2) body(task);
            });
            for (std::int64_t task = 0; task < tasks; task += 2) body(task);
            other.join();
          },
          2};
}

double sum_of_squares(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += value * value;
  return sum;
}

double root_mean_square(const std::vector<double>& x) {
  return x.empty() ? 0 : std::sqrt(sum_of_squares(x) / static_cast<double>(x.size()));
}

/// Relative error of rounding to the type.
double rounding(DType dtype) {
  switch (dtype) {
    case DType::kFloat64: return 0x1p-53;
    case DType::kFloat32: return 0x1p-24;
    case DType::kFloat16: return 0x1p-11;
    case DType::kBFloat16: break;
  }
  return 0x1p-8;
}

/// ⟨x, y⟩ and Σ|x y|.
struct Product {
  double sum = 0;
  double size = 0;

  Product() = default;
  Product(const std::vector<double>& x, const std::vector<double>& y) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      sum += x[i] * y[i];
      size += std::abs(x[i] * y[i]);
    }
  }
  Product& operator+=(const Product& other) {
    sum += other.sum;
    size += other.size;
    return *this;
  }
};

/// The largest number of the type; what is beyond it is infinite there.
double largest(DType dtype) {
  return dtype == DType::kFloat16 ? 65504.0
                                  : static_cast<double>(std::numeric_limits<float>::max());
}

template <class Real>
class Call {
 public:
  Call(std::int64_t rule, Choices& choices)
      : choices_(choices),
        rule_(rule_at<Real>(rule)),
        shape_(draw_shape(choices)),
        random_(static_cast<std::uint64_t>(choices.below(65536))) {
    if (choices.below(3) == 2) {
      shape_.B = 1;
      shape_.T = std::min(shape_.T, kMaxWork / (shape_.HV * shape_.K * shape_.V));
      cu_seqlens_ = draw_packing(shape_.T, choices);
    }
    use_qk_l2norm_ = choices.flag();
    gates_ = static_cast<Gates>(choices.below(5));
    values_ = choices.rarely() ? static_cast<Values>(1 + choices.below(2)) : Values::kOrdinary;
    scale_ = choices.flag() ? 1.0 / std::sqrt(static_cast<double>(shape_.K)) : 1.0;
    draw_inputs();
    if (choices.flag()) initial_state_.emplace(draw_state());
    if (rule_.momentum && initial_state_) initial_momentum_.emplace(draw_state());
  }

  void check() {
    const Outputs recurrent = run(rule_.forms.recurrent, true);
    const Outputs forward = run(rule_.forms.forward, true);
    const Outputs again = run(rule_.forms.forward, choices_.flag());
    compare("o", forward.o.values(), recurrent.o.values(), forward.o.dtype(), recurrent.o.dtype());
    compare("final_state", forward.state->values(), recurrent.state->values());
    if (rule_.momentum) {
      compare("final_momentum", forward.momentum->values(), recurrent.momentum->values());
    }
    if (forward.o.dtype() == again.o.dtype()) {
      expect(forward.o.values() == again.o.values(), "threads change no bit of o");
    }
    if (again.state) {
      expect(forward.state->values() == again.state->values(),
             "threads change no bit of the state");
    }
    // Gradients through a state that has grown like that overflow types and tolerances.
    if (root_mean_square(recurrent.o.values()) < kGrown * std::max(1.0, value_scale())) {
      check_backward(forward);
    }
    if constexpr (std::is_same_v<Real, float>) check_narrow_states();
  }

 private:
  static constexpr double kGrown = 1e3;

  struct Outputs {
    Rows o;
    std::optional<States<Real>> state, momentum;
  };

  Rows::Axes rows_of(Kind kind) const {
    return {shape_.B, shape_.T, kind == Kind::kKey ? shape_.H : shape_.HV};
  }

  std::int64_t size_of(Kind kind) const {
    switch (kind) {
      case Kind::kKey:
      case Kind::kChannelGate: return shape_.K;
      case Kind::kValue: return shape_.V;
      case Kind::kGate: break;
    }
    return 1;
  }

  core::Packing packing() const { return {shape_, cu_seqlens_}; }

  std::int64_t state_size() const {
    return packing().sequences() * shape_.HV * shape_.K * shape_.V;
  }

  double value_scale() const {
    if (values_ == Values::kZero) return 0;
    return values_ == Values::kDenormal ? 1e-40 : 1;
  }

  void draw_inputs() {
    for (const auto& input : all_inputs<Real>(rule_.channel_gate)) {
      if (rule_.inputs.find(input.name) == std::string_view::npos) continue;
      if (rule_.optional.find(input.name) != std::string_view::npos && choices_.flag()) continue;
      names_.push_back(input);
      rows_.push_back(draw_input(input));
    }
  }

  /// A tensor of its own, or one that was drawn before.
  std::shared_ptr<Rows> draw_input(const Input<Real>& input) {
    auto rows = std::make_shared<Rows>(rows_of(input.kind), size_of(input.kind),
                                       choices_.any_of(kTypes), /*written=*/false, choices_);
    for (std::size_t i = 0; i + 1 < names_.size(); ++i) {
      const bool alike = names_[i].range == input.range && rows_[i]->same_shape(*rows);
      if (alike && choices_.rarely()) return rows_[i];
    }
    // Keys stay within length 1, lest β‖k‖² pass 2.
    const double key_scale = 1.0 / std::sqrt(static_cast<double>(shape_.K));
    const double strength_limit = rule_.momentum ? 1.0 : 2.0;
    rows->fill([&] {
      return draw_element(input.range, key_scale, gates_, value_scale(), strength_limit, random_);
    });
    return rows;
  }

  States<Real> draw_state() {
    States<Real> state(state_size(), 0);
    for (std::size_t i = 0; i < state.size; ++i) {
      state.data[i] = static_cast<Real>(value_scale() * random_.either_sign());
    }
    return state;
  }

  RuleParams<Real> params() const {
    RuleParams<Real> p;
    p.shape = shape_;
    p.cu_seqlens = cu_seqlens_;
    p.scale = scale_;
    p.use_qk_l2norm = use_qk_l2norm_;
    p.channel_gate = rule_.channel_gate;
    for (std::size_t i = 0; i < names_.size(); ++i) {
      p.*names_[i].view = std::as_const(*rows_[i]).view();
    }
    if (initial_state_) p.initial_state = initial_state_->data.get();
    if (initial_momentum_) p.initial_momentum = initial_momentum_->data.get();
    return p;
  }

  /// Runs a form with outputs that hold NaN; the state in place of the initial one, or apart.
  Outputs run(void (*form)(const RuleParams<Real>&, const core::Executor&), bool with_state) {
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    Outputs out{
        Rows(rows_of(Kind::kValue), shape_.V, choices_.any_of(kTypes), true, choices_), {}, {}};
    RuleParams<Real> p = params();
    p.o = out.o.view();
    const bool in_place = choices_.flag();
    const auto give = [&](std::optional<States<Real>>& state, const auto& initial,
                          const Real*& from, Real*& to) {
      if (in_place && initial) {
        state.emplace(*initial);
        from = state->data.get();
      } else {
        state.emplace(state_size(), kNan);
      }
      to = state->data.get();
    };
    if (with_state) {
      give(out.state, initial_state_, p.initial_state, p.final_state);
      if (rule_.momentum)
        give(out.momentum, initial_momentum_, p.initial_momentum, p.final_momentum);
    }
    form(p, draw_executor(choices_));
    expect(out.o.gaps_are_nan(), "what lies between the rows of o stays as it was");
    return out;
  }

  /// Runs the recurrent form in place on states in fp32 or, where `narrow`, in bf16. The states
  /// begin with the numbers that bf16 has; afterwards `states` holds what they became.
  Rows run_in_place(bool narrow, DType type, std::vector<double>& states) {
    const std::size_t size = static_cast<std::size_t>(state_size()) * (rule_.momentum ? 2 : 1);
    States<std::uint16_t> halves(static_cast<std::int64_t>(size), 0);
    States<Real> wide(static_cast<std::int64_t>(size), 0);
    for (std::size_t i = 0; i < size; ++i) {
      const auto& initial =
          i < static_cast<std::size_t>(state_size()) ? initial_state_ : initial_momentum_;
      if (!initial) continue;
      write(&halves.data[i], DType::kBFloat16,
            static_cast<double>(initial->data[i % initial->size]));
      wide.data[i] = static_cast<Real>(read(&halves.data[i], DType::kBFloat16));
    }
    Rows o(rows_of(Kind::kValue), shape_.V, type, true, choices_);
    RuleParams<Real> p = params();
    p.o = o.view();
    p.initial_state = p.final_state = narrow ? nullptr : wide.data.get();
    p.narrow_state = narrow ? halves.data.get() : nullptr;
    if (rule_.momentum) {
      p.initial_momentum = p.final_momentum = narrow ? nullptr : wide.data.get() + state_size();
      p.narrow_momentum = narrow ? halves.data.get() + state_size() : nullptr;
    }
    rule_.forms.recurrent(p, draw_executor(choices_));
    for (std::size_t i = 0; i < size; ++i) {
      states.push_back(narrow ? read(&halves.data[i], DType::kBFloat16)
                              : static_cast<double>(wide.data[i]));
    }
    return o;
  }

  /// States in bf16 are those in fp32, rounded once, to the nearest.
  void check_narrow_states() {
    const DType type = choices_.any_of(kTypes);
    std::vector<double> narrow, wide;
    const auto o = run_in_place(true, type, narrow).values();
    const auto expected = run_in_place(false, type, wide).values();
    const auto same = [](double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); };
    expect(std::equal(o.begin(), o.end(), expected.begin(), expected.end(), same),
           "a state in bf16 changes no bit of o");
    const auto rounded = [&](double x, double y) {
      if (same(x, y)) return true;
      if (std::isinf(x)) return std::abs(y) > 0x1.fep127;  // beyond the largest, to nearest
      return std::abs(x - y) <= std::abs(y) * 0x1p-8 + 0x1p-134;
    };
    expect(std::equal(narrow.begin(), narrow.end(), wide.begin(), wide.end(), rounded),
           "a state in bf16 is rounded once, to the nearest");
  }

  void check_backward(const Outputs& out) {
    RuleGradients<Real> d;
    Rows d_o(rows_of(Kind::kValue), shape_.V, choices_.any_of(kTypes), false, choices_);
    d_o.fill([&] { return random_.either_sign(); });
    const bool with_d_o = !choices_.rarely();
    if (with_d_o) d.d_o = std::as_const(d_o).view();
    std::optional<States<Real>> d_state, d_momentum, d_initial, d_initial_momentum;
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    if (choices_.flag()) {
      d_state.emplace(state_size(), 0.5);
      d.d_final_state = d_state->data.get();
    }
    if (rule_.momentum && choices_.flag()) {
      d_momentum.emplace(state_size(), -0.25);
      d.d_final_momentum = d_momentum->data.get();
    }
    if (initial_state_) d.d_initial_state = d_initial.emplace(state_size(), kNan).data.get();
    if (initial_momentum_) {
      d.d_initial_momentum = d_initial_momentum.emplace(state_size(), kNan).data.get();
    }
    std::vector<Rows> gradients;
    gradients.reserve(names_.size());
    for (const auto& input : names_) {
      gradients.emplace_back(rows_of(input.kind), size_of(input.kind), choices_.any_of(kTypes),
                             /*written=*/true, choices_);
      d.*input.gradient = gradients.back().view();
    }
    rule_.forms.backward(params(), d, draw_executor(choices_));

    for (const auto& gradient : gradients) {
      expect(gradient.gaps_are_nan(), "what lies between the rows of a gradient stays as it was");
      expect_finite(gradient.values(), "gradients are finite");
    }
    if (d_initial) expect_finite(d_initial->values(), "d_initial_state is finite");
    if (values_ != Values::kOrdinary) return;  // nothing to compare, or nothing exact
    Product of_o, of_results, of_inputs, of_q;
    if (with_d_o) of_o = Product(d_o.values(), out.o.values());
    of_results += of_o;
    if (d_state) of_results += Product(d_state->values(), out.state->values());
    if (d_momentum) of_results += Product(d_momentum->values(), out.momentum->values());
    if (d_initial) of_inputs += Product(d_initial->values(), initial_state_->values());
    if (d_initial_momentum) {
      of_inputs += Product(d_initial_momentum->values(), initial_momentum_->values());
    }
    double coarsest = rounding(out.o.dtype());
    for (std::size_t i = 0; i < names_.size(); ++i) {
      const Product product(gradients[i].values(), rows_[i]->values());
      if (names_[i].name == "v") of_inputs += product;
      if (names_[i].name == "q") of_q = product;
      coarsest = std::max(coarsest, rounding(gradients[i].dtype()));
    }
    expect_equal(of_results, of_inputs, coarsest, "<do, o> + <dS', S'> is <dv, v> + <dS, S>");
    if (!use_qk_l2norm_) expect_equal(of_o, of_q, coarsest, "<do, o> is <dq, q>");
  }

  void expect_finite(const std::vector<double>& x, const char* promise) {
    expect(std::all_of(x.begin(), x.end(), [](double value) { return std::isfinite(value); }),
           promise);
  }

  void expect_equal(const Product& x, const Product& y, double coarsest, const char* promise) {
    const double tolerance = 4 * coarsest + (sizeof(Real) == 8 ? 1e-9 : 1e-3);
    if (std::abs(x.sum - y.sum) <= tolerance * (x.size + y.size)) return;
    std::fprintf(stderr, "%g and %g, of terms of size %g and %g\n", x.sum, y.sum, x.size, y.size);
    expect(false, promise);
  }

  /// Both forms within the rounding of their types and of the arithmetic.
  void compare(const char* name, const std::vector<double>& x, const std::vector<double>& y,
               DType x_type = core::dtype_of<Real>(), DType y_type = core::dtype_of<Real>()) {
    // Keys that correct other keys than they write can make a state grow: then one type may
    // overflow where the other does not.
    const double most = std::min(largest(x_type), largest(y_type));
    std::vector<double> difference;
    for (std::size_t i = 0; i < x.size(); ++i) {
      difference.push_back(std::clamp(x[i], -most, most) - std::clamp(y[i], -most, most));
    }
    const double error = root_mean_square(difference);
    const double tolerance =
        2 * (rounding(x_type) + rounding(y_type)) + (sizeof(Real) == 8 ? 1e-10 : 1e-4);
    // Where all cancels, rounding leaves what the inputs' size says; 16 bits have a smallest
    // number.
    const double floor = value_scale() * std::max(1.0, scale_ * std::sqrt(shape_.K));
    if (error <= tolerance * (root_mean_square(y) + floor) + 1e-7) return;
    std::fprintf(stderr, "%s: error %g, size %g\n", name, error, root_mean_square(y));
    expect(false, "the chunkwise form gives what the recurrent form gives");
  }

  void expect(bool condition, const char* promise) {
    if (condition) return;
    std::fprintf(stderr, "%s<%s>: B %lld T %lld H %lld HV %lld K %lld V %lld, cu_seqlens",
                 rule_.name, core::name_of(core::dtype_of<Real>()),
                 static_cast<long long>(shape_.B), static_cast<long long>(shape_.T),
                 static_cast<long long>(shape_.H), static_cast<long long>(shape_.HV),
                 static_cast<long long>(shape_.K), static_cast<long long>(shape_.V));
    for (const auto border : cu_seqlens_)
      std::fprintf(stderr, " %lld", static_cast<long long>(border));
    std::fprintf(stderr, ", l2norm %d, gates %d, values %d, inputs", use_qk_l2norm_,
                 static_cast<int>(gates_), static_cast<int>(values_));
    for (std::size_t i = 0; i < names_.size(); ++i) {
      const auto view = std::as_const(*rows_[i]).view();
      std::fprintf(stderr, " %s:%s(%lld,%lld,%lld)", std::string(names_[i].name).c_str(),
                   core::name_of(view.dtype), static_cast<long long>(view.batch_stride),
                   static_cast<long long>(view.time_stride),
                   static_cast<long long>(view.head_stride));
    }
    std::fprintf(stderr, "\nreproduce: printf '");
    for (const auto byte : current_input) std::fprintf(stderr, "\\x%02x", byte);
    std::fprintf(stderr, "' > input && replay_rules input\n");
    require(false, promise);
  }

  Choices& choices_;
  Rule<Real> rule_;
  Shape shape_;
  Random random_;
  std::vector<std::int64_t> cu_seqlens_;
  bool use_qk_l2norm_ = false;
  Gates gates_{};
  Values values_{};
  double scale_ = 1;
  std::vector<Input<Real>> names_;
  std::vector<std::shared_ptr<Rows>> rows_;
  std::optional<States<Real>> initial_state_, initial_momentum_;
};

// ---- calls that are refused --------------------------------------------------------------------

/// Makes one thing wrong with a call that has no tensors, so that whatever is touched crashes.
RuleParams<float> wrong_params(Choices& choices, std::vector<std::int64_t>& cu_seqlens) {
  RuleParams<float> p;
  p.shape = {1, 4, 2, 4, 8, 8};
  switch (choices.below(11)) {
    case 0: p.shape.B = -1; break;
    case 1: p.shape.T = -1; break;
    case 2: p.shape.H = -choices.below(2); break;
    case 3: p.shape.HV = choices.flag() ? 3 : 0; break;
    case 4: p.shape.K = choices.flag() ? 0 : 257 + choices.below(1000); break;
    case 5: p.shape.V = choices.flag() ? 0 : 257 + choices.below(1000); break;
    case 6: p.scale = std::numeric_limits<double>::quiet_NaN(); break;
    case 7: cu_seqlens = {1, 4}; break;
    case 8: cu_seqlens = {0, 2 + choices.below(2)}; break;
    case 9: cu_seqlens = {0, 1 + choices.below(3), choices.below(1), 4}; break;
    default: p.shape.B = 2; cu_seqlens = {0, 4};
  }
  p.cu_seqlens = cu_seqlens;
  return p;
}

void check_refusal(Choices& choices) {
  std::vector<std::int64_t> cu_seqlens;
  const RuleParams<float> p = wrong_params(choices, cu_seqlens);
  bool refused = false;
  try {
    const auto executor = core::serial_executor();
    switch (choices.below(6)) {
      case 0: cpu::delta_rule(p, executor); break;
      case 1: cpu::delta_rule_recurrent(p, executor); break;
      case 2: cpu::delta_rule_backward(p, RuleGradients<float>{}, executor); break;
      case 3: cpu::gated_delta_rule(p, executor); break;
      case 4: cpu::gated_delta_rule_recurrent(p, executor); break;
      default: cpu::gated_delta_rule_backward(p, RuleGradients<float>{}, executor);
    }
  } catch (const ShapeError&) {
    refused = true;
  }
  require(refused, "wrong sizes are a ShapeError");
}

/// Leaves only the instruction set that the environment names, where it names one.
void choose_target() {
  const char* wanted = std::getenv("FASTWEIGHTS_FUZZ_TARGET");
  if (wanted == nullptr) return;
  for (std::int64_t targets = hwy::SupportedTargets(); targets != 0; targets &= targets - 1) {
    const std::int64_t target = targets & -targets;
    if (std::strcmp(hwy::TargetName(target), wanted) == 0) {
      hwy::DisableTargets(~target);
      return;
    }
  }
  std::fprintf(stderr, "this machine has no %s\n", wanted);
}

}  // namespace
}  // namespace fastweights::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace fuzz = fastweights::fuzz;
  static const bool chosen = (fuzz::choose_target(), true);
  static_cast<void>(chosen);
  fuzz::current_input = {data, size};
  fuzz::Choices choices({data, size});
  const std::int64_t rule = choices.below(fuzz::kRules + 1);
  if (rule == fuzz::kRules) {
    fuzz::check_refusal(choices);
  } else if (choices.flag()) {
    fuzz::Call<double>(rule, choices).check();
  } else {
    fuzz::Call<float>(rule, choices).check();
  }
  return 0;
}
