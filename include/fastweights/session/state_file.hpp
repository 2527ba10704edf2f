/// \file
/// The file that a session is saved in (`.fwstate`): a safetensors file in a sealed envelope.
///
///     0    8  magic: 89 'F' 'W' 'S' 0D 0A 1A 0A
///     8    4  version of the format, little-endian
///     12   4  zero
///     16   8  length of the whole file, little-endian
///     24      the content, a safetensors file
///     -16     XXH3-128 of every byte before it, in canonical (big-endian) form
///
/// The content's metadata are `model` (its fingerprint) and, in decimal, `vocabulary_size`,
/// `piece`, `journal_bytes`, `limited_writes`, `seed`, and what was committed: `base_read`,
/// `base_written`, `base_draws` (of the generator whose seed is `seed`), `base_limited_writes`. Its
/// tensors:
///
///     layers.N.…, position, logits   the session's
///     base.…                         the same where its log begins, if something was committed
///     checkpoints.I.…                the same at checkpoint I, but not if that is the present
///     …policy.capped_norms           I64 [1] beside each of these, of a write policy with caps
///     session.policy                 of a policy that is not the default: I64 [2 or 3, 4], the
///                                    bits of fp64. strength, memory_norm_cap, head_norm_cap, has
///                                    a surprise gate; its low, high, least, most; the ridge and
///                                    zeros, where there is one
///     …end_to_end.…                  beside each of these, of a session that learns end to end
///     protection.projectors.N, .least_free   of a session with protected keys; and
///     …protection.refused_writes     I64 [1] beside each of the first three
///     session.end_to_end             I64 [1, 3], the bits of fp64: learning rate, every, clip
///     …store.place, .matches, .mixture, .hidden, .logits   beside each of these, of an exact store
///     content.store.…                what the store holds, and what it dropped since a checkpoint
///     base.content.store.…           what it held where the log begins
///     log.tokens                     U8 [tokens, bytes per token]
///     log.calls                      I64 [calls, 4]: kind, tokens, has a seed, the seed's bits
///     log.strengths                  I64 [spans, 3]: begin, end, the bits of the strength (fp32)
///     log.marks                      I64 [marks, 3]: the number's bits, position, status
///     log.checkpoints                I64 [checkpoints, 2]: position, limited writes
///
/// Version 1 has no strengths, marks and checkpoints, and nothing is committed; it is still read.
///
/// The envelope keeps its meaning in every version, so that damage can be told from a version that
/// is too new. The checksum detects damage, not forgery: whatever it says, sizes are checked
/// against the file's length before anything is allocated. No LibTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "fastweights/io/safetensors.hpp"
#include "fastweights/session/end_to_end.hpp"
#include "fastweights/session/log.hpp"
#include "fastweights/session/mark.hpp"
#include "fastweights/session/write_policy.hpp"

namespace fastweights {

/// The newest format version, the one that is written.
inline constexpr std::uint32_t kStateFileVersion = 2;

/// A checkpoint in a state file.
struct StoredCheckpoint {
  std::int64_t position = 0;
  std::int64_t limited_writes = 0;

  bool operator==(const StoredCheckpoint&) const = default;
};

/// The content of a state file.
struct StateFile {
  std::string model;                     ///< fingerprint of its model: 32 hexadecimal digits
  std::int64_t piece = 0;                ///< tokens that a read processes at once
  std::int64_t journal_bytes = 0;        ///< budget of the checkpoints
  std::int64_t limited_writes = 0;       ///< see SessionReport
  std::int64_t base_limited_writes = 0;  ///< the same where the log begins
  WritePolicy policy = {};
  std::optional<EndToEndOptions> end_to_end = {};
  SessionLog log;
  std::vector<MarkEntry> marks;
  std::vector<StoredCheckpoint> checkpoints;  ///< in order, at boundaries of the log's steps
  std::vector<io::TensorData> tensors;        ///< views of bytes that somebody else keeps
};

/// The file as bytes. Throws Error if a tensor's name is there twice or is one of the log's, and
/// ShapeError if its bytes do not fit its shape.
std::vector<std::byte> serialize_state_file(const StateFile& file);

/// Parses a whole file. The tensors of the result refer to `bytes`. Throws FileError saying what is
/// wrong: empty, no state file, cut short, altered, of a newer version, or malformed.
StateFile parse_state_file(std::span<const std::byte> bytes);

/// Writes the file beside `path`, syncs it and renames it over `path`, readable by its owner only
/// (mode 0600). Throws FileError; then whatever stood at `path` is still there, untouched.
void write_state_file(const std::filesystem::path& path, const StateFile& file);

namespace detail {

/// An envelope around any content: for `serialize_state_file`, and for tests and fuzzing, which
/// reach the parts behind the checksum with it.
std::vector<std::byte> seal_state_file(std::span<const std::byte> content,
                                       std::uint32_t version = kStateFileVersion);

}  // namespace detail
}  // namespace fastweights
