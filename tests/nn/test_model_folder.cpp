#include <torch/torch.h>

#include <catch2/catch_test_macros.hpp>
#include <catch2/matchers/catch_matchers.hpp>
#include <catch2/matchers/catch_matchers_exception.hpp>
#include <catch2/matchers/catch_matchers_string.hpp>
#include <filesystem>
#include <fstream>
#include <string>

#include "fastweights/core/error.hpp"
#include "fastweights/nn/model_folder.hpp"
#include "fastweights/nn/tensor_file.hpp"
#include "file_fixture.hpp"
#include "numerics.hpp"
#include "small_model.hpp"

namespace fastweights::nn {
namespace {

namespace fs = std::filesystem;
using Catch::Matchers::ContainsSubstring;
using Catch::Matchers::MessageMatches;
using test::random_tokens;
using test::small_model;

at::Tensor logits_of(const LanguageModelImpl& model, const at::Tensor& tokens) {
  const at::NoGradGuard no_grad;
  return model.forward(tokens, model.initial_state(tokens.size(0))).logits;
}

TEST_CASE("a saved model loads, bit for bit") {
  const test::TemporaryFolder folder;
  auto model = small_model();
  save_model(folder.path() / "new" / "model", *model);
  const auto loaded = load_model(folder.path() / "new" / "model");
  CHECK(loaded->config() == model->config());
  CHECK_FALSE(loaded->is_training());
  const auto tokens = random_tokens(2, 40);
  CHECK(logits_of(*loaded, tokens).equal(logits_of(*model, tokens)));
  for (const auto& parameter : loaded->parameters()) CHECK_FALSE(parameter.requires_grad());
}

TEST_CASE("a model stored in bf16 is widened, and can be loaded in other types") {
  const test::TemporaryFolder folder;
  auto model = small_model();
  save_model(folder.path(), *model, at::kBFloat16);
  for (const auto& [name, tensor] : load_tensors(folder.path() / "model.safetensors")) {
    CHECK(tensor.scalar_type() == at::kBFloat16);
  }
  const auto tokens = random_tokens(2, 40);
  const auto wide = load_model(folder.path());
  CHECK(wide->embedding->weight.scalar_type() == at::kFloat);
  CHECK(test::error_ratio(logits_of(*wide, tokens), logits_of(*model, tokens)) < 5e-2);
  const auto narrow = load_model(folder.path(), at::kBFloat16);
  const auto logits = logits_of(*narrow, tokens);
  CHECK(logits.scalar_type() == at::kFloat);
  CHECK(test::error_ratio(logits, logits_of(*wide, tokens)) < 1e-1);
  CHECK(load_model(folder.path(), at::kDouble)
            ->initial_state(1)
            .blocks[0]
            .memory.state.scalar_type() == at::kDouble);
}

TEST_CASE("load_weights reads into a model that is being trained") {
  const test::TemporaryFolder folder;
  auto model = small_model();
  save_model(folder.path(), *model);
  torch::manual_seed(99);
  LanguageModel other(model->config());
  load_weights(folder.path(), *other);
  CHECK(other->is_training());
  CHECK(other->embedding->weight.requires_grad());
  CHECK(other->embedding->weight.equal(model->embedding->weight));
  auto config = model->config();
  config.memory_dropout = config.dropout = 0.5;
  config.initializer_range = 0.01;
  config.half_life_max = 100.0;
  config.fast_head = !config.fast_head;
  LanguageModel dropping(config);
  load_weights(folder.path(), *dropping);
  CHECK(dropping->embedding->weight.equal(model->embedding->weight));
  config.rope_base = 500.0;
  LanguageModel another(config);
  CHECK_THROWS_MATCHES(load_weights(folder.path(), *another), StateMismatch,
                       MessageMatches(ContainsSubstring("is not the configuration")));
}

TEST_CASE("weights that do not fit are named") {
  const test::TemporaryFolder folder;
  auto model = small_model();
  save_model(folder.path(), *model);
  const auto file = folder.path() / "model.safetensors";
  const auto good = load_tensors(file);
  const auto refuses = [&](const NamedTensors& tensors, const char* text) {
    save_tensors(file, tensors);
    CHECK_THROWS_MATCHES(load_model(folder.path()), StateMismatch,
                         MessageMatches(ContainsSubstring(text)));
  };
  const auto without = [&](const std::string& gone) {
    NamedTensors tensors;
    for (const auto& item : good) {
      if (item.first != gone) tensors.push_back(item);
    }
    return tensors;
  };
  refuses(without("norm.weight"), "norm.weight is missing");
  auto more = good;
  more.emplace_back("output.weight", at::zeros({1}));
  refuses(more, "output.weight is not known");
  auto reshaped = without("norm.weight");
  reshaped.emplace_back("norm.weight", at::zeros({31}));
  refuses(reshaped, "norm.weight must be [32], got [31]");
  auto integers = without("norm.weight");
  integers.emplace_back("norm.weight", at::zeros({32}, at::kLong));
  refuses(integers, "norm.weight must be of a floating-point type");
  refuses({}, "and 42 more");
}

TEST_CASE("missing, malformed and foreign files are errors that say which") {
  const test::TemporaryFolder folder;
  const auto refuses = [&](const char* text) {
    CHECK_THROWS_MATCHES(load_model(folder.path()), Error, MessageMatches(ContainsSubstring(text)));
  };
  refuses("config.json");
  auto model = small_model();
  save_model(folder.path(), *model);
  fs::resize_file(folder.path() / "model.safetensors", 1000);
  refuses("model.safetensors");
  fs::remove(folder.path() / "model.safetensors");
  CHECK_THROWS_AS(load_model(folder.path()), FileError);
  std::ofstream(folder.path() / "config.json") << "{\"with\": 1}";
  refuses("config.json: config: unknown key \"with\"; the nearest known key is \"width\"");
}

TEST_CASE("tensor files hold every type, empty tensors and strided ones") {
  const test::TemporaryFolder folder;
  const auto path = folder.path() / "tensors.safetensors";
  NamedTensors tensors;
  for (const auto type : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt,
                          at::kShort, at::kChar, at::kByte, at::kBool}) {
    tensors.emplace_back(at::toString(type), at::randint(0, 2, {3, 5}).to(type).t());
  }
  tensors.emplace_back("empty", at::zeros({0, 3}));
  tensors.emplace_back("scalar", at::tensor(3.5));
  save_tensors(path, tensors, {{"made", "here"}});
  const auto loaded = load_tensors(path);
  REQUIRE(loaded.size() == tensors.size());
  for (const auto& [name, tensor] : tensors) {
    CAPTURE(name);
    const auto found = std::find_if(loaded.begin(), loaded.end(),
                                    [&](const auto& item) { return item.first == name; });
    REQUIRE(found != loaded.end());
    CHECK(found->second.equal(tensor));
    CHECK(found->second.scalar_type() == tensor.scalar_type());
  }
  CHECK_THROWS_MATCHES(save_tensors(path, {{"z", at::zeros({2}, at::kComplexFloat)}}), Error,
                       MessageMatches(ContainsSubstring("\"z\" has type ComplexFloat")));
}

}  // namespace
}  // namespace fastweights::nn
