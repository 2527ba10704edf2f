#include "fastweights/session/session.hpp"

#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <numeric>
#include <span>
#include <utility>

#include "decoder.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/io/mapped_file.hpp"
#include "fastweights/io/quote.hpp"
#include "fastweights/io/tokenizer.hpp"
#include "fastweights/nn/language_model.hpp"
#include "fastweights/session/generator.hpp"
#include "fastweights/session/state_file.hpp"
#include "fingerprint.hpp"

namespace fastweights {
namespace {

using Model = std::shared_ptr<const nn::LanguageModelImpl>;
using detail::Place;
using nn::NamedTensors;
using Tokens = std::vector<std::int64_t>;

// ---- one step ---------------------------------------------------------------------------------

at::Tensor to_tensor(std::span<const std::int64_t> values) {
  return at::tensor(at::IntArrayRef(values.data(), values.size()), at::kLong);
}

at::Device device_of(const nn::LanguageModelImpl& model) {
  return model.embedding->weight.device();
}

/// A model that a session can run: of bytes, and with nothing left to chance.
Model checked(Model model) {
  if (!model) throw Error("session: there is no model");
  if (model->is_training()) throw Error("session: the model must be in evaluation mode (eval())");
  if (model->config().vocabulary_size != io::ByteTokenizer::kVocabularySize) {
    throw Error("session: the model's vocabulary must be the 256 bytes, got " +
                std::to_string(model->config().vocabulary_size) + " tokens");
  }
  return model;
}

Place fresh_place(const nn::LanguageModelImpl& model) {
  const auto options = at::TensorOptions(at::kFloat).device(device_of(model));
  return {model.initial_state(1), at::zeros({model.config().vocabulary_size}, options)};
}

/// Moves on over `tokens`; returns the logits after each of them, fp32 [T, vocabulary].
at::Tensor advance(Place& place, const nn::LanguageModelImpl& model, const Tokens& tokens,
                   bool in_place = false) {
  const at::Tensor input = to_tensor(tokens).unsqueeze(0).to(device_of(model));
  auto [logits, state] = model.forward(input, place.state, {.in_place = in_place});
  at::Tensor rows = logits.squeeze(0).to(at::kFloat);
  place = {std::move(state), rows[-1].clone()};
  return rows;
}

/// −log2 p of each token: the first under the logits `before` it, the others under `rows`, which
/// are the logits after each token.
at::Tensor bits_of(std::span<const std::int64_t> tokens, const at::Tensor& before,
                   const at::Tensor& rows) {
  const at::Tensor ahead = at::cat(
      {before.unsqueeze(0), rows.slice(0, 0, static_cast<std::int64_t>(tokens.size()) - 1)});
  const at::Tensor ids = to_tensor(tokens).to(rows.device()).unsqueeze(1);
  return at::log_softmax(ahead, 1).gather(1, ids).squeeze(1).mul(-1.0 / std::log(2.0)).cpu();
}

void append(std::vector<float>& out, const at::Tensor& values) {
  const std::span<const float> span(values.const_data_ptr<float>(),
                                    static_cast<std::size_t>(values.numel()));
  out.insert(out.end(), span.begin(), span.end());
}

// ---- texts -------------------------------------------------------------------------------------

/// Cuts a text into pieces of tokens and calls `run(tokens, first)` on each.
template <class Run>
void for_each_piece(std::string_view text, std::int64_t piece, const Progress& progress, Run run) {
  const auto step = static_cast<std::size_t>(piece);
  for (std::size_t done = 0; done < text.size();) {
    const Tokens tokens = io::ByteTokenizer().encode(text.substr(done, step));
    run(tokens, done == 0);
    done += tokens.size();
    const bool go_on = !progress || progress(static_cast<std::int64_t>(done),
                                             static_cast<std::int64_t>(text.size()));
    if (!go_on && done < text.size()) {
      throw Cancelled("session: stopped after " + std::to_string(done) + " of " +
                      std::to_string(text.size()) + " tokens");
    }
  }
}

void check_write_options(const WriteOptions& options) {
  if (options.max_tokens < 0) {
    throw Error("session: max_tokens must be at least 0, got " +
                std::to_string(options.max_tokens));
  }
  if (std::any_of(options.stop.begin(), options.stop.end(), std::mem_fn(&std::string::empty))) {
    throw Error("session: a stop string must not be empty");
  }
  check_sampling_options({options.temperature, options.top_k, options.top_p});
}

std::int64_t sample(const at::Tensor& logits, const WriteOptions& options, Generator& generator) {
  const at::Tensor plain = logits.cpu();
  const std::span<const float> span(plain.const_data_ptr<float>(),
                                    static_cast<std::size_t>(plain.numel()));
  return sample_token(span, {options.temperature, options.top_k, options.top_p},
                      generator.uniform());
}

/// Calls `on_token`; what it throws is kept for later, so that the session can be left valid first.
bool wants_more(const WriteOptions& options, std::string_view bytes, std::exception_ptr& thrown) {
  try {
    return !options.on_token || options.on_token(bytes);
  } catch (...) {
    thrown = std::current_exception();
    return false;
  }
}

// ---- state files -------------------------------------------------------------------------------

/// The generator of a session with this log: each written token drew once.
Generator generator_after(const SessionLog& log, std::uint64_t first_seed) {
  Generator generator{.seed = first_seed};
  for (const LogCall& call : log.calls()) {
    if (call.kind != CallKind::kWritten) continue;
    if (call.seed) generator = {.seed = *call.seed};
    generator.draws += static_cast<std::uint64_t>(call.tokens);
  }
  return generator;
}

at::Tensor to_tensor(const Generator& generator) {
  const std::array<std::int64_t, 2> fields = {static_cast<std::int64_t>(generator.seed),
                                              static_cast<std::int64_t>(generator.draws)};
  return to_tensor(fields);
}

io::ScalarType stored_type(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return io::ScalarType::F64;
    case at::kFloat: return io::ScalarType::F32;
    case at::kHalf: return io::ScalarType::F16;
    case at::kBFloat16: return io::ScalarType::BF16;
    case at::kLong: return io::ScalarType::I64;
    default:
      throw Error(std::string("session: a state of type ") + c10::toString(tensor.scalar_type()) +
                  " cannot be saved");
  }
}

io::TensorData stored(const std::string& name, const at::Tensor& tensor) {
  return {name,
          stored_type(tensor),
          tensor.sizes().vec(),
          {static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()}};
}

/// The stored tensor of that name, which must be just like `like`.
at::Tensor restored(const std::string& name, const at::Tensor& like,
                    std::span<const io::TensorData> tensors) {
  const auto from = std::ranges::find(tensors, name, &io::TensorData::name);
  if (from == tensors.end() || from->type != stored_type(like) || like.sizes() != from->shape) {
    throw StateMismatch("the state file has no tensor " + name + " like the model's");
  }
  at::Tensor host = at::empty(like.sizes(), like.options().device(at::kCPU));
  if (!from->bytes.empty()) std::memcpy(host.data_ptr(), from->bytes.data(), from->bytes.size());
  return host.to(like.device());
}

}  // namespace

// ---- the session -------------------------------------------------------------------------------

Session::Session(Model model, const SessionOptions& options)
    : model_(checked(std::move(model))),
      decoder_(detail::Decoder::make(*model_)),
      options_(options),
      place_(fresh_place(*model_)),
      generator_{.seed = options.seed},
      log_(model_->config().vocabulary_size) {
  if (options.piece < 1) {
    throw Error("session: piece must be at least 1, got " + std::to_string(options.piece));
  }
}

void Session::read_pieces(std::string_view text, const Progress& progress,
                          const AfterPiece& after) {
  const c10::InferenceMode guard;
  for_each_piece(text, options_.piece, progress, [&](const Tokens& tokens, bool first) {
    Place next = place_;
    const at::Tensor rows = advance(next, *model_, tokens);
    if (first) {
      log_.start_call(CallKind::kRead, tokens);
    } else {
      log_.extend_call(tokens);
    }
    std::swap(place_, next);
    if (after) after(tokens, next.logits, rows);
  });
}

void Session::read(std::string_view text, const Progress& progress) {
  read_pieces(text, progress, {});
}

std::vector<float> Session::read_and_score(std::string_view text, const Progress& progress) {
  std::vector<float> bits;
  bits.reserve(text.size());
  read_pieces(text, progress, [&](auto tokens, const at::Tensor& before, const at::Tensor& rows) {
    append(bits, bits_of(tokens, before, rows));
  });
  return bits;
}

double Session::score(std::string_view text, const Progress& progress) const {
  if (text.empty()) throw Error("session: an empty text has no bits per byte");
  const std::vector<float> bits = token_bits(text, progress);
  return std::accumulate(bits.begin(), bits.end(), 0.0) / static_cast<double>(text.size());
}

std::vector<float> Session::token_bits(std::string_view text, const Progress& progress) const {
  const c10::InferenceMode guard;
  Place place = place_;
  std::vector<float> bits;
  bits.reserve(text.size());
  for_each_piece(text, options_.piece, progress, [&](const Tokens& tokens, bool) {
    const at::Tensor before = place.logits;
    append(bits, bits_of(tokens, before, advance(place, *model_, tokens)));
  });
  return bits;
}

std::string Session::write(const WriteOptions& options) {
  check_write_options(options);
  const c10::InferenceMode guard;
  Place place{place_.state.clone(), place_.logits};
  Generator generator = options.seed ? Generator{.seed = *options.seed} : generator_;
  Tokens written;
  std::string text;
  std::exception_ptr thrown;
  for (bool more = true; more && std::ssize(written) < options.max_tokens;) {
    written.push_back(sample(place.logits, options, generator));
    if (decoder_) {
      place.logits = decoder_->step(written.back(), place.state);
    } else {
      advance(place, *model_, {written.back()}, /*in_place=*/true);
    }
    const std::string bytes = io::ByteTokenizer().decode(std::span(written).last(1));
    text += bytes;
    more = wants_more(options, bytes, thrown) &&
           std::none_of(options.stop.begin(), options.stop.end(),
                        [&](const std::string& stop) { return text.ends_with(stop); });
  }
  if (!written.empty()) {
    log_.start_call(CallKind::kWritten, written, options.seed);
    place_ = std::move(place);
    generator_ = generator;
  }
  if (thrown) std::rethrow_exception(thrown);
  return text;
}

at::Tensor Session::logits() const { return place_.logits.cpu().clone(); }

NamedTensors Session::place_tensors() const {
  NamedTensors tensors = place_.state.tensors();
  tensors.emplace_back("logits", place_.logits);
  return tensors;
}

NamedTensors Session::state() const {
  NamedTensors tensors = place_tensors();
  for (auto& [name, tensor] : tensors) tensor = tensor.clone();
  tensors.emplace_back("generator", to_tensor(generator_));
  return tensors;
}

void Session::save(const std::filesystem::path& path) const {
  NamedTensors tensors = place_tensors();
  std::vector<io::TensorData> views;
  for (auto& [name, tensor] : tensors) {
    tensor = tensor.cpu().contiguous();
    views.push_back(stored(name, tensor));
  }
  write_state_file(path, {.model = detail::model_fingerprint(*model_),
                          .piece = options_.piece,
                          .seed = options_.seed,
                          .log = log_,
                          .tensors = std::move(views)});
}

void Session::restore(const StateFile& file) {
  const c10::InferenceMode guard;
  NamedTensors mine = place_tensors();
  if (mine.size() != file.tensors.size()) {
    throw StateMismatch("the state file has " + std::to_string(file.tensors.size()) +
                        " tensors, the model's state " + std::to_string(mine.size()));
  }
  for (auto& [name, tensor] : mine) tensor = restored(name, tensor, file.tensors);
  place_.logits = mine.back().second;
  mine.pop_back();
  place_.state = nn::LanguageModelState::from_tensors(mine);
  log_ = file.log;
  generator_ = generator_after(log_, file.seed);
  if (place_.state.position.item<std::int64_t>() != log_.size()) {
    throw FileError("state file: malformed: its tensors do not belong to its log");
  }
}

Session Session::load(const std::filesystem::path& path, Model model) {
  const io::MappedFile mapped(path);
  try {
    const StateFile file = parse_state_file(mapped.bytes());
    Session session(std::move(model), {.piece = file.piece, .seed = file.seed});
    const std::string fingerprint = detail::model_fingerprint(*session.model_);
    if (file.model != fingerprint) {
      throw StateMismatch("the state belongs to another model: its fingerprint is " + file.model +
                          ", this model's is " + fingerprint);
    }
    session.restore(file);
    return session;
  } catch (const FileError& error) {
    throw FileError(io::quote(path.string()) + ": " + error.what());
  } catch (const StateMismatch& error) {
    throw StateMismatch(io::quote(path.string()) + ": " + error.what());
  }
}

}  // namespace fastweights
