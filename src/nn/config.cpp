#include "fastweights/nn/config.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <vector>

#include "fastweights/core/error.hpp"

namespace fastweights::nn {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kFormat = "fastweights";
constexpr std::int64_t kVersion = 1;
constexpr std::int64_t kMaxHeadSize = 256;
constexpr std::int64_t kMaxSize = std::int64_t{1} << 24;

// Calls `visit(name, member)` for every key, in the order of config.json.
template <class Config, class Visit>
void for_each_key(Config& config, Visit&& visit) {
  visit("vocabulary_size", config.vocabulary_size);
  visit("width", config.width);
  visit("layers", config.layers);
  visit("feed_forward_width", config.feed_forward_width);
  visit("attention", config.attention);
  visit("attention_heads", config.attention_heads);
  visit("attention_window", config.attention_window);
  visit("attention_sinks", config.attention_sinks);
  visit("rope_base", config.rope_base);
  visit("memory", config.memory);
  visit("memory_rule", config.memory_rule);
  visit("memory_heads", config.memory_heads);
  visit("memory_value_heads", config.memory_value_heads);
  visit("memory_key_size", config.memory_key_size);
  visit("memory_value_size", config.memory_value_size);
  visit("convolution_size", config.convolution_size);
  visit("beta_max", config.beta_max);
  visit("half_life_min", config.half_life_min);
  visit("half_life_max", config.half_life_max);
  visit("memory_dropout", config.memory_dropout);
  visit("memory_initial_matrix", config.memory_initial_matrix);
  visit("fast_head", config.fast_head);
  visit("fast_head_eta", config.fast_head_eta);
  visit("fast_head_half_life", config.fast_head_half_life);
  visit("fast_head_initial_matrix", config.fast_head_initial_matrix);
  visit("tie_embeddings", config.tie_embeddings);
  visit("dropout", config.dropout);
  visit("norm_epsilon", config.norm_epsilon);
  visit("initializer_range", config.initializer_range);
}

[[noreturn]] void fail(const std::string& message) { throw Error("config: " + message); }

std::string text(double value) { return Json(value).dump(); }

void check_range(std::string_view key, std::int64_t value, std::int64_t low, std::int64_t high) {
  if (value >= low && value <= high) return;
  fail(std::string(key) + " must be from " + std::to_string(low) + " to " + std::to_string(high) +
       ", got " + std::to_string(value));
}

// Both ends belong to the range.
void check_range(std::string_view key, double value, double low, double high) {
  if (std::isfinite(value) && value >= low && value <= high) return;
  fail(std::string(key) + " must be from " + text(low) + " to " + text(high) + ", got " +
       (std::isfinite(value) ? text(value) : std::to_string(value)));
}

void check_divides(std::string_view key, std::int64_t value, std::string_view into,
                   std::int64_t whole) {
  if (whole % value == 0) return;
  fail(std::string(key) + " must divide " + std::string(into) + " = " + std::to_string(whole) +
       ", got " + std::to_string(value));
}

void check_attention(const LanguageModelConfig& config) {
  check_range("attention_heads", config.attention_heads, 1, config.width);
  check_divides("attention_heads", config.attention_heads, "width", config.width);
  const auto size = config.width / config.attention_heads;
  if (size % 4 != 0 || size > kMaxHeadSize) {
    fail("width / attention_heads must be a multiple of 4 up to 256, got " + std::to_string(size));
  }
  check_range("attention_window", config.attention_window, 1, kMaxSize);
  check_range("attention_sinks", config.attention_sinks, 0, 1024);
  check_range("rope_base", config.rope_base, 1.0, 1e12);
}

void check_memory(const LanguageModelConfig& config) {
  if (config.memory_rule != "gated_delta_rule" && config.memory_rule != "delta_rule") {
    fail("memory_rule must be \"gated_delta_rule\" or \"delta_rule\", got \"" + config.memory_rule +
         "\"");
  }
  check_range("memory_heads", config.memory_heads, 1, kMaxSize);
  check_range("memory_value_heads", config.memory_value_heads, 1, kMaxSize);
  check_divides("memory_heads", config.memory_heads, "memory_value_heads",
                config.memory_value_heads);
  check_range("memory_key_size", config.memory_key_size, 1, kMaxHeadSize);
  check_range("memory_value_size", config.memory_value_size, 1, kMaxHeadSize);
  check_range("convolution_size", config.convolution_size, 1, 64);
  check_range("beta_max", config.beta_max, 1e-6, 2.0);
  check_range("half_life_min", config.half_life_min, 1e-3, 1e12);
  check_range("half_life_max", config.half_life_max, config.half_life_min, 1e12);
  check_range("memory_dropout", config.memory_dropout, 0.0, 1.0);
}

void check_fast_head(const LanguageModelConfig& config) {
  check_range("fast_head_eta", config.fast_head_eta, 0.0, 2.0);
  check_range("fast_head_half_life", config.fast_head_half_life, 0.0, 1e12);
}

// Number of single-character edits between two words.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

void check_known(const std::string& key) {
  std::string nearest;
  std::size_t least = key.size() + 64;
  bool known = key == "format" || key == "version";
  const LanguageModelConfig defaults;
  for_each_key(defaults, [&](const char* name, const auto&) {
    known = known || key == name;
    const auto distance = edit_distance(key, name);
    if (distance < least) {
      least = distance;
      nearest = name;
    }
  });
  if (!known) fail("unknown key \"" + key + "\"; the nearest known key is \"" + nearest + "\"");
}

[[noreturn]] void fail_type(std::string_view key, std::string_view expected, const Json& value) {
  fail(std::string(key) + " must be " + std::string(expected) + ", got " + value.dump());
}

void read_value(std::string_view key, const Json& value, bool& out) {
  if (!value.is_boolean()) fail_type(key, "true or false", value);
  out = value.get<bool>();
}

void read_value(std::string_view key, const Json& value, std::string& out) {
  if (!value.is_string()) fail_type(key, "a string", value);
  out = value.get<std::string>();
}

void read_value(std::string_view key, const Json& value, double& out) {
  if (!value.is_number()) fail_type(key, "a number", value);
  out = value.get<double>();
}

void read_value(std::string_view key, const Json& value, std::int64_t& out) {
  const bool too_large = value.is_number_unsigned() &&
                         value.get<std::uint64_t>() > static_cast<std::uint64_t>(INT64_MAX);
  if (!value.is_number_integer() || too_large) fail_type(key, "an integer", value);
  out = value.get<std::int64_t>();
}

Json parse(std::string_view json) {
  Json object;
  try {
    object = Json::parse(json);
  } catch (const Json::exception& error) {
    fail(std::string("not valid JSON: ") + error.what());
  }
  if (!object.is_object()) fail("must be a JSON object");
  return object;
}

void check_format(const Json& object) {
  if (object.contains("format") && object["format"] != kFormat) {
    fail("format must be \"fastweights\", got " + object["format"].dump());
  }
  if (!object.contains("version")) return;
  std::int64_t version = 0;
  read_value("version", object["version"], version);
  if (version != kVersion) {
    fail("version must be " + std::to_string(kVersion) + ", got " + std::to_string(version));
  }
}

}  // namespace

void LanguageModelConfig::validate() const {
  check_range("vocabulary_size", vocabulary_size, 1, kMaxSize);
  check_range("width", width, 1, kMaxSize);
  check_range("layers", layers, 1, 1024);
  check_range("feed_forward_width", feed_forward_width, 1, kMaxSize);
  check_range("norm_epsilon", norm_epsilon, 0.0, 1.0);
  check_range("initializer_range", initializer_range, 0.0, 10.0);
  check_range("dropout", dropout, 0.0, 0.99);
  if (!attention && !memory) fail("attention or memory must be true");
  if (attention) check_attention(*this);
  if (memory) check_memory(*this);
  if (fast_head) check_fast_head(*this);
}

LanguageModelConfig LanguageModelConfig::from_json(std::string_view json) {
  return LanguageModelConfig{}.with(json);
}

LanguageModelConfig LanguageModelConfig::with(std::string_view json) const {
  const Json object = parse(json);
  check_format(object);
  for (const auto& item : object.items()) check_known(item.key());
  LanguageModelConfig config = *this;
  for_each_key(config, [&](const char* name, auto& member) {
    if (object.contains(name)) read_value(name, object[name], member);
  });
  config.validate();
  return config;
}

double LanguageModelConfig::fast_head_decay() const {
  return fast_head_half_life == 0.0 ? 0.0 : -std::log(2.0) / fast_head_half_life;
}

std::string LanguageModelConfig::to_json() const {
  Json object{{"format", kFormat}, {"version", kVersion}};
  for_each_key(*this, [&](const char* name, const auto& member) { object[name] = member; });
  return object.dump(2) + "\n";
}

}  // namespace fastweights::nn
