/// \file
/// Any bytes are either refused with a FileError or are a state file that is the same after it was
/// written and read again. The input is tried as it is, and as the content of an envelope whose
/// checksum is right: a fuzzer does not guess checksums, but a forger computes them.
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "fastweights/core/error.hpp"
#include "fastweights/session/state_file.hpp"
#include "fuzz_target.hpp"

namespace fastweights::fuzz {
namespace {

using Bytes = std::span<const std::byte>;

std::optional<StateFile> parse(Bytes file) {
  try {
    return parse_state_file(file);
  } catch (const FileError&) {
    return {};
  }
}

void check(Bytes file) {
  const std::optional<StateFile> state = parse(file);
  if (!state) return;
  const std::vector<std::byte> written = serialize_state_file(*state);
  const StateFile again = parse_state_file(written);
  require(again.model == state->model, "the fingerprint survives writing");
  require(again.piece == state->piece && again.journal_bytes == state->journal_bytes,
          "options survive writing");
  require(again.limited_writes == state->limited_writes &&
              again.base_limited_writes == state->base_limited_writes,
          "counts survive writing");
  require(again.policy == state->policy && again.end_to_end == state->end_to_end,
          "policy and learning end to end survive writing");
  require(again.marks == state->marks, "marks survive writing");
  require(again.checkpoints == state->checkpoints, "checkpoints survive writing");
  require(again.log == state->log, "the log survives writing");
  require(serialize_state_file(again) == written, "what is written is a function of the content");
}

}  // namespace
}  // namespace fastweights::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  namespace fw = fastweights;
  const auto input = std::as_bytes(std::span(data, size));
  fw::fuzz::check(input);
  fw::fuzz::check(fw::detail::seal_state_file(input));
  fw::fuzz::check(fw::detail::seal_state_file(fw::fuzz::with_header_length(input)));
  fw::fuzz::check(fw::detail::seal_state_file(input, 1));
  return 0;
}
