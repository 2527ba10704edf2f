/// \file
/// What a session learned becomes part of a model (docs/consolidation.md).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastweights/session/session.hpp"

namespace fastweights {

/// How a session is consolidated, and how that is tried.
struct ConsolidationOptions {
  /// Text of the kind that the session learned, which it has not read: a session that starts from
  /// the new model must find it cheaper. Empty: the last tenth of what the session read and wrote,
  /// 16 KiB at most, which the model that is tried has then not learned.
  std::string trial = {};
  /// Text of what the model knew before, if that is to be guarded.
  std::string guarded = {};
  /// Bits per byte that `guarded` may cost more.
  double tolerance = 0.01;
  bool memory = true;  ///< consolidate the matrices in the blocks
  bool head = true;    ///< and the one at the head, where the model has one
  /// And what the session learned end to end, as a change of this rank of the gate and the up
  /// projection of the last block's feed-forward; 0: of full rank.
  bool feed_forward = true;
  std::int64_t rank = 64;
};

/// One way of consolidating, and what it cost. Shares are those of what the session learned that
/// the new model starts from.
struct ConsolidationTrial {
  double memory_share = 0;
  double head_share = 0;
  /// How strongly what the head and the feed-forward read in `guarded` is left as it was; 0: not at
  /// all.
  double protection = 0;
  double trial_bits = 0;    ///< bits per byte of `trial`
  double guarded_bits = 0;  ///< bits per byte of `guarded`; 0 if there is none
  double feed_forward_share = 0;

  bool operator==(const ConsolidationTrial&) const = default;
};

/// A model that knows what a session learned, and the figures that speak for it.
struct Consolidation {
  std::shared_ptr<const nn::LanguageModelImpl> model;
  ConsolidationTrial before;  ///< the session's own model
  ConsolidationTrial chosen;
  std::vector<ConsolidationTrial> trials;  ///< all that were tried
};

/// A new model whose memories start from what the session learned. The session and its model stay
/// as they are; the new model shares the weights, which do not change (but for the two projections
/// of a session that learned end to end, of which it has its own), and contains what the session
/// read, as far as its matrices hold it.
///
/// The delta rule has solved already for the matrix that best maps the keys of the text to its
/// values; that matrix, or a share of it, is what memories then start from. At the head the change
/// ΔF is first kept away from what `guarded` is read with: with C the mean of ĥ ĥᵀ over `guarded`
/// and a protection p, ΔF' = (I + p·D·C)⁻¹ ΔF, the minimiser of ‖ΔF' − ΔF‖² + p·D·mean‖ΔF'ᵀĥ‖².
/// What was learned end to end, ΔW, is kept away in the same way from the inputs of its layer, then
/// cut to `rank` by its singular values.
/// Several shares and protections are tried; the best on `trial` that keeps within the tolerance on
/// `guarded` is taken.
///
/// Throws Error if there is no memory to consolidate or too little text for a trial, and, with the
/// figures, if nothing that was tried makes the trial text cheaper within the tolerance; Cancelled.
/// @param progress between trials, with those done and in all
Consolidation consolidate(const Session& session, const ConsolidationOptions& options = {},
                          const Progress& progress = {});

/// A session on another model, of equal vocabulary, that has read and written the same: its log is
/// replayed. Throws Error if the log's beginning was committed.
Session rebase(const Session& session, std::shared_ptr<const nn::LanguageModelImpl> model,
               const Progress& progress = {});

}  // namespace fastweights
