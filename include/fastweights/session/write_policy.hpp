/// \file
/// How a session decides how strongly each token is learned (docs/write_policies.md). No LibTorch.
#pragma once

#include <optional>

namespace fastweights {

/// A strength by surprise: what the model, without an exact store, gave the token for a cost.
/// Up to `low` bits a token is learned with `least`, from `high` bits on with `most`, between them
/// in proportion.
struct SurpriseGate {
  double low = 0.0;
  double high = 4.0;
  float least = 0.0F;
  float most = 1.0F;

  bool operator==(const SurpriseGate&) const = default;
};

/// What is done to a session's writes beyond what the model was trained to do; by default nothing.
/// The parts work together. A policy is fixed for the life of a session and is applied on top of
/// the strengths of its log, so that edits stay exact: the session is a function of model, options
/// and log.
struct WritePolicy {
  /// Times the strength of every token, see `Session::feedback`; 0: a frozen session, whose text
  /// passes the attention window and leaves no write.
  float strength = 1.0F;
  /// A further factor, by surprise. A read then runs the model twice over each piece: what a token
  /// costs is measured with all tokens before it learned as they would be without the gate.
  std::optional<SurpriseGate> surprise = {};
  /// Largest Frobenius norm of each head's matrix in the blocks; 0: no limit. A matrix that is
  /// larger after a piece, or after a written token, is scaled down to it, and the report counts
  /// it.
  double memory_norm_cap = 0.0;
  /// The same of the matrix at the head.
  double head_norm_cap = 0.0;
  /// Recursive least squares in the blocks: above 0, each head's matrix is, after every token, the
  /// exact ridge solution over all that was learned, S = argmin Σ βᵢ ‖vᵢ − Sᵀ k̂ᵢ‖² + ridge · ‖S −
  /// S₀‖² with the matrix S₀ that the session began with. Nothing decays: a decay would shrink the
  /// solution. It runs in fp64 and module by module; 0: the model's own rule.
  double ridge = 0.0;

  bool operator==(const WritePolicy&) const = default;

  /// Whether strengths are other than the log's.
  bool changes_strengths() const { return strength != 1.0F || surprise.has_value(); }
  bool caps_norms() const { return memory_norm_cap > 0 || head_norm_cap > 0; }
};

/// Learns from every token as the model was trained to.
inline constexpr WritePolicy kAsTrained = {};
/// Reads and writes, and learns nothing.
inline constexpr WritePolicy kFrozen = {.strength = 0.0F};

/// Throws Error if a value is out of range: strengths in [0, 2], 0 ≤ low < high, caps and ridge ≥
/// 0, all finite; or if there are both a ridge and a memory_norm_cap.
void check_write_policy(const WritePolicy& policy);

/// The strength of a token that the log gives `strength` and that cost `bits`: at most 2. The bits
/// count only where the policy has a gate for surprise.
float strength_under(const WritePolicy& policy, float strength, double bits);

}  // namespace fastweights
