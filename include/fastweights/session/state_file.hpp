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
/// The content's metadata are `model` (its fingerprint), `vocabulary_size`, `piece` and `seed`, in
/// decimal; its tensors are those of the session, and the log's two: `log.tokens`, U8 [tokens,
/// bytes per token], and `log.calls`, I64 [calls, 4]: kind, tokens, has a seed, the seed's bits.
///
/// The envelope keeps its meaning in every version, so that damage can be told from a version that
/// is too new. The checksum detects damage, not forgery: whatever it says, sizes are checked
/// against the file's length before anything is allocated. No LibTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "fastweights/io/safetensors.hpp"
#include "fastweights/session/log.hpp"

namespace fastweights {

/// The newest format version, the one that is written.
inline constexpr std::uint32_t kStateFileVersion = 1;

/// The content of a state file.
struct StateFile {
  std::string model;       ///< fingerprint of the model it belongs to: 32 hexadecimal digits
  std::int64_t piece = 0;  ///< tokens that a read processes at once
  std::uint64_t seed = 0;  ///< the seed of the session's first generator
  SessionLog log;
  std::vector<io::TensorData> tensors;  ///< views of bytes that somebody else keeps
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
