#include "trainer.hpp"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>
#include <numeric>
#include <random>
#include <utility>

#include "autocast.hpp"
#include "evaluation.hpp"
#include "fastweights/core/error.hpp"
#include "fastweights/io/atomic_file.hpp"
#include "fastweights/io/safetensors.hpp"
#include "fastweights/nn/model_folder.hpp"
#include "fastweights/nn/tensor_file.hpp"
#include "state_rows.hpp"

namespace training {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;
namespace nn = fastweights::nn;

constexpr const char* kFormat = "fastweights training checkpoint 1";
constexpr double kSmoothing = 0.95;

nn::LanguageModel make_model(const Options& options) {
  torch::manual_seed(options.seed);
  nn::LanguageModel model(options.model);
  if (!options.from.empty()) fastweights::load_weights(options.from, *model);
  return model;
}

AdamW::NamedTensors parameters_of(nn::LanguageModelImpl& model) {
  AdamW::NamedTensors parameters;
  for (const auto& item : model.named_parameters()) {
    parameters.emplace_back(item.key(), item.value());
  }
  return parameters;
}

StreamOptions stream_options(const Options& options) {
  // The data's order is apart from the weights' initial values, which come from the same seed.
  return {options.batch, options.segment, options.reset_probability, options.repeat_probability,
          options.seed ^ 0x5851f42d4c957f2dULL};
}

json by_name(const std::vector<Work>& works, const std::vector<double>& values) {
  json object = json::object();
  for (size_t i = 0; i < works.size(); ++i) object[works[i].name] = values[i];
  return object;
}

void round_to_bf16(nn::LanguageModelImpl& model) {
  const at::NoGradGuard no_gradient;
  for (at::Tensor& parameter : model.parameters()) parameter.copy_(parameter.to(at::kBFloat16));
}

/// The tensors whose names start with `prefix`, without it.
nn::NamedTensors below(const std::map<std::string, at::Tensor>& tensors,
                       const std::string& prefix) {
  nn::NamedTensors found;
  for (const auto& [name, tensor] : tensors) {
    if (name.starts_with(prefix)) found.emplace_back(name.substr(prefix.size()), tensor);
  }
  return found;
}

void restore_parameters(nn::LanguageModelImpl& model,
                        const std::map<std::string, at::Tensor>& tensors) {
  const at::NoGradGuard no_gradient;
  for (const auto& [name, parameter] : parameters_of(model)) {
    const auto found = tensors.find("model." + name);
    if (found == tensors.end() || found->second.sizes() != parameter.sizes()) {
      throw fastweights::StateMismatch("checkpoint: model." + name + " is missing or misshaped");
    }
    parameter.copy_(found->second);
  }
}

template <typename Map>
const typename Map::mapped_type& required(const Map& map, const std::string& key) {
  const auto found = map.find(key);
  if (found == map.end()) throw fastweights::StateMismatch("checkpoint: no " + key);
  return found->second;
}

/// Of its own for each part of each step: which worker comes first decides nothing, and a resumed
/// run draws what an uninterrupted one would.
at::Generator dropout_generator(std::uint64_t seed, int64_t step, int64_t part) {
  // A seed_seq takes 32 bits of each.
  std::seed_seq sequence{seed, seed >> 32, static_cast<std::uint64_t>(step),
                         static_cast<std::uint64_t>(part)};
  std::array<std::uint32_t, 2> words{};
  sequence.generate(words.begin(), words.end());
  return at::detail::createCPUGenerator(std::uint64_t{words[0]} << 32 | words[1]);
}

double mean(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

}  // namespace

Trainer::Trainer(Options options)
    : options_(std::move(options)),
      texts_(read_works(options_.texts)),
      held_out_(read_works(options_.held_out)),
      recipe_(recipe(options_, digest(texts_))),
      model_(make_model(options_)),
      replicas_(model_, options_.threads),
      optimizer_(parameters_of(*model_), options_.optimizer),
      stream_(texts_, stream_options(options_)) {
  at::set_num_threads(1);  // the workers are the threads
  states_ = split_rows(model_->initial_state(options_.batch), parts());
  prepare_output();
  if (options_.resume) resume();
  log_.emplace(options_.output / "log.jsonl", options_.resume ? counters_.step : -1);
  if (!options_.resume) {
    log_->write({{"event", "start"},
                 {"step", 0},
                 {"command", options_.command},
                 {"recipe", json::parse(recipe_)}});
  }
}

void Trainer::prepare_output() const {
  std::error_code error;
  fs::create_directories(options_.output, error);
  if (error) {
    throw fastweights::FileError("output: cannot create " + options_.output.string() + ": " +
                                 error.message());
  }
  const bool exists = fs::exists(checkpoint_path());
  if (options_.resume && !exists) {
    throw fastweights::FileError("--resume: " + checkpoint_path().string() + " does not exist");
  }
  if (exists && !options_.resume && !options_.overwrite) {
    throw fastweights::FileError("output: " + checkpoint_path().string() +
                                 " exists; give --resume to go on or --overwrite to start anew");
  }
  // Otherwise a later --resume could join the old checkpoint to the new log.
  if (exists && options_.overwrite) fs::remove(checkpoint_path());
}

fs::path Trainer::checkpoint_path() const { return options_.output / "checkpoint.safetensors"; }

double Trainer::seconds() const {
  return counters_.seconds + std::chrono::duration<double>(Clock::now() - start_).count();
}

double Trainer::progress() const {
  double done = 0.0;
  if (options_.steps > 0) done = static_cast<double>(counters_.step) / options_.steps;
  if (options_.seconds > 0) done = std::max(done, seconds() / options_.seconds);
  return done;
}

Outcome Trainer::run(const std::function<bool()>& stop) {
  start_ = last_checkpoint_ = Clock::now();
  progress_at_start_ = progress();
  const int64_t first_step = counters_.step;
  const auto used_up = [&] {
    return options_.stop_after > 0 && counters_.step - first_step >= options_.stop_after;
  };
  line_.note(fmt::format("{} parameters; {:.2f} MB in {} works, {} held out; {} threads",
                         model_->parameter_count(), total_bytes(texts_) / 1e6, texts_.size(),
                         held_out_.size(), options_.threads));
  while (progress() < 1.0 && !used_up() && !stop()) {
    train_step();
    const bool due = options_.evaluate_every > 0 && counters_.step % options_.evaluate_every == 0;
    if (due) evaluate(stop);
    periodic_checkpoint();
  }
  checkpoint();
  if (progress() >= 1.0 && finish(stop)) return Outcome::kFinished;
  line_.note(fmt::format("stopped at step {}; go on with --resume", counters_.step));
  return Outcome::kInterrupted;
}

void Trainer::train_step() {
  const double learning_rate = options_.schedule.at(progress());
  const Clock::time_point begin = Clock::now();
  const Segment segment = stream_.next();
  const double nats = backward(segment);
  const double norm = std::isfinite(nats) ? optimizer_.step(learning_rate) : nats;
  if (!std::isfinite(norm)) {
    const std::string kept = fs::exists(checkpoint_path()) ? checkpoint_path().string() + " is kept"
                                                           : "there is no checkpoint yet";
    throw fastweights::Error(
        fmt::format("step {}: the {} is not finite (learning rate {:.2e}); {}", counters_.step + 1,
                    std::isfinite(nats) ? "gradient" : "loss", learning_rate, kept));
  }
  counters_.step += 1;
  counters_.bytes += segment.bytes;
  const double bits = nats / std::numbers::ln2;
  counters_.bits += bits;
  const double speed = segment.bytes / std::chrono::duration<double>(Clock::now() - begin).count();
  const bool first = recent_speed_ == 0.0;
  recent_bits_ = first ? bits : kSmoothing * recent_bits_ + (1 - kSmoothing) * bits;
  recent_speed_ = first ? speed : kSmoothing * recent_speed_ + (1 - kSmoothing) * speed;
  if (counters_.step % options_.log_every == 0) record(learning_rate, norm);
  show(learning_rate);
}

double Trainer::backward(const Segment& segment) {
  std::vector<double> nats(options_.threads);
  // Drawn here, not by the workers: which of them came first would decide who got which numbers.
  const at::Tensor memory_keep = model_->draw_memory_keep(options_.batch);
  run_workers(options_.threads, [&](int worker) {
    for (int64_t turn = 0; turn < options_.accumulation; ++turn) {
      const int64_t index = worker * options_.accumulation + turn;
      nats[worker] += backward_part(worker, index, segment, memory_keep);
    }
  });
  replicas_.sum_gradients();
  return std::accumulate(nats.begin(), nats.end(), 0.0);
}

double Trainer::backward_part(int worker, int64_t index, const Segment& segment,
                              const at::Tensor& memory_keep) {
  const auto [begin, end] = part(options_.batch, parts(), index);
  const auto rows = [begin = begin, end = end](const at::Tensor& tensor) {
    return tensor.slice(0, begin, end);
  };
  const auto state = states_[index].reset_rows(rows(segment.fresh));
  nn::LanguageModelOutput result;
  {
    const Autocast autocast(options_.bf16);
    nn::ForwardOptions options;
    if (memory_keep.defined()) options.memory_keep = rows(memory_keep);
    options.generator = dropout_generator(options_.seed, counters_.step, index);
    result = replicas_[worker].forward(rows(segment.inputs), state, options);
  }
  const at::Tensor loss =
      at::cross_entropy_loss(result.logits.flatten(0, 1).to(at::kFloat),
                             rows(segment.targets).flatten(), {}, at::Reduction::Sum, kIgnored);
  // Each byte counts alike, in whichever part of the batch it is.
  const at::Tensor share = loss / static_cast<double>(std::max<int64_t>(segment.bytes, 1));
  share.backward();
  states_[index] = result.state.detach();
  return share.item<double>();
}

void Trainer::record(double learning_rate, double norm) {
  log_->write({{"event", "train"},
               {"step", counters_.step},
               {"bytes", counters_.bytes},
               {"bits_per_byte", counters_.bits / static_cast<double>(options_.log_every)},
               {"gradient_norm", norm},
               {"learning_rate", learning_rate},
               {"bytes_per_second", recent_speed_},
               {"seconds", seconds()}});
  counters_.bits = 0.0;
}

void Trainer::show(double learning_rate) {
  const double done = progress();
  const double now = std::chrono::duration<double>(Clock::now() - start_).count();
  const double rate = (done - progress_at_start_) / std::max(now, 1e-9);
  line_.update({done, counters_.step, recent_bits_, recent_speed_, learning_rate,
                rate > 0.0 ? (1.0 - done) / rate : 0.0});
}

void Trainer::evaluate(const std::function<bool()>& stop) {
  if (held_out_.empty()) return;
  const EvaluationOptions options{options_.evaluate_bytes, options_.segment, options_.bf16,
                                  options_.threads};
  model_->eval();
  const std::vector<double> bits = bits_per_byte(*model_, held_out_, options, stop);
  model_->train();
  if (bits.empty()) return;
  log_->write({{"event", "evaluation"},
               {"step", counters_.step},
               {"first_bytes", options_.evaluate_bytes},
               {"held_out", by_name(held_out_, bits)},
               {"mean", mean(bits)},
               {"seconds", seconds()}});
  line_.note(fmt::format("step {}: held out {:.4f} bits/byte", counters_.step, mean(bits)));
}

bool Trainer::finish(const std::function<bool()>& stop) {
  line_.finish();
  const fs::path folder = options_.output / "model";
  fastweights::save_model(folder, *model_, at::kBFloat16);
  line_.note("wrote " + folder.string());
  const json works = evaluate_whole_works(stop);
  if (stop()) return false;
  const json summary = {{"command", options_.command},
                        {"recipe", json::parse(recipe_)},
                        {"parameters", model_->parameter_count()},
                        {"training_bytes", total_bytes(texts_)},
                        {"training_works", texts_.size()},
                        {"steps", counters_.step},
                        {"bytes_read", counters_.bytes},
                        {"seconds", seconds()},
                        {"held_out", works}};
  fastweights::io::write_file_atomically(options_.output / "summary.json", summary.dump(1) + "\n");
  return true;
}

json Trainer::evaluate_whole_works(const std::function<bool()>& stop) {
  json object = json::object();
  if (held_out_.empty()) return object;
  // What is measured is what was written: the rounded weights, computed in fp32.
  round_to_bf16(*model_);
  model_->eval();
  const EvaluationOptions whole{0, options_.segment, false, options_.threads};
  const auto carried = bits_per_byte(*model_, held_out_, whole, stop);
  model_->enable_memory(false);
  const auto attention_only = bits_per_byte(*model_, held_out_, whole, stop);
  model_->enable_memory(true);
  if (attention_only.empty()) return object;
  for (size_t i = 0; i < held_out_.size(); ++i) {
    const Work& work = held_out_[i];
    object[work.name] = {{"bytes", work.bytes.size()},
                         {"memory_carried", carried[i]},
                         {"attention_only", attention_only[i]}};
    line_.note(fmt::format("{}: {:.4f} bits/byte, {:.4f} without memory", work.name, carried[i],
                           attention_only[i]));
  }
  return object;
}

void Trainer::checkpoint() {
  std::map<std::string, at::Tensor> tensors = optimizer_.save();
  tensors.merge(stream_.save());
  for (const auto& [name, parameter] : parameters_of(*model_)) {
    tensors["model." + name] = parameter.detach();
  }
  for (const auto& [name, tensor] : join_rows(states_).tensors()) tensors["state." + name] = tensor;
  tensors["generator"] = at::detail::getDefaultCPUGenerator().get_state();
  const json counters = {{"step", counters_.step},
                         {"bytes", counters_.bytes},
                         {"seconds", seconds()},
                         {"bits", counters_.bits}};
  nn::save_tensors(checkpoint_path(), {tensors.begin(), tensors.end()},
                   {{"format", kFormat}, {"recipe", recipe_}, {"counters", counters.dump()}});
  last_checkpoint_ = Clock::now();
}

void Trainer::periodic_checkpoint() {
  const std::chrono::duration<double> age = Clock::now() - last_checkpoint_;
  if (age.count() < options_.checkpoint_seconds) return;
  try {
    checkpoint();
  } catch (const fastweights::FileError& error) {
    // A full disk must not end a long run: the old checkpoint is whole, the next one may fit.
    line_.note(fmt::format("warning: {} (training goes on)", error.what()));
    last_checkpoint_ = Clock::now();
  }
}

void Trainer::resume() {
  const auto metadata = fastweights::io::SafetensorsFile(checkpoint_path()).view().metadata();
  if (!metadata.contains("format") || metadata.at("format") != kFormat) {
    throw fastweights::StateMismatch(checkpoint_path().string() + " is no training checkpoint");
  }
  for (const std::string& change : changed_settings(required(metadata, "recipe"), recipe_)) {
    line_.note(change);
  }
  const nn::NamedTensors loaded = nn::load_tensors(checkpoint_path());
  const std::map<std::string, at::Tensor> tensors(loaded.begin(), loaded.end());
  restore_parameters(*model_, tensors);
  optimizer_.restore(tensors);
  stream_.restore(tensors);
  states_ = split_rows(nn::LanguageModelState::from_tensors(below(tensors, "state.")), parts());
  auto generator = at::detail::getDefaultCPUGenerator();
  generator.set_state(required(tensors, "generator"));
  const json counters = json::parse(required(metadata, "counters"));
  counters_ = {counters.at("step"), counters.at("bytes"), counters.at("seconds"),
               counters.at("bits")};
}

}  // namespace training
