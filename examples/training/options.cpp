#include "options.hpp"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string_view>
#include <thread>

#include "fastweights/core/error.hpp"

namespace training {
namespace {

using nlohmann::json;

// Settings of a run that a resumed one cannot change.
constexpr std::array<std::string_view, 4> kFixed = {"model", "texts", "batch", "segment"};

json read_json(const std::filesystem::path& path) {
  std::ifstream file(path);
  if (!file) throw fastweights::FileError("config: cannot open " + path.string());
  try {
    return json::parse(file);
  } catch (const json::parse_error& error) {
    throw fastweights::FileError("config: " + path.string() + " is not JSON: " + error.what());
  }
}

/// `key=value`, the value as JSON where it is JSON and as a string otherwise.
void assign(json& config, const std::string& setting) {
  const size_t equals = setting.find('=');
  if (equals == std::string::npos || equals == 0) {
    throw fastweights::Error("--set: expected key=value, got '" + setting + "'");
  }
  const std::string text = setting.substr(equals + 1);
  json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  config[setting.substr(0, equals)] = value.is_discarded() ? json(text) : std::move(value);
}

std::string joined(int argc, char** argv) {
  std::string command;
  for (int i = 0; i < argc; ++i) command += (i > 0 ? " " : "") + std::string(argv[i]);
  return command;
}

fastweights::nn::LanguageModelConfig read_config(const std::filesystem::path& path,
                                                 const std::vector<std::string>& settings) {
  const fastweights::nn::LanguageModelConfig defaults;
  json config = path.empty() ? json::parse(defaults.to_json()) : read_json(path);
  for (const std::string& setting : settings) assign(config, setting);
  const auto result = fastweights::nn::LanguageModelConfig::from_json(config.dump());
  if (result.vocabulary_size != 256) {
    throw fastweights::Error(
        "config: texts are read as bytes, so vocabulary_size must be 256, got " +
        std::to_string(result.vocabulary_size));
  }
  return result;
}

void add_data_options(CLI::App& app, Options& options) {
  app.add_option("--texts", options.texts, "Training texts: files, or folders searched for .txt")
      ->required();
  app.add_option("--held-out", options.held_out, "Held-out works, never trained on");
  app.add_option("--output", options.output,
                 "Folder for checkpoint.safetensors, log.jsonl, summary.json and the model/ folder")
      ->required();
  app.add_flag("--resume", options.resume, "Go on from the checkpoint in --output, exactly");
  app.add_flag("--overwrite", options.overwrite, "Start anew although --output holds a checkpoint");
}

void add_batch_options(CLI::App& app, Options& options) {
  const CLI::Range probability(0.0, 1.0);
  app.add_option("--batch", options.batch, "Rows per update; each streams through its own work")
      ->check(CLI::Range(1, 4096));
  app.add_option("--segment", options.segment,
                 "Bytes per segment: back-propagation stops at its start, the state is carried on")
      ->check(CLI::Range(16, 1 << 20));
  app.add_option("--accumulation", options.accumulation,
                 "Turns in which each thread takes its rows: less memory")
      ->check(CLI::Range(1, 1024));
  app.add_option("--reset-probability", options.reset_probability,
                 "That a row starts a segment with an empty state in mid-work")
      ->check(probability);
  app.add_option("--repeat-probability", options.repeat_probability,
                 "That a row reads a passage of 64-256 bytes from 256-16384 bytes back again")
      ->check(probability);
}

void add_optimizer_options(CLI::App& app, Options& options) {
  app.add_option("--learning-rate", options.schedule.peak, "Peak")->check(CLI::PositiveNumber);
  app.add_option("--final-ratio", options.schedule.final_ratio, "Last learning rate / peak")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--warmup", options.schedule.warmup, "Share of the run")
      ->check(CLI::Range(0.0, 1.0));
  app.add_option("--weight-decay", options.optimizer.weight_decay, "On projection matrices only")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--beta1", options.optimizer.beta1)->check(CLI::Range(0.0, 0.9999));
  app.add_option("--beta2", options.optimizer.beta2)->check(CLI::Range(0.0, 0.99999));
  app.add_option("--clip", options.optimizer.clip, "Largest norm of the gradient; 0: no limit")
      ->check(CLI::NonNegativeNumber);
}

void add_run_options(CLI::App& app, Options& options) {
  app.add_option("--steps", options.steps, "Updates")->check(CLI::NonNegativeNumber);
  app.add_option(
         "--seconds", options.seconds,
         "Wall time; the learning rate follows whichever of --steps and --seconds ends first")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--stop-after", options.stop_after,
                 "Updates, after which a checkpoint is left as on Ctrl-C; 0: none")
      ->check(CLI::NonNegativeNumber);
  app.add_flag("--bf16", options.bf16, "Matrix products in bf16 (autocast); weights stay fp32");
  app.add_option("--threads", options.threads, "Workers; each takes its share of the batch")
      ->check(CLI::Range(1, 1024));
  app.add_option("--seed", options.seed, "Of initial weights, data order and dropout");
  app.add_option("--log-every", options.log_every, "Steps")->check(CLI::PositiveNumber);
  app.add_option("--evaluate-every", options.evaluate_every, "Steps; 0: only at the end")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--evaluate-bytes", options.evaluate_bytes,
                 "Of each held-out work, while training; at the end all is read")
      ->check(CLI::PositiveNumber);
  app.add_option("--checkpoint-seconds", options.checkpoint_seconds, "Between checkpoints")
      ->check(CLI::NonNegativeNumber);
}

}  // namespace

Options parse_options(int argc, char** argv) {
  CLI::App app("Train a byte language model whose memory is carried from segment to segment.");
  app.option_defaults()->always_capture_default();
  Options options;
  options.threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  std::filesystem::path config;
  std::vector<std::string> settings;
  add_data_options(app, options);
  app.add_option("--from", options.from, "Model folder whose weights training starts from");
  app.add_option("--config", config,
                 "config.json of the model; without it that of --from, or the defaults");
  app.add_option("--set", settings, "key=value of the model's config, e.g. --set width=64");
  add_batch_options(app, options);
  add_optimizer_options(app, options);
  add_run_options(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::exit(app.exit(error));
  }
  if (options.steps == 0 && options.seconds == 0.0) {
    throw fastweights::Error("give --steps or --seconds: how long shall it train?");
  }
  if (options.batch < options.threads * options.accumulation) {
    throw fastweights::Error("--batch must be at least threads * accumulation = " +
                             std::to_string(options.threads * options.accumulation) + ", got " +
                             std::to_string(options.batch));
  }
  if (options.resume && options.overwrite) {
    throw fastweights::Error("--resume and --overwrite exclude each other");
  }
  if (config.empty() && !options.from.empty()) config = options.from / "config.json";
  options.model = read_config(config, settings);
  options.command = joined(argc, argv);
  return options;
}

std::string recipe(const Options& options, const std::string& texts_digest) {
  const json values = {{"model", json::parse(options.model.to_json())},
                       {"from", options.from.string()},
                       {"texts", texts_digest},
                       {"batch", options.batch},
                       {"segment", options.segment},
                       {"accumulation", options.accumulation},
                       {"threads", options.threads},
                       {"reset_probability", options.reset_probability},
                       {"repeat_probability", options.repeat_probability},
                       {"steps", options.steps},
                       {"seconds", options.seconds},
                       {"learning_rate", options.schedule.peak},
                       {"final_ratio", options.schedule.final_ratio},
                       {"warmup", options.schedule.warmup},
                       {"weight_decay", options.optimizer.weight_decay},
                       {"beta1", options.optimizer.beta1},
                       {"beta2", options.optimizer.beta2},
                       {"clip", options.optimizer.clip},
                       {"bf16", options.bf16},
                       {"seed", options.seed},
                       {"log_every", options.log_every}};
  return values.dump();
}

std::vector<std::string> changed_settings(const std::string& checkpoint, const std::string& now) {
  json before = json::parse(checkpoint, nullptr, /*allow_exceptions=*/false);
  const json after = json::parse(now);
  if (!before.is_object()) throw fastweights::StateMismatch("checkpoint: its recipe is not JSON");
  if (before.contains("model")) {
    // A key that the configuration did not have yet is at its default.
    const auto model = fastweights::nn::LanguageModelConfig::from_json(before["model"].dump());
    before["model"] = json::parse(model.to_json());
  }
  std::vector<std::string> changes;
  for (const auto& [key, value] : after.items()) {
    const json old = before.value(key, json());
    if (old == value) continue;
    const std::string change =
        "--resume: " + key + " was " + old.dump() + " in the checkpoint and is now " + value.dump();
    if (std::find(kFixed.begin(), kFixed.end(), key) != kFixed.end()) {
      throw fastweights::StateMismatch(change);
    }
    changes.push_back(change);
  }
  return changes;
}

}  // namespace training
