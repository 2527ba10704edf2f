#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/config.hpp"

namespace fastweights::nn {
namespace {

using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;

TEST_CASE("a configuration survives JSON") {
  LanguageModelConfig config;
  config.width = 96;
  config.memory_rule = "delta_rule";
  config.beta_max = 2.0;
  config.norm_epsilon = 1e-5;
  config.half_life_max = 0.1 + 8192;
  config.tie_embeddings = false;
  CHECK(LanguageModelConfig::from_json(config.to_json()) == config);
  CHECK(LanguageModelConfig::from_json("{}") == LanguageModelConfig{});
  CHECK_THAT(config.to_json(), ContainsSubstring("\"format\": \"fastweights\""));
  CHECK_THAT(config.to_json(), ContainsSubstring("\"version\": 1"));
}

TEST_CASE("JSON that is no configuration is refused, by name") {
  struct Bad {
    const char* json;
    const char* message;
  };
  const auto bad =
      GENERATE(Bad{"", "not valid JSON"}, Bad{"{\"width\": 256", "not valid JSON"},
               Bad{"[1]", "must be a JSON object"},
               Bad{"{\"windth\": 1}", "unknown key \"windth\"; the nearest known key is \"width\""},
               Bad{"{\"memory_heads_\": 1}", "the nearest known key is \"memory_heads\""},
               Bad{"{\"width\": \"256\"}", "width must be an integer, got \"256\""},
               Bad{"{\"width\": 256.5}", "width must be an integer, got 256.5"},
               Bad{"{\"width\": 18446744073709551615}", "width must be an integer"},
               Bad{"{\"memory\": 1}", "memory must be true or false, got 1"},
               Bad{"{\"memory_rule\": null}", "memory_rule must be a string, got null"},
               Bad{"{\"beta_max\": true}", "beta_max must be a number, got true"},
               Bad{"{\"format\": \"gguf\"}", "format must be \"fastweights\", got \"gguf\""},
               Bad{"{\"version\": 2}", "version must be 1, got 2"});
  CAPTURE(bad.json);
  CHECK_THROWS_MATCHES(LanguageModelConfig::from_json(bad.json), Error,
                       MessageMatches(ContainsSubstring(bad.message)));
}

TEST_CASE("values out of range are refused, by name") {
  struct Bad {
    std::function<void(LanguageModelConfig&)> change;
    const char* message;
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<Bad> cases{
      {[](auto& c) { c.vocabulary_size = 0; }, "vocabulary_size must be from 1 to"},
      {[](auto& c) { c.width = -1; }, "width must be from 1 to 16777216, got -1"},
      {[](auto& c) { c.layers = 0; }, "layers must be from 1 to 1024, got 0"},
      {[](auto& c) { c.attention_heads = 3; }, "attention_heads must divide width = 256, got 3"},
      {[](auto& c) { c.attention_heads = 0; }, "attention_heads must be from 1"},
      {[](auto& c) { c.attention_heads = 128; }, "width / attention_heads must be a multiple of 4"},
      {[](auto& c) { c.attention_window = 0; }, "attention_window must be from 1"},
      {[](auto& c) { c.attention_sinks = -1; }, "attention_sinks must be from 0"},
      {[&](auto& c) { c.rope_base = nan; }, "rope_base must be from 1"},
      {[](auto& c) { c.memory_rule = "hebb"; }, "got \"hebb\""},
      {[](auto& c) { c.memory_heads = 3; }, "memory_heads must divide memory_value_heads = 4"},
      {[](auto& c) { c.memory_key_size = 257; }, "memory_key_size must be from 1 to 256, got 257"},
      {[](auto& c) { c.memory_value_size = 0; }, "memory_value_size must be from 1 to 256, got 0"},
      {[](auto& c) { c.convolution_size = 0; }, "convolution_size must be from 1"},
      {[](auto& c) { c.beta_max = 2.5; }, "beta_max must be from"},
      {[](auto& c) { c.half_life_max = 1.0; }, "half_life_max must be from 4.0"},
      {[](auto& c) { c.half_life_min = HUGE_VAL; }, "half_life_min must be from"},
      {[](auto& c) { c.memory_dropout = 1.5; }, "memory_dropout must be from 0.0 to 1.0, got 1.5"},
      {[](auto& c) { c.dropout = 1.0; }, "dropout must be from 0.0 to 0.99, got 1.0"},
      {[&](auto& c) { c.norm_epsilon = nan; }, "norm_epsilon must be from"},
      {[](auto& c) { c.attention = c.memory = false; }, "attention or memory must be true"}};
  for (const auto& bad : cases) {
    CAPTURE(bad.message);
    LanguageModelConfig config;
    bad.change(config);
    CHECK_THROWS_MATCHES(config.validate(), Error, MessageMatches(ContainsSubstring(bad.message)));
  }
  CHECK_NOTHROW(LanguageModelConfig{}.validate());
}

TEST_CASE("the sizes of a branch that is off do not matter") {
  LanguageModelConfig config;
  config.attention = false;
  config.attention_heads = 3;
  CHECK_NOTHROW(config.validate());
}

}  // namespace
}  // namespace fastweights::nn
