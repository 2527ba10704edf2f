#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "fastweights/core/array.hpp"
#include "fastweights/core/executor.hpp"

// Tokens of some sessions through a whole language model, for decoding: the weights are streamed
// from memory once for all of them, and between the weights everything stays in cache. Compiled for
// several instruction sets. The arithmetic is fp32. Results depend neither on the executor nor on
// what else is in the call: not by a bit.

namespace fastweights::cpu {

using core::Array;
using core::ConstArray;
using core::Executor;

/// A row-major [rows, columns] matrix of the model's type.
struct Weights {
  const void* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

/// Sizes and constants that all layers share; as in `nn::LanguageModelConfig`.
struct DecodingSizes {
  std::int64_t width = 0;
  std::int64_t feed_forward_width = 0;
  std::int64_t attention_heads = 0;
  std::int64_t attention_window = 0;
  std::int64_t attention_sinks = 0;
  double rope_base = 10000.0;
  std::int64_t memory_heads = 0;
  std::int64_t memory_value_heads = 0;
  std::int64_t memory_key_size = 0;
  std::int64_t memory_value_size = 0;
  std::int64_t convolution_size = 1;
  double beta_max = 1.0;
  double norm_epsilon = 1e-6;

  std::int64_t keys() const { return memory_heads * memory_key_size; }
  std::int64_t values() const { return memory_value_heads * memory_value_size; }
};

/// What windowed attention reads; the vectors are fp32.
struct DecodingAttention {
  Weights query, key, value, output;
  const float* sink_key = nullptr;    // [heads, sinks, size / 2]
  const float* sink_value = nullptr;  // [heads, sinks, size]
  const float* mix = nullptr;         // [width]
};

/// What a fast-weight memory reads; without a decay where the rule has none.
struct DecodingMemory {
  Weights query, key, value, beta, decay, gate, output;
  const float* convolution = nullptr;  // [taps, 2·H·K + HV·V]
  const float* a_log = nullptr;        // [HV]
  const float* dt_bias = nullptr;      // [HV]
  const float* norm = nullptr;         // [V]
  const float* mix = nullptr;          // [width]
};

/// One block. A branch that is left out has no output matrix.
struct DecodingLayer {
  const float* mixer_norm = nullptr;         // [width]
  const float* feed_forward_norm = nullptr;  // [width]
  DecodingAttention attention;
  DecodingMemory memory;
  Weights gate, up, down;
};

/// A model: matrices are of type `dtype`, fp32 or bf16.
struct DecodingModel {
  core::DType dtype = core::DType::kFloat32;
  DecodingSizes sizes;
  std::vector<DecodingLayer> layers;
  Weights embedding;            // [vocabulary, width]
  const float* norm = nullptr;  // [width]
  Weights output;               // [vocabulary, width]
  bool fast_head = false;       // a memory at the head: softmax_delta_rule
  double head_eta = 0.0;        // its write strength
  double head_decay = 0.0;      // its log-decay
};

/// The state of one layer, of the model's type but for `memory`; read and written.
struct DecodingState {
  float* memory = nullptr;      // [HV, K, V]
  void* convolution = nullptr;  // [taps − 1, 2·H·K + HV·V]
  void* key = nullptr;          // [window, heads, size], rotated
  void* value = nullptr;        // [window, heads, size]
};

/// The state of the memory at the head, see `nn::HeadState`; read and written.
struct DecodingHeadState {
  float* state = nullptr;   // [width, vocabulary]
  void* hidden = nullptr;   // [width], of the model's type
  float* logits = nullptr;  // [vocabulary]
};

/// A token that a session reads.
struct DecodingToken {
  std::int64_t token = 0;
  std::int64_t position = 0;  ///< tokens before it in its sequence
  /// r in [0, 2]: every β is multiplied by r and limited to 2, every log-decay by min(r, 1), η and
  /// log-decay at the head alike; with 0 a memory is neither written nor decays.
  float strength = 1.0F;
  const DecodingState* states = nullptr;  ///< one for each layer
  DecodingHeadState head = {};            ///< null where the model has none
  /// Null, or gets the final hidden state, normed, that the logits are made of [width].
  float* hidden = nullptr;
  /// Null, or gets what keep_tokens() needs of the token: decoding_trace() elements.
  float* trace = nullptr;
  /// Null, or what the session adds to the gate and the up projection of the last layer [2 ·
  /// feed_forward_width, width], gate first.
  const float* feed_forward_delta = nullptr;
  /// Null, or gets the residual stream before the feed-forward of the last layer [width].
  float* mixed = nullptr;
};

/// fp32 elements of scratch memory that so many tokens need.
std::int64_t decoding_scratch(const DecodingModel& model, std::int64_t tokens = 1);

/// fp32 elements of a token's trace.
std::int64_t decoding_trace(const DecodingModel& model);

/// Reads tokens of some sessions and writes the logits of what comes after each. A session gets the
/// bits that it gets alone and token by token, whatever else there is. Sizes are not checked.
/// @param tokens  fewer than 2^20 over all heads. Neighbours whose `states` are the same array are
///                successive tokens of one session; the states of different sessions are not each
///                other's.
/// @param scratch 64-byte aligned, overwritten
/// @param logits  fp32 [tokens, vocabulary]
void decode_tokens(const DecodingModel& model, std::span<const DecodingToken> tokens,
                   float* scratch, float* logits, const Executor& executor);

/// Does to the states of a session what reading some tokens has done to a copy of them, without the
/// model: writes, keys and inputs come from the traces. So the first of several tokens that were
/// read on a copy can be kept without the others, as after speculative decoding.
/// @param tokens successive ones of one session, with its states as they were before the first, and
///               the traces that decode_tokens() has left
void keep_tokens(const DecodingModel& model, std::span<const DecodingToken> tokens,
                 const Executor& executor);

/// One token of one session. DecodingToken tells what its parts are.
/// @param states one for each layer
/// @param logits fp32 [vocabulary]
void decode_token(const DecodingModel& model, std::int64_t token, std::int64_t position,
                  float strength, const std::vector<DecodingState>& states, float* scratch,
                  float* logits, const Executor& executor, const DecodingHeadState& head = {},
                  float* hidden = nullptr);

}  // namespace fastweights::cpu
