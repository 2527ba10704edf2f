#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace fastweights::nn {

/// Everything that decides the shapes and the arithmetic of a LanguageModel. `config.json` holds
/// exactly these keys, and "format": "fastweights", "version": 1.
struct LanguageModelConfig {
  std::int64_t vocabulary_size = 256;
  std::int64_t width = 256;
  std::int64_t layers = 4;
  std::int64_t feed_forward_width = 704;

  bool attention = true;
  std::int64_t attention_heads = 4;     ///< each of width / attention_heads dimensions
  std::int64_t attention_window = 128;  ///< tokens that a token sees, itself included
  std::int64_t attention_sinks = 1;     ///< learned keys and values that every token sees
  double rope_base = 10000.0;

  bool memory = true;
  std::string memory_rule = "gated_delta_rule";  ///< or "delta_rule"
  std::int64_t memory_heads = 4;                 ///< H
  std::int64_t memory_value_heads = 4;           ///< HV, a multiple of H
  std::int64_t memory_key_size = 64;             ///< K, 1 to 256
  std::int64_t memory_value_size = 64;           ///< V, 1 to 256
  std::int64_t convolution_size = 4;             ///< W, taps of the short convolution
  double beta_max = 1.0;               ///< largest write strength, up to 2 (negative eigenvalues)
  double half_life_min = 4.0;          ///< of the decay gates when training starts, in tokens; see
  double half_life_max = 8192.0;       ///< FastWeightMemory
  double memory_dropout = 0.0;         ///< probability that a row trains without its memories
  bool memory_initial_matrix = false;  ///< memories start from learned matrices, not from zero

  bool fast_head = false;                 ///< a memory at the head, see ops/fast_head.hpp
  double fast_head_eta = 0.3;             ///< its write strength, up to 2
  double fast_head_half_life = 0.0;       ///< in tokens; 0: nothing is forgotten
  bool fast_head_initial_matrix = false;  ///< it starts from a learned matrix, not from zero

  bool tie_embeddings = true;  ///< the output layer is the embedding's transpose
  double dropout = 0.0;        ///< share of embeddings and branches' outputs missing in training
  double norm_epsilon = 1e-6;
  double initializer_range = 0.02;  ///< standard deviation of the weights when training starts

  /// @throws Error naming the key, what it must be and what it is.
  void validate() const;

  /// Reads and validates a JSON object; keys left out keep their defaults.
  /// @throws Error on malformed JSON, an unknown key (naming the nearest known one), a value of a
  ///         wrong type, another format or a newer version, or a value that `validate` refuses
  static LanguageModelConfig from_json(std::string_view json);
  std::string to_json() const;
  /// This configuration with the keys of a JSON object in the place of its own.
  /// @throws Error as `from_json`
  LanguageModelConfig with(std::string_view json) const;
  /// Log-decay of a token at the head.
  double fast_head_decay() const;

  bool operator==(const LanguageModelConfig&) const = default;
};

}  // namespace fastweights::nn
